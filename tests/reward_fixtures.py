"""Tiny reward models in folders, and one of every reward that there is, over them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import env_fixtures as fixtures
import numpy as np
import torch
from env_fixtures import EOS, VOCAB, DenseReward, IdReward, LetterReward
from transformers import (
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

import textenv.rewards as rewards
from textenv import Shared
from textenv.rewards import RewardContext

CONTEXT = RewardContext(fixtures.tiny_tokenizer(), frozenset({EOS}), max_new_tokens=8)
SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": EOS,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}
KINDS = {
    "classifier": (LlamaForSequenceClassification, LlamaConfig, 1),
    "logit": (LlamaForTokenClassification, LlamaConfig, 1),
    "labels": (LlamaForTokenClassification, LlamaConfig, 3),
    "bert": (BertForTokenClassification, BertConfig, 1),
}


def save_model(kind: str, folder: Path) -> Path:
    """A random model of a kind, with the tiny tokenizer."""
    model, config, labels = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made: Any = model(config(**SIZE, num_labels=labels))
    made.save_pretrained(folder)
    fixtures.tiny_tokenizer().save_pretrained(folder)
    return folder


def save_judge(folder: Path) -> Path:
    """A random language model with the tiny tokenizer."""
    fixtures.tiny_llama(5).save_pretrained(folder)
    fixtures.tiny_tokenizer().save_pretrained(folder)
    return folder


@cache
def shared(seed: int) -> Shared:
    """A tiny language model."""
    return Shared(fixtures.tiny_llama(seed))


def letters(text: str) -> float:
    return sum(ord(char) for char in text) % 7 / 2 - 1


PROMPT_TEXTS = ["ax by", "cz", "dx ay"]
"""What the prompts of `PROMPTS` read."""
PROMPTS = [[1, 3, 7], [1, 11], [1, 12, 4]]

Maker = Callable[[dict[str, Path]], Any]
EVERY: dict[str, Maker] = {
    "ClassifierReward": lambda f: rewards.ClassifierReward(f["classifier"]),
    "TokenClassifierReward": lambda f: rewards.TokenClassifierReward(f["logit"]),
    "TokenFunction": lambda f: rewards.TokenFunction(DenseReward.one),
    "StepReward": lambda f: rewards.StepReward(DenseReward(), [5, 20]),
    "TokenAggregate": lambda f: rewards.TokenAggregate(DenseReward(), "min", separators=[5, 20]),
    "RegexMatch": lambda f: rewards.RegexMatch("[ab]"),
    "LengthTarget": lambda f: rewards.LengthTarget(3),
    "SoftOverlong": lambda f: rewards.SoftOverlong(5),
    "MissingEOS": lambda f: rewards.MissingEOS(),
    "NumericAnswer": lambda f: rewards.NumericAnswer(dict.fromkeys(PROMPT_TEXTS, "1"), none=-1),
    "ExactAnswer": lambda f: rewards.ExactAnswer(dict.fromkeys(PROMPT_TEXTS, "by")),
    "LexiconReward": lambda f: rewards.LexiconReward({"ax": 1.5, "by": -2.0, "c": 0.25}),
    "WordsReward": lambda f: rewards.WordsReward(
        ("ax", "by ax"), np.array([1.0, 2.0]), np.array([0.5, -1.5]), bias=0.25
    ),
    "LogProbReward": lambda f: rewards.LogProbReward(shared(5)),
    "TextLogProbReward": lambda f: rewards.TextLogProbReward(f["judge"], reduce="sum"),
    "ImplicitReward": lambda f: rewards.ImplicitReward(shared(5), shared(6)),
    "ImplicitReward per token": lambda f: rewards.ImplicitReward(shared(5), shared(6), per_token=True),
    "PreferenceReward": lambda f: rewards.PreferenceReward(
        rewards.Pointwise(LetterReward()), dict.fromkeys(PROMPT_TEXTS, " by ax")
    ),
    "PreferenceReward by pairs": lambda f: rewards.PreferenceReward(
        rewards.PairClassifier(rewards.ClassifierReward(f["classifier"]), "{prompt} a{first} b{second}"),
        dict.fromkeys(PROMPT_TEXTS, " by ax"),
        log=True,
    ),
    "HumanReward": lambda f: rewards.HumanReward(
        lambda prompt, response: str(letters(prompt + response)), low=-9, high=9
    ),
    "WeightedSum": lambda f: fixtures.a_sum(),
    "WeightedSum of tokens too": lambda f: fixtures.a_mixed_sum(),
    "Clip": lambda f: rewards.Clip(IdReward(), -0.5, 0.5),
    "Affine": lambda f: rewards.Affine(LetterReward(), 2, -1),
    "LengthPenalty": lambda f: rewards.LengthPenalty(LetterReward(), 0.25, 4),
    "Ensemble": lambda f: rewards.Ensemble({"a": LetterReward(), "b": IdReward(), "c": rewards.LengthTarget(3)}, 0.5),
    "RunningNormalization": lambda f: rewards.RunningNormalization(IdReward(), decay=0.9),
    "LengthControlled": lambda f: rewards.LengthControlled(LetterReward()),
}
