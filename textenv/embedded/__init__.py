"""The small models, prompts and corpus that make the default work without arguments and without a network.

Nothing is loaded here; these are paths. ``MODEL_CARD.md`` beside this file says what the models are, how they were
made and what they cannot do.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent

STORYTELLER: Path = _FOLDER / "storyteller"
"""Folder of the story-telling language model and its tokenizer: the default policy's start and reference."""

REWARD: Path = _FOLDER / "reward"
"""Folder of the reward model (a sequence classifier with one label) and the same tokenizer.

Its score is the classifier's output plus ``reward_bias`` of its config.
"""

PROMPTS: Path = _FOLDER / "prompts.txt"
"""Openings of stories to train on, one per line."""

HELDOUT: Path = _FOLDER / "heldout.txt"
"""Openings of stories to evaluate on, one per line; none is in ``PROMPTS``."""

TALES: Path = _FOLDER / "corpus" / "tales.jsonl"
"""Short tales that end, to fine-tune on: rows of `prompt` and `response`, of the openings in `PROMPTS`."""

PREFERENCES: Path = _FOLDER / "corpus" / "preferences.jsonl"
"""Pairs of continuations, the happier preferred by a noisy judge: rows of `prompt`, `chosen` and `rejected`."""

__all__ = ["HELDOUT", "PREFERENCES", "PROMPTS", "REWARD", "STORYTELLER", "TALES"]
