"""A human in the loop: asks in the terminal what a response is worth."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from textenv.rewards.combinators import check_number
from textenv.tables import as_number

Ask = Callable[[str, str], str]
"""From prompt and response, made safe to show, to what the human typed."""


class HumanReward:
    """score = the number that a person gives, in [low, high]; for teaching, and for small numbers of episodes.

    The same prompt and response are asked about once: answers are kept, and saved in checkpoints.
    """

    def __init__(self, ask: Ask | None = None, *, low: float = -1.0, high: float = 1.0) -> None:
        """Prepare to ask.

        Args:
            ask: Shows a prompt and a response and returns what is typed; None: in the terminal.
            low: Lowest score.
            high: Highest score.

        Raises:
            ValueError: For bounds that are none.
        """
        check_number("low", low)
        check_number("high", high, low=low)
        self.ask = ask if ask is not None else _Terminal(low, high)
        self.low, self.high = low, high
        self.answers: dict[tuple[str, str], float] = {}

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One score a response."""
        return [self._one(pair) for pair in zip(prompts, responses, strict=True)]

    def _one(self, pair: tuple[str, str]) -> float:
        while pair not in self.answers:
            typed = self.ask(printable(pair[0]), printable(pair[1]))
            score = as_number(typed)
            if score is not None and self.low <= score <= self.high:
                self.answers[pair] = score
        return self.answers[pair]

    def state_dict(self) -> dict[str, Any]:
        """The answers so far."""
        return {"answers": [[*pair, score] for pair, score in self.answers.items()]} if self.answers else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.answers = {(prompt, response): float(score) for prompt, response, score in state.get("answers", [])}


def printable(text: str) -> str:
    r"""A text without what a terminal would obey: control and format characters are shown as escapes.

    Line ends and tabs stay.

    >>> printable("a\x1b[2Jb\u202ec\n")
    'a\\x1b[2Jb\\u202ec\n'
    """
    return "".join(
        char
        if char in "\n\t" or not unicodedata.category(char).startswith("C")
        else char.encode("unicode_escape").decode()
        for char in text
    )


class _Terminal:
    """Asks with rich, or plainly where it is not installed."""

    def __init__(self, low: float, high: float) -> None:
        self.question = f"Score from {low:g} to {high:g}: "

    def __call__(self, prompt: str, response: str) -> str:
        try:
            from rich.console import Console
            from rich.text import Text
        except ImportError:
            print(f"\n{prompt}[{response}]")
            return input(self.question)
        console = Console()
        # Text, not markup: a response may hold square brackets.
        console.print(Text.assemble("\n", (prompt, "dim"), (response, "bold")))
        return console.input(self.question, markup=False)
