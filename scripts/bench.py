"""Speed and memory, competitors measured in turn in one process.

    python -m scripts.bench
    python -m scripts.bench --only tax trl --rounds 9
    python -m scripts.bench --only gpu --device cuda

Writes `speed.json` and, from it, `speed.md`; cases that are not run again keep what was measured before.

- **tax**: stepping the environment token by token, against bare generation and one scoring pass.
- **trl**: an iteration of PPO against TRL's, and against the model's own forwards and backwards.
- **adapters**: an iteration of other libraries' PPO against the native one.
- **memory**: log-probs and their backward, as the vocabulary grows.
- **scaling**: powers with which costs grow.
- **startup**: imports and `gym.make`.
- **samplers**: tokens a second of each sampler that is installed.
- **gpu**: fractions of a device's bandwidth and matrix rate.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from scripts.benching import adapters, gpu, memory, ppo, samplers, scaling, startup, tax

CASES: dict[str, Callable[[int, Path | None, Callable[[str], None]], tuple[str, Any]]] = {
    "tax": tax.run,
    "trl": ppo.run,
    "adapters": adapters.run,
    "memory": memory.run,
    "scaling": scaling.run,
    "startup": startup.run,
}
"""What is measured by default: `(rounds, model, tell)` gives a section of the page and a list of dataclasses."""

MORE = {"samplers": samplers.run}
"""What runs only if it is named: vLLM wants an environment of its own."""


@dataclass(frozen=True)
class Flags:
    """Measure speed."""

    only: tuple[str, ...] = tuple(CASES)
    """Which cases; `samplers` and `gpu` run only if they are named."""
    rounds: int = 5
    """Timed calls of each competitor."""
    threads: int = 1
    """CPU threads."""
    model: Path | None = None
    """Folder of the language model; if absent, stories260K of the material, or the embedded storyteller without it."""
    device: str = "cuda"
    """Where `gpu` runs; "cpu" with `--sizes tiny` tries it out."""
    sizes: tuple[str, ...] = ("0.1B", "0.5B", "1.5B")
    """Models of `gpu`."""
    out: Path = Path("docs/benchmarks")
    """Folder of what is written."""

    def __post_init__(self) -> None:
        """Refuse unknown cases."""
        known = (*CASES, *MORE, "gpu")
        unknown = [name for name in self.only if name not in known]
        if unknown:
            raise ValueError(f"only: expected some of {', '.join(known)}, got {', '.join(unknown)}")


def main(flags: Flags) -> None:
    """Measure, and write what was found."""
    torch.set_num_threads(flags.threads)
    console = Console(highlight=False)
    machine = f"{platform.processor() or platform.machine()}, {flags.threads} thread(s), PyTorch {torch.__version__}"
    flags.out.mkdir(parents=True, exist_ok=True)
    file = flags.out / "speed.json"
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf8")) if file.exists() else {}
    for name in flags.only:
        tell = console.print
        if name == "gpu":
            text, found = gpu.run(flags.rounds, flags.model, tell, flags.device, flags.sizes)
        else:
            text, found = {**CASES, **MORE}[name](flags.rounds, flags.model, tell)
        print(text)
        rows = [asdict(row) for row in found]
        report[name] = {"machine": machine, "rounds": flags.rounds, "text": text, "found": rows}
        # After each case, so that none is lost to what happens in the next.
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf8")
        (flags.out / "speed.md").write_text(page(report), encoding="utf8")


def page(report: Mapping[str, Mapping[str, Any]]) -> str:
    """The Markdown page of all cases that were measured."""
    parts = [
        "# Speed\n\n    python -m scripts.bench\n\n[Performance](../performance.md) says what is behind the figures.\n"
    ]
    for name in (*CASES, *MORE, "gpu"):
        if name in report:
            case = report[name]
            parts.append(f"{case['text'].rstrip()}\n\n{case['machine']}; `--rounds {case['rounds']}`.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
