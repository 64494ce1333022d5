"""The training text: real stories, and stories sampled from a model that was trained on their like."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.embedding.config import Config, log
from scripts.embedding.sampling import make_generator, sample

SEPARATOR = "<|endoftext|>"
_ASCII = str.maketrans({"“": '"', "”": '"', "«": '"', "»": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "..."})


class Story(NamedTuple):
    """One story, and whether its end is known."""

    text: str
    ended: bool


def clean(text: str) -> str:
    """Plain quotation marks and dashes, one newline between paragraphs, no space at line ends."""
    lines = (line.strip() for line in text.translate(_ASCII).splitlines())
    return "\n".join(line for line in lines if line)


def read_real(path: Path, seed: int, heldout_fraction: float = 0.05) -> tuple[list[Story], list[Story]]:
    """The real stories, shuffled, as (training, held-out)."""
    pieces = path.read_text(encoding="utf-8", errors="ignore").split(SEPARATOR)
    # The file is cut at a size: its last story has no end.
    stories = [Story(clean(piece), index < len(pieces) - 1) for index, piece in enumerate(pieces)]
    stories = [story for story in stories if len(story.text) > 100 and story.text.isascii()]
    random.Random(seed).shuffle(stories)
    count = int(len(stories) * heldout_fraction)
    return stories[count:], stories[:count]


def sample_teacher(config: Config, path: Path) -> None:
    """Sample ``config.teacher_stories`` stories from stories260K and write them to ``path`` as JSON."""
    folder = config.material / "models" / "stories260K"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(config.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = make_generator(config.device, config.seed)
    stories: list[Story] = []
    began = time.perf_counter()
    while len(stories) < config.teacher_stories and time.perf_counter() - began < 60.0 * config.teacher_minutes:
        # Its stories begin and end with the same id.
        start = torch.full((config.sample_rows, 1), tokenizer.bos_token_id, device=config.device)
        rows, lengths = sample(
            model, start, config.teacher_tokens, stop_id=tokenizer.bos_token_id, pad_id=tokenizer.bos_token_id,
            generator=generator, temperature=config.teacher_temperature,
        )  # fmt: skip
        ids = [row[1:length] for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)]
        ended = [row[-1] == tokenizer.bos_token_id for row in ids]
        texts = tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=True)
        stories += [
            Story(clean(text), end)
            for text, end in zip(texts, ended, strict=True)
            if len(text) > 100 and text.isascii()
        ]
        log(f"  {len(stories)} stories sampled, {sum(ended) / len(ended):.0%} of the last batch ended")
    path.write_text(json.dumps(stories[: config.teacher_stories]))


def read_sampled(path: Path) -> list[Story]:
    """The stories that :func:`sample_teacher` wrote."""
    return [Story(text, ended) for text, ended in json.loads(path.read_text())]
