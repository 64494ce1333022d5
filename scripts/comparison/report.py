"""The table and the learning curves of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.comparison.entries import ASIDE, ENTRIES, PPO_VARIANTS, Entry, seeds_of
from scripts.valence import KL_COEF

START = 3.34
"""Objective of the untrained model."""
NATIVE = "ppo"
"""What its variants are compared with."""

_HEAD = """# All algorithms on one task

The task of `scripts/valence.py`: `stories260K` learns to write words of positive valence, β = {kl_coef}. Every
algorithm has 3,840 episodes of 48 tokens. Its objective, score − β·KL of the law that acted against the full reference,
is the mean over the last 320; the untrained model has {start}. One thread and one process a run. CPU seconds are those
of training alone, peak memory is the whole process's (about 450 MB of it are imports). Means ± standard errors over
seeds.

    python scripts/compare_algorithms.py --jobs 2

{machine}.

"""


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], machine: str) -> None:
    """Write the Markdown page."""
    lines = [
        "| algorithm | library | objective | score | KL | CPU s | peak MB | seeds |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, entry in ENTRIES.items():
        mine = _of(rows, name)
        if mine:
            figures = [mean_se([row[key] for row in mine]) for key in ("objective", "score", "kl")]
            costs = [f"{np.mean([row[key] for row in mine]):.0f}" for key in ("cpu_seconds", "peak_mb")]
            lines.append(f"| {name} | {entry.library} | {' | '.join([*figures, *costs, str(len(mine))])} |")
    text = _HEAD.format(kl_coef=KL_COEF, start=START, machine=machine) + "\n".join(lines) + "\n\n" + _variants(rows)
    text += _notes(rows) + _unfinished(rows) + "## Every run\n\n" + _every(rows)
    path.write_text(text, encoding="utf8")


def mean_se(values: Sequence[float]) -> str:
    """`mean ± standard error`; the error of one value is unknown."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {standard_error(values):.2f}"


def standard_error(values: Sequence[float]) -> float:
    """Of the mean, from the unbiased variance."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def verdict(ours: Sequence[float], theirs: Sequence[float], start: float = START) -> str:
    """Whether two sets of seeds agree within noise.

    Δ is within noise if |Δ| ≤ 2 SE(Δ), and that says something only if SE(Δ) ≤ 5 % of the gain over the start.
    """
    if min(len(ours), len(theirs)) < 2:
        return "one seed"
    delta = float(np.mean(ours) - np.mean(theirs))
    error = math.hypot(standard_error(ours), standard_error(theirs))
    if abs(delta) > 2 * error:
        return f"{delta:+.2f} ± {error:.2f}: differs"
    if error > 0.05 * (float(np.mean(theirs)) - start):
        return f"{delta:+.2f} ± {error:.2f}: too noisy to tell"
    return f"{delta:+.2f} ± {error:.2f}: the same"


def _variants(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every other PPO against the native one."""
    native = [row["objective"] for row in _of(rows, NATIVE)]
    lines = ["## Other PPOs against the native one", "", "| | Δ objective |", "|---|---|"]
    for name in PPO_VARIANTS:
        mine = [row["objective"] for row in _of(rows, name)]
        if name != NATIVE and mine and native:
            lines.append(f"| {name} | {verdict(mine, native)} |")
    return "\n".join(lines) + "\n\n" + _minibatches(rows)


_MINIBATCHES = """Stock PPO of a library learns from minibatches of transitions, drawn from all episodes of a rollout;
the native one, and "by episode", from whole episodes. Tokens of one episode share one score, so a minibatch of a few
episodes estimates the gradient with more noise than as many tokens of all of them. Within one library nothing else
differs:

| | Δ objective |
|---|---|
"""


def _minibatches(rows: Sequence[Mapping[str, Any]]) -> str:
    """Stock minibatches against those by episode, of each library that has both."""
    lines = []
    for name in PPO_VARIANTS:
        stock, whole = ([row["objective"] for row in _of(rows, one)] for one in (name, f"{name} by episode"))
        if stock and whole:
            lines.append(f"| {name}, against {name} by episode | {verdict(stock, whole)} |\n")
    return _MINIBATCHES + "".join(lines) + "\n" if lines else ""


def _notes(rows: Sequence[Mapping[str, Any]]) -> str:
    noted = [f"- **{name}**: {ENTRIES[name].note}" for name in ENTRIES if ENTRIES[name].note and _of(rows, name)]
    return "## What differs from the defaults\n\n" + "\n".join(noted) + "\n\n" if noted else ""


def _unfinished(rows: Sequence[Mapping[str, Any]]) -> str:
    """Entries that lack seeds, so that nobody takes the table for more than it is."""
    lacking = [name for name in ENTRIES if name not in ASIDE and len(_of(rows, name)) < len(seeds_of(name))]
    if not lacking:
        return ""
    return f"## Not yet run with all seeds\n\n{', '.join(lacking)}.\n\n"


def _every(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| algorithm | " + " | ".join(f"seed {seed}" for seed in _seeds(rows)) + " |"]
    lines.append("|---" * (len(_seeds(rows)) + 1) + "|")
    for name in ENTRIES:
        found = {row["seed"]: f"{row['objective']:.2f}" for row in _of(rows, name)}
        if found:
            lines.append(f"| {name} | " + " | ".join(found.get(seed, "") for seed in _seeds(rows)) + " |")
    return "\n".join(lines) + "\n"


def _seeds(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted({row["seed"] for row in rows})


def _of(rows: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return sorted((row for row in rows if row["algorithm"] == name), key=lambda row: row["seed"])


# ----------------------------------------------------------------------------------------------------- curves


def write_curves(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One picture an algorithm: objective against episodes, every seed and their mean, native PPO in grey."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    native = _curves(_of(rows, NATIVE))
    for name, entry in ENTRIES.items():
        curves = _curves(_of(rows, name))
        if not curves:
            continue
        figure = Figure(figsize=(5.2, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.axhline(START, color="0.75", linewidth=1, linestyle=":")
        if native and name != NATIVE:
            axes.plot(*_mean(native), color="0.7", linewidth=1.5, label="native PPO")
        for x, y in curves:
            axes.plot(x, y, color="#3b6ea5", linewidth=0.7, alpha=0.35)
        axes.plot(*_mean(curves), color="#1f4e82", linewidth=2, label=_title(name, entry))
        axes.set(xlabel="episodes", ylabel="score − β·KL", xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left")
        figure.savefig(folder / f"{name.replace(' ', '_').replace('++', '_pp')}.png", dpi=110)


def _title(name: str, entry: Entry) -> str:
    return f"{name} ({entry.library})" if entry.library == "textenv" else name


def _curves(rows: Sequence[Mapping[str, Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Episodes and objective of each seed, smoothed over 320 episodes."""
    curves = []
    for row in rows:
        counts, scores, kls = (np.array(column, dtype=float) for column in zip(*row["curve"], strict=True))
        objective = np.repeat(scores - KL_COEF * kls, counts.astype(int))
        sums = np.concatenate([[0.0], objective.cumsum()])
        x = np.arange(320, len(objective) + 1, 64)
        curves.append((x, (sums[x] - sums[x - 320]) / 320))
    return curves


def _mean(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    length = min(len(x) for x, _ in curves)
    return curves[0][0][:length], np.mean([y[:length] for _, y in curves], axis=0)
