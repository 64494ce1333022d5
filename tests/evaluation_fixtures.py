"""Assessments written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agents.assessment import Assessment

TEXTS = ["a b a b", "b c", "a b", "d e f d e f"]


def assessment(
    name: str = "model",
    scores: Sequence[float] = (1.0, 2.0, 3.0, 6.0),
    second: Sequence[float] | None = None,
    responses: Sequence[str] = TEXTS,
    prompts: Sequence[str] = ("Once", "The cat"),
    **changes: Any,
) -> Assessment:
    """Two prompts, two responses each."""
    count = len(responses)
    fields: dict[str, Any] = {
        "lengths": [4, 2, 2, 6][:count],
        "finish_reasons": [1, 2, 2, 2][:count],
        "kls": [1.0, -0.5, 2.0, 4.5][:count],
        "exact_kls": [1.5, 0.5, 1.0, 4.0][:count],
        "entropies": [4.0, 1.0, 3.0, 6.0][:count],
        "ref_nlls": [6.0, 3.0, 4.0, 8.0][:count],
    }
    return Assessment(
        name=name,
        per_prompt=count // len(prompts),
        prompts=list(prompts),
        responses=list(responses),
        scores=list(scores),
        second_scores=None if second is None else list(second),
        **{**fields, **changes},
    )
