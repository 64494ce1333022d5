"""The frozen reference π_ref: its log-probs, in step with an episode or of whole responses."""

from __future__ import annotations

import torch
from torch import Tensor

from textenv.logprobs import selected_logprobs
from textenv.models import Shared, hidden_states, output_head
from textenv.row_cache import row_decoder

BATCH_TOKENS = 16_384
"""How many padded tokens one scoring forward may hold."""


class Reference:
    """log π_ref(a|s) with π_ref = softmax(logits/temperature), float32."""

    def __init__(self, model: Shared, *, temperature: float) -> None:
        """Wrap a frozen model."""
        self.model, self.temperature = model, temperature

    @torch.no_grad()
    def logprobs(self, ids: Tensor, prompt_lengths: Tensor, response_lengths: Tensor) -> Tensor:
        """Score whole responses, log π_ref of each token, in batches of similar lengths.

        Args:
            ids: `[B, L]`, prompt then response, right-padded.
            prompt_lengths: `[B]`.
            response_lengths: `[B]`.

        Returns:
            `[B, T]`, T = max(response_lengths); 0 past a response's end.
        """
        lengths = prompt_lengths + response_lengths
        result = torch.zeros(len(ids), int(response_lengths.max()), device=ids.device)
        order = torch.argsort(lengths)
        while len(order):
            width = int(lengths[order[-1]])
            rows = order[-max(1, BATCH_TOKENS // width) :]
            order = order[: -len(rows)]
            part = self._forward(ids[rows, :width], prompt_lengths[rows], response_lengths[rows])
            result[rows, : part.shape[1]] = part
        return result

    def _forward(self, ids: Tensor, prompt_lengths: Tensor, response_lengths: Tensor) -> Tensor:
        steps = torch.arange(int(response_lengths.max()), device=ids.device)
        mask = steps < response_lengths[:, None]
        positions = (prompt_lengths[:, None] + steps).clamp(max=ids.shape[1] - 1)
        hidden = hidden_states(self.model, ids)
        hidden = hidden.gather(1, (positions - 1)[..., None].expand(-1, -1, hidden.shape[-1]))
        with self.model.scope():
            return selected_logprobs(
                hidden, output_head(self.model), ids.gather(1, positions), temperature=self.temperature, mask=mask
            )


class ReferenceStepper:
    """log π_ref of one token per row and step, on a key-value cache that lags one token behind the text."""

    def __init__(self, reference: Reference, rows: int, columns: int) -> None:
        """Room for `rows` texts of up to `columns` tokens."""
        self._reference = reference
        self._decoder = row_decoder(reference.model.module, rows, columns)
        self._head = output_head(reference.model.module)

    @torch.no_grad()
    def begin(self, rows: Tensor, ids: Tensor, lengths: Tensor) -> None:
        """Start new texts in some rows.

        Args:
            rows: `[r]`.
            ids: `[r, P]`, right-padded.
            lengths: `[r]`; the last token waits for the first `step`.
        """
        with self._reference.model.scope():
            self._decoder.prefill(rows, ids, lengths - 1)

    @torch.no_grad()
    def step(self, last_tokens: Tensor, actions: Tensor, rows: Tensor | None) -> Tensor:
        """Append the last token of s_t and tell log π_ref(a_t | s_t).

        Args:
            last_tokens: `[n]`, the last token of s_t.
            actions: `[n]`, a_t.
            rows: `[n]`, which rows act; None: all.

        Returns:
            `[n]` float32.
        """
        with self._reference.model.scope():
            hidden = self._decoder.advance(last_tokens, rows)
            logits = self._head(hidden).float() / self._reference.temperature
        return logits.gather(1, actions[:, None])[:, 0] - logits.logsumexp(1)
