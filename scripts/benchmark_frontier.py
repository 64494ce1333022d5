"""What a score costs, shown on real material: β = 0 against β > 0.

`early279K` learns by PPO to write what `stories260K` finds probable: the score of a response is its mean log-prob per
token under that judge, and nothing in it asks for variety. Responses have 48 tokens, prompts the first 8 of the
material's openings. A run is evaluated twice, by 256 responses each: 4 to each of 64 prompts that are held out, every
tenth of the distinct ones, and 1 to each of 256 openings as they occur, where a few prompts make up half. The second
reward is distinct-2 of those responses. A run is over-optimised if its score has risen against `early279K` while its
distinct-2 is below half of that of `stories260K`'s own responses to the same prompts, both beyond their 95 % intervals;
it is not if either is ruled out by them, and otherwise it is not known.

    python scripts/benchmark_frontier.py
    python scripts/benchmark_frontier.py --betas 0.1 --seeds 0 1 2
    python scripts/benchmark_frontier.py --table

One thread and one process a run. Writes one JSON object a run to `docs/benchmarks/frontier.jsonl` (runs that are there
are not repeated), the table to `frontier.md` beside it and the picture to `docs/images/frontier.png`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
import tyro

import textenv  # noqa: F401 - registers RLHF-Text-v0
from agents import PPO, PPOConfig, ValueHeadLM
from agents.assessment import Assessment, assess
from agents.evaluation_metrics import distinct, gains, metrics
from agents.intervals import Statistic, over_optimised
from scripts.frontier_page import benchmark_page, figure, read_rows, table
from scripts.valence import MATERIAL, is_there
from textenv.models import load_tokenizer
from textenv.rewards import LogProbReward

BETAS = (0.0, 0.02, 0.05, 0.1, 0.2)
PROMPT_TOKENS, RESPONSE_TOKENS, SAMPLES = 8, 48, 256
LEAST_VARIETY = 0.5
"""Share of the judge's own distinct-2 that a policy must keep."""
CONFIG = PPOConfig(batch_episodes=64, epochs=2, minibatches=4, learning_rate=1e-3, gae_lambda=0.98)
REFERENCE, JUDGE = "early279K", "stories260K"


@dataclass(frozen=True)
class Flags:
    """Run β × seeds, or print the table of what was run."""

    betas: tuple[float, ...] = BETAS
    """Which β."""
    seeds: tuple[int, ...] = (0,)
    """Which seeds."""
    iterations: int = 120
    """Updates of a run, 64 responses each."""
    results: Path = Path("docs/benchmarks/frontier.jsonl")
    """One JSON object a run; runs that are there are not repeated."""
    image: Path = Path("docs/images/frontier.png")
    """Where the picture goes."""
    table: bool = False
    """Only write table and picture of what was run."""
    material: Path = MATERIAL
    """Folder of the material."""
    one: tuple[float, int] | None = None
    """Train one β with one seed in this process and print its figures."""


@dataclass(frozen=True)
class Prompts:
    """The first tokens of the openings of stories."""

    train: list[list[int]]
    """Each as often as it opens a story; none that is held out."""
    held_out: list[list[int]]
    """Distinct ones that training never sees."""
    usual: list[list[int]]
    """Evenly among all openings, so that frequent ones are in it as often as they occur."""

    @property
    def sets(self) -> dict[str, list[list[int]]]:
        """Those that a policy is evaluated on."""
        return {"held_out": self.held_out, "usual": self.usual}


