"""The value head under TRL's names, and what a value-headed forward gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from agents.value_head import ValueHead


class CausalLMOutputWithValue(NamedTuple):
    """What a forward gives: a tuple of three, and its parts by name."""

    logits: Tensor
    """`[B, L, V]` float32."""
    loss: Tensor | None
    """Mean cross-entropy of `labels`; None without them."""
    value: Tensor
    """`[B, L]` float32, in reward units."""


class CachedOutputWithValue(NamedTuple):
    """The same with `return_past_key_values=True`: a tuple of four."""

    logits: Tensor
    """`[B, L, V]` float32."""
    loss: Tensor | None
    """Mean cross-entropy of `labels`; None without them."""
    value: Tensor
    """`[B, L]` float32, in reward units."""
    past_key_values: Any
    """The model's cache."""


class VHead(nn.Module):
    """`model.v_head`: the value head under TRL's names, `summary.weight` and `summary.bias`; no dropout."""

    def __init__(self, head: ValueHead) -> None:
        """Look at a `ValueHead`; nothing is copied."""
        super().__init__()
        self.summary = head.linear
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        """Values `[..., 1]` in reward units of hidden states `[..., H]`."""
        return self.head.denormalize(self.head(hidden)).unsqueeze(-1)

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:  # type: ignore[override]
        """`summary.weight` and `summary.bias`."""
        return self.summary.state_dict(destination=destination, prefix=prefix + "summary.", keep_vars=keep_vars)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take `summary.weight` and `summary.bias`."""
        renamed = {name.removeprefix("summary."): value for name, value in state_dict.items()}
        return self.summary.load_state_dict(renamed, strict=strict, assign=assign)

    def take(self, saved: Mapping[str, Tensor], source: Any) -> None:
        """Take what was read from a folder.

        Raises:
            ValueError: If it is no head for hidden states of this size.
        """
        ours = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        theirs = {name: tuple(value.shape) for name, value in saved.items()}
        if ours != theirs:
            raise ValueError(f"pretrained_model_name_or_path: expected a value head {ours} in {source}, got {theirs}")
        self.load_state_dict(saved)
