"""Supervised fine-tuning by transformers' Trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from agents.checks import at_least
from agents.tracking import Tracker
from scripts.finetuning.batches import Autocast, Collate, flattened, heldout_loss, isolates, padded
from scripts.finetuning.examples import Example
from scripts.splitting import split_groups
from scripts.trainer_config import TrainerConfig, last_checkpoint, step_of, training_arguments
from textenv.dropout import disable_dropout


@dataclass(frozen=True)
class SFTConfig(TrainerConfig):
    """Settings of the training."""

    packing: bool = True
    """Whether the examples of a forward stand in one row without padding, where the model keeps them apart; changes
    speed only."""
    lora_rank: int = 0
    """Rank of LoRA adapters, merged into the weights at the end; 0 trains all weights."""
    gradient_checkpointing: bool = False
    """Less memory, a third more time."""
    eval_every: int = 0
    """Steps between evaluations; 0: after each epoch."""
    log_every: int = 10
    """Steps between lines in `metrics.jsonl`."""
    seed: int = 0
    """Of the order of the examples, the held-out split and adapters."""

    def __post_init__(self) -> None:
        """Check each setting."""
        super().__post_init__()
        for name, low in (("log_every", 1), ("lora_rank", 0), ("eval_every", 0), ("seed", 0)):
            at_least(name, getattr(self, name), low)


@dataclass(frozen=True)
class Trained:
    """What a training came to."""

    model: Any
    """The model, adapters merged."""
    steps: int
    """Optimizer steps in all."""
    train_loss: float | None
    """Mean over the steps of this run; None if there were none."""
    tokens_per_s: float
    """Tokens of this run's examples by its seconds, evaluations included."""
    packed: bool
    """Whether examples were packed."""


class HeldOutTrainer(Trainer):
    """A Trainer whose evaluation counts each held-out token alike; the Trainer's own is a mean over batches."""

    def __init__(self, *, heldout: Sequence[Example], collate: Collate, autocast: Autocast, **options: Any) -> None:
        rows: Any = [example.features for example in heldout]
        super().__init__(data_collator=collate, eval_dataset=rows, **options)
        self.heldout, self.collate, self.autocast = heldout, collate, autocast

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The loss on the held-out examples and its exponential."""
        loss = heldout_loss(
            self.model,
            self.heldout,
            self.collate,
            batch_examples=self.args.per_device_eval_batch_size,
            autocast=self.autocast,  # the Trainer's own is in the model's forward, which is not called
        )
        metrics = {"eval_loss": loss, "eval_perplexity": perplexity(loss)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Logged(TrainerCallback):
    """What the Trainer logs goes to a tracker."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """One row, numbered by the optimizer step."""
        if state.is_world_process_zero:
            self.tracker.log(state.global_step, logs or {})


def perplexity(loss: float) -> float:
    """exp(loss); infinity where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def collator(model: Any, packing: bool) -> Collate:
    """How batches are made: packed if wanted and the model keeps examples apart."""
    return flattened if packing and isolates(model) else padded


def autocast(device: torch.device, config: SFTConfig) -> Autocast:
    """What makes the context of a forward outside of the Trainer."""
    enabled = config.in_bf16(device)
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16) if enabled else nullcontext()


def split(examples: Sequence[Example], frac: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Those to train on and those held out, at least one of each; 0 holds out none.

    Examples with one prompt stay on one side: a response to a prompt that was trained on is no unseen one.
    """
    if not 0 <= frac < 1:
        raise ValueError(f"heldout_frac: expected a share in [0, 1), got {frac}")
    if frac == 0:
        return list(examples), []
    # One token may be BOS alone, before a response to nothing.
    keys = [example.prompt if len(example.prompt) > 1 else number for number, example in enumerate(examples)]
    different = len(set(keys))
    if max(1, round(frac * different)) >= different:
        raise ValueError(f"heldout_frac: expected enough examples to hold out {frac}, got {different} prompts")
    return split_groups(examples, keys, frac, seed)


def finetune(
    model: Any,
    examples: Sequence[Example],
    heldout: Sequence[Example],
    config: SFTConfig,
    folder: Path,
    tracker: Tracker,
    *,
    resume: bool = False,
) -> Trained:
    """Train; checkpoints go to `folder`, of which the newest is kept.

    Args:
        model: A causal language model, on the device where it trains; its dropout is set to 0.
        examples: To train on.
        heldout: To evaluate on; may be empty.
        config: Settings.
        folder: Of the checkpoints.
        tracker: Told of losses and rates.
        resume: Whether to go on from the newest checkpoint, if there is one; the weights are then what an
            uninterrupted run would have.
    """
    torch.manual_seed(config.seed)
    use_cache = getattr(model.config, "use_cache", None)
    disable_dropout(model)
    model = _with_adapters(model, config.lora_rank)
    collate = collator(model, config.packing)
    device = next(model.parameters()).device
    arguments = _arguments(config, folder, device, bool(heldout))
    trainer = HeldOutTrainer(
        model=model,
        args=arguments,
        train_dataset=[e.features for e in examples],
        heldout=heldout,
        collate=collate,
        autocast=autocast(device, config),
        callbacks=[Logged(tracker)],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(folder) if resume else None
    start = time.perf_counter()
    done = 0 if checkpoint is None else step_of(checkpoint)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    seconds, steps = time.perf_counter() - start, trainer.state.global_step
    tokens = config.epochs * sum(len(e.input_ids) for e in examples) * (steps - done) / max(steps, 1)
    if config.lora_rank:
        model = model.merge_and_unload()
    if use_cache is not None:
        # The Trainer has switched it off, and a saved model would decode without a cache.
        model.config.use_cache = use_cache
    loss = result.training_loss if steps > done else None
    return Trained(model, steps, loss, tokens / seconds, collate is flattened)


def _with_adapters(model: Any, rank: int) -> Any:
    if rank == 0:
        return model
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def _arguments(config: SFTConfig, folder: Path, device: torch.device, evaluates: bool) -> TrainingArguments:
    own: dict[str, Any] = {
        "per_device_eval_batch_size": config.forward_examples,
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if config.gradient_checkpointing else None,
        "eval_strategy": "no" if not evaluates else "steps" if config.eval_every else "epoch",
        "eval_steps": config.eval_every or None,
    }
    return training_arguments(config, folder, device, seed=config.seed, log_every=config.log_every, own=own)
