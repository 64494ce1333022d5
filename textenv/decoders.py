"""Which decoder serves a model."""

from __future__ import annotations

from typing import Any

from textenv.attention import plain_attention
from textenv.models import backbone
from textenv.recompute import Decoder, RecomputeDecoder


def row_decoder(model: Any, rows: int, columns: int) -> Decoder:
    """The fastest exact decoder for a model: `RowDecoder`, or `RecomputeDecoder` where its cache would be wrong.

    A cache of plain keys and values serves full attention. State-space layers, models that take no position ids, and
    sliding or chunked attention shorter than `columns` are recomputed.

    Args:
        model: A Hugging Face causal LM, or a `Shared` one, whose `within` is entered in every forward.
        rows: Number of rows.
        columns: Most tokens that a row will hold.
    """
    if plain_attention(backbone(model), columns):
        # Not before it is needed: the caches of transformers bring the names of all its models, a third of a second.
        from textenv.row_cache import RowDecoder

        return RowDecoder(model, rows, columns)
    return RecomputeDecoder(model, rows, columns)
