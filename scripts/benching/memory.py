"""Peak memory and time of log-probs and their backward, against the model's own, as the vocabulary grows.

python -m scripts.benching.memory --one trunk --vocab 512
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from agents import ValueHeadLM
from scripts.benching.models import Shape, llama
from scripts.benching.timing import Competitor, measure

TRUNK, OURS, UNCHUNKED = "trunk", "evaluate", "unchunked"
NAMES = (TRUNK, OURS, UNCHUNKED)

_TEXT = """## Memory of log-probs

{rows}×{tokens} tokens, hidden {hidden}, {layers} layers. *trunk*: forward and backward of the layers, with one gradient
of the head's weights beside it; *evaluate*: `ValueHeadLM.evaluate` with values and the backward of both; *unchunked*: a
log-softmax of all logits and its backward. Peak resident memory is that of a fresh process, above what it was with
imports and model loaded; CPU seconds are of one process, in turn.

"""


@dataclass(frozen=True)
class Problem:
    """Sizes of a measurement."""

    vocab: int
    """V."""
    rows: int = 8
    """B."""
    tokens: int = 256
    """Of each row, all with log-probs."""
    hidden: int = 256
    """H."""
    layers: int = 4
    """Blocks."""


@dataclass(frozen=True)
class Usage:
    """What one competitor takes."""

    name: str
    """Whose."""
    vocab: int
    """V."""
    before_mib: float
    """Resident before the work, imports and model loaded."""
    peak_mib: float
    """Most that was resident during it, above that."""
    cpu_seconds: tuple[float, ...] = ()
    """CPU seconds of each timed call."""


def run(
    rounds: int, model: Path | None, tell: Callable[[str], None], problems: Sequence[Problem] | None = None
) -> tuple[str, list[Usage]]:
    """Measure; the text of the page, and what was found. The models are random: `model` is not read."""
    found, problems = [], problems or [Problem(vocab) for vocab in (512, 32_000, 150_000)]
    for problem in problems:
        rivals = [Competitor(name, partial(work, name, problem)) for name in NAMES]
        for timing in measure(rivals, rounds, tell):
            usage = in_fresh_process(timing.name, problem)
            tell(f"vocabulary {problem.vocab}: {usage.name} {usage.peak_mib:.0f} MiB")
            found.append(Usage(usage.name, usage.vocab, usage.before_mib, usage.peak_mib, timing.cpu_seconds))
    return page(found, problems[0]), found


def page(found: Sequence[Usage], problem: Problem) -> str:
    """What is said of it."""
    head = (
        "| vocabulary | | MiB before | peak MiB above | ÷ trunk | CPU s | ÷ unchunked |\n|--:|---" + "|--:" * 5 + "|\n"
    )
    of = {(usage.vocab, usage.name): usage for usage in found}
    lines = []
    for usage in found:
        seconds = statistics.median(usage.cpu_seconds)
        memory = usage.peak_mib / of[usage.vocab, TRUNK].peak_mib
        time = seconds / statistics.median(of[usage.vocab, UNCHUNKED].cpu_seconds)
        lines.append(
            f"| {usage.vocab} | {usage.name} | {usage.before_mib:.0f} | {usage.peak_mib:.0f} | {memory:.2f} "
            f"| {seconds:.2f} | {time:.2f} |\n"
        )
    return _TEXT.format(**asdict(problem)) + head + "".join(lines)


def in_fresh_process(name: str, problem: Problem) -> Usage:
    """What `name` takes in a process of its own."""
    flags = [f"--{key}={value}" for key, value in asdict(problem).items()]
    command = [sys.executable, "-m", "scripts.benching.memory", "--one", name, *flags]
    command += ["--threads", str(torch.get_num_threads())]
    root = Path(__file__).resolve().parents[2]
    told = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return Usage(**json.loads(told.splitlines()[-1]))


def in_this_process(name: str, problem: Problem) -> Usage:
    """What `name` takes, in this process, which should have done nothing else."""
    call = work(name, problem)
    work(name, Problem(64, 1, 2, 32, 1))()  # libraries that are loaded at the first call are not the work's memory
    before = _resident("VmRSS")
    # Forget the peak so far. (`ru_maxrss` would not do: a child starts with the peak of its parent.)
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return Usage(name, problem.vocab, before, _resident("VmHWM") - before)


def work(name: str, problem: Problem) -> Callable[[], object]:
    """Load; what is returned does the work once, and leaves no gradients."""
    model = llama(Shape(problem.vocab, problem.hidden, problem.layers))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(problem.vocab, (problem.rows, problem.tokens + 1), generator=generator)
    policy = ValueHeadLM(model)
    step = {TRUNK: partial(_trunk, model), OURS: partial(_evaluate, policy), UNCHUNKED: partial(_unchunked, model)}[
        name
    ]

    def call() -> None:
        step(ids)
        policy.zero_grad(set_to_none=True)

    return call


def _trunk(model: nn.Module, ids: Tensor) -> None:
    hidden = model.base_model(ids[:, :-1], use_cache=False).last_hidden_state  # type: ignore[operator]
    weight = model.get_output_embeddings().weight  # type: ignore[operator]
    weight.grad = torch.ones_like(weight)  # written, or it would not be resident
    hidden.backward(torch.ones_like(hidden))


def _evaluate(policy: ValueHeadLM, ids: Tensor) -> None:
    ones = torch.ones(len(ids), dtype=torch.long)
    found = policy.evaluate(ids, ones, ones * (ids.shape[1] - 1), temperature=1.0)
    (found.logprobs.mean() + found.normalized_values.mean()).backward()


def _unchunked(model: nn.Module, ids: Tensor) -> None:
    logits = model(ids[:, :-1], use_cache=False).logits
    logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).mean().backward()


def _resident(field: str) -> float:
    """Memory of this process, in MiB, as Linux tells it under that name."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def main() -> None:
    """Measure one competitor and print what was found as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", choices=NAMES, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocab", type=int, required=True)
    for name in ("rows", "tokens", "hidden", "layers"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Problem, name))
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    problem = Problem(flags.vocab, flags.rows, flags.tokens, flags.hidden, flags.layers)
    print(json.dumps(asdict(in_this_process(flags.one, problem))))


if __name__ == "__main__":
    main()
