"""The frozen reference π_ref: its log-probs, in step with an episode or of whole responses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from textenv.constraints.base import Allowed
from textenv.decoders import row_decoder
from textenv.logprobs import MAX_CHUNK_ELEMENTS, Head, packed_logprobs
from textenv.models import Shared, backbone, output_head
from textenv.packing import Packing, packed_hidden

BATCH_TOKENS = {"cpu": 1024, "cuda": 16_384}
"""How many padded tokens a forward without gradients holds, by device. A CPU gets the memory of larger ones anew from
the system each time: 64 rows of 55 tokens take 7 to 30 % longer at once than in four parts."""


class Reference:
    """log π_ref(a|s) with π_ref = softmax(logits/temperature), float32."""

    def __init__(self, model: Shared, *, temperature: float) -> None:
        """Wrap a frozen model."""
        self.model, self.temperature = model, temperature

    @torch.no_grad()
    def logprobs(
        self, ids: Tensor, prompt_lengths: Tensor, response_lengths: Tensor, allowed: Allowed | None = None
    ) -> Tensor:
        """Score whole responses, log π_ref of each token, in batches of similar lengths.

        Args:
            ids: `[B, L]`, prompt then response, right-padded.
            prompt_lengths: `[B]`.
            response_lengths: `[B]`.
            allowed: The sets that the law is renormalised over; None: all tokens.

        Returns:
            `[B, T]`, T = max(response_lengths); 0 past a response's end.
        """
        lengths = prompt_lengths + response_lengths
        result = torch.zeros(len(ids), int(response_lengths.max()), device=ids.device)
        order = torch.argsort(lengths)
        while len(order):
            width = int(lengths[order[-1]])
            rows = order[-max(1, BATCH_TOKENS.get(ids.device.type, 16_384) // width) :]
            order = order[: -len(rows)]
            within = None if allowed is None else _of_rows(allowed, rows)
            part = self._forward(ids[rows, :width], prompt_lengths[rows], response_lengths[rows], within)
            result[rows, : part.shape[1]] = part
        return result

    def _forward(
        self, ids: Tensor, prompt_lengths: Tensor, response_lengths: Tensor, allowed: Allowed | None
    ) -> Tensor:
        steps = torch.arange(int(response_lengths.max()), device=ids.device)
        result = torch.zeros(len(ids), len(steps), device=ids.device)
        row, step = (steps < response_lengths[:, None]).nonzero(as_tuple=True)
        place = prompt_lengths[row] + step
        packing = Packing.of((prompt_lengths + response_lengths - 1).clamp(min=1), ids)  # the last token is not read
        head = output_head(self.model)
        with self.model.scope():
            hidden = packed_hidden(backbone(self.model), ids, packing, packing.starts[row] + place - 1)
            targets = ids[row, place]
            if allowed is None:
                result[row, step] = packed_logprobs(hidden, head, targets, self.temperature)[0]
            else:
                result[row, step] = allowed_logprobs(
                    hidden, head, targets, lambda some: allowed(row[some], step[some]), temperature=self.temperature
                )
        return result


def only_allowed(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Logits `[n, V]` with −inf where `allowed`, `[n, V]` bool, is false; as they are without it.

    >>> only_allowed(torch.tensor([[1.0, 2.0]]), torch.tensor([[True, False]])).tolist()
    [[1.0, -inf]]
    """
    return logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)


