"""What the cases have in common: their models, what running a Llama of any shape costs by count, and a free score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.valence import model_folder
from textenv.embedded import STORYTELLER


@dataclass(frozen=True)
class Shape:
    """A Llama: embedding and head are not tied, an attention head is `hidden / heads` wide."""

    vocab: int
    """V."""
    hidden: int
    """H."""
    layers: int
    """Blocks."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 8
    """Heads of keys and values."""
    intermediate: int | None = None
    """Width of the MLP; None: 4 H."""

    @property
    def mlp(self) -> int:
        """Width of the MLP."""
        return 4 * self.hidden if self.intermediate is None else self.intermediate

    @property
    def kv_width(self) -> int:
        """Numbers in a token's key, or in its value, of one layer."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def trunk_weights(self) -> int:
        """Weights of the matrices of all layers."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.kv_width
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def weights(self) -> int:
        """Weights that a token is multiplied by: those of the layers and of the head, not the embedding."""
        return self.trunk_weights + self.vocab * self.hidden

    def forward_flops(self, rows: int, length: int, head_positions: int) -> float:
        """Floating-point operations of one forward of `rows` rows of `length` tokens.

        2 a weight and token; causal attention of a token at place p (from 1) takes 4 H p in each layer: products with p
        keys, and p values added up.

        Args:
            rows: B.
            length: L.
            head_positions: Of each row, how many positions go through the head.
        """
        attention = 4 * self.hidden * self.layers * length * (length + 1) / 2
        return rows * (2 * self.trunk_weights * length + 2 * self.vocab * self.hidden * head_positions + attention)

    def decode_bytes(self, rows: int, length: int, width: int) -> float:
        """Bytes read to decode one token of each row: all weights once, and each row's keys and values.

        Args:
            rows: B.
            length: Tokens of each row that have keys and values.
            width: Bytes of a number.
        """
        return width * (self.weights + rows * length * 2 * self.kv_width * self.layers)


class FreeScore:
    """The share of even ids: a score that costs next to nothing."""

    wants_ids = True

    def __call__(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[float]:
        """One score a response."""
        return [sum(token % 2 == 0 for token in response) / len(response) for response in responses]


def story_model(given: Path | None) -> Path:
    """The folder that is given; without one stories260K of the material, or the embedded storyteller."""
    return Path(given or (model_folder() if model_folder().is_dir() else STORYTELLER))


def llama(
    shape: Shape, *, context: int = 4096, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> LlamaForCausalLM:
    """A random model of that shape, always the same one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(dtype)  # type: ignore[arg-type]
