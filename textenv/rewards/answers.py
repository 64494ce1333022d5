"""Rewards of answers that can be checked: against the right one, which is looked up by prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from textenv.rewards.combinators import check_number

MAX_DIGITS = 100
"""A longer run of digits is no number: Python refuses to convert very long ones, and a model may write any."""

# A sign counts where nothing is subtracted from a number, a word or a bracket: "5-3" ends with 3, "is -3" with -3.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]])[-+−])?\$?"
    r"(?P<whole>(?<![0-9.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?"
    r"(?P<decimals>\.[0-9]+)?"
    r"(?P<below>/[0-9]+)?"
)


def last_number(text: str) -> Fraction | None:
    r"""The last number that is written in a text, exactly; None if there is none.

    Signs (`-`, `+`, `−`), thousands separators (`1,234`), decimals and simple fractions (`3/4`) are read, and a dollar
    between sign and digits is skipped. A fraction over 0 is no number.

    >>> [str(last_number(text)) for text in ("12 - 5 is 7.", "-1,234.5", "so 3/4", "none")]
    ['7', '-2469/2', '3/4', 'None']
    """
    found = [number for match in _NUMBER.finditer(text) if (number := _value(match)) is not None]
    return found[-1] if found else None


def _value(match: re.Match[str]) -> Fraction | None:
    whole, decimals, below = match["whole"] or "", match["decimals"] or "", match["below"]
    if not (whole or decimals) or max(map(len, (whole, decimals, below or ""))) > MAX_DIGITS:
        return None
    value = Fraction((whole.replace(",", "") or "0") + decimals)
    if below is not None:
        if not int(below[1:]):
            return None
        value /= int(below[1:])
    return -value if match["sign"] in ("-", "−") else value


def _looked_up(answers: Mapping[str, str], prompt: str) -> str:
    if prompt.strip() not in answers:
        raise ValueError(f"expected a prompt that there is an answer to, got {prompt!r}")
    return answers[prompt.strip()]


def _by_prompt(answers: Mapping[str, str], *, argument: str) -> dict[str, str]:
    """Without white space around the prompts, which tokenizers do not keep."""
    if not isinstance(answers, Mapping) or not answers:
        raise ValueError(f"{argument}: expected texts by prompt, got {answers!r}")
    stripped = {str(prompt).strip(): str(answer) for prompt, answer in answers.items()}
    if len(stripped) < len(answers):
        raise ValueError(
            f"{argument}: expected prompts that differ in more than white space around them, got two alike"
        )
    return stripped


@dataclass(frozen=True)
class NumericAnswer:
    """score = right if the last number in the response is the right one, wrong if it is another, none if there is none.

    Numbers are compared exactly, as fractions: 0.5, 1/2 and .50 are one answer. The reward of verifiable arithmetic, as
    on GSM8K (Cobbe et al. 2021, arXiv 2110.14168).

    >>> NumericAnswer({"2 + 2 =": "4"})(["2 + 2 ="] * 3, [" 4", " It is 5.", " four"])
    [1.0, 0.0, 0.0]
    """

    answers: Mapping[str, str]
    """By prompt: a text whose last number is the right one. White space around prompts does not count."""
    right: float = 1.0
    """Score of the right number."""
    wrong: float = 0.0
    """Score of another number."""
    none: float = 0.0
    """Score of no number."""
    tolerance: float = 0.0
    """How far off still is right, ≥ 0."""

    def __post_init__(self) -> None:
        """Check that every answer is a number."""
        object.__setattr__(self, "answers", _by_prompt(self.answers, argument="answers"))
        for name in ("right", "wrong", "none"):
            check_number(name, getattr(self, name))
        check_number("tolerance", self.tolerance, low=0.0)
        for prompt, answer in self.answers.items():
            if last_number(answer) is None:
                raise ValueError(f"answers: expected a number for {prompt!r}, got {answer!r}")

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One score a response."""
        return [self._one(p, r) for p, r in zip(prompts, responses, strict=True)]

    def _one(self, prompt: str, response: str) -> float:
        expected, found = last_number(_looked_up(self.answers, prompt)), last_number(response)
        if found is None or expected is None:
            return self.none
        return self.right if abs(found - expected) <= Fraction(self.tolerance) else self.wrong


@dataclass(frozen=True)
class ExactAnswer:
    """score = 1 if the response is the right one but for white space at its ends and, unless `case`, its case; else 0.

    >>> ExactAnswer({"2 + 2 is": "four"})(["2 + 2 is"] * 2, [" Four", " four, of course"])
    [1.0, 0.0]
    """

    answers: Mapping[str, str]
    """By prompt. White space around prompts does not count."""
    case: bool = False
    """Whether upper and lower case differ."""

    def __post_init__(self) -> None:
        """Check that there are answers."""
        object.__setattr__(self, "answers", _by_prompt(self.answers, argument="answers"))

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One score a response."""
        pairs = zip(prompts, responses, strict=True)
        return [float(self._plain(r) == self._plain(_looked_up(self.answers, p))) for p, r in pairs]

    def _plain(self, text: str) -> str:
        return text.strip() if self.case else text.strip().casefold()
