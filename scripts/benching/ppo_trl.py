"""One iteration of TRL's PPO, the last there was (1.12), set up as kindly as its options allow."""

from __future__ import annotations

import gc
import importlib.metadata
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from scripts.benching.ppo_task import EPOCHS, KL_COEF, LEARNING_RATE, MINIBATCHES, Phases, Task, number_tokenizer
from textenv.models import no_progress_bar


def is_there() -> bool:
    """Whether TRL 1.12 is installed; later ones have no PPO. Nothing is imported."""
    try:
        return importlib.metadata.version("trl").startswith("1.12.")
    except importlib.metadata.PackageNotFoundError:
        return False


class TrlIteration:
    """Calling it does one iteration: `PPOTrainer.train()` with one batch in all; models and optimizer go on.

    What `train` sets up each time is in it: 1 ms of CPU time, where the smallest iteration timed takes a second.
    """

    def __init__(self, task: Task, *, collect_garbage: bool) -> None:
        """Load the four models and make the trainer.

        Args:
            task: What to learn from.
            collect_garbage: Whether TRL's own `gc.collect()`, twice an iteration, does anything. What it costs grows
                with the objects in the process, so that it is charged for its competitors' too.
        """
        self.phases = Phases()
        self._folder = tempfile.TemporaryDirectory()
        with _quiet():
            self.trainer = _trainer(task, self._folder.name)
        module, trainer, timed = _module(), self.trainer, self.phases.timed
        self._train = timed("update", trainer.train)  # all that is not one of these
        self._patches = {
            "batch_generation": timed("generate", module.batch_generation),
            "get_reward": _of(trainer.reward_model, module.get_reward, timed, "reward", "values"),
            "forward": _of(trainer.ref_model, module.forward, timed, "reference", "update"),
            "gc": SimpleNamespace(collect=timed("gc", gc.collect) if collect_garbage else lambda: 0),
        }

    def __call__(self) -> None:
        """One iteration."""
        with _patched(self._patches), _quiet():
            self._train()
        self.phases.finish()


def _of(
    model: nn.Module, function: Callable[..., Any], timed: Callable[..., Callable[..., Any]], name: str, other: str
) -> Callable[..., Any]:
    """A function of a model and more: timed under one name for this model, under another for all others."""
    this, others = timed(name, function), timed(other, function)
    return lambda given, *args: (this if given is model else others)(given, *args)


def _module() -> Any:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.ppo import ppo_trainer  # type: ignore[import-not-found]  # of the extra `bench`

    return ppo_trainer


@contextmanager
def _patched(names: dict[str, Any]) -> Iterator[None]:
    """Other values of names of TRL's module, for a while."""
    module = _module()
    before = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, no banners, no advice."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_progress_bar(), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def _trainer(task: Task, folder: str) -> Any:
    module = _module()
    from datasets import Dataset
    from transformers import PrinterCallback

    torch.manual_seed(0)
    policy, reference = (AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.float32) for _ in range(2))
    values = AutoModelForSequenceClassification.from_pretrained(task.folder, num_labels=1, dtype=torch.float32)
    # Where no response ends early, padding is an id outside of the vocabulary: one that is sampled would be hidden,
    # and a mask that hides something sends attention on a slower path.
    pad = task.vocab_size if task.stop is None else 0
    policy.generation_config.pad_token_id = pad
    config = module.PPOConfig(
        output_dir=folder,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        num_sample_generations=0,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=task.rows,
        gradient_accumulation_steps=1,
        num_mini_batches=MINIBATCHES,
        num_ppo_epochs=EPOCHS,
        total_episodes=task.rows,
        local_rollout_forward_batch_size=task.rows,
        response_length=task.tokens,
        stop_token_id=task.stop,
        temperature=1.0,
        kl_coef=KL_COEF,
    )
    trainer = module.PPOTrainer(
        args=config,
        # TRL asks it for padding and for the end of text alone.
        processing_class=number_tokenizer(task.vocab_size, pad=pad, end=2 if task.stop is None else task.stop),
        model=policy,
        ref_model=reference,
        reward_model=_FreeReward(task.prompt_length),
        value_model=values,
        train_dataset=Dataset.from_dict({"input_ids": task.prompts}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _FreeReward(nn.Module):
    """`FreeScore` in the shape that TRL asks for: a backbone whose hidden states `score` reads."""

    base_model_prefix = "backbone"

    def __init__(self, prompt_length: int) -> None:
        super().__init__()
        self.backbone = _EvenShare(prompt_length)
        self.score = nn.Identity()


class _EvenShare(nn.Module):
    def __init__(self, prompt_length: int) -> None:
        super().__init__()
        self.prompt_length = prompt_length

    def forward(self, input_ids: Tensor, **options: Any) -> SimpleNamespace:
        """The share of even ids in the response up to each place."""
        even = (input_ids[:, self.prompt_length :] % 2 == 0).float().cumsum(1)
        share = even / torch.arange(1, even.shape[1] + 1)
        return SimpleNamespace(hidden_states=(nn.functional.pad(share, (self.prompt_length, 0))[..., None],))
