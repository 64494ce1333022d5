"""Supervised fine-tuning by transformers' Trainer."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from agents.tracking import Tracker
from scripts.finetuning.batches import Collate, flattened, heldout_loss, isolates, padded
from scripts.finetuning.examples import Example
from scripts.splitting import split_groups
from textenv.dropout import disable_dropout


@dataclass(frozen=True)
class SFTConfig:
    """Settings of the training."""

    epochs: float = 1.0
    """Passes over the examples."""
    learning_rate: float = 1e-4
    """Of AdamW, at its highest."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """How the rate goes on after the warm-up."""
    warmup_frac: float = 0.03
    """Share of the steps over which the rate rises."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Longest gradient of a step."""
    batch_examples: int = 16
    """Examples of a step."""
    microbatch_examples: int | None = None
    """Examples of a forward, a divisor of `batch_examples`, which is meant if this is absent; changes memory only."""
    packing: bool = True
    """Whether the examples of a forward stand in one row without padding, where the model keeps them apart; changes
    speed only."""
    lora_rank: int = 0
    """Rank of LoRA adapters, merged into the weights at the end; 0 trains all weights."""
    gradient_checkpointing: bool = False
    """Less memory, a third more time."""
    bf16: bool | None = None
    """Forwards in bfloat16, weights and optimizer in float32; None: on CUDA."""
    eval_every: int = 0
    """Steps between evaluations; 0: after each epoch."""
    save_every: int = 0
    """Steps between checkpoints; 0: after each epoch."""
    log_every: int = 10
    """Steps between lines in `metrics.jsonl`."""
    seed: int = 0
    """Of the order of the examples, the held-out split and adapters."""

    def __post_init__(self) -> None:
        """Check each setting."""
        for name in ("epochs", "learning_rate", "max_grad_norm", "batch_examples", "log_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number > 0, got {getattr(self, name)}")
        for name in ("weight_decay", "lora_rank", "eval_every", "save_every", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        if not 0 <= self.warmup_frac < 1:
            raise ValueError(f"warmup_frac: expected a share in [0, 1), got {self.warmup_frac}")
        if self.microbatch_examples is not None and (
            self.microbatch_examples < 1 or self.batch_examples % self.microbatch_examples
        ):
            raise ValueError(
                f"microbatch_examples: expected a divisor of batch_examples, {self.batch_examples}, "
                f"got {self.microbatch_examples}"
            )

    @property
    def forward_examples(self) -> int:
        """Examples of a forward."""
        return self.microbatch_examples or self.batch_examples


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

    def __init__(self, *, heldout: Sequence[Example], collate: Collate, **options: Any) -> None:
        rows: Any = [example.features for example in heldout]
        super().__init__(data_collator=collate, eval_dataset=rows, **options)
        self.heldout, self.collate = heldout, collate

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The loss on the held-out examples and its exponential."""
        loss = heldout_loss(
            self.model,
            self.heldout,
            self.collate,
            batch_examples=self.args.per_device_eval_batch_size,
            autocast=self.compute_loss_context_manager,
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


def autocast(device: torch.device, bf16: bool | None) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the context of a forward outside of the Trainer."""
    enabled = device.type == "cuda" if bf16 is None else bf16
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
    arguments = _arguments(config, folder, next(model.parameters()).device, bool(heldout))
    trainer = HeldOutTrainer(
        model=model,
        args=arguments,
        train_dataset=[e.features for e in examples],
        heldout=heldout,
        collate=collate,
        callbacks=[Logged(tracker)],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(folder) if resume else None
    start = time.perf_counter()
    done = _steps(checkpoint)
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


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; what a killed run has left unfinished after it is removed.

    The Trainer writes `trainer_state.json` last.
    """
    while (found := get_last_checkpoint(str(folder)) if folder.is_dir() else None) is not None:
        if (Path(found) / "trainer_state.json").is_file():
            return found
        shutil.rmtree(found)
    return None


def _steps(checkpoint: str | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.rsplit("-", 1)[1])


def _with_adapters(model: Any, rank: int) -> Any:
    if rank == 0:
        return model
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def _arguments(config: SFTConfig, folder: Path, device: torch.device, evaluates: bool) -> TrainingArguments:
    bf16 = device.type == "cuda" if config.bf16 is None else config.bf16
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_frac,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        per_device_train_batch_size=config.forward_examples,
        per_device_eval_batch_size=config.forward_examples,
        gradient_accumulation_steps=config.batch_examples // config.forward_examples,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        bf16=bf16,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        eval_strategy="no" if not evaluates else "steps" if config.eval_every else "epoch",
        eval_steps=config.eval_every or None,
        save_strategy="steps" if config.save_every else "epoch",
        save_steps=config.save_every or 500,
        save_total_limit=1,
        logging_steps=config.log_every,
        report_to="none",  # the default is every service that is installed
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=config.seed,
    )
    # The Trainer would otherwise split rows over all GPUs of one process, and a packed batch is one row.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
