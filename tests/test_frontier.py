"""The frontier's figure: points where they belong, names that can be read."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from agents import learning_curve
from agents.frontier import Point, frontier_figure, signed_root, signed_square
from agents.intervals import Estimate


def estimate(value: float, half: float = 0.1) -> Estimate:
    return Estimate(value, half / 1.96, value - half, value + half)


def point(name: str, kl: float, score: float, second: float | None = None, flag: bool | None = None) -> Point:
    return Point(name, estimate(kl), estimate(score), None if second is None else estimate(second), flag)


POINTS = [point("far", 40, 3, 0.1, True), point("near", 4, 2, 0.5, False), point("start", 0, 1, 0.6)]


def test_both_panels_have_the_points_in_order_and_their_intervals() -> None:
    score, second = frontier_figure(POINTS, "Calm", lines=[["start", "near", "far"]]).axes
    assert list(score.lines[0].get_xdata()) == [0, 4, 40] and list(score.lines[0].get_ydata()) == [1, 2, 3]
    assert list(second.lines[0].get_ydata()) == [0.6, 0.5, 0.1]
    across, up = (bars.get_segments() for bars in score.collections)
    assert [segment[:, 0].tolist() for segment in across][1] == pytest.approx([3.9, 4.1])
    assert [segment[:, 1].tolist() for segment in up][1] == pytest.approx([1.9, 2.1])
    assert {"Calm", "far", "near", "start"} <= {text.get_text() for text in second.texts}


def test_over_optimised_points_are_hollow() -> None:
    paper = learning_curve.DARK["paper"]
    score = frontier_figure(POINTS, colours=learning_curve.DARK).axes[0]
    faces = {float(line.get_xdata()[0]): line.get_markerfacecolor() for line in score.lines}
    assert faces[40] == paper and paper not in (faces[0], faces[4])


def test_only_what_is_told_is_joined_in_the_order_that_is_told() -> None:
    """A run may come back towards the reference; a policy of elsewhere stands apart."""
    others = [point("better", 20, 5), point("back", 9, 4), point("alone", 12, 2)]
    joined = [["start", "far", "back"], ["start", "near"], ["alone"]]
    score = frontier_figure([*POINTS, *others], lines=joined).axes[0]
    lines = [list(line.get_xdata()) for line in score.lines if len(line.get_xdata()) > 1]
    assert lines == [[0, 40, 9], [0, 4]]
    marks = {float(line.get_xdata()[0]): line.get_marker() for line in score.lines if len(line.get_xdata()) == 1}
    assert marks == {0: "o", 4: "o", 9: "o", 12: "D", 20: "D", 40: "o"}
    assert all(len(line.get_xdata()) == 1 for line in frontier_figure(POINTS).axes[0].lines)
    with pytest.raises(ValueError, match=r"^lines: expected names of points, got \['nobody'\]"):
        frontier_figure(POINTS, lines=[["start", "nobody"]])


def test_without_a_second_reward_of_all_there_is_one_panel() -> None:
    assert len(frontier_figure([*POINTS, point("x", 2, 2)]).axes) == 1


def test_names_cover_neither_each_other_nor_points() -> None:
    crowd = [point("reference", 0, -2.9), point("β 0.2", 23, -1.83), point("β 0.1", 24, -1.8), point("β 0", 95, -0.7)]
    axes = frontier_figure(crowd, lines=[[p.name for p in crowd]]).axes[0]
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text() in {p.name for p in crowd}]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    dots = axes.transData.transform([(p.kl.value, p.score.value) for p in crowd])
    assert not any(box.contains(*dot) for box in boxes for dot in dots)


@pytest.mark.parametrize("count", [1, 2])
def test_few_points_and_unknown_intervals(count: int) -> None:
    nan = float("nan")
    one = Point("a", Estimate(0.0, nan, nan, nan), Estimate(1.0, nan, nan, nan))
    assert learning_curve.png(frontier_figure([one] * count, lines=[["a"]])).startswith(b"\x89PNG")


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match=r"^found: expected at least one point, got none"):
        frontier_figure([])


def test_the_scale_is_undone_on_both_sides_of_zero() -> None:
    values = np.array([-4.0, 0.0, 9.0])
    assert signed_root(values).tolist() == [-2, 0, 3]
    assert signed_square(signed_root(values)).tolist() == values.tolist()
