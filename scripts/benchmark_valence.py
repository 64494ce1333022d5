"""PPO on real material: `stories260K` learns to write words of positive valence.

One thread, 60 iterations of 64 responses of 48 tokens.

The score of a response is the sum of the human valence (VADER lexicon) of its words; β = 0.5, fixed-length responses,
prompts of 8 tokens (`scripts/valence.py`). The objective is score − 0.5·KL over the last five iterations; the untrained
model has 3.34.

    python scripts/benchmark_valence.py --settings separate --seeds 0 1 2 3 4 5 6 7
    python scripts/benchmark_valence.py --table

Without the material that the task needs it says so.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from agents import PPO, PPOConfig, ValueHeadLM
from scripts.valence import KL_COEF, MATERIAL, is_there, make_env, model_folder

ITERATIONS = 60
SETTINGS: dict[str, tuple[str, PPOConfig]] = {
    # TRL 1.12's own: its critic is a second model, its schedule linear to 0.
    "trl": ("separate", PPOConfig(epochs=4, minibatches=4, learning_rate=3e-4, gae_lambda=0.95)),
    "separate": ("separate", PPOConfig(epochs=2, minibatches=4, learning_rate=2e-4, gae_lambda=0.98)),
    "shared": ("shared", PPOConfig(epochs=2, minibatches=4, learning_rate=6e-4, gae_lambda=0.98)),
}


@dataclass(frozen=True)
class Flags:
    """Run settings × seeds, or print the table of what was run."""

    settings: tuple[str, ...] = tuple(SETTINGS)
    """Which settings: trl, separate, shared."""
    seeds: tuple[int, ...] = tuple(range(8))
    """Which seeds."""
    results: Path = Path("docs/benchmarks/valence.jsonl")
    """One JSON object a run; runs that are there are not repeated."""
    table: bool = False
    """Only write the table beside the results."""
    material: Path = MATERIAL
    """Folder of the material."""


def run(material: Path, setting: str, seed: int) -> dict[str, Any]:
    """Train once; the figures of the run."""
    envs = make_env(material=material)
    critic, config = SETTINGS[setting]
    agent = PPO(ValueHeadLM.from_pretrained(model_folder(material), critic=critic), envs, replace(config, seed=seed))
    start = time.process_time()
    history = agent.learn(ITERATIONS)
    seconds = time.process_time() - start
    score, kl = (sum(row[key] for row in history[-5:]) / 5 for key in ("score/mean", "kl/sequence"))
    return {
        "setting": setting,
        "seed": seed,
        "start": history[0]["score/mean"],
        "objective": score - KL_COEF * kl,
        "score": score,
        "kl": kl,
        "cpu_seconds": seconds,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of every run, and the means."""
    lines = ["| settings | seed | objective | score | KL | CPU s |", "|---|--:|--:|--:|--:|--:|"]
    for setting in SETTINGS:
        mine = sorted((row for row in rows if row["setting"] == setting), key=lambda row: row["seed"])
        for row in mine:
            figures = " | ".join(f"{row[key]:.2f}" for key in ("objective", "score", "kl"))
            lines.append(f"| {setting} | {row['seed']} | {figures} | {row['cpu_seconds']:.0f} |")
        if mine:
            means = " | ".join(_mean_se([row[key] for row in mine]) for key in ("objective", "score", "kl"))
            lines.append(f"| **{setting}** | mean ± SE | {means} | {_mean_se([r['cpu_seconds'] for r in mine], 0)} |")
    return "\n".join(lines) + "\n"


def _settings() -> str:
    """What the settings' names stand for."""
    names = ("epochs", "minibatches", "learning_rate", "lr_schedule", "gae_lambda")
    return "\n".join(
        f"- `{setting}`: critic `{critic}`, " + ", ".join(f"{name}={getattr(config, name)}" for name in names)
        for setting, (critic, config) in SETTINGS.items()
    )


def _mean_se(values: Sequence[float], digits: int = 2) -> str:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return f"**{mean:.{digits}f}** ± {math.sqrt(variance / len(values)):.{digits}f}"


def main(flags: Flags) -> None:
    """Run what is missing, then write the table."""
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in flags.results.read_text().splitlines()] if flags.results.exists() else []
    if not flags.table:
        if not is_there(flags.material):
            return
        flags.results.parent.mkdir(parents=True, exist_ok=True)
        done = {(row["setting"], row["seed"]) for row in rows}
        for setting in flags.settings:
            for seed in flags.seeds:
                if (setting, seed) not in done:
                    rows.append(run(flags.material, setting, seed))
                    print(json.dumps(rows[-1]), flush=True)
                    with flags.results.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    what = "\n\n".join((__doc__ or "").split("\n\n")[1:3])
    page = f"# Valence of stories260K\n\n{what}\n\n{_settings()}\n\n{table(rows)}"
    flags.results.with_suffix(".md").write_text(page, encoding="utf8")


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
