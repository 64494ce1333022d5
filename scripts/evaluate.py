"""Evaluate policies on held-out prompts, beside the model they started from.

Writes `evaluation.json`, `evaluation.md`, `frontier.png` and `report.html`, one page that needs no other file.
docs/evaluation.md says what each number is. A policy is a folder, a hub name, or `name=folder`; checkpoints of a run,
or runs with different β, become the frontier of score against KL. What `train_ppo.py` trained the model with is found
beside it, and stands for flags that are not given.

    python scripts/evaluate.py --model runs/ppo/policy
    python scripts/evaluate.py --model runs/ppo/policy --others runs/ppo/policies/*
    python scripts/evaluate.py --model runs/ppo/policy --second-reward distinct-2 --responses 4
    python scripts/evaluate.py --model β0.1=runs/b0.1/policy --others β0.2=runs/b0.2/policy β0=runs/b0/policy
    python scripts/evaluate.py --model my-policy --env.reward my_rewards:helpful --second-reward my-other-reward-model
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.markup import escape

import textenv
from agents import ValueHeadLM
from agents.assessment import Assessment, assess
from agents.evaluation_metrics import SecondReward, compare, distinct, second_score
from agents.evaluation_report import print_evaluation, write_evaluation
from scripts.options import EnvFlags, bound_reward, device_of, heldout_prompts, make_env, run
from scripts.trained import TrainedWith, runs_joined, shown
from textenv.rewards.human import printable
from textenv.rewards.reward import Ids
from textenv.rewards.running import in_fixed_units
from textenv.task import Task

SecondScores = Callable[[Ids, Ids], np.ndarray]
"""Scores of prompts and responses as token ids."""


@dataclass(frozen=True)
class Flags:
    """Evaluate policies."""

    model: str
    """Folder or hub name of the policy, or `name=folder`."""
    others: tuple[str, ...] = ()
    """Further policies."""
    baseline: str | None = None
    """What all are compared with; the reference if absent."""
    second_reward: str | None = None
    """A reward that training never saw: a folder, a hub name, `module:attribute`, or `distinct-1`, `-2`, `-3`; or
    `name=` and one of these."""
    tolerance: float = 0.0
    """How far the second reward may fall, in its own units, before a policy counts as over-optimised."""
    responses: int = 1
    """Responses to each prompt."""
    env: EnvFlags = field(default_factory=EnvFlags)
    """`prompts`, `kl_coef`, `kl_target` and `length_end` mean nothing here: only held-out prompts are answered, every
    response is scored, none is charged."""
    samples: int = 3
    """Prompts to print with the policies' responses."""
    seed: int = 0
    """Of the baseline's samples; each policy has the next one, so that their draws are independent."""
    out: Path = Path("runs/evaluation")
    """Folder of what is written."""
    threads: int | None = None
    """CPU threads; PyTorch's choice if absent."""


def main(flags: Flags) -> None:
    """Sample from each, measure, compare, write."""
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    given, flags, console = flags.env, resolved(flags), Console()
    policies = named_policies(flags)
    trained = {name: TrainedWith.load(source) for name, source in policies.items()}
    reference, reward = (escape(printable(str(name))) for name in (flags.env.reference, flags.env.reward))
    console.print(f"[dim]reference[/] {reference}   [dim]reward[/] {reward}", highlight=False)
    tell(console, flags, given, trained)
    # A reference is needed whatever β was, and every response is to be scored.
    options = replace(flags.env, kl_coef=1.0, kl_target=None, length_end="terminate")
    prompts = heldout_prompts(flags.env)
    envs = make_env(options, prompts=prompts)
    unseen = flags.second_reward
    title, unseen = ("Second reward", None) if unseen is None else named(Path(unseen).name, unseen)
    second, second_scores = second_reward(unseen, envs.unwrapped.task)
    assessments: list[Assessment] = []
    for number, (name, source) in enumerate(policies.items()):
        policy = ValueHeadLM.from_pretrained(
            source, device=device_of(flags.env.device), trust_remote_code=flags.env.trust_remote_code
        )
        assessments.append(
            assess(
                policy,
                envs,
                prompts,
                name=name,
                per_prompt=flags.responses,
                second_reward=second_scores,
                seed=flags.seed + number,
            )
        )
    results = compare(assessments, second, flags.tolerance)
    joined = runs_joined(trained, given, "reference" if flags.baseline is None else None)
    write_evaluation(flags.out, results, asdict(flags), second_name=title, lines=joined)
    print_evaluation(console, results, second_name=title, limit=flags.samples)
    console.print(f"[dim]report[/] {flags.out}/report.html", highlight=False)


