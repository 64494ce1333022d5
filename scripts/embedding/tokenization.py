"""The tokenizer: byte-level BPE, so that any text goes in and comes back unchanged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from scripts.embedding.stories import Story

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def train_tokenizer(texts: Sequence[str], vocabulary: int, context: int, folder: Path) -> None:
    """Learn the merges on ``texts`` and save the tokenizer in ``folder``; BOS is added by it, EOS is not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, BOS, EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, model_max_length=context,
        padding_side="right", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The saved tokenizer."""
    return AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: Any, texts: Sequence[str], chunk: int = 8192) -> list[list[int]]:
    """Token ids of every text, BOS first, by all cores."""
    rows: list[list[int]] = []
    for start in range(0, len(texts), chunk):
        rows += [item.ids for item in tokenizer.backend_tokenizer.encode_batch_fast(list(texts[start : start + chunk]))]
    return rows


def decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """Text of every row without special tokens."""
    return tokenizer.backend_tokenizer.decode_batch([list(row) for row in rows], skip_special_tokens=True)


def pad(rows: Sequence[Sequence[int]], width: int, pad_id: int) -> Tensor:
    """Rows cut to ``width`` and right-padded, int16 [N, width]."""
    table = torch.full((len(rows), width), pad_id, dtype=torch.int16)
    for index, row in enumerate(rows):
        table[index, : min(len(row), width)] = torch.tensor(row[:width], dtype=torch.int16)
    return table


def story_rows(tokenizer: Any, stories: Sequence[Story], context: int) -> Tensor:
    """One row per story: BOS, its tokens, EOS if its end is known, [N, context + 1].

    A row begins where its story does and holds nothing else, because that is how the environment uses the model.
    """
    rows = encode(tokenizer, [story.text for story in stories])
    eos_id = tokenizer.eos_token_id
    rows = [[*row, eos_id] if story.ended else row for row, story in zip(rows, stories, strict=True)]
    return pad(rows, context + 1, tokenizer.pad_token_id)
