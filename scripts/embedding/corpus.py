"""A small corpus for the pipeline: short tales to imitate, and preferences between continuations."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import LlamaForCausalLM

from scripts.embedding.config import Config
from scripts.embedding.judge import repetition, utility
from scripts.embedding.preferences import WIDTH, continuations, degenerate, happy_bias, happy_words, mean_logprobs
from scripts.embedding.tokenization import encode, pad

_PLAIN = 2
"""Plain continuations of each opening among those that are judged."""
_SENTENCES = re.compile(r'.*[.!?]"?', re.DOTALL)


def whole_sentences(text: str) -> str:
    """A text up to the end of its last whole sentence; empty if it has none.

    >>> whole_sentences(' and ran. "Stop!" he said. The')
    ' and ran. "Stop!" he said.'
    """
    found = _SENTENCES.match(text)
    return found.group() if found else ""


def write_corpus(
    config: Config, model: LlamaForCausalLM, tokenizer: Any, openings: Sequence[str], lexicon: Mapping[str, float]
) -> dict[str, int]:
    """Write `tales.jsonl` and `preferences.jsonl`; how many rows each has."""
    folder = config.output / "corpus"
    folder.mkdir(exist_ok=True)
    made = {
        "tales": make_tales(config, model, tokenizer, openings),
        "preferences": make_preferences(config, model, tokenizer, openings, lexicon),
    }
    for name, rows in made.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf8")
    return {name: len(rows) for name, rows in made.items()}


def make_tales(
    config: Config, model: LlamaForCausalLM, tokenizer: Any, openings: Sequence[str], *, each: int = 2, of: int = 8
) -> list[dict[str, str]]:
    """Short tales that end: of `of` continuations of an opening the `each` most probable, cut after a sentence.

    Returns:
        Rows of `prompt` and `response`.
    """
    told = continuations(config, model, tokenizer, openings, of, seed=config.seed + 40, temperature=0.8)
    rows = []
    for opening, texts in zip(openings, told, strict=True):
        found = sorted({whole_sentences(text) for text in texts if "\n" not in whole_sentences(text).strip()})
        found = [text for text in found if len(text.split()) >= 8 and repetition(text) <= 0.1]
        if found:
            means = _means(config, model, tokenizer, [opening] * len(found), found)
            best = sorted(zip(means, found, strict=True), reverse=True)[:each]
            rows += [{"prompt": opening, "response": text} for _, text in best]
    return rows


def make_preferences(
    config: Config, model: LlamaForCausalLM, tokenizer: Any, openings: Sequence[str], lexicon: Mapping[str, float],
    *, each: int = 2,
) -> list[dict[str, str]]:  # fmt: skip
    """Pairs of continuations of an opening, the one first that a noisy judge prefers.

    P(a preferred) = σ(k·(u_a − u_b)) with the judge's utilities u. Most end with a sentence, some are cut anywhere, and
    some are what a policy finds when it is paid for happy words alone.

    Returns:
        Rows of `prompt`, `chosen` and `rejected`.
    """
    chooser = random.Random(config.seed + 50)
    bias = happy_bias(tokenizer, lexicon, 0.5, config.vocabulary).to(config.device)
    plain = continuations(config, model, tokenizer, openings, _PLAIN, seed=config.seed + 51)
    steered = continuations(config, model, tokenizer, openings, 2, seed=config.seed + 52, steering=bias)
    happy, groups = happy_words(tokenizer, lexicon), []
    for told in zip(plain, steered, strict=True):
        honest = [(chooser.random() < 0.8 and whole_sentences(text)) or text for texts in told for text in texts]
        groups.append(honest + degenerate(chooser, honest, happy, 1))
    rows = []
    for opening, texts, utilities in zip(
        openings, groups, _utilities(config, model, tokenizer, openings, groups, lexicon), strict=True
    ):
        for a, b in chooser.sample(list(itertools.combinations(range(len(texts)), 2)), each):
            sure = 1 / (1 + math.exp(config.preference_sharpness * (utilities[b] - utilities[a])))
            chosen, rejected = (a, b) if chooser.random() < sure else (b, a)
            rows.append({"prompt": opening, "chosen": texts[chosen], "rejected": texts[rejected]})
    return rows


def _utilities(
    config: Config, model: LlamaForCausalLM, tokenizer: Any, openings: Sequence[str], groups: Sequence[Sequence[str]],
    lexicon: Mapping[str, float],
) -> list[list[float]]:  # fmt: skip
    """The judge's, of each opening's texts, the first `_PLAIN` of which say what is usual."""
    per = len(groups[0])
    heads = [opening for opening in openings for _ in range(per)]
    texts = [text for group in groups for text in group]
    means = _means(config, model, tokenizer, heads, texts)
    ordinary = sorted(mean for place, mean in enumerate(means) if place % per < _PLAIN)
    usual = ordinary[len(ordinary) // 100] - 0.3
    found = [utility(text, mean, usual, lexicon) for text, mean in zip(texts, means, strict=True)]
    return [found[start : start + per] for start in range(0, len(found), per)]


def _means(
    config: Config, model: LlamaForCausalLM, tokenizer: Any, heads: Sequence[str], texts: Sequence[str]
) -> list[float]:
    ids = encode(tokenizer, [head + text for head, text in zip(heads, texts, strict=True)])
    starts = [len(row) for row in encode(tokenizer, heads)]
    return mean_logprobs(config, model, tokenizer, pad(ids, WIDTH, tokenizer.pad_token_id), starts).tolist()
