"""Where a right-padded batch is read: which hidden state stands for which action, and rows padded on either side."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from textenv.packing import Packing


class Slots:
    """Where evaluate reads: places among the tokens that are forwarded, row after row, and where results go."""

    def __init__(self, prompt_lengths: Tensor, response_lengths: Tensor, input_ids: Tensor, whole: bool) -> None:
        """Lay out the slots.

        Args:
            prompt_lengths: `[B]`, at least 1.
            response_lengths: `[B]`.
            input_ids: `[B, L]`, right-padded.
            whole: Whether the state after the last token is read too.

        Raises:
            ValueError: If the lengths do not fit.
        """
        prompts, responses = prompt_lengths.tolist(), response_lengths.tolist()
        rows, width = input_ids.shape
        totals = [p + r for p, r in zip(prompts, responses, strict=True)]
        if len(prompts) != rows:
            raise ValueError(f"prompt_lengths and response_lengths must have one entry per row, {rows}")
        if min(prompts) < 1 or min(responses) < 0 or max(totals) > width:
            raise ValueError(
                f"prompt_lengths must be at least 1, response_lengths at least 0, and their sums at most {width}; "
                f"got prompts from {min(prompts)}, responses from {min(responses)}, sums to {max(totals)}"
            )
        device, longest = input_ids.device, max(responses)
        self.shape = (rows, longest)
        starts, counts = prompt_lengths.to(device), response_lengths.to(device)
        # The last token is predicted, never read, unless the value after it is asked for.
        self.packing = Packing.of(starts + counts if whole else (starts + counts - 1).clamp(min=1), input_ids)
        steps = torch.arange(longest, device=device)
        self.where = (steps[None, :] < counts[:, None]).reshape(-1).nonzero().squeeze(1)
        row = torch.arange(rows, device=device)[:, None]
        before = starts[:, None] - 1 + steps[None, :]
        self.sources = (self.packing.starts[:, None] + before).reshape(-1).index_select(0, self.where)
        self.targets = (row * width + before + 1).reshape(-1).index_select(0, self.where)
        self.last = self.packing.starts + starts + counts - 1


def masked_hidden(trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Final hidden states `[B, L, H]` of rows padded on either side."""
    if attention_mask is None or bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
        return trunk(input_ids=input_ids, use_cache=False).last_hidden_state  # the padding, if any, is on the right
    # Positions must be given: without them absolute embeddings would count the padding.
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    output = trunk(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
    return output.last_hidden_state


def last_positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Column of each row's last attended token `[B]`, whichever side is padded."""
    rows, width = input_ids.shape
    if attention_mask is None:
        return torch.full((rows,), width - 1, device=input_ids.device)
    order = torch.arange(1, width + 1, device=input_ids.device)
    return ((attention_mask != 0) * order).argmax(1)


def scale_gradient(hidden: Tensor, coef: float) -> Tensor:
    """The same numbers; the gradient is multiplied by `coef`."""
    return hidden.detach() if coef == 0.0 else hidden * coef + hidden.detach() * (1.0 - coef)
