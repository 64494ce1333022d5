"""Metric files survive crashes and resumes, trackers compose, progress reads well with and without a terminal."""

from __future__ import annotations

import io
import json
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from agents.tracking import MetricsFile, Progress, TensorBoard, Trackers, read_metrics, sparkline


class Recorder:
    """A tracker that remembers its calls, and fails at closing when told to."""

    def __init__(self, calls: list[str], name: str, fails: bool = False) -> None:
        self.calls, self.name, self.fails = calls, name, fails

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self.calls.append(f"{self.name} log {iteration} {dict(metrics)}")

    def close(self) -> None:
        self.calls.append(f"{self.name} close")
        if self.fails:
            raise OSError(f"{self.name} cannot close")


def write_rows(path: Path, first: int, last: int, value: float) -> None:
    file = MetricsFile(path, first_iteration=first)
    for iteration in range(first, last):
        file.log(iteration, {"score/mean": value})
    file.close()


def test_rows_are_on_disk_when_logged(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "deep" / "metrics.jsonl")
    file.log(0, {"score/mean": 0.5, "kl/sequence": 1.25})
    # Read before closing: a crash after this point loses nothing.
    assert read_metrics(tmp_path / "deep" / "metrics.jsonl") == [
        {"iteration": 0, "score/mean": 0.5, "kl/sequence": 1.25}
    ]
    file.close()


def test_resume_drops_what_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path, 0, 5, value=1.0)
    write_rows(path, 3, 6, value=2.0)
    assert [(row["iteration"], row["score/mean"]) for row in read_metrics(path)] == [
        (0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0),
    ]  # fmt: skip


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.jsonl", 0, 5, value=1.0)
    write_rows(tmp_path / "metrics.jsonl", 0, 1, value=2.0)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"iteration": 0, "score/mean": 2.0}]


def test_resume_after_a_line_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path, 0, 3, value=1.0)
    path.write_text(path.read_text()[:-9])
    assert [row["iteration"] for row in read_metrics(path)] == [0, 1]
    write_rows(path, 2, 4, value=2.0)
    assert [row["iteration"] for row in read_metrics(path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("line", ["{", "[1]", '{"score/mean": 1}', "7"])
def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"iteration": 0}}\n{line}\n{{"iteration": 1}}\n')
    with pytest.raises(
        ValueError, match=r"^path: expected one JSON object with `iteration` per line, got .*jsonl:2\)$"
    ):
        read_metrics(path)


def test_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.log(0, {"a": math.nan, "b": math.inf, "c": 0.1 + 0.2})
    file.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {"iteration": 0, "a": None, "b": None, "c": 0.1 + 0.2}
    row = read_metrics(path)[0]
    assert math.isnan(row["a"]) and math.isnan(row["b"])


def read_events(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars("score/mean")]


def test_tensorboard_keeps_one_value_per_iteration_over_a_resume(tmp_path: Path) -> None:
    for first, last, value in ((0, 3, 1.0), (2, 4, 2.0)):
        # Files are read in the order of their names, which hold the second and an unpadded count of the process's
        # files: two of one second are out of order when the count gains a digit. A resumed run is another process.
        time.sleep(1.1)
        board = TensorBoard(tmp_path, first_iteration=first)
        for iteration in range(first, last):
            board.log(iteration, {"score/mean": value})
        board.close()
    assert read_events(tmp_path) == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]


def test_trackers_tell_all_in_order_and_close_in_reverse() -> None:
    calls: list[str] = []
    with Trackers([Recorder(calls, "a"), Recorder(calls, "b")]) as trackers:
        trackers.log(3, {"x": 1.0})
    assert calls == ["a log 3 {'x': 1.0}", "b log 3 {'x': 1.0}", "b close", "a close"]


def test_trackers_close_all_even_if_one_fails() -> None:
    calls: list[str] = []
    with pytest.raises(OSError, match="b cannot close"):
        Trackers([Recorder(calls, "a"), Recorder(calls, "b", fails=True)]).close()
    assert calls == ["b close", "a close"]


def test_progress_writes_plain_lines_without_a_terminal() -> None:
    out = io.StringIO()
    progress = Progress(12, first_iteration=8, console=Console(file=out, width=100))
    progress.log(8, {"score/mean": -1.5, "kl/sequence": 2.0})
    progress.log(9, {})
    progress.close()
    lines = out.getvalue().splitlines()
    assert [line.rsplit(maxsplit=1)[0] for line in lines] == [
        " 9/12  score   −1.50  KL    2.00",
        "10/12  score       –  KL       –",
    ]


def test_progress_draws_one_line_on_a_narrow_terminal() -> None:
    out = io.StringIO()
    progress = Progress(60, console=Console(file=out, force_terminal=True, width=80, color_system=None))
    for iteration in range(60):
        progress.log(iteration, {"score/mean": 10.0 + iteration, "kl/sequence": 12.34})
    progress.close()
    progress.close()
    last = re.sub(r"\x1b\[[?\w]*", "", out.getvalue()).split("\r")[-1].rstrip()
    assert all(part in last for part in ("60/60", "69.00", "12.34", "▁"))
    assert "\n" not in last and "…" not in last and len(last) <= 80


def test_sparkline() -> None:
    assert sparkline([]) == "" and sparkline([math.nan]) == ""
    assert sparkline([1.0, math.nan, 2.0]) == "▁█"
    # Three times as many values as characters: each stands for the mean of three, so a lone outlier does not win.
    assert sparkline([0, 0, 0, 1, 1, 1, 7, 0, 0], width=3) == "▁▄█"
    assert len(sparkline(list(range(1000)), width=12)) == 12
