"""Speed, measured in one process, competitors in turn.

    python scripts/bench.py
    python scripts/bench.py --rounds 9 --out docs/benchmarks

Writes `speed.json` and `speed.md`.

- **adapters**: one iteration of PPO, 64 responses of 48 tokens collected and learnt from in 4 epochs of 4 minibatches:
  native, and through each adapter with stock minibatches of shuffled transitions, with minibatches of whole episodes,
  and with prefix cache and prefix sharing switched off.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console

from scripts.benching import adapters, ppo, tax
from scripts.benching.timing import Timing

CASES: dict[str, Callable[[int, Path | None, Callable[[str], None]], tuple[str, list[Timing]]]] = {
    "tax": tax.run,
    "trl": ppo.run,
    "adapters": adapters.run,
}


@dataclass(frozen=True)
class Flags:
    """Measure speed."""

    only: tuple[str, ...] = tuple(CASES)
    """Which cases."""
    rounds: int = 5
    """Timed calls of each competitor."""
    threads: int = 1
    """CPU threads."""
    model: Path | None = None
    """Folder of the language model; if absent, stories260K of the material, or the embedded storyteller without it."""
    out: Path = Path("docs/benchmarks")
    """Folder of what is written."""


def main(flags: Flags) -> None:
    """Measure, and write what was found."""
    torch.set_num_threads(flags.threads)
    console = Console(highlight=False)
    machine = f"{platform.processor() or platform.machine()}, {flags.threads} thread(s), PyTorch {torch.__version__}"
    page, found = [f"# Speed\n\n{machine}. Medians of {flags.rounds} rounds in one process.\n"], {}
    for name in flags.only:
        text, timings = CASES[name](flags.rounds, flags.model, console.print)
        console.print(text)
        page.append(text)
        found[name] = [asdict(timing) for timing in timings]
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "speed.md").write_text("\n".join(page), encoding="utf8")
    report = {"machine": machine, "rounds": flags.rounds, "cases": found}
    (flags.out / "speed.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
