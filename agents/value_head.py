"""A value head whose outputs are in reward units while its weights learn in normalised ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """`V = value_std · u + value_mean` with `u = w · h + b`, in float32.

    The critic learns `u` against targets normalised by the statistics, so its steps do not depend on the scale of the
    rewards; everything else reads `V`. When the statistics move, `rescale_values(..., preserve=True)` moves `w` and
    `b` so that `V` stays where it was (PopArt: van Hasselt et al. 2016, "Learning values across many orders of
    magnitude", equations 3 to 5, proposition 1). `u` starts at 0, so `V` starts at `value_mean`.
    """

    value_mean: Tensor
    value_std: Tensor
    value_count: Tensor

    def __init__(self, hidden_size: int, device: torch.device | str = "cpu") -> None:
        """Start at `u = 0` with mean 0 and standard deviation 1.

        Args:
            hidden_size: H of the hidden states read.
            device: Where the parameters live.
        """
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        # Buffers, so that they travel with the state dict; float64, as running statistics add small to large.
        for name, start in (("value_mean", 0.0), ("value_std", 1.0), ("value_count", 0.0)):
            self.register_buffer(name, torch.tensor(start, dtype=torch.float64, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalised values `u`: `[..., H]` in any dtype to `[...]` float32."""
        with torch.autocast(hidden.device.type, enabled=False):  # it would make bfloat16 of them again
            return self.linear(hidden.float()).squeeze(-1)

    def denormalize(self, normalized: Tensor) -> Tensor:
        """Values in reward units: `V = value_std · u + value_mean`."""
        return normalized * self.value_std.float() + self.value_mean.float()

    def normalize(self, values: Tensor) -> Tensor:
        """The inverse of `denormalize`: `u = (V - value_mean) / value_std`."""
        return (values - self.value_mean.float()) / self.value_std.float()

    @torch.no_grad()
    def rescale_values(self, mean: float, std: float, *, preserve: bool = True) -> None:
        """Set the statistics.

        With `preserve`, `w' = w σ/σ'` and `b' = (σ b + μ - μ') / σ'`, so that every `V` stays as it was.

        Args:
            mean: The new mean μ'.
            std: The new standard deviation σ', positive.
            preserve: Whether values stay (a running update) or `u` does (a first estimate).

        Raises:
            ValueError: If `std` is not positive and finite.
        """
        if not (std > 0 and std < float("inf")):
            raise ValueError(f"std must be positive and finite; got {std}")
        if preserve:
            old_mean, old_std = float(self.value_mean), float(self.value_std)
            bias = (old_std * self.linear.bias.double() + old_mean - mean) / std
            self.linear.weight.copy_(self.linear.weight.double() * (old_std / std))
            self.linear.bias.copy_(bias)
        self.value_mean.fill_(mean)
        self.value_std.fill_(std)
