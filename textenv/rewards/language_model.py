"""Rewards that language models give by their log-probs: a judge's, and a DPO-trained policy's against its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from textenv.models import Shared, context_length, load_causal_lm, load_tokenizer, logit_width, unwrap
from textenv.prompts import closing_count
from textenv.reference import Reference
from textenv.rewards.base import RewardContext, TextDecoder
from textenv.rewards.batching import check_lengths, padded
from textenv.rewards.combinators import check_number
from textenv.rewards.reward import Ids

Reduce = Literal["mean", "sum"]


class TokenLogprobs:
    """log p(token | what stands before it) of response tokens, by a frozen causal language model, in float32."""

    def __init__(
        self,
        source: str | Path | Shared,
        *,
        argument: str = "reward",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        temperature: float = 1.0,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the model.

        Args:
            source: Folder, hub name or `textenv.Shared` model.
            argument: For error messages.
            device: Where a loaded model runs.
            dtype: Its floating-point type.
            temperature: Divides the logits.
            trust_remote_code: Whether the folder may bring Python code.

        Raises:
            ValueError: If there is no such model.
        """
        check_number("temperature", temperature)
        if temperature <= 0:
            raise ValueError(f"temperature: expected a number > 0, got {temperature!r}")
        model = load_causal_lm(
            source, argument=argument, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
        self.reference = Reference(model, temperature=temperature)
        self.device, self.width = unwrap(model).device, logit_width(model)
        self.context = context_length(unwrap(model).config)

    def __call__(self, prompts: Ids, responses: Ids) -> list[Tensor]:
        """`[T]` for each response.

        Raises:
            ValueError: If a prompt or a response is empty, if both together are too long, or if an id is not the
                model's.
        """
        rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
        check_lengths(
            [min(len(p), len(r)) and len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], self.context
        )
        if max(map(max, rows)) >= self.width:
            raise ValueError(f"expected ids below the model's {self.width}, got {max(map(max, rows))}")
        ids, _ = padded(rows, self.device)
        starts, lengths = (
            torch.tensor([len(one) for one in some], device=self.device) for some in (prompts, responses)
        )
        logprobs = self.reference.logprobs(ids, starts, lengths).cpu()
        return [row[: len(response)] for row, response in zip(logprobs, responses, strict=True)]


def _reduced(rows: Sequence[Tensor], reduce: Reduce) -> list[float]:
    return [float(row.double().mean() if reduce == "mean" else row.double().sum()) for row in rows]


def _check_reduce(reduce: str) -> None:
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce: expected one of {', '.join(map(repr, get_args(Reduce)))}, got {reduce!r}")


class LogProbReward:
    """score = (1/T)·Σ_t log p(y_t | x, y_<t) under a judge that shares the policy's vocabulary, or the sum.

    A stop token counts as any other. `TextLogProbReward` is for a judge with another vocabulary.
    """

    wants_ids = True

    def __init__(self, logprobs: TokenLogprobs | str | Path | Shared, *, reduce: Reduce = "mean") -> None:
        """Make a judge.

        Args:
            logprobs: The judge: a folder, hub name or `textenv.Shared` model, or a `TokenLogprobs` with settings of
                yours.
            reduce: `mean` over the tokens, or `sum`.

        Raises:
            ValueError: If there is no such model, or for another `reduce`.
        """
        _check_reduce(reduce)
        self.logprobs = logprobs if isinstance(logprobs, TokenLogprobs) else TokenLogprobs(logprobs)
        self.reduce: Reduce = reduce

    def __call__(self, prompts: Ids, responses: Ids) -> list[float]:
        """One score a response."""
        return _reduced(self.logprobs(prompts, responses), self.reduce)


class TextLogProbReward:
    """As `LogProbReward`, of the text, by a judge with its own tokenizer.

    Prompt and response are encoded as one text, and what the prompt encoded alone does not begin with is the response;
    what the tokenizer puts after every text, an EOS for instance, is not of it. After a response that ended with a stop
    token the judge's EOS counts, too, and of a response without text nothing else does: otherwise to stop at once would
    be the best of all.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        reduce: Reduce = "mean",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        """Load a judge.

        Args:
            source: Folder or hub name of a causal language model with a tokenizer.
            reduce: `mean` over the judge's tokens, or `sum`.
            device: Where it runs.
            dtype: Its floating-point type.
            trust_remote_code: Whether the folder may bring Python code.

        Raises:
            ValueError: If there is no such model or tokenizer, if the tokenizer has no EOS, or for another `reduce`.
        """
        _check_reduce(reduce)
        self.reduce: Reduce = reduce
        self.tokenizer = load_tokenizer(source, argument="reward")
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"reward: expected a judge whose tokenizer has an EOS token, got {source}")
        self.logprobs = TokenLogprobs(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        self.tail = closing_count(self.tokenizer)
        """How many tokens the tokenizer puts after every text."""

    def ids(self, text: str) -> list[int]:
        """Of a text that may go on."""
        whole = self.tokenizer(text)["input_ids"]
        return whole[: len(whole) - self.tail]

    def bind(self, context: RewardContext) -> BoundTextJudge:
        """The judge, with the policy's way from ids to text."""
        return BoundTextJudge(self, context.decoder)


@dataclass(frozen=True)
class BoundTextJudge:
    """A judge of text that is asked in the policy's ids."""

    judge: TextLogProbReward
    """The judge."""
    decoder: TextDecoder
    """The policy's."""
    wants_ids = True

    def __call__(self, prompts: Ids, responses: Ids) -> list[float]:
        """One score a response."""
        texts = zip(*self.decoder(prompts, responses), strict=True)
        stops = [bool(response) and response[-1] in self.decoder.stop_token_ids for response in responses]
        rows = [self._encode(*pair, stop) for pair, stop in zip(texts, stops, strict=True)]
        return _reduced(self.judge.logprobs([p for p, _ in rows], [r for _, r in rows]), self.judge.reduce)

    def _encode(self, prompt: str, response: str, stop: bool) -> tuple[list[int], list[int]]:
        tokenizer: Any = self.judge.tokenizer
        start, whole = self.judge.ids(prompt), self.judge.ids(prompt + response)
        pairs = zip(start, whole, strict=False)
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(start), len(whole)))
        eos = tokenizer.eos_token_id
        scored = [*whole[same:], eos] if stop or len(whole) == same else whole[same:]
        begin = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return whole[:same] or [begin], scored


