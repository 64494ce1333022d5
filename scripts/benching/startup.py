"""What importing the packages costs, against what they are made on, and making the environments."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.benching.timing import Timing, table

BARE, OURS = "import torch, transformers, gymnasium", "import textenv, agents"
MAKE, MAKE_VEC = 'gym.make("RLHF-Text-v0")', 'gym.make_vec("RLHF-Text-v0", num_envs=64)'

# What comes first is not timed.
_LINES = {
    BARE: ("", BARE),
    OURS: ("", OURS),
    MAKE: ("import gymnasium as gym, textenv", MAKE),
    MAKE_VEC: ("import gymnasium as gym, textenv", MAKE_VEC),
}

_PROGRAM = """
import time
{before}
cpu, wall = time.process_time(), time.perf_counter()
{timed}
print(time.process_time() - cpu, time.perf_counter() - wall)
"""

_TEXT = """## Start-up

Each in fresh processes, in turn; the environments are the default ones, made after `import textenv`, what they import
and load included. Where scikit-learn is installed, transformers imports it with the first model, a second of theirs.

"""


def run(
    rounds: int, model: Path | None, tell: Callable[[str], None], names: Sequence[str] = tuple(_LINES)
) -> tuple[str, list[Timing]]:
    """Measure; the text of the page, and what was found. `model` is not read."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for name in names:
        seconds(*_LINES[name])  # the files come into memory
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            times[name].append(seconds(*_LINES[name]))
            tell(f"round {number + 1}: {name} {times[name][-1][0]:.2f} CPU s")
    found = [Timing(name, *zip(*pairs, strict=True)) for name, pairs in times.items()]
    return _TEXT + table(found, [BARE] if BARE in names else []), found


def seconds(before: str, timed: str) -> tuple[float, float]:
    """CPU and wall-clock seconds of a line of Python in a fresh process, after another that is not timed."""
    program = _PROGRAM.format(before=before, timed=timed)
    root = Path(__file__).resolve().parents[2]
    # One thread, here as there: a pool of threads costs CPU seconds to start.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=env, capture_output=True, text=True, check=True
    )
    cpu, wall = told.stdout.splitlines()[-1].split()
    return float(cpu), float(wall)
