"""A report on a reward model: on the terminal, as JSON, as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

INK, FAINT = "#1f4e82", "0.7"


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json` and `calibration.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf8")
    picture(report).savefig(folder / "calibration.png", dpi=110)


def picture(report: Mapping[str, Any]) -> Figure:
    """The calibration curve and the accuracy by gap, each with bars of two standard errors."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    heldout, ratings = report["heldout"], report["task"] == "ratings"
    bins = heldout["calibration"]["bins"]
    ends = [f([b["predicted"] for b in bins]) for f in (min, max)] if ratings else [0.5, 1.0]
    left.plot(ends, ends, color=FAINT, linewidth=1, linestyle=":")
    _points(left, bins)
    left.set(
        xlabel="predicted rating" if ratings else "probability given to the choice",
        ylabel="mean rating" if ratings else "share of right choices",
        title=f"calibration error {heldout['calibration']['error']:.3f}",
    )
    _points(right, heldout["by_gap"]["bins"])
    right.axhline(0.5, color=FAINT, linewidth=1, linestyle=":")
    right.set(xlabel=f"{heldout['by_gap']['of']} gap", ylabel="accuracy", title=_percent(heldout["accuracy"]))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _points(axes: Any, bins: Sequence[Mapping[str, Any]]) -> None:
    x, y = ([b[key] for b in bins] for key in ("predicted", "observed"))
    errors = [2 * b["standard_error"] for b in bins]
    axes.errorbar(x, y, yerr=errors, color=INK, marker="o", markersize=4, linewidth=1.2, elinewidth=0.8)


def show(console: Console, report: Mapping[str, Any]) -> None:
    """Print the figures."""
    heldout = report["heldout"]
    console.print(
        f"held-out accuracy [bold]{_percent(heldout['accuracy'])}[/] on {heldout['accuracy']['count']} choices"
    )
    for name in ("loss", "rmse", "correlation"):
        if name in heldout:
            console.print(f"{name} {heldout[name]:.3f}")
    error = heldout["calibration"]["error"]
    console.print(_table(f"Calibration (error {error:.3f})", heldout["calibration"]["bins"], "predicted", "true"))
    of = heldout["by_gap"]["of"]
    console.print(_table(f"Accuracy by {of} gap", heldout["by_gap"]["bins"], "mean gap", "right"))


def _table(title: str, bins: Sequence[Mapping[str, Any]], first: str, second: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("from", "to", "count", first, second, "± SE"):
        table.add_column(heading, justify="right")
    for b in bins:
        numbers = (b[key] for key in ("predicted", "observed", "standard_error"))
        table.add_row(f"{b['low']:.2f}", f"{b['high']:.2f}", str(b["count"]), *(f"{number:.3f}" for number in numbers))
    return table


def _percent(share: Mapping[str, Any]) -> str:
    """`71.2 % (69.6 to 72.8)`."""
    return f"{100 * share['value']:.1f} % ({100 * share['low']:.1f} to {100 * share['high']:.1f})"


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error from the unbiased variance."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
