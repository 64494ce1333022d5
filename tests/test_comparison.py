"""The comparison of algorithms and the benchmark: what is counted, what is concluded, what is written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.benching.timing import Competitor, Timing, measure, table
from scripts.compare_algorithms import last_means
from scripts.comparison.entries import ENTRIES, EPISODES
from scripts.comparison.report import mean_se, verdict

ROOT = Path(__file__).resolve().parents[1]


def test_the_last_rows_are_weighed_by_their_episodes() -> None:
    history = [(64, 0.0, 9.0), (100, 1.0, 2.0), (300, 5.0, 6.0)]
    assert last_means(history, 300) == (5.0, 6.0)
    assert last_means(history, 320) == (4.0, 5.0)  # (100·1 + 300·5) / 400, (100·2 + 300·6) / 400


def test_mean_and_standard_error() -> None:
    assert mean_se([1.0, 2.0, 3.0]) == "2.00 ± 0.58"  # sd 1, √3
    assert mean_se([1.5]) == "1.50"


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([13.3, 13.4, 13.2], [13.3, 13.2, 13.4], "the same"),
        ([15.3, 15.4, 15.2], [13.3, 13.2, 13.4], "differs"),
        ([10.0, 18.0, 12.0], [13.3, 13.2, 13.4], "too noisy to tell"),
        ([13.3], [13.3, 13.2], "one seed"),
    ],
)
def test_verdict(ours: list[float], theirs: list[float], expected: str) -> None:
    assert verdict(ours, theirs, start=3.34).endswith(expected)


def test_every_entry_has_the_same_episodes() -> None:
    assert all(EPISODES % rows == 0 for rows in (16, 64))
    assert {entry.library for entry in ENTRIES.values()} == {"textenv", "Tianshou", "Stable-Baselines3", "TorchRL"}


def run_of(name: str, seed: int) -> dict[str, Any]:
    curve = [[64, 3.0 + 0.1 * i + seed, 0.1 * i] for i in range(60)]
    return {
        "algorithm": name,
        "seed": seed,
        "episodes": 3840,
        "objective": 6.0 + seed,
        "score": 8.0,
        "kl": 4.0,
        "cpu_seconds": 60.0,
        "peak_mb": 500.0,
        "curve": curve,
    }


def test_table_and_curves_are_written(tmp_path: Path) -> None:
    results = tmp_path / "algorithms.jsonl"
    names = ("ppo", "sb3 ppo", "sb3 ppo by episode", "reinforce++")
    runs = [run_of(name, seed) for name in names for seed in (0, 1)]
    runs[3]["objective"] += 1.0
    results.write_text("".join(json.dumps(row) + "\n" for row in runs), encoding="utf8")
    command = [sys.executable, "-m", "scripts.compare_algorithms", "--table", "--results", str(results)]
    subprocess.run([*command, "--images", str(tmp_path / "curves")], cwd=ROOT, check=True, capture_output=True)
    page = (tmp_path / "algorithms.md").read_text(encoding="utf8")
    assert "| sb3 ppo | Stable-Baselines3 | 7.00 ± 1.00 | 8.00 ± 0.00 | 4.00 ± 0.00 | 60 | 500 | 2 |" in page
    assert "| sb3 ppo | +0.50 ± 1.12: too noisy to tell |" in page  # 6, 8 against 6, 7
    assert "| sb3 ppo, against sb3 ppo by episode | +0.50 ± 1.12: too noisy to tell |" in page
    assert "tianshou ppo, against" not in page
    assert "| reinforce++ | 6.00 | 7.00 |" in page and "| rloo |" not in page
    assert "## Not yet run with all seeds\n\nppo, " in page and "rloo, " in page
    pictures = {path.name for path in (tmp_path / "curves").iterdir()}
    assert pictures == {"ppo.png", "sb3_ppo.png", "sb3_ppo_by_episode.png", "reinforce_pp.png"}


def test_competitors_are_timed_in_turn() -> None:
    calls: list[str] = []

    def maker(name: str) -> Callable[[], Callable[[], object]]:
        return lambda: lambda: calls.append(name)

    timings = measure([Competitor("a", maker("a")), Competitor("b", maker("b")), Competitor("c", maker("c"), 1)], 3)
    assert calls == ["a", "b", *"abc", *"ba", *"ab"]  # a warm-up each, but of the slow one; then in turn
    assert [len(timing.cpu_seconds) for timing in timings] == [3, 3, 1]


def test_ratios_are_of_medians() -> None:
    timings = [Timing("x", (1.0, 2.0, 9.0), (1.0,) * 3), Timing("y", (1.0, 1.0, 1.0), (1.0,) * 3)]
    assert "| x | 2.00 | 1.00–9.00 | 2.00 |" in table(timings, ["y"])
