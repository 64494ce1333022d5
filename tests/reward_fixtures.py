"""Tiny reward models in folders, and one of every reward that there is, over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
WORDS = {f"{a}{b}": (5 * i + 3 * j) % 7 / 2 - 1.25 for i, a in enumerate("abcd") for j, b in enumerate("xyz")}
"""Values of the words that a token of the tiny tokenizer is."""
STEPS = range(3, VOCAB, 2)
"""Every other token ends a step."""


def by_prompt(*values: str) -> dict[str, str]:
    return dict(zip(PROMPT_TEXTS, values, strict=True))


class InDigits:
    """A reward of numbers asked about a vocabulary without digits: a reads 1, b 2, and so on."""

    def __init__(self, reward: Any) -> None:
        self.reward = reward

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        digits = str.maketrans("abcd", "1234")
        return self.reward(prompts, [response.translate(digits) for response in responses])


Maker = Callable[[dict[str, Path]], Any]
EVERY: dict[str, Maker] = {
    "ClassifierReward": lambda f: rewards.ClassifierReward(f["classifier"]),
    "TokenClassifierReward": lambda f: rewards.TokenClassifierReward(f["logit"]),
    "TokenFunction": lambda f: rewards.TokenFunction(DenseReward.one),
    "StepReward": lambda f: rewards.StepReward(DenseReward(), STEPS),
    "TokenAggregate": lambda f: rewards.TokenAggregate(DenseReward(), "min", separators=STEPS),
    "RegexMatch": lambda f: rewards.RegexMatch("[ab]"),
    "LengthTarget": lambda f: rewards.LengthTarget(3),
    "SoftOverlong": lambda f: rewards.SoftOverlong(5),
    "MissingEOS": lambda f: rewards.MissingEOS(),
    "NumericAnswer": lambda f: InDigits(rewards.NumericAnswer(by_prompt("1", "2", "3"), none=-1)),
    "ExactAnswer": lambda f: rewards.ExactAnswer(by_prompt("by", "ax", "")),
    "LexiconReward": lambda f: rewards.LexiconReward(WORDS),
    "WordsReward": lambda f: rewards.WordsReward(
        (*WORDS, "by ax"), np.linspace(1, 2, 13), np.array([*WORDS.values(), -1.5]), bias=0.25
    ),
    "LogProbReward": lambda f: rewards.LogProbReward(shared(5)),
    "TextLogProbReward": lambda f: rewards.TextLogProbReward(f["judge"], reduce="sum"),
    "ImplicitReward": lambda f: rewards.ImplicitReward(shared(5), shared(6)),
    "ImplicitReward per token": lambda f: rewards.ImplicitReward(shared(5), shared(6), per_token=True),
    "PreferenceReward": lambda f: rewards.PreferenceReward(
        rewards.Pointwise(LetterReward()), by_prompt(" by ax", " cz", " ay")
    ),
    "PreferenceReward by pairs": lambda f: rewards.PreferenceReward(
        rewards.PairClassifier(rewards.ClassifierReward(f["classifier"]), "{prompt} a{first} b{second}"),
        by_prompt(" by ax", " cz", " ay"),
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
