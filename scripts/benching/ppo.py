"""The native PPO iteration against TRL's, and against the least that it could cost."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import torch

import textenv  # noqa: F401 - registers RLHF-Text-v0
from agents import PPO, PPOConfig, ValueHeadLM
from agents.config import OldLogprobs
from agents.rollout import Rollout
from agents.sampling import TransformersSampler
from scripts.benching import ppo_trl
from scripts.benching.models import FreeScore
from scripts.benching.ppo_floor import FloorIteration
from scripts.benching.ppo_task import (
    EPOCHS,
    KL_COEF,
    LEARNING_RATE,
    MINIBATCHES,
    Phases,
    Task,
    random_task,
    story_tasks,
)
from scripts.benching.timing import Competitor, Timing, measure, table

PHASES = ("generate", "reference", "reward", "values", "update", "gc")
TRL, TRL_NO_GC, BF16 = "TRL", "TRL, no gc", "native, separate, bf16"
COMPILED = "native, shared, compiled"
SPARED = "native, separate, sampler's log-probs"
CRITICS = ("separate", "shared")
BF16_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
FLOOR_GOAL = 1.15
FLOOR_BATCHES = 4
# How long TRL's iteration takes hangs on the longest response of each batch, and both sides draw their own.
RAGGED_ROUNDS = 6

_TEXT = """## PPO against TRL

One iteration: the responses, a reference, a score that costs nothing, values, and {steps} optimizer steps ({epochs}
epochs of {minibatches} minibatches), prompts of {prompt} tokens, float32. "TRL" is 1.12.0, the last that had a PPO; it
trains a critic of its own, so "separate" is its match. "no gc": its own two calls of `gc.collect()` an iteration do
nothing. "floor" is what the models' own forwards and backwards cost with nothing around them: bare decoding of the
same tokens (by the decoder of this project), a reference forward, a value forward, and each minibatch's forward,
backward and fused Adam step. It is no bound of the possible where responses are ragged or prompts begin alike: it
pads them, and computes each row whole. "compiled" has its trunk compiled for learning.
"sampler's log-probs" is `old_logprobs="sampler"`: the log-probs before the update are those that generation told, as
TRL's are; by default the native agent forwards its policy over them once more, to hold the sampler against it.

In the tables of phases (CPU seconds, medians), "values" is for the native agent all that collecting has left (its own
log-probs of the responses, values, entropies), for TRL the value forward; "update" is for TRL all that is left.

"""


@dataclass(frozen=True)
class IterationTiming(Timing):
    """What was measured of a competitor's iterations."""

    task: str
    """Which task."""
    phases: dict[str, float]
    """Median CPU seconds of its parts."""


@dataclass(frozen=True)
class Goal:
    """The largest ratio of CPU seconds that is asked for."""

    name: str
    """Whose."""
    against: str
    """Against whom."""
    ratio: float
    """At most."""


EQUAL_GOALS = (
    Goal("native, separate", TRL_NO_GC, 1.0),
    Goal(SPARED, TRL_NO_GC, 1.0),
    Goal("native, shared", TRL_NO_GC, 0.65),
    Goal("native, separate", "floor, separate", FLOOR_GOAL),
    Goal("native, shared", "floor, shared", FLOOR_GOAL),
    Goal(BF16, TRL_NO_GC, 0.5),
)
RAGGED_GOALS = (
    Goal("native, separate", TRL_NO_GC, 0.5),
    Goal(SPARED, TRL_NO_GC, 0.5),
    Goal("native, shared", TRL_NO_GC, 0.33),
)


def run(rounds: int, model: Path | None, tell: Callable[[str], None]) -> tuple[str, list[Timing]]:
    """Measure; the text of the page, and what was found."""
    equal, ragged = story_tasks(model)
    with tempfile.TemporaryDirectory() as folder:
        random = random_task(Path(folder))
        parts = [
            (EQUAL_GOALS, measure_task(equal, rounds, tell, compiled=True)),
            (EQUAL_GOALS, measure_task(random, rounds, tell, bf16=bool(bf16_units()), compiled=True)),
            (RAGGED_GOALS, measure_task(ragged, RAGGED_ROUNDS * rounds, tell)),
        ]
    text = _TEXT.format(steps=EPOCHS * MINIBATCHES, epochs=EPOCHS, minibatches=MINIBATCHES, prompt=equal.prompt_length)
    return text + "\n".join(section(*part) for part in parts) + _notes(), [t for _, found in parts for t in found]


def bf16_units() -> str:
    """What the CPU multiplies bfloat16 matrices with, as Linux tells it; empty if it has nothing for them."""
    told = Path("/proc/cpuinfo")
    flags = told.read_text(encoding="utf8") if told.is_file() else ""
    return next((name for flag, name in BF16_UNITS.items() if flag in flags), "")


