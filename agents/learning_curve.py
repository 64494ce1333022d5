"""The picture of a run: how the score rose, and what it cost in KL."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agents.tracking import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from agents.evaluation import Evaluation

Rows = Sequence[Mapping[str, float]]

# Metric keys that the learning curve draws; the first two come with every iteration, the others now and then.
SCORE, KL = "score/mean", "kl/sequence"
HELD_OUT_SCORE, HELD_OUT_KL = "eval/score_mean", "eval/kl_mean"

FONTS = ("Inter", "Source Sans 3", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")
LIGHT = {
    "ink": "#1f2430",
    "muted": "#7a8090",
    "grid": "#e9ebf0",
    "score": "#0b6e8f",
    "kl": "#b4652a",
    "paper": "#ffffff",
}
DARK = {
    "ink": "#e8e6e1",
    "muted": "#969ba8",
    "grid": "#2b2f3a",
    "score": "#5cc3e0",
    "kl": "#e3a06a",
    "paper": "#16181d",
}


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Centred running mean; at the start its window shrinks, at the end it looks back only.

    So the line starts where the run started, and does not end on one lucky iteration.

    >>> smoothed([0.0, 3.0, 6.0, 3.0, 6.0], 3)
    [0.0, 3.0, 4.0, 5.0, 4.5]
    """
    halves = [min(window // 2, i) for i in range(len(values))]
    windows = [values[i - half : i + half + 1] for i, half in enumerate(halves)]
    return [sum(part) / len(part) for part in windows]


def series(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """Iterations and values of one metric, where it was logged and is finite."""
    points = [(row["iteration"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    return [x for x, _ in points], [y for _, y in points]


def learning_curve(
    rows: Rows, before: Evaluation, colours: Mapping[str, str] = LIGHT, *, fixed_units: bool = True
) -> Figure:
    """Score over the untrained policy's mean ± sd, and under it the KL that the score has cost.

    Args:
        rows: Metric rows.
        before: Evaluation of the untrained policy: the band.
        colours: `LIGHT` or `DARK`.
        fixed_units: Whether what was paid is in the units of evaluations; else only the held-out scores are drawn.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(typeface()):
        figure = Figure(figsize=(8.6, 5.6), facecolor=colours["paper"])
        FigureCanvasAgg(figure)
        score, kl = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
        drawn, unit = (SCORE, "mean per response") if fixed_units else (HELD_OUT_SCORE, "mean per held-out response")
        last = draw_curve(score, rows, drawn, HELD_OUT_SCORE, colours["score"], colours)
        draw_band(score, before.summary, last, colours)
        draw_curve(kl, rows, KL, HELD_OUT_KL, colours["kl"], colours)
        kl.set_ylim(bottom=min([0.0, *series(rows, KL)[1]]))
        name_panel(score, "Score", unit, colours)
        name_panel(kl, "KL to the reference", "nats per response", colours)
        kl.set_xlabel("iteration", color=colours["muted"], loc="right")
        figure.subplots_adjust(left=0.045, right=0.87, top=0.92, bottom=0.09, hspace=0.34)
        figure.canvas.draw()
    return figure


def typeface() -> dict[Any, Any]:
    """Matplotlib's settings of type: the first of `FONTS` that are installed."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    fonts = [font for font in FONTS if font in installed]
    return {"font.family": fonts or "sans-serif", "font.size": 10.5, "axes.unicode_minus": True}


def draw_band(axes: Axes, summary: Mapping[str, float], last: float, colours: Mapping[str, str]) -> None:
    """The untrained policy's score: mean as a line, one standard deviation on either side.

    Args:
        axes: Panel of the score.
        summary: Numbers of the untrained policy.
        last: Where the score's own label stands; this one gives way.
        colours: `LIGHT` or `DARK`.
    """
    mean, sd = summary["score_mean"], summary["score_sd"]
    axes.axhspan(mean - sd, mean + sd, color=colours["muted"], alpha=0.13, linewidth=0)
    axes.axhline(mean, color=colours["muted"], linewidth=1, dashes=(4, 3))
    bottom, top = axes.get_ylim()
    crowded = abs(last - mean) < 0.13 * (top - bottom)
    axes.annotate(
        f"before\n{number(mean)} ± {number(sd)}",
        xy=(1, mean),
        xycoords=axes.get_yaxis_transform(),
        xytext=(9, 0 if not crowded else -27 if last >= mean else 27),
        textcoords="offset points",
        va="center",
        color=colours["muted"],
        fontsize=9.5,
    )


def draw_curve(axes: Axes, rows: Rows, key: str, held_out: str, colour: str, colours: Mapping[str, str]) -> float:
    """Each iteration faintly, a running mean, held-out points as rings; returns the last value, written at the end."""
    x, y = series(rows, key)
    if not x:
        return math.nan
    window = max(1, len(y) // 12)
    mean = smoothed(y, window)
    if window > 1:
        axes.plot(x, y, color=colour, linewidth=1, alpha=0.3)
    axes.plot(x, mean, color=colour, linewidth=2.4, solid_capstyle="round", clip_on=False)
    axes.plot(x[-1], mean[-1], "o", color=colour, markersize=5, clip_on=False)
    axes.plot(*series(rows, held_out), "o", color=colours["paper"], markeredgecolor=colour, markersize=6, clip_on=False)
    axes.set_xlim(x[0], max(x[-1], x[0] + 1))
    axes.annotate(
        number(mean[-1]),
        xy=(x[-1], mean[-1]),
        xytext=(9, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        fontsize=13,
        fontweight="bold",
        annotation_clip=False,
    )
    return mean[-1]


def name_panel(axes: Axes, name: str, unit: str, colours: Mapping[str, str]) -> None:
    """A panel's title at its left edge, light horizontal lines, and no box."""
    title = axes.annotate(
        name, (0, 1), (0, 12), axes.transAxes, "offset points", color=colours["ink"], fontsize=12.5, fontweight="bold"
    )
    beside = (title, axes.transAxes)
    axes.annotate(unit, (1, 1), (7, 12), beside, "offset points", color=colours["muted"], fontsize=10)
    axes.set_facecolor(colours["paper"])
    axes.grid(axis="y", color=colours["grid"], linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=colours["muted"], labelsize=9.5, pad=6)
    axes.spines[:].set_visible(False)
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", integer=True)


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file, the same bytes each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()
