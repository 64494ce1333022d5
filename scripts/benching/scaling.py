"""How the cost of an iteration of PPO grows with batch, response, prompt and vocabulary, against counted operations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import torch

from agents import PPO, PPOConfig, ValueHeadLM
from scripts.benching.models import FreeScore, Shape, llama
from scripts.benching.ppo_task import Phases
from scripts.benching.timing import Competitor, measure
from textenv import Shared

FACTORS = (1, 2, 4, 8)
MICROBATCH = 32
PARTS = ("generate", "evaluate", "update")
PHASES = (*PARTS, "iteration")

_TEXT = """## Scaling

One iteration of PPO (1 epoch, 1 minibatch, forwards of {microbatch} episodes, shared critic, a reference) of a random
Llama: hidden {hidden}, {layers} layers. Exponents are of least squares on logarithms: of CPU seconds, and of the
floating-point operations of matrix products counted at the same sizes ("theory"; norms, activations and softmaxes are
not counted). The other sizes are chosen so that the one that grows counts.

"""


@dataclass(frozen=True)
class Size:
    """Sizes of an iteration."""

    rows: int = 32
    """B."""
    response: int = 64
    """T."""
    prompt: int = 4
    """Tokens of each prompt."""
    vocab: int = 2000
    """V."""
    hidden: int = 256
    """H."""
    layers: int = 2
    """Blocks."""

    @property
    def shape(self) -> Shape:
        """The model's."""
        return Shape(self.vocab, self.hidden, self.layers)


BASES = {
    "rows": Size(),
    "response": Size(response=32),
    "prompt": Size(response=4, prompt=64),
    "vocab": Size(response=16, vocab=8000),
}
"""What grows, and from where."""


@dataclass(frozen=True)
class Growth:
    """How one phase grows with one size."""

    size: str
    """What grows: a field of `Size`."""
    phase: str
    """Which part of the iteration."""
    values: tuple[int, ...]
    """What it was."""
    cpu_seconds: tuple[tuple[float, ...], ...]
    """At each value, those of each timed call."""
    exponent: float
    """Fitted to the least CPU seconds: noise only adds."""
    theory: float
    """Fitted to the operations counted."""


def run(
    rounds: int,
    model: Path | None,
    tell: Callable[[str], None],
    bases: Mapping[str, Size] = BASES,
    factors: Sequence[int] = FACTORS,
) -> tuple[str, list[Growth]]:
    """Measure; the text of the page, and what was found. The models are random: `model` is not read."""
    found = []
    for name, base in bases.items():
        sizes = [replace(base, **{name: getattr(base, name) * factor}) for factor in factors]
        iterations = [Iteration(size) for size in sizes]
        rivals = [
            Competitor(f"{name} {getattr(iteration.size, name)}", lambda iteration=iteration: iteration)
            for iteration in iterations
        ]
        measure(rivals, rounds, tell)
        found += [_growth(name, phase, iterations, rounds) for phase in PHASES]
    return page(found, bases), found


def page(found: Sequence[Growth], bases: Mapping[str, Size]) -> str:
    """What is said of it."""
    head = (
        "| rows | response | prompt | vocabulary | "
        + " | ".join(f"{phase} | theory" for phase in PHASES)
        + " |\n|"
        + "--:|" * (4 + 2 * len(PHASES))
        + "\n"
    )
    of = {(growth.size, growth.phase): growth for growth in found}
    lines = []
    for name, base in bases.items():
        values = of[name, PHASES[0]].values
        sizes = {key: str(value) for key, value in vars(base).items()} | {name: f"{values[0]}–{values[-1]}"}
        cells = [f"{of[name, phase].exponent:.2f} | {of[name, phase].theory:.2f}" for phase in PHASES]
        cells = [sizes["rows"], sizes["response"], sizes["prompt"], sizes["vocab"], *cells]
        lines.append("| " + " | ".join(cells) + " |\n")
    return _TEXT.format(microbatch=MICROBATCH, **vars(next(iter(bases.values())))) + head + "".join(lines)


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """The a of cost = c · value^a, by least squares on logarithms.

    >>> exponent([1, 2, 4], [3, 12, 48])
    2.0
    """
    xs, ys = [math.log(value) for value in values], [math.log(cost) for cost in costs]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def operations(size: Size, phase: str) -> float:
    """Floating-point operations of a phase of one iteration, those of matrix products."""
    length = size.prompt + size.response
    forward = size.shape.forward_flops(size.rows, length - 1, size.response)
    # Sampling pushes the same tokens through as one forward does. Evaluating is the policy's forward and the
    # reference's. A backward is twice its forward.
    counts = {"generate": forward, "evaluate": 2 * forward, "update": 3 * forward}
    return sum(counts.values()) if phase == "iteration" else counts[phase]


class Iteration:
    """An agent on a random model; a call is one iteration, whose phases are timed."""

    def __init__(self, size: Size) -> None:
        """Load everything."""
        self.size, self.phases = size, Phases()
        model = llama(size.shape)
        generator = torch.Generator().manual_seed(0)
        envs = gym.make_vec(
            "RLHF-Text-v0",
            num_envs=1,
            reference=Shared(copy.deepcopy(model).requires_grad_(False)),
            reward=FreeScore(),
            prompts=torch.randint(size.vocab, (size.rows, size.prompt), generator=generator).tolist(),
            max_new_tokens=size.response,
            stop_token_ids=[],
        )
        config = PPOConfig(
            batch_episodes=size.rows,
            epochs=1,
            minibatches=1,
            microbatch_episodes=min(size.rows, MICROBATCH),
            lr_schedule="constant",
            bf16=False,
        )
        self.agent = PPO(ValueHeadLM(model), envs, config)
        self.phases.watch(self.agent.sampler, "sample", "generate")
        self.phases.watch(self.agent, "collect", "evaluate")  # what is left of it: a part within a part is not counted
        self.phases.watch(self.agent, "update", "update")

    def __call__(self) -> None:
        """One iteration."""
        self.agent.learn(1)
        self.phases.finish()

    def seconds(self, phase: str, rounds: int) -> tuple[float, ...]:
        """CPU seconds of a phase in the last `rounds` iterations."""
        names = PARTS if phase == "iteration" else (phase,)
        return tuple(sum(done[name] for name in names) for done in self.phases.done[-rounds:])


def _growth(name: str, phase: str, iterations: Sequence[Iteration], rounds: int) -> Growth:
    values = tuple(getattr(iteration.size, name) for iteration in iterations)
    seconds = tuple(iteration.seconds(phase, rounds) for iteration in iterations)
    counted = [operations(iteration.size, phase) for iteration in iterations]
    return Growth(
        name,
        phase,
        values,
        seconds,
        exponent=exponent(values, [min(times) for times in seconds]),
        theory=exponent(values, counted),
    )