def measure_task(
    task: Task, rounds: int, tell: Callable[[str], None], *, bf16: bool = False, compiled: bool = False
) -> list[IterationTiming]:
    """Time all competitors at one task, in turn.

    Args:
        task: Which.
        rounds: How often.
        tell: Called with a line of progress.
        bf16: Whether the native agent is timed under autocast too.
        compiled: Whether it is timed with a compiled trunk too.
    """
    makers: dict[str, Callable[[], Any]] = {}
    if ppo_trl.is_there():
        makers[TRL] = partial(ppo_trl.TrlIteration, task, collect_garbage=True)
        makers[TRL_NO_GC] = partial(ppo_trl.TrlIteration, task, collect_garbage=False)
    rollouts = NativeIteration(task, "shared").rollouts(FLOOR_BATCHES)
    batches = [(rollout.ids, rollout.response_lengths) for rollout in rollouts]
    for critic in CRITICS:
        makers[f"native, {critic}"] = partial(NativeIteration, task, critic)
        makers[f"floor, {critic}"] = partial(FloorIteration, task, batches, shared=critic == "shared")
    makers[SPARED] = partial(NativeIteration, task, "separate", old_logprobs="sampler")
    if compiled:
        makers[COMPILED] = partial(NativeIteration, task, "shared", compiled=True)
    if bf16:
        makers[BF16] = partial(NativeIteration, task, "separate", bf16=True)
    made = {name: make() for name, make in makers.items()}
    rivals = [Competitor(name, lambda work=work: work) for name, work in made.items()]
    return [
        IterationTiming(t.name, t.cpu_seconds, t.wall_seconds, task.name, made[t.name].phases.medians())
        for t in measure(rivals, rounds, lambda line: tell(f"{task.name}, {line}"))
    ]


def section(goals: Sequence[Goal], timings: Sequence[IterationTiming]) -> str:
    """What is said of one task: a table of totals, one of phases, and how each goal is met."""
    names = {timing.name for timing in timings}
    against = [name for name in (TRL_NO_GC, "floor, separate", "floor, shared") if name in names]
    heads = [phase for phase in PHASES if any(phase in timing.phases for timing in timings)]
    rows = ["| Phases | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for timing in timings:
        cells = [f"{timing.phases[phase]:.3f}" if phase in timing.phases else "" for phase in heads]
        rows.append(f"| {timing.name} | " + " | ".join(cells) + " |")
    lines = [f"### {timings[0].task}", "", table(timings, against), *rows, "", *_verdicts(goals, timings)]
    return "\n".join(lines) + "\n"


def _verdicts(goals: Sequence[Goal], timings: Sequence[Timing]) -> list[str]:
    """A line for each goal whose two competitors were timed; ratios within a round, so that a slow minute cancels."""
    cpu = {timing.name: timing.cpu_seconds for timing in timings}
    lines = []
    for goal in goals:
        if goal.name in cpu and goal.against in cpu:
            ratios = [ours / theirs for ours, theirs in zip(cpu[goal.name], cpu[goal.against], strict=True)]
            whole = sum(cpu[goal.name]) / sum(cpu[goal.against])
            spread = f"{min(ratios):.2f}–{max(ratios):.2f}, all together {whole:.2f}"
            found = f"{statistics.median(ratios):.2f} ({spread}; goal: at most {goal.ratio:.2f})"
            lines.append(f"- {goal.name} ÷ {goal.against}, round by round: {found}")
    return lines


def _notes() -> str:
    """What could not be measured here, and with what the rest was."""
    lines = [] if ppo_trl.is_there() else ["TRL was not measured: `pip install 'textenv[bench]' -c constraints.txt`."]
    units = bf16_units()
    lines.append(
        f"bf16 is autocast to bfloat16, which this CPU multiplies with its {units} units."
        if units
        else "This CPU has no units for bfloat16: autocast to it was not measured."
    )
    return "".join(f"\n{line}\n" for line in lines)


class NativeIteration:
    """Calling it does one iteration of the native agent."""

    def __init__(
        self,
        task: Task,
        critic: str,
        *,
        bf16: bool = False,
        compiled: bool = False,
        old_logprobs: OldLogprobs = "forward",
    ) -> None:
        """Load the policy and its environment.

        Args:
            task: What to learn from.
            critic: `"separate"` or `"shared"`.
            bf16: Whether forwards run under autocast.
            compiled: Whether the policy's trunk is compiled, when it first learns.
            old_logprobs: As in `TrainConfig`.
        """
        torch.manual_seed(0)
        self.phases = Phases()
        policy = ValueHeadLM.from_pretrained(task.folder, critic=critic)
        if compiled:
            cast(Any, policy.lm).base_model.compile()
        sampler = TransformersSampler(policy)
        reward: Any = self.phases.timed("reward", FreeScore())
        reward.wants_ids = True
        envs = gym.make_vec(
            "RLHF-Text-v0",
            num_envs=1,
            reference=str(task.folder),
            reward=reward,
            prompts=task.prompts,
            max_new_tokens=task.tokens,
            stop_token_ids=[] if task.stop is None else [task.stop],
            kl_coef=KL_COEF,
        )
        config = PPOConfig(
            batch_episodes=task.rows,
            epochs=EPOCHS,
            minibatches=MINIBATCHES,
            learning_rate=LEARNING_RATE,
            lr_schedule="constant",
            bf16=bf16,
            old_logprobs=old_logprobs,
        )
        self.agent = PPO(policy, envs, config, sampler)
        self.phases.watch(sampler, "sample", "generate")
        self.phases.watch(self.agent.task.reference, "logprobs", "reference")
        self.phases.watch(self.agent, "collect", "values")  # all of it that is not one of these
        self.phases.watch(self.agent, "update", "update")

    def __call__(self) -> None:
        """One iteration."""
        self.agent.learn(1)
        self.phases.finish()

    def rollouts(self, count: int) -> list[Rollout]:
        """Some that nothing is learnt from."""
        return [self.agent.collect() for _ in range(count)]
