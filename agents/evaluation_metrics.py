"""What an assessment says in numbers, alone and beside another of the same prompts, each with its uncertainty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agents import intervals
from agents.assessment import Assessment
from agents.evaluation import ngrams
from agents.intervals import Estimate, Statistic, over_optimised
from textenv.types import FinishReason

REPEATED = 4
"""Words of the n-grams that `repetition` counts, as in Welleck et al. 2020."""

SecondReward = Callable[[Assessment], Statistic]
"""What a second, unseen reward says of a whole assessment: `second_score`, or a corpus statistic such as `distinct`."""


@dataclass(frozen=True)
class Result:
    """One policy of a comparison."""

    assessment: Assessment
    """What it wrote."""
    metrics: Mapping[str, Estimate]
    """Its own numbers, as `metrics` gives them."""
    gains: Mapping[str, Estimate]
    """Against the baseline, as `gains` gives them; empty for the baseline itself."""
    over_optimised: bool | None
    """Whether the score rose while the second reward fell; None: neither is proven, or there is no second reward, or
    only one prompt."""

    @property
    def name(self) -> str:
        """What the policy is called."""
        return self.assessment.name

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON; numbers first, texts last."""
        return {
            "metrics": {name: estimate.as_dict() for name, estimate in self.metrics.items()},
            "gains": {name: estimate.as_dict() for name, estimate in self.gains.items()},
            "over_optimised": self.over_optimised,
            **self.assessment.as_dict(),
        }


def compare(
    assessments: Sequence[Assessment], second: SecondReward | None = None, tolerance: float = 0.0
) -> list[Result]:
    """The numbers of several policies; the first of them is the baseline of the others.

    Args:
        assessments: Of the same prompts, each with a name of its own.
        second: The second reward.
        tolerance: How far it may fall before a policy counts as over-optimised.

    Raises:
        ValueError: If there are none, or names are alike, or prompts differ.
    """
    names = [assessment.name for assessment in assessments]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"assessments: expected at least one and no name twice, got {names}")
    baseline, *others = assessments
    results = [Result(baseline, metrics(baseline, second), {}, None)]
    for ours in others:
        gained = gains(ours, baseline, second)
        known = second is not None and len(ours.prompts) > 1
        flag = over_optimised(gained["score_gain"], gained["second_gain"], tolerance) if known else None
        results.append(Result(ours, metrics(ours, second), gained, flag))
    return results


def metrics(assessment: Assessment, second: SecondReward | None = None) -> dict[str, Estimate]:
    """Every number of one policy, by name, each defined in `docs/evaluation.md`.

    Args:
        assessment: P prompts, n responses each.
        second: Adds `second`.
    """
    rows, lengths = assessment.by_prompt, assessment.by_prompt(assessment.lengths)
    stopped = [float(reason == FinishReason.STOP) for reason in assessment.finish_reasons]
    repeated = [repetition(text, REPEATED) for text in assessment.responses]
    found = {"score": intervals.mean(rows(assessment.scores)).estimate()}
    if second is not None:
        found["second"] = second(assessment).estimate()
    return found | {
        "kl": intervals.mean(rows(assessment.exact_kls)).estimate(),
        "kl_k1": intervals.mean(rows(assessment.kls)).estimate(),
        "kl_token": intervals.ratio(rows(assessment.exact_kls), lengths).estimate(),
        "kl_token_k1": intervals.ratio(rows(assessment.kls), lengths).estimate(),
        "entropy": intervals.ratio(rows(assessment.entropies), lengths).estimate(),
        "perplexity": intervals.ratio(rows(assessment.ref_nlls), lengths).exp().estimate(),
        "distinct_1": distinct(assessment, 1).estimate(),
        "distinct_2": distinct(assessment, 2).estimate(),
        "distinct_3": distinct(assessment, 3).estimate(),
        "repetition": intervals.mean(rows(repeated)).estimate(),
        "length": intervals.mean(lengths).estimate(),
        "stopped": intervals.share(rows(stopped)),
    }


def gains(ours: Assessment, baseline: Assessment, second: SecondReward | None = None) -> dict[str, Estimate]:
    """Numbers of one policy against another: differences and wins, paired by prompt.

    Args:
        ours: The policy in question.
        baseline: What it is compared with.
        second: Adds `second_gain`, and `second_wins` where single responses have second scores.

    Raises:
        ValueError: If the prompts differ.
    """
    if ours.prompts != baseline.prompts:
        raise ValueError(
            f"baseline: expected the {len(ours.prompts)} prompts of {ours.name!r} in their order, got "
            f"{len(baseline.prompts)} prompts that differ"
        )
    score, other = ours.by_prompt(ours.scores), baseline.by_prompt(baseline.scores)
    found = {
        "score_gain": (intervals.mean(score) - intervals.mean(other)).estimate(),
        "score_wins": intervals.wins(score, other),
    }
    if second is not None:
        found["second_gain"] = (second(ours) - second(baseline)).estimate()
        if ours.second_scores is not None and baseline.second_scores is not None:
            pair = ours.by_prompt(ours.second_scores), baseline.by_prompt(baseline.second_scores)
            found["second_wins"] = intervals.wins(*pair)
    return found


def second_score(assessment: Assessment) -> Statistic:
    """The mean of the second scores.

    Raises:
        ValueError: If there are none.
    """
    if assessment.second_scores is None:
        raise ValueError(f"assessment: expected second scores of {assessment.name!r}, got none")
    return intervals.mean(assessment.by_prompt(assessment.second_scores))


def distinct(assessment: Assessment, n: int) -> Statistic:
    """Share of the word n-grams of all responses together that differ, as `distinct_n`.

    Args:
        assessment: Compare only those of equal numbers of responses.
        n: Words of an n-gram.
    """
    each = assessment.per_prompt
    texts = [assessment.responses[i : i + each] for i in range(0, len(assessment.responses), each)]
    counts = [Counter(gram for text in of_prompt for gram in ngrams(text, n)) for of_prompt in texts]
    holders = Counter(gram for count in counts for gram in count)
    # Without a prompt, what it alone has is gone.
    own = [sum(holders[gram] == 1 for gram in count) for count in counts]
    total = [sum(count.values()) for count in counts]
    return intervals.of_sums(own, total, len(holders), sum(total))


def repetition(text: str, n: int) -> float:
    """Share of a text's word n-grams that are repeats, 1 − different/all (Welleck et al. 2020, "seq-rep-n").

    0 where the text has none.

    >>> repetition("a b a b a b", 2)
    0.6
    """
    grams = ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
