"""Task of the benchmarks: `stories260K` learns to write words of positive valence.

The score of a response is the sum of the human valence (VADER lexicon) of its words; β = 0.5, responses of 48 tokens,
none of which ends one, prompts of 8 tokens. The untrained model has score and objective 3.34 (sd 2.87).

Needs the material: a folder with models/stories260K, data/vader_lexicon.txt and data/tinystories_openings.txt, by
default `../shared/material` or what the environment variable TEXTENV_MATERIAL names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gymnasium as gym

import textenv  # noqa: F401 - registers RLHF-Text-v0
from textenv.models import load_tokenizer
from textenv.rewards import LexiconReward, read_lexicon

KL_COEF = 0.5
MATERIAL = Path(os.environ.get("TEXTENV_MATERIAL", "../shared/material"))


def model_folder(material: Path = MATERIAL) -> Path:
    """The model that learns, which is also the reference."""
    return material / "models" / "stories260K"


def is_there(material: Path = MATERIAL) -> bool:
    """Whether the material is; says so if not."""
    if model_folder(material).is_dir():
        return True
    print(f"skipped: there is no material in {material}; set TEXTENV_MATERIAL")
    return False


def make_env(num_envs: int = 1, material: Path = MATERIAL, **options: Any) -> Any:
    """The batched environment of the task; `options` are further arguments of `gym.make_vec`."""
    folder = model_folder(material)
    tokenizer = load_tokenizer(folder, argument="material")
    lines = (material / "data" / "tinystories_openings.txt").read_text(encoding="utf8").splitlines()
    encoded = (tokenizer(line.strip())["input_ids"] for line in lines)
    return gym.make_vec(
        "RLHF-Text-v0",
        num_envs=num_envs,
        reference=str(folder),
        reward=LexiconReward(read_lexicon(material / "data" / "vader_lexicon.txt")),
        prompts=[ids[:8] for ids in encoded if len(ids) >= 8],
        max_new_tokens=48,
        stop_token_ids=[],
        kl_coef=KL_COEF,
        **options,
    )
