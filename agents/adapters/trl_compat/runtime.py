"""What TRL's `PPOTrainer` took from accelerate: a device, and trackers. One process."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from agents.adapters.trl_compat.config import PPOConfig
from agents.adapters.trl_compat.model import AutoModelForCausalLMWithValueHead
from agents.adapters.trl_compat.names import AdaptiveKLController, FixedKLController
from agents.tracking import TensorBoard
from textenv.kl import KLController

# The arguments of the model's forward, and what TRL kept beside them.
_COLUMNS = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "past_key_values", "labels"}
_COLUMNS |= {"label", "query", "response"}


class LocalProcess:
    """`ppo_trainer.accelerator`: what code for TRL reads from it, for one process.

    Attributes:
        device: Where the models are.
        num_processes: 1.
        process_index: 0.
        local_process_index: 0.
        is_main_process: True.
        is_local_main_process: True.
        state: Has `deepspeed_plugin`, None.
    """

    def __init__(self, device: torch.device) -> None:
        """Know the device.

        Raises:
            ValueError: If this is one of several processes, which would each train a model of its own.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"WORLD_SIZE: expected one process, got {os.environ['WORLD_SIZE']}")
        self.device = device
        self.num_processes, self.process_index, self.local_process_index = 1, 0, 0
        self.is_main_process = self.is_local_main_process = True
        self.state = SimpleNamespace(deepspeed_plugin=None)

    def prepare(self, *things: Any) -> Any:
        """The things themselves: one as it is, several as a tuple."""
        return things[0] if len(things) == 1 else things

    def unwrap_model(self, model: Any) -> Any:
        """The model itself."""
        return model

    def gather(self, tensor: Any) -> Any:
        """The tensor itself: there is no other process."""
        return tensor

    def wait_for_everyone(self) -> None:
        """Nothing to wait for."""

    def print(self, *things: Any) -> None:
        """As `print`."""
        print(*things)


