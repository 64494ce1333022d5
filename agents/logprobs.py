"""Log-probabilities and entropies from hidden states; the one implementation is the environment's."""

from __future__ import annotations

from textenv.logprobs import packed_logprobs, selected_logprobs, selected_logprobs_and_entropy, unpack

__all__ = ["packed_logprobs", "selected_logprobs", "selected_logprobs_and_entropy", "unpack"]
