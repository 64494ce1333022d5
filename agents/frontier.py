"""The KL–reward frontier: what a score has cost in KL, and what a second, unseen reward says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.evaluation_metrics import Result
from agents.intervals import Estimate
from agents.learning_curve import LIGHT, name_panel, typeface

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """One policy: a checkpoint of a run, or a run with its own β."""

    name: str
    """What stands beside it."""
    kl: Estimate
    """KL to the reference, nats per response."""
    score: Estimate
    """Mean of the reward that was trained on."""
    second: Estimate | None = None
    """Of a reward that training never saw."""
    over_optimised: bool | None = None
    """Whether the score rose while the second reward fell."""


Lines = Sequence[Sequence[str]]
"""Names of points that a line joins, in its order: checkpoints of one run, or runs that differ in β alone."""


def points(results: Sequence[Result]) -> list[Point]:
    """The policies of a comparison, by KL, least first."""
    found = [
        Point(r.name, r.metrics["kl"], r.metrics["score"], r.metrics.get("second"), r.over_optimised) for r in results
    ]
    return sorted(found, key=lambda point: point.kl.value)


def frontier_figure(
    found: Sequence[Point],
    second_name: str = "Second reward",
    colours: Mapping[str, str] = LIGHT,
    lines: Lines = (),
) -> Figure:
    """Score against KL, and under it the second reward; bars are 95 % intervals, hollow points are over-optimised.

    Points that no line joins are diamonds.

    The axis of KL is that of its square root, along which scores rise most evenly (Gao, Schulman & Hilton 2023,
    "Scaling laws for reward model overoptimization").

    Args:
        found: Policies, in any order.
        second_name: Title of the lower panel, which is there if every point has a second reward.
        colours: `LIGHT` or `DARK`.
        lines: What is joined.

    Raises:
        ValueError: If there is no point, or a line joins one that is not there.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not found:
        raise ValueError("found: expected at least one point, got none")
    ordered = sorted(found, key=lambda point: point.kl.value)
    unknown = {name for line in lines for name in line} - {point.name for point in found}
    if unknown:
        raise ValueError(f"lines: expected names of points, got {sorted(unknown)}")
    seconds = [point.second for point in ordered if point.second is not None]
    both = len(seconds) == len(ordered)
    with rc_context(typeface()):
        figure = Figure(figsize=(8.6, 6.4 if both else 4.2), facecolor=colours["paper"])
        FigureCanvasAgg(figure)
        panels = figure.subplots(2 if both else 1, 1, sharex=True, squeeze=False)[:, 0]
        draw_points(panels[0], ordered, [point.score for point in ordered], colours["score"], colours, lines)
        name_panel(panels[0], "Score", "mean per response, 95 % intervals", colours)
        if both:
            draw_points(panels[1], ordered, seconds, colours["kl"], colours, lines)
            name_panel(panels[1], second_name, "not trained on; hollow where over-optimised", colours)
        panels[-1].set_xlabel("KL to the reference, nats per response", color=colours["muted"], loc="right")
        bottom = 0.085 if both else 0.13
        figure.subplots_adjust(left=0.07, right=0.96, top=0.93 if both else 0.89, bottom=bottom, hspace=0.26)
        figure.canvas.draw()
    return figure


def draw_points(
    axes: Axes,
    ordered: Sequence[Point],
    values: Sequence[Estimate],
    colour: str,
    colours: Mapping[str, str],
    lines: Lines,
) -> None:
    """One panel: points with their intervals both ways, the lines, and a name at each.

    Args:
        axes: The panel.
        ordered: Points by KL.
        values: What is drawn of each.
        colour: Of the panel.
        colours: `LIGHT` or `DARK`.
        lines: What is joined.
    """
    x, y = [point.kl.value for point in ordered], [value.value for value in values]
    axes.set_xscale("function", functions=(signed_root, signed_square))
    places = {point.name: place for point, place in zip(ordered, zip(x, y, strict=True), strict=True)}
    lines = [line for line in lines if len(line) > 1]
    joined = [[places[name] for name in line] for line in lines]
    for line in joined:
        axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.2, alpha=0.45)
    across, up = _bars([point.kl for point in ordered]), _bars(values)
    axes.errorbar(x, y, xerr=across, yerr=up, fmt="none", ecolor=colour, elinewidth=1.6)
    for point, value in zip(ordered, values, strict=True):
        face = colours["paper"] if point.over_optimised else colour
        shape = "o" if any(point.name in line for line in lines) else "D"
        axes.plot(
            point.kl.value, value.value, shape, color=face, markeredgecolor=colour, markeredgewidth=1.8, markersize=7
        )
    widest = max(0.0, *(value + bar for value, bar in zip(x, across[1], strict=True))) ** 0.5
    axes.set_xlim(-((0.04 * widest) ** 2), (1.08 * widest) ** 2 or 1.0)
    axes.margins(y=0.18)
    name_points(axes, [point.name for point in ordered], list(zip(x, y, strict=True)), joined, colours)


PLACES = (
    (9, 9, "left", "bottom"),
    (9, -9, "left", "top"),
    (-9, 9, "right", "bottom"),
    (-9, -9, "right", "top"),
    (9, 24, "left", "bottom"),
    (9, -24, "left", "top"),
    (-9, 24, "right", "bottom"),
    (-9, -24, "right", "top"),
)
"""Where a name may stand beside its point, best first: offsets in points, and alignments."""


def name_points(
    axes: Axes,
    names: Sequence[str],
    places: Sequence[tuple[float, float]],
    joined: Sequence[Sequence[tuple[float, float]]],
    colours: Mapping[str, str],
) -> None:
    """A name at each point, where it covers no other name, no point and no line, if there is such a place."""
    from matplotlib.transforms import Bbox

    canvas: Any = axes.get_figure(root=True)
    renderer = canvas.canvas.get_renderer()
    dots = axes.transData.transform(places)
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in dots]
    corners = (pairwise(axes.transData.transform(line)) for line in joined)
    between = (a + share * (b - a) for pairs in corners for a, b in pairs for share in np.linspace(0, 1, 60))
    taken += [Bbox.from_bounds(x - 1, y - 1, 2, 2) for x, y in between]
    for name, place in reversed(list(zip(names, places, strict=True))):  # it is narrowest where KL is large
        label = axes.annotate(
            name, place, (0, 0), textcoords="offset points", color=colours["ink"], fontsize=9.5, annotation_clip=False
        )
        for dx, dy, across, up in PLACES:
            label.set(position=(dx, dy), horizontalalignment=across, verticalalignment=up)
            box = label.get_window_extent(renderer)
            if not box.count_overlaps(taken) and axes.bbox.padded(18).contains(box.x1, box.y1):
                break
        taken.append(label.get_window_extent(renderer))


def signed_root(values: Any) -> np.ndarray:
    """√x, −√−x below 0: estimates of a KL near 0 may be negative."""
    return np.sign(values) * np.sqrt(np.abs(values))


def signed_square(values: Any) -> np.ndarray:
    """What `signed_root` undoes."""
    return np.sign(values) * np.square(values)


def _bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Lengths of the intervals below and above each value; 0 where they are not known."""
    ends = [(e.value - e.low, e.high - e.value) if math.isfinite(e.se) else (0.0, 0.0) for e in estimates]
    return [[max(0.0, end[side]) for end in ends] for side in (0, 1)]