def split_prompts(openings: Sequence[Sequence[int]], tokens: int = PROMPT_TOKENS, usual: int = SAMPLES) -> Prompts:
    """Every tenth distinct prompt is held out.

    Args:
        openings: As token ids; those that are too short are left out.
        tokens: Of a prompt.
        usual: How many openings are taken as they occur.

    >>> split = split_prompts([[7], *([i] for i in range(10)), [9]], tokens=1, usual=3)
    >>> split.held_out, split.train[:3], split.usual
    ([[9]], [[7], [0], [1]], [[7], [3], [7]])
    """
    cut = [tuple(ids[:tokens]) for ids in openings if len(ids) >= tokens]
    held_out = list(dict.fromkeys(cut))[9::10]
    kept = set(held_out)
    train = [list(ids) for ids in cut if ids not in kept]
    return Prompts(train, [list(ids) for ids in held_out], [list(ids) for ids in cut[:: len(cut) // usual][:usual]])


@cache
def prompts(material: Path) -> Prompts:
    """Of the material."""
    tokenizer = load_tokenizer(material / "models" / JUDGE, argument="material")
    lines = (material / "data" / "tinystories_openings.txt").read_text(encoding="utf8").splitlines()
    return split_prompts([tokenizer(line.strip())["input_ids"] for line in lines])


def make_env(material: Path, beta: float) -> Any:
    """The batched environment of the task."""
    return gym.make_vec(
        "RLHF-Text-v0",
        reference=str(material / "models" / REFERENCE),
        reward=LogProbReward(material / "models" / JUDGE),
        prompts=prompts(material).train,
        max_new_tokens=RESPONSE_TOKENS,
        stop_token_ids=[],
        kl_coef=beta,
    )


def assessed(source: ValueHeadLM | str, name: str, seed: int, material: Path) -> dict[str, Assessment]:
    """What a policy, or a model of the material, writes to each set of prompts; by the name of the set."""
    policy = ValueHeadLM.from_pretrained(material / "models" / source) if isinstance(source, str) else source
    envs = make_env(material, 1.0)  # with a reference, also where training had none
    return {
        kind: assess(policy, envs, some, name=name, per_prompt=SAMPLES // len(some), seed=seed)
        for kind, some in prompts(material).sets.items()
    }


@cache
def standards(material: Path) -> tuple[dict[str, Assessment], dict[str, Assessment]]:
    """What the reference and the judge write themselves, to compare with."""
    return assessed(REFERENCE, REFERENCE, 1001, material), assessed(JUDGE, JUDGE, 1002, material)


def figures(ours: Assessment, reference: Assessment, judge: Assessment) -> dict[str, Any]:
    """The numbers of one policy on one set of prompts, and whether it is over-optimised."""
    kept = distinct(ours, 2) / distinct(judge, 2)
    gain = gains(ours, reference)["score_gain"]
    # The flag's zero is the least variety that is asked for.
    short = Statistic(kept.value - LEAST_VARIETY, kept.without - LEAST_VARIETY).estimate()
    own = {name: estimate.as_dict() for name, estimate in metrics(ours).items()}
    compared = {"gain": gain.as_dict(), "kept": kept.estimate().as_dict()}
    return (
        own | compared | {"over_optimised": over_optimised(gain, short), "sample": ours.prompts[0] + ours.responses[0]}
    )


def all_figures(ours: dict[str, Assessment], material: Path) -> dict[str, Any]:
    """The numbers on each set of prompts."""
    reference, judge = standards(material)
    return {kind: figures(found, reference[kind], judge[kind]) for kind, found in ours.items()}


def run(beta: float, seed: int, iterations: int, material: Path) -> dict[str, Any]:
    """Train once and evaluate; the figures of the run."""
    torch.set_num_threads(1)
    policy = ValueHeadLM.from_pretrained(material / "models" / REFERENCE, critic="separate")
    agent = PPO(policy, make_env(material, beta), replace(CONFIG, seed=seed))
    start = time.process_time()
    agent.learn(iterations)
    seconds = time.process_time() - start
    heading = {"beta": beta, "seed": seed, "iterations": iterations, "cpu_seconds": round(seconds, 1)}
    return heading | all_figures(assessed(policy, f"β {beta:g}", seed, material), material)


def main(flags: Flags) -> None:
    """Run what is missing, then write table and picture."""
    if flags.one is not None:
        print(json.dumps(run(*flags.one, flags.iterations, flags.material)))
        return
    rows = read_rows(flags.results)
    if not flags.table:
        if not is_there(flags.material):
            return
        flags.results.parent.mkdir(parents=True, exist_ok=True)
        done = {(row["beta"], row["seed"]) for row in rows if "beta" in row}
        missing = [(beta, seed) for seed in flags.seeds for beta in flags.betas if (beta, seed) not in done]
        if not rows:
            both = zip((REFERENCE, JUDGE), standards(flags.material), strict=True)
            rows += [{"name": name} | all_figures(found, flags.material) for name, found in both]
            write_rows(flags.results, rows)
        for beta, seed in missing:
            row = run_apart(beta, seed, flags)
            if row is not None:
                rows.append(row)
                write_rows(flags.results, [row])
    flags.image.parent.mkdir(parents=True, exist_ok=True)
    flags.image.write_bytes(figure(rows))
    flags.results.with_suffix(".md").write_text(benchmark_page(rows, __doc__ or ""), encoding="utf8")


def run_apart(beta: float, seed: int, flags: Flags) -> dict[str, Any] | None:
    """One run in a process of its own; None if it failed, which is printed."""
    words = ["--one", str(beta), str(seed), "--iterations", str(flags.iterations), "--material", str(flags.material)]
    command = [sys.executable, "-m", "scripts.benchmark_frontier", *words]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if found.returncode:
        print(f"β {beta:g}, seed {seed}: failed\n{found.stderr}", file=sys.stderr, flush=True)
        return None
    row = json.loads(found.stdout.splitlines()[-1])
    print(table([row]).splitlines()[-1], flush=True)
    return row


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to the file of results."""
    with path.open("a", encoding="utf8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
