"""Rewards of preference models: how likely a response is to win against a fixed opponent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from textenv.rewards.base import RewardFunction
from textenv.rewards.classifier import ClassifierReward
from textenv.rewards.combinators import check_number
from textenv.rewards.templates import fill


class Comparison(Protocol):
    """A preference model: `(prompts, firsts, seconds) -> logits` that the first is better than the second, one a pair.

    P(first ≻ second | prompt) = σ(logit).
    """

    def __call__(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> Any:
        """Compare responses."""
        ...


@dataclass(frozen=True)
class Pointwise:
    """The Bradley–Terry comparison of a pointwise reward: logit = scale·(r(x, first) − r(x, second)).

    >>> longer = Pointwise(lambda prompts, responses: [len(response) for response in responses])
    >>> longer([""], ["four"], ["one"])
    [1.0]
    """

    reward: RewardFunction
    """Of text, one number a response: a `ClassifierReward`, say."""
    scale: float | None = None
    """Log-odds a unit of score; None: the reward's own `scale` (that of a normalised reward model), else 1."""

    def __post_init__(self) -> None:
        """Check that it is asked in text, alone."""
        if self.scale is not None:
            check_number("scale", self.scale, low=0.0)
        for name in ("wants_ids", "bind"):
            if getattr(self.reward, name, False):
                raise ValueError(f"reward: expected a plain reward of text, got one with {name}, {self.reward!r}")
        if not callable(self.reward):
            raise ValueError(f"reward: expected a reward of text (load_reward reads a folder), got {self.reward!r}")

    def __call__(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
        """One logit a pair."""
        scores = [float(score) for score in self.reward([*prompts, *prompts], [*firsts, *seconds])]
        unit = getattr(self.reward, "scale", 1.0) if self.scale is None else self.scale
        pairs = zip(scores[: len(firsts)], scores[len(firsts) :], strict=True)
        return [unit * (first - second) for first, second in pairs]


@dataclass(frozen=True)
class PairClassifier:
    """The comparison of a sequence classifier with one label that reads a prompt and two responses as one text.

    logit = (f(x, first, second) − f(x, second, first))/2, so which stands first makes no difference.
    """

    classifier: ClassifierReward
    """f: the logit that the first response is better."""
    template: str = "{prompt}\n\nA: {first}\n\nB: {second}"
    """Of the text, as the classifier was trained."""

    def __post_init__(self) -> None:
        """Check the template."""
        missing = [name for name in ("{prompt}", "{first}", "{second}") if name not in self.template]
        if missing:
            raise ValueError(f"template: expected {', '.join(missing)} in it, got {self.template!r}")

    def __call__(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> Tensor:
        """One logit a pair, `[n]`."""
        orders = ((firsts, seconds), (seconds, firsts))
        texts = [
            fill(self.template, {"prompt": prompt, "first": first, "second": second})
            for one, two in orders
            for prompt, first, second in zip(prompts, one, two, strict=True)
        ]
        forward, backward = self.classifier([""] * len(texts), texts).chunk(2)
        return (forward - backward) / 2


@dataclass(frozen=True)
class PreferenceReward:
    """score = σ(logit) = P(y ≻ y_ref | x), the win probability over a stored response to the same prompt; or its log.

    The opponent is asked about every time and nothing is kept, so a pairwise model costs two forwards a response.

    >>> longer = Pointwise(lambda prompts, responses: [len(response) for response in responses])
    >>> [round(p, 3) for p in PreferenceReward(longer, {"Say": " one"})(["Say", "Say"], [" one", " five"])]
    [0.5, 0.731]
    """

    comparison: Comparison
    """The preference model: `Pointwise(reward)`, a `PairClassifier`, or a function of yours."""
    opponents: Mapping[str, str]
    """y_ref by prompt. White space around prompts does not count."""
    log: bool = False
    """Whether the score is log P, which grows without bound where the response loses for certain."""

    def __post_init__(self) -> None:
        """Check both."""
        if not callable(self.comparison):
            raise ValueError(f"comparison: expected a callable (prompts, firsts, seconds), got {self.comparison!r}")
        if not isinstance(self.opponents, Mapping) or not self.opponents:
            raise ValueError(f"opponents: expected responses by prompt, got {self.opponents!r}")
        object.__setattr__(self, "opponents", {prompt.strip(): text for prompt, text in self.opponents.items()})

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One score a response."""
        logits = self.comparison(prompts, responses, [self._opponent(prompt) for prompt in prompts])
        if len(logits) != len(responses):
            raise ValueError(f"expected {len(responses)} logits of the comparison, one a pair, got {len(logits)}")
        values = torch.as_tensor(logits, dtype=torch.float64)
        return (torch.nn.functional.logsigmoid(values) if self.log else values.sigmoid()).tolist()

    def _opponent(self, prompt: str) -> str:
        if prompt.strip() not in self.opponents:
            raise ValueError(f"expected a prompt that there is an opponent to, got {prompt!r}")
        return self.opponents[prompt.strip()]
