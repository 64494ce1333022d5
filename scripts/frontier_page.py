"""Table, picture and pages of `scripts/benchmark_frontier.py`, from its rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.frontier import Point, frontier_figure
from agents.intervals import Estimate
from agents.learning_curve import png
from agents.report import markdown
from agents.tracking import number
from textenv.rewards.human import printable

Row = Mapping[str, Any]
NOT_YET = "Not run yet: `python scripts/benchmark_frontier.py`."


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()] if path.exists() else []


def sorted_rows(rows: Sequence[Row]) -> list[Row]:
    """What the models write that it is compared with, then runs, the highest β first."""
    return sorted(rows, key=lambda row: (-row.get("beta", math.inf), row.get("seed", 0)))


def name(row: Row, rows: Sequence[Row]) -> str:
    """A model's name, or β, with the seed where there are several."""
    if "beta" not in row:
        return row["name"]
    seeds = {other["seed"] for other in rows if "beta" in other}
    return f"β {row['beta']:g}" + (f", seed {row['seed']}" if len(seeds) > 1 else "")


SETS = {"held_out": "Held-out prompts", "usual": "Prompts as they occur"}
"""What a policy was evaluated on; the picture is of the first."""


def table(rows: Sequence[Row], kind: str = "held_out") -> str:
    """A Markdown table of one set of prompts, one line a row."""
    lines = [
        "| | score | gain | KL | distinct-2 | of the judge's | repetition | over-optimised | CPU s |",
        "|---|--:|--:|--:|--:|--:|--:|---|--:|",
    ]
    for row in sorted_rows(rows):
        found = row[kind]
        cells = [
            name(row, rows),
            *(with_interval(found[key]) for key in ("score", "gain")),
            with_interval(found["kl"], 1),
        ]
        cells += [with_interval(found["distinct_2"], 3), percent(found["kept"]), percent(found["repetition"])]
        cells += [
            {True: "**yes**", False: "no", None: "not known"}[found["over_optimised"]],
            f"{row.get('cpu_seconds', 0):.0f}" if "beta" in row else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_interval(estimate: Row, digits: int = 2) -> str:
    """A number and half its 95 % interval."""
    return f"{number(estimate['value'], digits)} ± {number(estimate['high'] - estimate['value'], digits)}"


def percent(estimate: Row) -> str:
    """A share and half its 95 % interval, in per cent."""
    return f"{100 * estimate['value']:.0f} ± {100 * (estimate['high'] - estimate['value']):.0f} %"


def figure(rows: Sequence[Row]) -> bytes:
    """The frontier as PNG: score and distinct-2 against KL."""
    found = []
    for row in rows:
        own = row["held_out"]
        kl, score, variety = (Estimate(**own[key]) for key in ("kl", "score", "distinct_2"))
        found.append(Point(name(row, rows), kl, score, variety, own["over_optimised"]))
    # One start, and runs that differ in β alone.
    sweep = [point for point, row in zip(found, rows, strict=True) if "beta" in row or point.kl.value == 0]
    line = [point.name for point in sorted(sweep, key=lambda point: point.kl.value)]
    return png(frontier_figure(found, "Distinct-2", lines=[line]))


def benchmark_page(rows: Sequence[Row], about: str) -> str:
    """`docs/benchmarks/frontier.md`: what was done, the picture, every run."""
    first, *paragraphs = about.strip().split("\n\n")
    picture = "![Score and distinct-2 against KL](../images/frontier.png)"
    iterations = sorted({row["iterations"] for row in rows if "beta" in row})
    done = f"PPO, {' and '.join(map(str, iterations))} updates of 64 responses." if iterations else NOT_YET
    parts = [f"# The KL–reward frontier\n\n{first}", paragraphs[0], done, picture]
    parts += [f"## {title}\n\n{table(rows, kind)}" for kind, title in SETS.items()]
    parts.append("± is half a 95 % interval by prompt.")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def hacking_block(rows: Sequence[Row]) -> str:
    """What `docs/reward_hacking.md` shows of the runs: picture, table, and a response of each."""
    runs = [row for row in sorted_rows(rows) if "beta" in row]
    if not runs:
        return NOT_YET
    lines = ["| | the first held-out prompt and its first response |", "|---|---|"]
    lines += [f"| {name(row, rows)} | {markdown(printable(row['held_out']['sample']))} |" for row in runs]
    picture = "![Score and distinct-2 against KL](images/frontier.png)"
    return "\n\n".join(
        [picture, table(rows).strip(), "\n".join(lines), "[How it was measured](benchmarks/frontier.md)."]
    )
