"""Training a classifier with the Trainer of transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from scripts.reward_modelling.examples import Example, Text
from scripts.reward_modelling.losses import Objective
from scripts.reward_modelling.network import Scorer
from textenv.rewards.batching import padded


@dataclass(frozen=True)
class FitSettings:
    """How a classifier is trained: AdamW, linear warm-up and decay, dropout off."""

    epochs: int = 2
    """Passes over the examples."""
    batch: int = 32
    """Examples an optimizer step, on each device."""
    accumulate: int = 1
    """Backward passes that a step is split into."""
    learning_rate: float = 5e-4
    """Peak rate; it suits models of under a million parameters. 1e-5 suits one of billions."""
    warmup: float = 0.1
    """Share of the steps in which the rate rises."""
    weight_decay: float = 0.01
    """Of the matrices."""
    max_grad_norm: float = 1.0
    """Longest gradient."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products; weights and head stay float32."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: Naming the setting.
        """
        for name in ("epochs", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected a share in [0, 1), got {self.warmup}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected a number >= 0, got {self.weight_decay}")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate: expected a divisor of batch={self.batch}, got {self.accumulate}")


class RewardTrainer(Trainer):
    """The mean of an objective over the examples of a batch."""

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

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss, and the scores if they are asked for."""
        scores = model(inputs["input_ids"], inputs["lengths"])
        raw = self.objective.unit * scores + self.objective.centre
        loss = self.objective.loss(raw, inputs["targets"]).mean()
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
    settings: FitSettings,
    *,
    seed: int,
    device: str,
    folder: Path,
    tell: Callable[[str], object],
) -> dict[str, Any]:
    """Train in place.

    Args:
        scorer: The network.
        objective: What to minimise.
        examples: All of whose texts have ids.
        ids: Token ids of each text.
        settings: How.
        seed: Of the order of the examples.
        device: `cpu` or `cuda`.
        folder: For the Trainer, which wants one.
        tell: Takes a line now and then.

    Returns:
        Seconds, steps, and the losses `(step, mean since the last)`.
    """
    items = [([ids[text] for text in example.texts], example.target) for example in examples]
    steps = settings.epochs * -(-len(items) // settings.batch)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch // settings.accumulate,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bfloat16",
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device != "cpu",
        use_cpu=device == "cpu",
        seed=seed,
    )
    began = time.perf_counter()
    trainer = RewardTrainer(objective, scorer, arguments, items, tell)
    scorer.train()
    trainer.train()
    scorer.eval()
    losses = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
    return {"seconds": time.perf_counter() - began, "steps": trainer.state.global_step, "losses": losses}
