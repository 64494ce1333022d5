"""Timing competitors in one process, in turn, so that what slows the machine slows them all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Competitor:
    """Something to time."""

    name: str
    """What the table calls it."""
    prepare: Callable[[], Callable[[], object]]
    """Loads everything; what it returns does the timed work, once a call."""
    rounds: int | None = None
    """Rounds that it takes part in; None: all. One that is very slow may have fewer, and then no warm-up."""


@dataclass(frozen=True)
class Timing:
    """What was measured of a competitor."""

    name: str
    """Whose."""
    cpu_seconds: tuple[float, ...]
    """CPU seconds of each call, of all threads together."""
    wall_seconds: tuple[float, ...]
    """Wall-clock seconds of each call."""

    @property
    def cpu(self) -> float:
        """Median CPU seconds."""
        return statistics.median(self.cpu_seconds)

    @property
    def spread(self) -> str:
        """Smallest to largest."""
        return f"{min(self.cpu_seconds):.2f}–{max(self.cpu_seconds):.2f}"


def measure(
    competitors: Sequence[Competitor], rounds: int, tell: Callable[[str], None] = lambda line: None
) -> list[Timing]:
    """Time the competitors: each warmed up once, then all of them in turn, the order reversed every other round.

    Garbage is collected between calls, outside of the clock, so that nobody pays for another's.

    Args:
        competitors: What to time.
        rounds: How often.
        tell: Called with a line of progress.
    """
    ready = []
    for competitor in competitors:
        work = competitor.prepare()
        if competitor.rounds is None:
            work()
        ready.append(work)
    cpu: list[list[float]] = [[] for _ in competitors]
    wall: list[list[float]] = [[] for _ in competitors]
    for number in range(rounds):
        order = range(len(competitors)) if number % 2 == 0 else reversed(range(len(competitors)))
        for i in order:
            limit = competitors[i].rounds
            if limit is not None and number >= limit:
                continue
            gc.collect()
            before = time.process_time(), time.perf_counter()
            ready[i]()
            cpu[i].append(time.process_time() - before[0])
            wall[i].append(time.perf_counter() - before[1])
            tell(f"round {number + 1}: {competitors[i].name} {cpu[i][-1]:.2f} CPU s")
    return [
        Timing(competitor.name, tuple(c), tuple(w)) for competitor, c, w in zip(competitors, cpu, wall, strict=True)
    ]


def table(timings: Sequence[Timing], against: Sequence[str]) -> str:
    """A Markdown table: medians, spreads, and the ratios of medians to each of the competitors named in `against`."""
    medians = {timing.name: timing.cpu for timing in timings}
    head = ["", "CPU s", "min–max", *(f"÷ {name}" for name in against)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for timing in timings:
        ratios = [f"{timing.cpu / medians[name]:.2f}" for name in against]
        lines.append("| " + " | ".join([timing.name, f"{timing.cpu:.2f}", timing.spread, *ratios]) + " |")
    return "\n".join(lines) + "\n"
