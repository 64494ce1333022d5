"""What every competitor of the PPO iteration has in common: models, prompts, sizes, and the clock of its phases."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import textenv.embedded
from scripts.benching.models import story_model
from scripts.valence import MATERIAL
from textenv.models import load_config, load_tokenizer, no_progress_bar

EPOCHS, MINIBATCHES = 4, 4
# What a step costs does not depend on its size, and the lengths of responses must not be learnt while they are timed.
LEARNING_RATE = 1e-6
KL_COEF = 0.05


@dataclass(frozen=True)
class Task:
    """A model, its prompts and the size of an iteration."""

    name: str
    """What the page calls it."""
    folder: Path
    """Of the policy, from which reference and critic start too."""
    prompts: list[list[int]]
    """As token ids, all of one length."""
    rows: int
    """Episodes of an iteration."""
    tokens: int
    """Longest response."""
    stop: int | None = None
    """The token that ends a response; None: all are of the same length."""

    @property
    def prompt_length(self) -> int:
        """Tokens of each prompt."""
        return len(self.prompts[0])

    @property
    def vocab_size(self) -> int:
        """V of the model."""
        return load_config(self.folder, argument="folder").vocab_size


def story_tasks(model: Path | None, *, rows: int = 64, tokens: int = 48) -> tuple[Task, Task]:
    """Responses of equal length, and responses that end with a full stop.

    Args:
        model: Folder of a language model with a tokenizer; None: stories260K of the material, or the storyteller.
        rows: Episodes of an iteration.
        tokens: Longest response.
    """
    folder = story_model(model)
    tokenizer = load_tokenizer(folder, argument="model")
    openings = MATERIAL / "data" / "tinystories_openings.txt"
    if not openings.is_file():
        openings = textenv.embedded.STORYTELLER.parent / "prompts.txt"
    encoded = (tokenizer(line.strip())["input_ids"] for line in openings.read_text(encoding="utf8").splitlines())
    prompts = [list(ids[:8]) for ids in encoded if len(ids) >= 8]
    stop = tokenizer.convert_tokens_to_ids(".")
    assert isinstance(stop, int)  # of one token; a list of several
    return (
        Task(f"{folder.name} {rows}×{tokens}", folder, prompts, rows, tokens),
        Task(f"{folder.name} {rows}×{tokens}, ragged", folder, prompts, rows, tokens, stop),
    )


def random_task(folder: Path, *, hidden: int = 256, layers: int = 4, rows: int = 64, tokens: int = 32) -> Task:
    """A random Llama of V = 1000, 4.7 million parameters by default, written to `folder`, and random prompts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    with no_progress_bar():
        model.save_pretrained(folder)
    number_tokenizer(config.vocab_size - 1, pad=0, end=2).save_pretrained(folder)
    prompts = torch.randint(3, config.vocab_size, (4 * rows, 8)).tolist()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return Task(f"random Llama of {millions:.1f}M parameters {rows}×{tokens}", folder, prompts, rows, tokens)


def number_tokenizer(largest: int, *, pad: int, end: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the decimal numbers up to `largest`, each its own id; pads on the left."""
    words = {str(token): token for token in range(largest + 1)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")),
        pad_token=str(pad),
        eos_token=str(end),
        padding_side="left",
    )


class Phases:
    """CPU seconds of named parts of a piece of work, for each time that it is done.

    Of a part within a part the time is the inner one's alone, so the parts add up to the whole.
    """

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        """Nothing measured yet; `clock` tells seconds."""
        self.done: list[dict[str, float]] = []
        self._clock = clock
        self._now: defaultdict[str, float] = defaultdict(float)
        self._within = 0.0  # seconds of the parts that ended within the one that runs

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; what it takes is added to the part `name`."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            before, self._within = self._within, 0.0
            start = self._clock()
            try:
                return function(*args, **kwargs)
            finally:
                took = self._clock() - start
                self._now[name] += took - self._within
                self._within = before + took

        return measured

    def watch(self, owner: Any, method: str, name: str) -> None:
        """From now on, calls of this method of this object are of the part `name`."""
        setattr(owner, method, self.timed(name, getattr(owner, method)))

    def finish(self) -> None:
        """The work is done once more."""
        self.done.append(dict(self._now))
        self._now.clear()

    def medians(self) -> dict[str, float]:
        """Of each part, over all times but the first, which was to warm up; 0 seconds where a part was not run."""
        timed = self.done[1:]
        names = dict.fromkeys(name for parts in timed for name in parts)
        return {name: statistics.median(parts.get(name, 0.0) for parts in timed) for name in names}
