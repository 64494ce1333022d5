"""Train a reward model: on pairs, on ratings, or on good and bad texts.

    python scripts/train_reward.py --data pairs.jsonl --out runs/reward
    python scripts/train_reward.py --data rated.csv --recipe.task ratings --recipe.kind words
    python scripts/train_reward.py --data pairs.jsonl --out runs/reward --resume

Writes `model` (a sequence classifier, or a folder of words: either is a `--env.reward`), `report.json`,
`calibration.png` and the newest checkpoint into `--out`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.markup import escape

import textenv
from scripts.options import device_of, run
from scripts.reward_modelling.examples import split
from scripts.reward_modelling.making import Recipe, make
from scripts.reward_modelling.report import show, write
from scripts.reward_modelling.rows import Columns, read, read_texts
from scripts.trainer_config import begin
from textenv.models import load_tokenizer
from textenv.tables import Reading


@dataclass(frozen=True)
class Flags:
    """Data, and what is made of it."""

    data: Path
    """Rows to train on: .jsonl, .json, .csv, .tsv, .parquet, or a folder of Dataset.save_to_disk."""
    heldout: Path | None = None
    """Rows to measure on; a share of the data if absent."""
    heldout_frac: float = 0.2
    """Share of the groups of rows that is held out."""
    split_by: str | None = None
    """Column whose values stay on one side; if absent, rows with one prompt stay together."""
    reference: Path | None = None
    """Rows with prompt and response whose scores get mean 0 and standard deviation 1: samples of the policy that will
    be trained; the training texts if absent."""
    columns: Columns = field(default_factory=Columns)
    recipe: Recipe = field(default_factory=Recipe)
    out: Path = Path("runs/reward")
    """Folder of everything that is written."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`, if there is one."""
    chat_template: bool = False
    """Whether a prompt that is text is what the user says in the tokenizer's chat template; messages always use it."""
    strict: bool = False
    """Whether bad rows are an error, or told and skipped."""
    device: str = "auto"
    """Where it trains; auto: the GPU if there is one."""
    threads: int | None = None
    """CPU threads; PyTorch's choice if absent."""
    trust_remote_code: bool = False
    """Whether a model folder may bring Python code."""


def main(flags: Flags) -> None:
    """Read, train, measure, write."""
    console = Console()
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)

    def tell(line: str) -> None:
        console.print(f"[dim]{escape(line)}[/]")

    base: Any = flags.recipe.model or textenv.embedded.STORYTELLER
    tokenizer = load_tokenizer(base, argument="model")

    readings: dict[str, Reading[Any]] = {}
    for name, path in (("data", flags.data), ("heldout", flags.heldout)):
        if path is not None:
            readings[name] = read(
                path, flags.recipe.task, flags.columns, tokenizer,
                split_by=flags.split_by, chat_template=flags.chat_template, strict=flags.strict,
            )  # fmt: skip
    if flags.reference is not None:
        readings["reference"] = read_texts(
            flags.reference, flags.columns, tokenizer, chat_template=flags.chat_template, strict=flags.strict
        )
    rows = {name: reading.told(tell) for name, reading in readings.items()}
    if flags.heldout is not None:
        training, heldout = rows["data"], rows["heldout"]
    else:
        training, heldout = split(rows["data"], flags.heldout_frac, flags.recipe.seed)
    begin(flags.out / "checkpoints", flags, resume=flags.resume)
    report = make(
        training, heldout, flags.recipe, flags.out, base=base, device=device_of(flags.device),
        reference=rows.get("reference"), resume=flags.resume, trust_remote_code=flags.trust_remote_code, tell=tell,
    )  # fmt: skip
    for side, counts in report["data"].items():
        tell(f"{side}: {counts['rows']} rows, {counts['ties']} ties dropped, {counts['examples']} examples")
    report["files"] = {name: reading.counts for name, reading in readings.items()}
    write(flags.out, report)
    show(console, report)
    console.print(f"[dim]reward model[/] {flags.out}/model   [dim]report[/] {flags.out}/report.json, calibration.png")


if __name__ == "__main__":
    run(main, tyro.cli(Flags, description=__doc__))
