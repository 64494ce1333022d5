"""The words and numbers of a comparison of policies, as they are printed in whatever form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agents.assessment import Assessment
from agents.evaluation_metrics import Result
from agents.intervals import FEW, Estimate
from agents.report import Headline
from agents.tracking import number
from textenv.rewards.human import printable
from textenv.types import FinishReason

TABLE_ROWS = 2000
"""Most responses in the table of samples; the JSON file has all."""


@dataclass(frozen=True)
class Line:
    """One row of the table of numbers."""

    key: str
    """In `Result.metrics` or `Result.gains`."""
    name: str
    """As it is printed."""
    meaning: str
    """What it is, in a few words."""
    digits: int = 2
    """After the point."""
    share: bool = False
    """Whether it is printed in per cent, with the interval's ends."""


def lines(second_name: str) -> list[Line]:
    """The rows of the table of numbers, in order; those that a comparison lacks are left out."""
    return [
        Line("score", "Score", "mean of the reward that was trained on", 3),
        Line("score_gain", "gain", "against the baseline, paired by prompt", 3),
        Line("score_wins", "wins", "against the baseline, ties count half", share=True),
        Line("second", second_name, "a reward that training never saw", 3),
        Line("second_gain", "gain", "against the baseline, paired by prompt", 3),
        Line("second_wins", "wins", "against the baseline, ties count half", share=True),
        Line("kl", "KL per response", "nats, exact at each state visited"),
        Line("kl_k1", "estimated from tokens", "nats, mean of k1"),
        Line("kl_token", "KL per token", "nats, exact at each state visited", 3),
        Line("kl_token_k1", "estimated from tokens", "nats, mean of k1", 3),
        Line("entropy", "Entropy", "nats per token", 3),
        Line("perplexity", "Perplexity", "of the responses under the reference"),
        Line("distinct_1", "Distinct-1", "share of words that differ, all responses together", 3),
        Line("distinct_2", "Distinct-2", "share of word pairs that differ", 3),
        Line("distinct_3", "Distinct-3", "share of word triples that differ", 3),
        Line("repetition", "Repetition", "share of repeated four-word sequences within a response", 3),
        Line("length", "Length", "tokens", 1),
        Line("stopped", "Stopped", "ended by a stop token", share=True),
    ]


SUBORDINATE = {"score_gain", "score_wins", "second_gain", "second_wins", "kl_k1", "kl_token_k1"}
"""Rows that say more about the one above."""


def printed(estimate: Estimate | None, line: Line, *, signed: bool = False) -> str:
    """A number with its 95 % interval, as people read it.

    >>> printed(Estimate(1.5, 0.1, 1.3, 1.7), Line("score", "Score", ""))
    '1.50 ± 0.20'
    >>> printed(Estimate(0.9, 0.02, 0.85, 0.94), Line("wins", "Wins", "", share=True))
    '90 % (85–94)'
    """
    if estimate is None:
        return ""
    known = math.isfinite(estimate.se)
    if line.share:
        ends = f" ({100 * estimate.low:.0f}–{100 * estimate.high:.0f})" if known else ""
        return f"{100 * estimate.value:.0f} %{ends}"
    shown = number(estimate.value, line.digits)
    plus = "+" if signed and estimate.value >= 0 else ""
    return f"{plus}{shown}" + (f" ± {number(estimate.high - estimate.value, line.digits)}" if known else "")


def number_rows(results: Sequence[Result], second_name: str) -> list[tuple[Line, list[str]]]:
    """The table of numbers: each line with a cell a policy; a cell that does not apply is empty."""
    rows = []
    for line in lines(second_name):
        estimates = [({**result.metrics, **result.gains}).get(line.key) for result in results]
        if any(estimate is not None for estimate in estimates):
            rows.append((line, [printed(e, line, signed=line.key.endswith("_gain")) for e in estimates]))
    return rows


def verdicts(results: Sequence[Result], second_name: str) -> list[tuple[str, bool | None]]:
    """A sentence a policy, whether it is over-optimised or this is not known, and the flag; one if none was asked."""
    ours = results[1:]
    if ours and (len(results[0].assessment.prompts) < 2 or all("second_gain" not in one.gains for one in ours)):
        return [("No second reward over two prompts or more, so over-optimisation was not looked for.", None)]
    return [(_verdict(result, second_name), result.over_optimised) for result in ours]


def _verdict(result: Result, second_name: str) -> str:
    score, second = (printed(result.gains[key], Line(key, "", "", 3), signed=True) for key in VERDICT)
    state = {
        True: " is over-optimised",
        False: " is not over-optimised",
        None: ": over-optimisation is neither shown nor ruled out",
    }[result.over_optimised]
    return f"{result.name}{state}: score {score}, {second_name} {second} against the baseline."


def caution(results: Sequence[Result]) -> str:
    """What is to be known before any interval is read; nothing where there are prompts enough."""
    count = len(results[0].assessment.prompts)
    return f"{count} prompts are few: below {FEW} the intervals are too narrow." if 1 < count < FEW else ""


VERDICT = ("score_gain", "second_gain")
"""What the flag is made of."""


def headlines(results: Sequence[Result], second_name: str) -> list[Headline]:
    """The numbers that sum up the first policy beside the baseline, most important first."""
    baseline, ours = results[0], results[min(1, len(results) - 1)]
    table = {line.key: line for line in lines(second_name)}

    def change(key: str) -> str:
        gain = ours.gains.get(key)
        return printed(gain, table[key], signed=True) if gain is not None else ""

    variety = baseline.metrics["distinct_2"].value
    kept = f"{100 * ours.metrics['distinct_2'].value / variety:.0f} % of the baseline's" if variety else ""
    wanted = (
        ("score", change("score_gain"), "difference with its 95 % interval"),
        ("second", change("second_gain"), "training never saw it"),
        ("kl", "nats per response", "distance from the reference"),
        ("distinct_2", kept, "share of word pairs that differ"),
    )
    found = []
    twice = ours.metrics.get("second") == ours.metrics["distinct_2"]  # that is the second reward itself
    for key, text, meaning in wanted:
        if key in ours.metrics and not (key == "distinct_2" and twice):
            old, new = (number(result.metrics[key].value) for result in (baseline, ours))
            found.append(Headline(table[key].name, old, new, text, meaning))
    return found


def sample_rows(results: Sequence[Result], limit: int = TABLE_ROWS) -> list[dict[str, Any]]:
    """One row a response: whole prompts in their order, every policy's responses to one before the next."""
    rows = []
    per_prompt = results[0].assessment.per_prompt
    prompts = results[0].assessment.prompts
    for index in range(min(len(prompts), max(1, limit // (per_prompt * len(results))))):
        for order, result in enumerate(results):
            a = result.assessment
            for i in range(index * per_prompt, (index + 1) * per_prompt):
                rows.append(
                    {
                        "number": index + 1,
                        "policy": order,
                        "name": printable(result.name),
                        "prompt": printable(a.prompts[index]),
                        "response": printable(a.responses[i]),
                        "score": a.scores[i],
                        "second": None if a.second_scores is None else a.second_scores[i],
                        "kl": a.kls[i],
                        "length": a.lengths[i],
                        "stopped": a.finish_reasons[i] == FinishReason.STOP,
                    }
                )
    return rows


def counted(assessment: Assessment) -> str:
    """How much was sampled."""
    each = assessment.per_prompt
    return f"{len(assessment.prompts)} held-out prompts, {each} response{'s' if each > 1 else ''} to each."
