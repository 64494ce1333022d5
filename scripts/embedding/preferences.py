"""Material for preferences: many continuations of each opening, good, bad and degenerate, with their utilities."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from scripts.embedding.config import Config, log
from scripts.embedding.judge import utility
from scripts.embedding.sampling import make_generator, sample
from scripts.embedding.storyteller import token_losses
from scripts.embedding.tokenization import decode, encode, pad

NEW_TOKENS = 48
WIDTH = 72
"""Longest opening and response, in tokens of their joint text."""


class Candidates(NamedTuple):
    """N continuations; rows of one opening stand together, `per_opening` of them."""

    rows: Tensor
    """Token ids of opening and response, right-padded, int16 [N, WIDTH]."""
    lengths: Tensor
    """int64 [N]."""
    utilities: Tensor
    """float32 [N]."""
    texts: list[str]
    """The responses."""
    per_opening: int


def continuations(
    config: Config, model: LlamaForCausalLM, tokenizer: Any, openings: Sequence[str], copies: int,
    *, seed: int, temperature: float = 1.0, steering: Tensor | None = None,
) -> list[list[str]]:  # fmt: skip
    """`copies` responses to each opening."""
    generator = make_generator(config.device, seed)
    groups: defaultdict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for index, ids in enumerate(encode(tokenizer, openings)):
        groups[len(ids)] += [(index, ids)] * copies
    found: list[list[str]] = [[] for _ in openings]
    for length, group in sorted(groups.items()):
        for first in range(0, len(group), config.sample_rows):
            part = group[first : first + config.sample_rows]
            start = torch.tensor([ids for _, ids in part], device=config.device)
            bias = None
            if steering is not None:  # some rows are led away from happy words, most towards them, some far
                strengths = torch.empty(len(part), 1, device=config.device).uniform_(-0.5, 1.5, generator=generator)
                bias = strengths * steering
            rows, _ = sample(
                model, start, NEW_TOKENS, stop_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
                generator=generator, temperature=temperature, logit_bias=bias,
            )  # fmt: skip
            for (index, _), text in zip(part, decode(tokenizer, rows[:, length:].tolist()), strict=True):
                found[index].append(text)
    return found


def happy_bias(tokenizer: Any, lexicon: Mapping[str, float], strength: float, vocabulary: int) -> Tensor:
    """A logit bias towards pieces that are happy words."""
    bias = torch.zeros(vocabulary)
    words = list(lexicon)
    for word, ids in zip(words, encode(tokenizer, [f" {word}" for word in words]), strict=True):
        if len(ids) == 2:  # BOS and one piece
            bias[ids[1]] = strength * lexicon[word]
    return bias


def degenerate(chooser: random.Random, honest: Sequence[str], happy: Sequence[str], count: int) -> list[str]:
    """Texts that a policy might find when it is paid for happiness alone."""

    def salad() -> str:
        return " " + " ".join(chooser.choices(happy, k=chooser.randint(8, 30)))

    def stutter() -> str:
        return f" {chooser.choice(['so', 'very', 'and', 'was'])} {chooser.choice(happy)}" * chooser.randint(4, 14)

    def echo() -> str:
        return _first_sentence(chooser.choice(honest)) * chooser.randint(3, 6)

    def shuffled() -> str:
        words = chooser.choice(honest).split()
        chooser.shuffle(words)
        return " " + " ".join(words)

    def stuffed() -> str:
        words = chooser.choice(honest).split()
        for _ in range(chooser.randint(3, 10)):
            words.insert(chooser.randint(0, len(words)), chooser.choice(happy))
        return " " + " ".join(words)

    kinds = (salad, stutter, echo, shuffled, stuffed)
    return [kind() for kind in chooser.sample(kinds, k=min(count, len(kinds)))]


def happy_words(tokenizer: Any, lexicon: Mapping[str, float]) -> list[str]:
    """Those that the storyteller says in one piece."""
    words = [word for word, value in lexicon.items() if value > 1.0]
    pieces = encode(tokenizer, [f" {word}" for word in words])
    return [word for word, ids in zip(words, pieces, strict=True) if len(ids) == 2] or ["happy"]  # BOS and the word


def _first_sentence(text: str) -> str:
    found = re.match(r"[^.!?]*[.!?]", text)
    return found.group() if found else text


@torch.no_grad()
def mean_logprobs(
    config: Config, model: LlamaForCausalLM, tokenizer: Any, rows: Tensor, starts: Sequence[int]
) -> Tensor:
    """Mean log p of each response's tokens under the storyteller, float32 [N]."""
    means = []
    first = torch.tensor(starts, device=config.device)
    for part, start in zip(rows.split(config.score_rows), first.split(config.score_rows), strict=True):
        ids = part.to(config.device).long()
        losses = token_losses(model, ids, tokenizer.pad_token_id)
        counts = (ids[:, 1:] != tokenizer.pad_token_id) & (
            torch.arange(ids.shape[1] - 1, device=ids.device) >= start[:, None] - 1
        )
        means.append(-(losses * counts).sum(1) / counts.sum(1).clamp(min=1))
    return torch.cat(means).cpu()


def collect_candidates(
    config: Config, model: LlamaForCausalLM, tokenizer: Any, openings: Sequence[str],
    lexicon: Mapping[str, float], seed: int,
) -> Candidates:  # fmt: skip
    """Sample, spoil and judge continuations of every opening."""
    each = config.sampled_per_opening // 3
    bias = happy_bias(tokenizer, lexicon, 0.5, config.vocabulary).to(config.device)
    kinds = [
        continuations(config, model, tokenizer, openings, each, seed=seed),
        continuations(config, model, tokenizer, openings, each, seed=seed + 1, temperature=1.2),
        continuations(config, model, tokenizer, openings, each, seed=seed + 2, steering=bias),
    ]
    happy = happy_words(tokenizer, lexicon)
    chooser = random.Random(seed)
    texts: list[str] = []
    for groups in zip(*kinds, strict=True):
        honest = [text for group in groups for text in group]
        # A third of them end early, so that the score does not depend on the length that training happens to use.
        honest = [_shorter(chooser, text) if chooser.random() < 0.33 else text for text in honest]
        texts += honest + degenerate(chooser, honest, happy, config.adversarial_per_opening)
    per_opening = 3 * each + config.adversarial_per_opening
    heads = [opening for opening in openings for _ in range(per_opening)]
    starts = [len(ids) for ids in encode(tokenizer, heads)]
    ids = encode(tokenizer, [head + text for head, text in zip(heads, texts, strict=True)])
    rows = pad(ids, WIDTH, tokenizer.pad_token_id)
    means = mean_logprobs(config, model, tokenizer, rows, starts)
    plain = torch.arange(len(texts)) % per_opening < each
    # Far below the storyteller's own: ordinary clumsiness is no sin, or the reward would be for dull text.
    usual = float(means[plain].quantile(0.01)) - 0.3
    utilities = [utility(text, float(mean), usual, lexicon) for text, mean in zip(texts, means, strict=True)]
    log(f"  {len(texts)} continuations of {len(openings)} openings judged; usual log-prob at least {usual:.2f}")
    lengths = torch.tensor([min(len(row), WIDTH) for row in ids])
    return Candidates(rows, lengths, torch.tensor(utilities), texts, per_opening)


def _shorter(chooser: random.Random, text: str) -> str:
    words = text.split(" ")
    return " ".join(words[: chooser.randint(min(6, len(words)), len(words))])
