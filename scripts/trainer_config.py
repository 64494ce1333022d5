"""What both uses of transformers' Trainer share: settings, arguments and checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from agents.checks import at_least, number


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of a training with AdamW."""

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
    bf16: bool | None = None
    """Forwards in bfloat16, weights and optimizer in float32; None: on CUDA."""
    save_every: int = 0
    """Steps between checkpoints; 0: after each epoch."""

    def __post_init__(self) -> None:
        """Check each setting."""
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            number(name, getattr(self, name), above=0.0)
        number("weight_decay", self.weight_decay)
        at_least("batch_examples", self.batch_examples, 1)
        at_least("save_every", self.save_every, 0)
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

    def in_bf16(self, device: torch.device) -> bool:
        """Whether forwards on a device are in bfloat16."""
        return device.type == "cuda" if self.bf16 is None else self.bf16


def training_arguments(
    config: TrainerConfig, folder: Path, device: torch.device, *, seed: int, log_every: int, own: Mapping[str, Any]
) -> TrainingArguments:
    """Arguments of a Trainer that trains on one device, keeps its newest checkpoint and tells nobody of anything.

    Args:
        config: Settings.
        folder: Of the checkpoints.
        device: Where the model is.
        seed: Of the order of the examples.
        log_every: Steps between logs.
        own: Further arguments.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_frac,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        per_device_train_batch_size=config.forward_examples,
        gradient_accumulation_steps=config.batch_examples // config.forward_examples,
        bf16=config.in_bf16(device),
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        save_strategy="steps" if config.save_every else "epoch",
        save_steps=config.save_every or 500,
        save_total_limit=1,
        logging_steps=log_every,
        report_to="none",  # the default is every service that is installed
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=seed,
        **own,
    )
    # The Trainer would otherwise split the rows of a batch over all GPUs of one process: a packed batch is one row, and
    # the rows of a comparison belong together.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


_SETTINGS = "settings.json"
_FREE = ("out", "resume", "threads", "device", "trust_remote_code")
"""Flags of a script that are no settings of its run."""


def begin(folder: Path, flags: Any, *, resume: bool) -> None:
    """Make a folder of checkpoints ready: emptied, or, to resume, one of a run with these very settings.

    Args:
        folder: Of the checkpoints.
        flags: Of the script, a dataclass.
        resume: Whether to go on from what is there.

    Raises:
        ValueError: If what is there was begun with others.
    """
    settings = {name: value for name, value in asdict(flags).items() if name not in _FREE}
    told = json.loads(json.dumps(settings, default=str))
    file = folder / _SETTINGS
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    elif file.is_file():
        before, now = _flat(json.loads(file.read_text(encoding="utf8"))), _flat(told)
        other = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if other:
            had, have = ({name: one.get(name) for name in other} for one in (before, now))
            raise ValueError(f"resume: expected the settings that the run was begun with, {had}, got {have}")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told) + "\n", encoding="utf8")


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by their flags.

    >>> _flat({"sft": {"epochs": 1.0}, "model": None})
    {'sft.epochs': 1.0, 'model': None}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found


def step_of(checkpoint: str) -> int:
    """The optimizer step after which the Trainer wrote a checkpoint.

    >>> step_of("runs/sft/checkpoints/checkpoint-120")
    120
    """
    return int(checkpoint.rsplit("-", 1)[1])


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; what a killed run has left unfinished after it is removed.

    The Trainer writes `trainer_state.json` last.
    """
    while (found := get_last_checkpoint(str(folder)) if folder.is_dir() else None) is not None:
        if (Path(found) / "trainer_state.json").is_file():
            return found
        shutil.rmtree(found)
    return None