def parse(args: Sequence[str] | None = None) -> Flags:
    """The flags, those of the environment beginning with what the model was trained with.

    Raises:
        ValueError: If another version wrote that, or if the reward is code that nobody named here or trusts.
    """
    choice, _ = tyro.cli(Choice, args=args, return_unknown_args=True, add_help=False)
    trained = None if choice.model is None else TrainedWith.load(named("model", choice.model)[1])
    default = Flags(model=tyro.MISSING, env=EnvFlags() if trained is None else trained.flags())
    flags = tyro.cli(Flags, args=args, default=default, description=__doc__)
    return flags if trained is None else replace(flags, env=trained.with_code(flags.env))


@dataclass(frozen=True)
class Choice:
    """What the defaults of the others depend on."""

    model: str | None = None
    """As in `Flags`."""


def tell(console: Console, flags: Flags, given: EnvFlags, trained: Mapping[str, TrainedWith | None]) -> None:
    """Say what was taken from the model's folder, and which policies were trained with something else than is used."""
    name, source = named("model", flags.model)
    own = trained[name]
    if own is not None:
        taken = shown(own.kept(given)) or "the defaults"
        console.print(f"[dim]as {escape(source)} was trained:[/] {escape(taken)}", highlight=False)
    for policy, one in trained.items():
        other = {} if one is None else one.otherwise(given)
        if other:
            told = f"{policy} was trained with {shown(other)}; all are measured alike."
            console.print(f"[yellow]{escape(told)}[/]", highlight=False)


def resolved(flags: Flags) -> Flags:
    """With the defaults by name, so that what is shown and written says what was measured against what."""
    reference = flags.env.reference or str(textenv.embedded.STORYTELLER)
    reward = flags.env.reward or str(textenv.embedded.REWARD)
    return replace(flags, env=replace(flags.env, reference=reference, reward=reward))


def named_policies(flags: Flags) -> dict[str, Any]:
    """The baseline, the policy and the others: each name with its folder. The flags are `resolved`.

    Raises:
        ValueError: If two have one name.
    """
    pairs = [named("baseline", flags.baseline) if flags.baseline else ("reference", flags.env.reference)]
    pairs.append(named("model", flags.model))
    pairs += [named(label(source, flags.others), source) for source in flags.others]
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"others: expected a name of its own for each policy (name=folder), got {names}")
    return dict(pairs)


def named(name: str, source: str) -> tuple[str, str]:
    """`name=folder` in two, where the name may hold a `=`; a folder without a name gets the one given."""
    match = None if Path(source).exists() else re.fullmatch(r"([^/]+)=(.+)", source)
    return (match[1], match[2]) if match else (name, source)


def label(source: str, others: Sequence[str]) -> str:
    """A folder's name among others: as much of its end as tells it apart."""
    parts = [Path(other).parts for other in others]
    mine = Path(source).parts
    for count in range(1, len(mine) + 1):
        if sum(other[-count:] == mine[-count:] for other in parts) == 1:
            return "/".join(mine[-count:])
    return source


def second_reward(name: str | None, task: Task) -> tuple[SecondReward | None, SecondScores | None]:
    """How the second reward sums up an assessment, and what scores single responses, where something does."""
    if name is None:
        return None, None
    match = re.fullmatch(r"distinct-([123])", name)
    if match:
        return partial(distinct, n=int(match[1])), None
    reward = bound_reward(name, "second_reward", task)

    def scores(prompts: Ids, responses: Ids) -> np.ndarray:
        with in_fixed_units(reward):
            return reward.scores(prompts, responses)

    return second_score, scores


if __name__ == "__main__":
    run(lambda args: main(parse(args)), None)
