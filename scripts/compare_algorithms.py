"""Every algorithm, native and through each adapter, on one task at equal episodes.

The task is that of `scripts/valence.py`: 3,840 responses of 48 tokens each, objective = score − 0.5·KL of the law that
really acted, against the full reference, over the last 320 of them. One thread and one process a run.

    python scripts/compare_algorithms.py --jobs 2
    python scripts/compare_algorithms.py --only ppo rloo "tianshou ppo" --seeds 0 1
    python scripts/compare_algorithms.py --table

Writes one JSON object a run to `docs/benchmarks/algorithms.jsonl` (runs that are there are not repeated), the table to
`algorithms.md` beside it and the learning curves to `docs/images/curves/`.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from scripts.comparison.entries import ASIDE, ENTRIES, seeds_of
from scripts.comparison.report import write_curves, write_table
from scripts.valence import KL_COEF, is_there


@dataclass(frozen=True)
class Flags:
    """Compare algorithms."""

    only: tuple[str, ...] = tuple(name for name in ENTRIES if name not in ASIDE)
    """Which of them; "ppo, bf16" too if it is named."""
    seeds: tuple[int, ...] | None = None
    """Which seeds; if absent, 16 of PPO in each library and 5 of all others."""
    jobs: int = 1
    """Runs at the same time."""
    results: Path = Path("docs/benchmarks/algorithms.jsonl")
    """Where runs are recorded."""
    images: Path = Path("docs/images/curves")
    """Where the learning curves go."""
    table: bool = False
    """Only write table and curves of what was run."""
    one: tuple[str, int] | None = None
    """Run one algorithm with one seed in this process and print its figures."""


def run(name: str, seed: int) -> dict[str, Any]:
    """One run, in this process."""
    torch.set_num_threads(1)
    entry = ENTRIES[name]
    train = entry.prepare(seed)
    start = time.process_time()
    history = [(int(row["episodes"]), row["score"], row["kl"]) for row in train() if row["episodes"]]
    seconds = time.process_time() - start
    last = last_means(history, 320)
    return {
        "algorithm": name,
        "seed": seed,
        "episodes": sum(count for count, _, _ in history),
        "objective": last[0] - KL_COEF * last[1],
        "score": last[0],
        "kl": last[1],
        "cpu_seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "curve": [[count, round(score, 3), round(kl, 3)] for count, score, kl in history],
    }


def last_means(history: Sequence[tuple[int, float, float]], episodes: int) -> tuple[float, float]:
    """Mean score and KL of the last rows that make at least so many episodes."""
    count = score = kl = 0.0
    for n, one_score, one_kl in reversed(history):
        count, score, kl = count + n, score + n * one_score, kl + n * one_kl
        if count >= episodes:
            break
    return score / count, kl / count


def main(flags: Flags) -> None:
    """Run what is missing, then write table and curves."""
    if flags.one is not None:
        print(json.dumps(run(*flags.one)))
        return
    rows = [json.loads(line) for line in flags.results.read_text().splitlines()] if flags.results.exists() else []
    if not flags.table:
        if not is_there():
            return
        flags.results.parent.mkdir(parents=True, exist_ok=True)
        done = {(row["algorithm"], row["seed"]) for row in rows}
        wanted = [(name, seed) for name in flags.only for seed in flags.seeds or seeds_of(name)]
        # Seed by seed, so that a table that is cut off has all algorithms.
        missing = sorted((pair for pair in wanted if pair not in done), key=lambda pair: pair[1])
        with ThreadPoolExecutor(flags.jobs) as pool:
            for row in pool.map(lambda pair: _run_apart(*pair), missing):
                if row is not None:
                    rows.append(row)
                    with flags.results.open("a", encoding="utf8") as file:
                        file.write(json.dumps(row) + "\n")
    machine = (
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, PyTorch {torch.__version__}"
    )
    write_table(flags.results.with_suffix(".md"), rows, machine)
    write_curves(flags.images, rows)


def _run_apart(name: str, seed: int) -> dict[str, Any] | None:
    """One run in a process of its own, whose time and memory are then its own."""
    command = [sys.executable, "-m", "scripts.compare_algorithms", "--one", name, str(seed)]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if found.returncode:
        print(f"{name}, seed {seed}: failed\n{found.stderr}", file=sys.stderr, flush=True)
        return None
    row = json.loads(found.stdout.splitlines()[-1])
    figures = f"objective {row['objective']:6.2f}   score {row['score']:6.2f}   KL {row['kl']:5.1f}"
    costs = f"{row['cpu_seconds']:4.0f} CPU s   {row['peak_mb']:5.0f} MB"
    Console().print(f"{name:<24} seed {seed}   {figures}   {costs}", highlight=False)
    return row


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