def allowed_logprobs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    allowed: Callable[[slice], Tensor],
    *,
    temperature: float,
    max_chunk_elements: int = MAX_CHUNK_ELEMENTS,
) -> Tensor:
    """Log-probs of targets under softmax over the allowed set of each position.

    logprobs[n] = z[n, targets[n]] − log Σ_{v ∈ A(n)} exp z[n, v],  z = head(hidden)/temperature

    Args:
        hidden: `[N, H]`.
        head: `[n, H]` to logits `[n, V]`.
        targets: `[N]`, each in its set.
        allowed: The sets of some of the positions, `[n, V]` bool.
        temperature: Divides the logits.
        max_chunk_elements: Largest number of logits held at once.

    Returns:
        `[N]` float32.
    """
    result = torch.zeros(len(targets), device=hidden.device)
    if not len(targets):
        return result
    chunk = max(1, max_chunk_elements // head(hidden[:1]).shape[-1])
    for first in range(0, len(targets), chunk):
        some = slice(first, first + chunk)
        logits = only_allowed(head(hidden[some]).float() / temperature, allowed(some))
        result[some] = logits.gather(1, targets[some][:, None])[:, 0] - logits.logsumexp(1)
    return result


def _of_rows(allowed: Allowed, rows: Tensor) -> Allowed:
    return lambda some, steps: allowed(rows[some], steps)


class ReferenceStepper:
    """log π_ref of one token per row and step, on a key-value cache that lags one token behind the text."""

    def __init__(self, reference: Reference, rows: int, columns: int) -> None:
        """Room for `rows` texts of up to `columns` tokens."""
        self._reference = reference
        self._decoder = row_decoder(reference.model.module, rows, columns)
        self._head = output_head(reference.model.module)

    @torch.inference_mode()
    def begin(self, rows: Tensor, ids: Tensor, lengths: Tensor) -> None:
        """Start new texts in some rows.

        Args:
            rows: `[r]`.
            ids: `[r, P]`, right-padded.
            lengths: `[r]`; the last token waits for the first `step`.
        """
        with self._reference.model.scope():
            self._decoder.prefill(rows, ids, lengths - 1)

    @torch.inference_mode()
    def step(self, last_tokens: Tensor, actions: Tensor, rows: Tensor | None, allowed: Tensor | None = None) -> Tensor:
        """Append the last token of s_t and tell log π_ref(a_t | s_t).

        Args:
            last_tokens: `[n]`, the last token of s_t.
            actions: `[n]`, a_t.
            rows: `[n]`, which rows act; None: all.
            allowed: `[n, V]` bool, the sets that the law is renormalised over; None: all tokens.

        Returns:
            `[n]` float32.
        """
        with self._reference.model.scope():
            hidden = self._decoder.advance(last_tokens, rows)
            logits = only_allowed(self._head(hidden).float() / self._reference.temperature, allowed)
        spoken = logits.gather(1, actions[:, None])[:, 0] - logits.logsumexp(1)
        with torch.inference_mode(False):
            return spoken.clone()  # an ordinary tensor, which anybody may write


class ReferenceLaws:
    """The whole law π_ref(·|s_t) at the present state of N rows, on a key-value cache in step with the text.

    One forward a step, as `ReferenceStepper`: the law of a state is computed when it is reached, and is both what
    candidates are picked from and where the next token's log-prob is read.
    """

    def __init__(self, reference: Reference, rows: int, columns: int, vocab_size: int) -> None:
        """Room for `rows` texts of up to `columns` tokens."""
        self._reference = reference
        self._decoder = row_decoder(reference.model.module, rows, columns)
        self._head = output_head(reference.model.module)
        device = next(reference.model.module.parameters()).device
        self.logprobs = torch.zeros(rows, vocab_size, device=device)
        """`[N, V]` float32: log π_ref of every token, −inf where it is not allowed."""

    @torch.no_grad()
    def begin(self, rows: Tensor, ids: Tensor, lengths: Tensor, allowed: Tensor | None) -> None:
        """Start new texts in some rows, `[r]`: ids `[r, P]`, right-padded; lengths `[r]`; allowed `[r, V]` bool."""
        with self._reference.model.scope():
            self._tell(rows, self._decoder.prefill(rows, ids, lengths), allowed)

    @torch.no_grad()
    def step(self, actions: Tensor, rows: Tensor, allowed: Tensor | None) -> Tensor:
        """Tell log π_ref(a_t | s_t) of some rows, `[r]`, and go on to s_{t+1}, which allows `[r, V]`."""
        spoken = self.logprobs[rows, actions]
        with self._reference.model.scope():
            everyone = len(rows) == len(self.logprobs)
            self._tell(rows, self._decoder.advance(actions, None if everyone else rows), allowed)
        return spoken

    def _tell(self, rows: Tensor, hidden: Tensor, allowed: Tensor | None) -> None:
        logits = only_allowed(self._head(hidden).float() / self._reference.temperature, allowed)
        self.logprobs[rows] = logits.log_softmax(1)
