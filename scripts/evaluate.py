"""Evaluate a policy on held-out prompts, beside the model it started from.

python scripts/evaluate.py --model runs/ppo/policy
python scripts/evaluate.py --model my-policy --env.reward my-reward-model --env.heldout heldout.txt
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from rich.console import Console

import textenv
from agents import Evaluation, ValueHeadLM, evaluate
from agents.report import print_comparison
from scripts.options import EnvFlags, device_of, heldout_prompts, make_env, run


@dataclass(frozen=True)
class Flags:
    """Evaluate a policy."""

    model: str
    """Folder or hub name of the policy."""
    baseline: str | None = None
    """Folder or hub name of what it is compared with; the reference if absent."""
    env: EnvFlags = field(default_factory=EnvFlags)
    samples: int = 4
    """Samples to print side by side."""
    seed: int = 0
    """Of the samples."""
    out: Path | None = None
    """A JSON file for prompts, responses, scores and KLs."""
    threads: int | None = None
    """CPU threads; PyTorch's choice if absent."""


def main(flags: Flags) -> None:
    """Sample from both and compare."""
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    prompts, envs = heldout_prompts(flags.env), make_env(flags.env)
    baseline = flags.baseline or flags.env.reference or textenv.embedded.STORYTELLER
    evaluations: list[Evaluation] = []
    for source in (baseline, flags.model):
        policy = ValueHeadLM.from_pretrained(
            source, device=device_of(flags.env.device), trust_remote_code=flags.env.trust_remote_code
        )
        evaluations.append(evaluate(policy, envs, prompts, seed=flags.seed))
    print_comparison(Console(), *evaluations, limit=flags.samples)
    if flags.out is not None:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        names = ("baseline", "model")
        result = {name: {"summary": e.summary} | e.as_dict() for name, e in zip(names, evaluations, strict=True)}
        flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    run(main, tyro.cli(Flags, description=__doc__))
