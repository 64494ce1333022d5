"""Prompts: the first words of stories."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import LlamaForCausalLM

from scripts.embedding.config import Config, log
from scripts.embedding.sampling import make_generator, sample
from scripts.embedding.stories import Story
from scripts.embedding.tokenization import decode, encode

_WORD = re.compile(r"[a-z']+")
_PLAIN = re.compile(r"[A-Z][A-Za-z',. ]+")
SPACE, NEWLINE = "Ġ", "Ċ"


def cut(pieces: Sequence[str], chooser: random.Random, shortest: int = 5, longest: int = 11) -> int:
    """How many of a story's first pieces (BOS not counted) to keep so that a whole word is last; 0 if there is no way.

    >>> cut(["One", "Ġday", ",", "ĠT", "im"], random.Random(0), shortest=2, longest=4)
    3
    """
    line = pieces[: longest + 1]
    if NEWLINE in line:
        line = line[: line.index(NEWLINE)]
    ends = [n for n in range(shortest, len(line)) if line[n].startswith(SPACE)]
    return chooser.choice(ends) if ends else 0


def openings_of(rows: Iterable[Sequence[int]], tokenizer: Any, chooser: random.Random) -> list[str]:
    """One opening per row of ids (BOS first), where the row has one."""
    heads = []
    for row in rows:
        head = list(row[1:13])
        count = cut(tokenizer.convert_ids_to_tokens(head), chooser)
        if count:
            heads.append(head[:count])
    return decode(tokenizer, heads)


def known_words(stories: Sequence[Story], least: int = 3) -> frozenset[str]:
    """Words that occur at least ``least`` times in the stories."""
    counts = Counter(word for story in stories for word in _WORD.findall(story.text.lower()))
    return frozenset(word for word, count in counts.items() if count >= least)


class Collector:
    """Distinct openings of known words, no three first words making up more than a share of them."""

    def __init__(self, words: frozenset[str], wanted: int, share: float = 0.15) -> None:
        """Start without any."""
        self.words, self.wanted, self.most = words, wanted, max(2, int(share * wanted))
        self.found: dict[str, None] = {}
        self.beginnings: Counter[tuple[str, ...]] = Counter()

    def add(self, opening: str) -> None:
        """Take ``opening`` if it is new, readable and not one more of many alike."""
        beginning = tuple(opening.split()[:3])
        words = _WORD.findall(opening.lower())
        if (
            len(self.found) < self.wanted
            and opening not in self.found
            and len(words) >= 3
            and self.words.issuperset(words)
            and _PLAIN.fullmatch(opening)
            and self.beginnings[beginning] < self.most
        ):
            self.found[opening] = None
            self.beginnings[beginning] += 1


def make_openings(
    config: Config, model: LlamaForCausalLM, tokenizer: Any, real: Sequence[Story],
    sampled: Sequence[Story], rounds: int = 24,
) -> tuple[list[str], list[str]]:  # fmt: skip
    """Openings told by the storyteller, as (prompts, held-out); they share none."""
    chooser = random.Random(config.seed)
    generator = make_generator(config.device, config.seed + 3)
    collector = Collector(known_words(real), config.prompts + config.heldout)
    for _ in range(rounds):
        if len(collector.found) == collector.wanted:
            break
        start = torch.full((config.sample_rows, 1), tokenizer.bos_token_id, device=config.device)
        rows, _ = sample(
            model, start, 12, stop_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, generator=generator
        )
        for opening in openings_of(rows.tolist(), tokenizer, chooser):
            collector.add(opening)
    told = len(collector.found)
    if told < collector.wanted:  # only a toy storyteller is so poor
        collector.most = collector.wanted
        for opening in openings_of(encode(tokenizer, [s.text[:200] for s in sampled]), tokenizer, chooser):
            collector.add(opening)
    openings = list(collector.found)
    log(f"  {told} openings by the storyteller, {len(openings) - told} by the teacher")
    chooser.shuffle(openings)
    heldout = min(config.heldout, len(openings) // 3)
    return openings[heldout:], openings[:heldout]
