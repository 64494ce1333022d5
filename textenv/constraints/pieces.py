"""The bytes that a token adds to a text."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Any, vocab_size: int, excluded: Collection[int]) -> dict[int, bytes]:
    """What each token adds to a text before it, as UTF-8.

    Bytes, because a letter may be spread over several tokens. Special tokens and tokens that add nothing are left out.

    Args:
        tokenizer: A Hugging Face tokenizer.
        vocab_size: Ids from here on are left out.
        excluded: Ids to leave out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = "" if backend is None else json.dumps(json.loads(backend.to_str()).get("decoder"))
    without = {*excluded, *tokenizer.all_special_ids}
    pieces = {i: piece for piece, i in sorted(tokenizer.get_vocab().items()) if i < vocab_size and i not in without}
    if '"ByteLevel"' in decoder:
        table = _byte_table()
        spelled = {i: piece for i, piece in pieces.items() if all(letter in table for letter in piece)}
        found = {i: bytes(table[letter] for letter in piece) for i, piece in spelled.items()}
        found |= _added_tokens(tokenizer, pieces)
    else:
        found = _decoded(tokenizer, list(pieces))
        if '"ByteFallback"' in decoder:
            matches = {i: _BYTE.fullmatch(piece) for i, piece in pieces.items()}
            found |= {i: bytes([int(match[1], 16)]) for i, match in matches.items() if match}
    return {i: text for i, text in sorted(found.items()) if text}


def _added_tokens(tokenizer: Any, pieces: dict[int, str]) -> dict[int, bytes]:
    """Tokens added to a byte-level vocabulary are spelled as they are."""
    added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
    return {i: str(added[i]).encode() for i in pieces if i in added}


def _byte_table() -> dict[str, int]:
    """Which byte each letter of a byte-level piece stands for (Radford et al. 2019, `bytes_to_unicode`)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _decoded(tokenizer: Any, ids: list[int]) -> dict[int, bytes]:
    """What the tokenizer itself writes for an id after another token; tokens that are part of a letter are left out."""

    def decode(rows: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    texts = zip(ids, decode([[i] for i in ids]), strict=True)
    anchor, start = next(((i, text) for i, text in texts if text.isascii() and text.isalnum()), (None, ""))
    if anchor is None:
        raise ValueError("tokenizer: expected one with a plain word or letter among its tokens, got none")
    wholes = decode([[anchor, i] for i in ids])
    return {
        i: whole[len(start) :].encode()
        for i, whole in zip(ids, wholes, strict=True)
        if whole.startswith(start) and "\ufffd" not in whole
    }
