"""Algorithms as JSON: what a checkpoint keeps of them, and how they are made again.

Components of this package are kept with their settings, but for an algorithm's `defaults`: what acts in a run is the
agent's config. What somebody else wrote, a function or a class, is kept by its name: only its author can make it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from agents.algorithms import aggregation, estimators, objectives
from agents.algorithms.base import Algorithm, ValueLoss

_OWN: tuple[type, ...] = (
    Algorithm,
    ValueLoss,
    estimators.GAE,
    estimators.DecoupledGAE,
    estimators.LengthAdaptiveGAE,
    estimators.ReturnToGo,
    estimators.RunningBaseline,
    estimators.GreedyBaseline,
    estimators.LeaveOneOut,
    estimators.GroupNormalized,
    estimators.Whitened,
    estimators.Scaled,
    objectives.Clipped,
    objectives.SequenceClipped,
    objectives.PolicyGradient,
    objectives.ReferenceKL,
    aggregation.TokenMean,
    aggregation.SequenceMean,
    aggregation.FixedLength,
)


def describe(part: Any) -> Any:
    """A component, or a number in one, as JSON.

    >>> describe(estimators.GAE(0.95))
    {'type': 'GAE', 'settings': {'lam': 0.95}}
    >>> describe(len)
    {'yours': 'builtins.len'}
    >>> describe((1, 2))
    {'type': 'tuple', 'settings': {'0': 1, '1': 2}}
    """
    if part is None or isinstance(part, bool | int | float | str):
        return part
    kind = type(part)
    if kind in (tuple, list):
        return {"type": kind.__name__, "settings": {str(place): describe(value) for place, value in enumerate(part)}}
    if kind is partial:
        arguments = {"function": part.func, "args": part.args, **{f"{key}=": v for key, v in part.keywords.items()}}
        return {"type": "partial", "settings": {key: describe(value) for key, value in arguments.items()}}
    if is_dataclass(part) and not isinstance(part, type):
        settings = {
            field.name: describe(getattr(part, field.name)) for field in fields(part) if field.name != "defaults"
        }
        if kind in _OWN:
            return {"type": kind.__name__, "settings": settings}
        return {"yours": f"{kind.__module__}.{kind.__qualname__}", "settings": settings}
    named = part if _has_a_name(part) else kind
    return {"yours": f"{named.__module__}.{named.__qualname__}"}


def _has_a_name(part: Any) -> bool:
    """Whether it is a function or a class, which has a name of its own."""
    return callable(part) and isinstance(getattr(part, "__qualname__", None), str)


def make(described: Any) -> Any:
    """The component that was described.

    Raises:
        ValueError: If it holds something that is not of this package.

    >>> make(describe(estimators.GAE(0.95)))
    GAE(lam=0.95)
    """
    if not isinstance(described, Mapping):
        return described
    kinds = {kind.__name__: kind for kind in _OWN}
    if described.get("type") in ("tuple", "list", "partial"):
        values = {name: make(value) for name, value in described["settings"].items()}
        if described["type"] == "partial":
            keywords = {name[:-1]: value for name, value in values.items() if name.endswith("=")}
            return partial(values["function"], *values["args"], **keywords)
        return (tuple if described["type"] == "tuple" else list)(values.values())
    if described.get("type") not in kinds:
        what = described.get("yours", described.get("type"))
        raise ValueError(f"algorithm: expected the one that was saved, because {what} in it is not ours, got None")
    return kinds[described["type"]](**{name: make(value) for name, value in described["settings"].items()})


def name_of(described: Mapping[str, Any]) -> str:
    """The name of a described `Algorithm`."""
    return described["settings"]["name"]


def check_same(given: Algorithm, described: Any) -> None:
    """Raise unless an algorithm is the one that was described.

    Raises:
        ValueError: Naming the first part that differs.
    """
    found = difference(describe(given), described, "algorithm")
    if found is not None:
        where, was, now = found
        raise ValueError(f"{where}: expected what was saved, {was!r}, got {now!r}")


def difference(now: Any, was: Any, where: str) -> tuple[str, Any, Any] | None:
    """The first place where two descriptions differ, and what stood and stands there.

    >>> difference(describe(estimators.GAE(0.9)), describe(estimators.GAE(0.95)), "estimator")
    ('estimator.lam', 0.95, 0.9)
    """
    if isinstance(now, Mapping) and isinstance(was, Mapping):
        heads = [{key: value for key, value in side.items() if key != "settings"} for side in (now, was)]
        if heads[0] != heads[1]:
            return (where, *(next(iter(head.values()), None) for head in reversed(heads)))  # type: ignore[return-value]
        mine, theirs = now.get("settings", {}), was.get("settings", {})
        for name in sorted(mine.keys() | theirs.keys()):
            found = difference(mine.get(name), theirs.get(name), f"{where}.{name}")
            if found is not None:
                return found
        return None
    return None if now == was else (where, was, now)