def check_arguments(
    config: Any, model: Any, ref_model: Any, tokenizer: Any, lr_scheduler: Any, training_data_collator: Any
) -> None:
    """Refuse arguments of `PPOTrainer` that cannot be what is meant.

    Raises:
        ValueError: Naming the argument, what was expected and what came.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if not isinstance(config, PPOConfig):
        raise ValueError(f"config: expected a PPOConfig of agents.adapters.trl_compat, got {type(config).__name__}")
    if not isinstance(model, AutoModelForCausalLMWithValueHead):
        raise ValueError(f"model: expected an AutoModelForCausalLMWithValueHead, got {type(model).__name__}")
    if ref_model is not None and not isinstance(ref_model, AutoModelForCausalLMWithValueHead | PreTrainedModel):
        raise ValueError(f"ref_model: expected a language model with or without a value head, got {ref_model!r}")
    if ref_model is model or ref_model is model.pretrained_model:
        raise ValueError("ref_model: expected another model or None, got the one that learns, to which the KL is 0")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer: expected a Hugging Face tokenizer, got {type(tokenizer).__name__}")
    if lr_scheduler is not None and not isinstance(lr_scheduler, LRScheduler):
        raise ValueError(f"lr_scheduler: expected a torch LRScheduler, got {type(lr_scheduler).__name__}")
    if training_data_collator is not None:
        raise ValueError("training_data_collator: expected None, because rows are laid out here")


def choose_device(model_device: torch.device, config: PPOConfig) -> torch.device:
    """Where training happens: where the model is, but on the GPU if it is on the CPU and there is one.

    Args:
        model_device: Where the model is.
        config: `accelerator_kwargs={"cpu": True}` keeps it there.
    """
    if model_device.type != "cpu" or config.accelerator_kwargs.get("cpu") or not torch.cuda.is_available():
        return model_device
    return torch.device("cuda", torch.cuda.current_device())


def make_controller(config: PPOConfig) -> KLController:
    """What holds β, and moves it if `adap_kl_ctrl`; a β of 0 stays 0 whatever it is multiplied by."""
    if config.adap_kl_ctrl and config.init_kl_coef > 0:
        return AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
    return FixedKLController(config.init_kl_coef)


def make_dataloader(dataset: Any, collate: Callable[..., Any] | None, config: PPOConfig) -> DataLoader:
    """Batches of `batch_size`, shuffled by the seed, the last one dropped if it is short.

    Args:
        dataset: Anything a `DataLoader` takes; of a `datasets.Dataset` columns are dropped as in TRL.
        collate: Makes a batch of items.
        config: `batch_size`, `seed` and `remove_unused_columns`.
    """
    if type(dataset).__module__.split(".")[0] == "datasets" and config.remove_unused_columns:
        dataset = dataset.remove_columns([name for name in dataset.column_names if name not in _COLUMNS])
    shuffle = torch.Generator().manual_seed(config.seed)
    return DataLoader(dataset, config.batch_size, shuffle=True, collate_fn=collate, drop_last=True, generator=shuffle)


def game_table(batch: Mapping[str, Any], columns: list[str], scores: list[float]) -> tuple[list[str], list[list[Any]]]:
    """Columns of a batch and its scores, as names and rows.

    Raises:
        ValueError: If a column is not there.
    """
    absent = [name for name in columns if name not in batch]
    if absent:
        raise ValueError(f"batch: expected the columns {columns}, got none of the name {', '.join(absent)}")
    return [*columns, "reward"], [list(row) for row in zip(*(batch[name] for name in columns), scores, strict=True)]


class StatsTracker(Protocol):
    """Receives what `log_stats` is given."""

    def log(self, step: int, logs: Mapping[str, Any], table: tuple[list[str], list[list[Any]]] | None) -> None:
        """Record numbers, arrays, and a table of its columns and rows."""
        ...


class NoTracker:
    """Nowhere."""

    def log(self, step: int, logs: Mapping[str, Any], table: tuple[list[str], list[list[Any]]] | None) -> None:
        """Do nothing."""


class TensorBoardTracker:
    """Scalars to TensorBoard; arrays and texts are left out, as accelerate's tracker did."""

    def __init__(self, config: PPOConfig) -> None:
        """Open the event file, in `logging_dir/tracker_project_name`.

        Raises:
            ValueError: If there is no folder to write to.
        """
        folder = config.project_kwargs.get("logging_dir", config.project_kwargs.get("project_dir"))
        if folder is None:
            raise ValueError("project_kwargs: expected logging_dir with log_with='tensorboard', got none")
        self._writer = TensorBoard(Path(folder) / config.tracker_project_name)

    def log(self, step: int, logs: Mapping[str, Any], table: tuple[list[str], list[list[Any]]] | None) -> None:
        """Write the scalars."""
        self._writer.log(step, {name: float(value) for name, value in logs.items() if isinstance(value, int | float)})
        self._writer.writer.flush()


class WandbTracker:
    """Everything to Weights & Biases: arrays as histograms, the batch as a table `game_log`."""

    def __init__(self, config: PPOConfig) -> None:
        """Start a run.

        Raises:
            ValueError: If wandb is not installed.
        """
        try:
            self._wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ValueError("log_with: expected wandb to be installed for 'wandb', got an ImportError") from error
        options = config.tracker_kwargs.get("wandb", {})
        self._run = self._wandb.init(project=config.tracker_project_name, config=config.to_dict(), **options)

    def log(self, step: int, logs: Mapping[str, Any], table: tuple[list[str], list[list[Any]]] | None) -> None:
        """Log one step."""
        extra = {} if table is None else {"game_log": self._wandb.Table(columns=table[0], rows=table[1])}
        self._run.log({**logs, **extra})


def make_tracker(config: PPOConfig) -> StatsTracker:
    """The tracker that `log_with` names."""
    if config.log_with == "wandb":
        return WandbTracker(config)
    return TensorBoardTracker(config) if config.log_with == "tensorboard" else NoTracker()
