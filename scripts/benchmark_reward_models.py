"""Reward models on real material: film reviews rated by people, and polite against impolite answers.

`films`: 10,605 review sentences with mean ratings from −4 to 4; a fifth of the sentences is held out, and comparisons
are drawn between sentences of one side whose ratings are more than 1 apart. `answers`: 1,100 pairs, a fifth of the
prompts held out. `lm` is a head on stories260K's trunk, all of it trained for 2 epochs; `words` is a logistic
regression on word differences, `words, ratings` a ridge on the ratings; `lexicon` is the untrained sum of VADER's
values.

    python scripts/benchmark_reward_models.py

Without the material it says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from rich.console import Console

from scripts.reward_modelling.examples import GROUP, split
from scripts.reward_modelling.figures import accuracy, decide
from scripts.reward_modelling.making import Recipe, examples_of, make
from scripts.reward_modelling.report import mean_error
from scripts.reward_modelling.training import FIT
from scripts.valence import MATERIAL, is_there, model_folder
from textenv.rewards.lexicon import read_lexicon, valence

RECIPES: dict[tuple[str, str], Recipe] = {
    ("films", "lm"): Recipe(task="ranked", rounds=2, fit=replace(FIT, learning_rate=2e-3)),
    ("films", "words"): Recipe(task="ranked", kind="words", rounds=20),
    ("films", "words, ratings"): Recipe(task="ratings", kind="words"),
    ("answers", "lm"): Recipe(fit=replace(FIT, learning_rate=2e-3, batch_examples=8)),
    ("answers", "words"): Recipe(kind="words"),
}


@dataclass(frozen=True)
class Flags:
    """Which runs, and where their figures go."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the split and of everything else."""
    only: str | None = None
    """Only the recipe of this name, such as `films/lm`."""
    validate: bool = False
    """Measure on a fifth of the training side and write nothing: for choosing settings."""
    results: Path = Path("docs/benchmarks/reward_models.json")
    """Every run; runs that are there are not repeated; the page is beside it."""
    material: Path = MATERIAL
    """Folder of the material."""


def films(material: Path) -> list[dict[str, Any]]:
    """Sentences and their mean ratings."""
    lines = (material / "data" / "movie_snippets_mean_rating.tsv").read_text(encoding="utf8").splitlines()
    cells = (line.split("\t") for line in lines)
    return [{"prompt": "", "response": text, "rating": float(rating), GROUP: text} for _, rating, text in cells]


def answers(material: Path) -> list[dict[str, Any]]:
    """Instructions with a polite and an impolite answer."""
    rows = json.loads((material / "data" / "instruction_preferences.json").read_text(encoding="utf8"))
    return [
        {"prompt": "\n".join(filter(None, (row["instruction"], row["input"]))) + "\n"}
        | {side: row[side] for side in ("chosen", "rejected")}
        for row in rows
    ]


def sides(task: str, material: Path, seed: int, validate: bool) -> tuple[list[Any], list[Any]]:
    """Training and held-out rows; no sentence and no prompt is on both sides."""
    training, heldout = split(films(material) if task == "films" else answers(material), 0.2, seed)
    return split(training, 0.2, seed) if validate else (training, heldout)


def lexicon(material: Path, seed: int, validate: bool) -> dict[str, Any]:
    """The figures of VADER's sum on the comparisons that `lm` is measured on; equal sums count a half."""
    values = read_lexicon(material / "data" / "vader_lexicon.txt")
    recipe = replace(RECIPES["films", "words"], seed=seed)
    examples, _ = examples_of(sides("films", material, seed, validate)[1], recipe, heldout=True)
    sums = {text: valence(text.response, values) for example in examples for text in example.texts}
    decisions = decide("ranked", examples, sums)
    return {"accuracy": accuracy(decisions.correct, decisions.members)._asdict()}


def run(flags: Flags, task: str, name: str, seed: int, tell: Callable[[str], object]) -> dict[str, Any]:
    """Train once and measure."""
    began = time.process_time()
    row: dict[str, Any] = {"task": task, "name": name, "seed": seed}
    if name == "lexicon":
        row |= {"heldout": lexicon(flags.material, seed, flags.validate)}
    else:
        recipe = replace(RECIPES[task, name], seed=seed)
        training, heldout = sides(task, flags.material, seed, flags.validate)
        with TemporaryDirectory() as folder:
            report = make(training, heldout, recipe, Path(folder), base=model_folder(flags.material), tell=tell)
        row |= {key: report[key] for key in ("data", "heldout")}
    return row | {"cpu_seconds": time.process_time() - began}


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown page: a line a recipe, means over seeds."""
    head = (__doc__ or "").replace("\nWithout the material it says so.\n", "").split("\n", 1)
    lines = [
        "| task | reward | held-out accuracy | each seed | comparisons | calibration error | CPU s |",
        "|---|---|--:|---|---|--:|--:|",
    ]
    for task, name in [("films", "lexicon"), *RECIPES]:
        mine = [row for row in rows if (row["task"], row["name"]) == (task, name)]
        if not mine:
            continue
        shares = [100 * row["heldout"]["accuracy"]["value"] for row in mine]
        calibrated = [row["heldout"]["calibration"]["error"] for row in mine if "loss" in row["heldout"]]
        cells = [
            f"**{_mean(shares)} %**",
            ", ".join(f"{share:.1f}" for share in shares),
            ", ".join(f"{row['heldout']['accuracy']['count']:,}" for row in mine),
            f"{sum(calibrated) / len(calibrated):.3f}" if calibrated else "",
            f"{sum(row['cpu_seconds'] for row in mine) / len(mine):.0f}",
        ]
        lines.append(f"| {task} | {name} | {' | '.join(cells)} |")
    return f"# Reward models\n\n{head[1].strip()}\n\nMeans ± standard errors over seeds.\n\n" + "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> str:
    return "{:.1f} ± {:.1f}".format(*mean_error(values)) if len(values) > 1 else f"{values[0]:.1f}"


def main(flags: Flags) -> None:
    """Do the runs that are not there yet; write the figures and the page after each."""
    if not is_there(flags.material):
        return
    torch.set_num_threads(1)
    console = Console()
    there = flags.results.is_file() and not flags.validate
    rows = json.loads(flags.results.read_text(encoding="utf8")) if there else []
    done = {(row["task"], row["name"], row["seed"]) for row in rows}
    for task, name in [("films", "lexicon"), *RECIPES]:
        for seed in flags.seeds if flags.only in (None, f"{task}/{name}") else ():
            if (task, name, seed) in done:
                continue
            rows.append(run(flags, task, name, seed, console.print))
            if not flags.validate:
                flags.results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf8")
                flags.results.with_suffix(".md").write_text(page(rows), encoding="utf8")
    console.print(page(rows), markup=False)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
