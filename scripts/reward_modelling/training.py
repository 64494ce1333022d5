"""Training a classifier with the Trainer of transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from scripts.reward_modelling.examples import Example, Text
from scripts.reward_modelling.losses import Objective
from scripts.reward_modelling.network import Scorer
from scripts.trainer_config import TrainerConfig, last_checkpoint, training_arguments
from textenv.rewards.batching import padded

FIT = TrainerConfig(
    epochs=2, learning_rate=5e-4, schedule="linear", warmup_frac=0.1, weight_decay=0.01, batch_examples=32, bf16=False
)
"""Settings that suit models of under a million parameters; one of billions wants a learning rate of 1e-5."""


class RewardTrainer(Trainer):
    """The mean of an objective over the examples of a step."""

    def __init__(
        self,
        objective: Objective,
        scorer: Scorer,
        arguments: TrainingArguments,
        items: Sequence[tuple[list[list[int]], float]],
        tell: Callable[[str], object],
    ) -> None:
        """Train the scorer on items as `collate` takes them."""
        super().__init__(
            scorer,
            arguments,
            data_collator=collate,
            train_dataset=items,  # type: ignore[arg-type]
            callbacks=[Lines(tell)],
        )
        self.remove_callback(PrinterCallback)
        self.objective = objective
        self.model_accepts_loss_kwargs = True  # a loss is divided by what its step has in all, see below

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int]:
        """The microbatches of a step, and how many examples they hold: the last step may have a shorter one."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(len(batch["targets"]) for batch in batches)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The microbatch's part of the step's mean loss, and the scores if they are asked for."""
        scores = model(inputs["input_ids"], inputs["lengths"])
        raw = self.objective.unit * scores + self.objective.centre
        losses = self.objective.loss(raw, inputs["targets"])
        loss = losses.sum() / (num_items_in_batch or len(losses))
        return (loss, {"scores": scores}) if return_outputs else loss


class Lines(TrainerCallback):
    """Tells the loss from time to time."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        """`tell` takes a line."""
        self.tell = tell

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called by the Trainer, which gives more than is needed."""
        if logs and "loss" in logs:
            self.tell(f"step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.4f}")


def collate(items: Sequence[tuple[list[list[int]], float]]) -> dict[str, Tensor]:
    """A batch: the texts of all examples, one after the other, and a target each."""
    rows = [ids for texts, _ in items for ids in texts]
    input_ids, lengths = padded(rows, torch.device("cpu"))
    targets = torch.tensor([target for _, target in items], dtype=torch.float32)
    return {"input_ids": input_ids, "lengths": lengths, "targets": targets}


def fit(
    scorer: Scorer,
    objective: Objective,
    examples: Sequence[Example],
    ids: Mapping[Text, list[int]],
    config: TrainerConfig,
    *,
    seed: int,
    folder: Path,
    tell: Callable[[str], object],
    resume: bool = False,
) -> dict[str, Any]:
    """Train in place, dropout off.

    Args:
        scorer: The network, on the device where it trains.
        objective: What to minimise.
        examples: All of whose texts have ids.
        ids: Token ids of each text.
        config: How.
        seed: Of the order of the examples.
        folder: Of the checkpoints, of which the newest is kept.
        tell: Takes a line now and then.
        resume: Whether to go on from the newest checkpoint, if there is one; the weights are then what an
            uninterrupted run would have.

    Returns:
        Seconds of this run, steps, and the losses `(step, mean since the last)`.
    """
    items = [([ids[text] for text in example.texts], example.target) for example in examples]
    steps = config.epochs * -(-len(items) // config.batch_examples)
    arguments = training_arguments(
        config, folder, scorer.classifier.device, seed=seed, log_every=max(1, int(steps) // 20), own={}
    )
    began = time.perf_counter()
    trainer = RewardTrainer(objective, scorer, arguments, items, tell)
    scorer.train()
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) if resume else None)
    scorer.eval()
    losses = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
    return {"seconds": time.perf_counter() - began, "steps": trainer.state.global_step, "losses": losses}