class ImplicitReward:
    """score = β·Σ_t (log π_dpo(y_t | s_t) − log π_ref(y_t | s_t)): the reward that a DPO-trained policy stands for.

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 5 without its β·log Z(x), which is the same for all responses to a
    prompt. With `per_token` each token is paid its own term (Rafailov et al. 2024, arXiv 2404.12358); the return
    is the same. Both models must have the policy's vocabulary.
    """

    wants_ids = True

    def __init__(
        self,
        policy: TokenLogprobs | str | Path | Shared,
        reference: TokenLogprobs | str | Path | Shared,
        *,
        beta: float = 0.1,
        per_token: bool = False,
    ) -> None:
        """Load both models.

        Args:
            policy: π_dpo: a folder, hub name or `textenv.Shared` model, or a `TokenLogprobs` with settings of yours.
            reference: π_ref, that it was trained against, likewise.
            beta: β of the training, > 0.
            per_token: Whether each token is paid its own term.

        Raises:
            ValueError: If there is no such model, if the two differ in vocabulary, or for a β that is none.
        """
        check_number("beta", beta)
        if beta <= 0:
            raise ValueError(f"beta: expected a number > 0, got {beta!r}")
        self.beta, self.per_token = float(beta), per_token
        self.policy, self.reference = (
            model if isinstance(model, TokenLogprobs) else TokenLogprobs(model, argument=argument)
            for argument, model in (("policy", policy), ("reference", reference))
        )
        if self.policy.width != self.reference.width:
            raise ValueError(
                f"reference: expected {self.policy.width} logits, as the policy, got {self.reference.width}"
            )

    def __call__(self, prompts: Ids, responses: Ids) -> list[Any]:
        """One score a response, or one a token."""
        both = zip(self.policy(prompts, responses), self.reference(prompts, responses), strict=True)
        terms = [self.beta * (trained.double() - base.double()) for trained, base in both]
        return terms if self.per_token else [float(row.sum()) for row in terms]
