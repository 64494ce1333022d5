"""Where numbers go while training: a JSON-lines file, TensorBoard, and a live line on the terminal.

A tracker has two methods, `log` and `close`; `Trackers` is a tracker made of trackers. Metrics are plain floats under
names such as `score/mean` or `kl/sequence`. Rows are numbered by iteration, and a run that is resumed at iteration `n`
passes `first_iteration=n`: what an interrupted run wrote at `n` and later is dropped, so no iteration appears twice.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console

BLOCKS = "▁▂▃▄▅▆▇█"


class Tracker(Protocol):
    """Receives the metrics of each iteration."""

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one iteration."""
        ...

    def close(self) -> None:
        """Write out what is pending and release files and the terminal; closing twice is harmless."""
        ...


class Trackers:
    """Several trackers as one, closed together even when one of them fails; also a context manager.

    Args:
        trackers: The parts, in the order in which they are told.
    """

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Pass the metrics to every part."""
        for tracker in self.trackers:
            tracker.log(iteration, metrics)

    def close(self) -> None:
        """Close every part, the last one first; the first error is raised after all were closed."""
        with ExitStack() as stack:
            for tracker in self.trackers:
                stack.callback(tracker.close)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Rows of a `metrics.jsonl`, oldest first: `iteration` beside its metrics; `null` reads as NaN.

    A last line that a crash has cut short is left out.

    Args:
        path: The file that `MetricsFile` wrote.

    Raises:
        ValueError: A line other than the last is not a row.
    """
    rows = []
    lines = Path(path).read_text(encoding="utf8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(decode_row(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number < len(lines):
                expected = "path: expected one JSON object with `iteration` per line"
                raise ValueError(f"{expected}, got {line!r} ({path}:{number})") from error
    return rows


def decode_row(line: str) -> dict[str, float]:
    """The row that `encode_row` wrote.

    >>> decode_row('{"iteration": 3, "loss/value": null}')
    {'iteration': 3, 'loss/value': nan}
    """
    row = json.loads(line)
    return {"iteration": int(row["iteration"])} | {key: math.nan if v is None else v for key, v in row.items()}


def encode_row(row: Mapping[str, float]) -> str:
    """One line of JSON; JSON has no NaN and no infinity, so both become `null`.

    >>> encode_row({"iteration": 3, "score/mean": 0.5, "loss/value": float("nan")})
    '{"iteration": 3, "score/mean": 0.5, "loss/value": null}'
    """
    return json.dumps({key: value if math.isfinite(value) else None for key, value in row.items()}, allow_nan=False)


class MetricsFile:
    """One JSON object per iteration, on disk as soon as it is logged.

    Args:
        path: The file; its folder is made.
        first_iteration: Rows of this iteration and later are removed first: 0 for a new run, the next iteration for
            a resumed one.
    """

    def __init__(self, path: str | Path, first_iteration: int = 0) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = read_metrics(path) if first_iteration and path.exists() else []
        kept = [row for row in kept if row["iteration"] < first_iteration]
        # Written aside and renamed, so that a full disk cannot take the old rows away.
        aside = path.with_name(path.name + ".tmp")
        with aside.open("w", encoding="utf8") as file:
            file.writelines(encode_row(row) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        self.file = path.open("a", encoding="utf8")

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Append one row."""
        self.file.write(encode_row({"iteration": iteration, **metrics}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoard:
    """TensorBoard events, one scalar per metric.

    Args:
        folder: Where the event files go; `tensorboard --logdir` reads it.
        first_iteration: Events of this iteration and later from an earlier run are hidden.
    """

    def __init__(self, folder: str | Path, first_iteration: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_iteration)

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Write one scalar per metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """A curve of at most `width` characters between its own lowest and highest value; NaN is left out.

    Each character is the mean of an equal share of the values.

    >>> sparkline([0, 1, 2, 3])
    '▁▃▆█'
    >>> sparkline([2, 2])
    '▁▁'
    """
    finite = [value for value in values if math.isfinite(value)]
    count = min(width, len(finite))
    edges = [len(finite) * i // count for i in range(count + 1)] if count else []
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means, default=0.0), max(means, default=0.0) - min(means, default=0.0)
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1)) if span else 0] for mean in means)


def clock(seconds: float) -> str:
    """Minutes and seconds.

    >>> clock(75.6), clock(3725)
    ('1:15', '62:05')
    """
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


class Progress:
    """A live bar with score, KL and time; one plain line per iteration where there is no terminal.

    Args:
        total: Iteration at which training ends.
        first_iteration: Iterations that were done before, in a resumed run.
        console: Where to draw; standard error by default, so that a pipe gets only results.
        score: The metric shown as score.
        kl: The metric shown as KL, in nats per response.
    """

    def __init__(
        self,
        total: int,
        first_iteration: int = 0,
        console: Console | None = None,
        score: str = "score/mean",
        kl: str = "kl/sequence",
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.console = console or Console(stderr=True)
        self.total, self.done, self.score, self.kl = total, first_iteration, score, kl
        self.scores: list[float] = []
        self.start = time.monotonic()
        columns = (  # together under 80 characters wide
            BarColumn(bar_width=16, complete_style="cyan", finished_style="cyan"),
            MofNCompleteColumn(),
            TextColumn("[dim]score[/] [bold]{task.fields[score]}[/] [cyan]{task.fields[curve]}[/]"),
            TextColumn("[dim]KL[/] [bold]{task.fields[kl]}[/]"),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
        )
        self.bar = Bar(*columns, console=self.console) if self.console.is_terminal else None
        if self.bar:
            self.task = self.bar.add_task("", total=total, completed=first_iteration, score="–", curve="", kl="–")
            self.bar.start()

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Show one iteration; metrics that are missing show as –."""
        self.done += 1
        score, kl = metrics.get(self.score, math.nan), metrics.get(self.kl, math.nan)
        self.scores.append(score)
        if self.bar:
            curve = sparkline(self.scores, width=12)
            self.bar.update(self.task, completed=self.done, score=number(score), curve=curve, kl=number(kl))
        else:
            width = len(str(self.total))
            self.console.print(
                f"{self.done:>{width}}/{self.total}  score {number(score):>7}  KL {number(kl):>7}  "
                f"{clock(time.monotonic() - self.start)}",
                highlight=False,
            )

    def close(self) -> None:
        """Leave the last state of the bar on the terminal."""
        if self.bar:
            self.bar.stop()


def number(value: float, digits: int = 2) -> str:
    """A number for people: fixed digits, a true minus sign, – where there is none.

    >>> number(-1.5), number(-0.001), number(0.1234, 3), number(float("nan"))
    ('−1.50', '0.00', '0.123', '–')
    """
    return f"{value:z.{digits}f}".replace("-", "−") if math.isfinite(value) else "–"
