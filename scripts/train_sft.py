"""Fine-tune a language model on text, on pairs of prompt and response, or on chats.

Of a pair the response is learnt, of a chat what the assistant says, and each time that it ends. Everything is written
to `runs/sft`: `model`, a Hugging Face folder with the tokenizer, `metrics.jsonl`, `summary.json` and checkpoints.
`train_ppo.py --policy.model runs/sft/model` goes on from it.

    python scripts/train_sft.py --data.train stories.txt
    python scripts/train_sft.py --model my-model --data.train pairs.jsonl --data.columns.prompt question
    python scripts/train_sft.py --out runs/sft --data.train pairs.jsonl --resume
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

import textenv
from agents.tracking import MetricsFile
from scripts.finetuning.batches import heldout_loss
from scripts.finetuning.examples import Columns, Encoder, Example, Form, read_examples
from scripts.finetuning.training import (
    SFTConfig,
    Trained,
    autocast,
    collator,
    finetune,
    perplexity,
    split,
)
from scripts.options import device_of, run
from scripts.trainer_config import begin, last_checkpoint, step_of
from textenv.models import (
    check_tokenizer_fits,
    context_length,
    load_causal_lm,
    load_tokenizer,
    logit_width,
    no_progress_bar,
)
from textenv.tables import Reading


@dataclass(frozen=True)
class DataFlags:
    """The examples."""

    train: str
    """A .txt (a text a line), .jsonl, .json, .csv, .tsv or .parquet file, or a folder of Dataset.save_to_disk."""
    heldout: str | None = None
    """A file of examples to evaluate on; if absent, some are held out."""
    heldout_frac: float = 0.05
    """Share of the prompts whose examples are held out; 0: none, and nothing is evaluated."""
    form: Form | None = None
    """Whether rows are texts, pairs or chats; if absent, what the first row has the columns of."""
    columns: Columns = field(default_factory=Columns)
    """Names of columns."""
    chat_template: bool = False
    """Whether a prompt that is text is what the user says in the tokenizer's chat template; chats always use it."""
    max_tokens: int | None = None
    """Longest example, a longer one loses its end; the model's context if absent."""
    strict: bool = False
    """Whether bad rows are an error, or told and skipped."""


@dataclass(frozen=True)
class Flags:
    """Fine-tune a language model."""

    data: DataFlags
    sft: SFTConfig = field(default_factory=SFTConfig)
    model: str | None = None
    """Folder or hub name; the embedded storyteller if absent."""
    out: Path = Path("runs/sft")
    """Folder of everything that is written."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`, if there is one."""
    device: str = "auto"
    """Where the model trains; auto: the GPU if there is one."""
    threads: int | None = None
    """CPU threads; PyTorch's choice if absent."""
    trust_remote_code: bool = False
    """Whether a model folder may bring Python code."""


def main(flags: Flags) -> None:
    """Read, evaluate, train, evaluate again, save."""
    console, config = Console(), flags.sft
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    source = flags.model or textenv.embedded.STORYTELLER
    tokenizer = load_tokenizer(source, argument="model")
    model: Any = load_causal_lm(
        source,
        argument="model",
        device=device_of(flags.device),
        trust_remote_code=flags.trust_remote_code,
        frozen=False,
    ).module
    check_tokenizer_fits(tokenizer, logit_width(model), argument="model")
    encoder = Encoder(tokenizer, flags.data.max_tokens or context_length(model.config), flags.data.chat_template)
    readings = read_data(flags.data, encoder, console)
    examples, heldout = sides(flags.data, readings, config.seed)
    console.print(
        f"[bold]SFT[/] of {flags.model or 'the embedded storyteller'} "
        f"({sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {model.device}) "
        f"on {len(examples)} examples, {len(heldout)} held out → {flags.out}"
    )
    checkpoints = flags.out / "checkpoints"
    begin(checkpoints, flags, resume=flags.resume)
    before = evaluate(model, heldout, config)
    with no_progress_bar(), closing(MetricsFile(flags.out / "metrics.jsonl", first_row(flags))) as tracker:
        trained = finetune(model, examples, heldout, config, checkpoints, tracker, resume=flags.resume)
        trained.model.save_pretrained(flags.out / "model")
    tokenizer.save_pretrained(flags.out / "model")
    report(console, flags, readings, trained, before, evaluate(trained.model, heldout, config))


def read_data(flags: DataFlags, encoder: Encoder, console: Console) -> dict[str, Reading[Example]]:
    """The examples of each file."""
    paths = {"train": flags.train, "heldout": flags.heldout}
    return {
        name: read_examples(
            path,
            encoder,
            form=flags.form,
            columns=flags.columns,
            strict=flags.strict,
            tell=lambda line: console.print(line, style="yellow", markup=False),
        )
        for name, path in paths.items()
        if path is not None
    }


def sides(flags: DataFlags, readings: Mapping[str, Reading[Example]], seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and those held out."""
    if "heldout" in readings:
        return readings["train"].rows, readings["heldout"].rows
    return split(readings["train"].rows, flags.heldout_frac, seed)


def first_row(flags: Flags) -> int:
    """The row of `metrics.jsonl` from which on a resumed run writes anew."""
    last = last_checkpoint(flags.out / "checkpoints") if flags.resume else None
    return 0 if last is None else step_of(last) + 1


def evaluate(model: Any, heldout: list[Example], config: SFTConfig) -> float | None:
    """The held-out loss, None without held-out examples."""
    if not heldout:
        return None
    return heldout_loss(
        model,
        heldout,
        collator(model, config.packing),
        batch_examples=config.forward_examples,
        autocast=autocast(model.device, config),
    )


def report(
    console: Console,
    flags: Flags,
    readings: Mapping[str, Reading[Example]],
    trained: Trained,
    before: float | None,
    after: float | None,
) -> None:
    """A table, and the same as a file."""
    summary = {
        "files": {
            name: reading.counts | {"cut": sum(example.cut for example in reading.rows)}
            for name, reading in readings.items()
        },
        "steps": trained.steps,
        "train_loss": trained.train_loss,
        "tokens_per_s": trained.tokens_per_s,
        "packed": trained.packed,
        "heldout_loss_before": before,
        "heldout_loss_after": after,
    }
    settings = json.loads(json.dumps(asdict(flags), default=str))
    (flags.out / "summary.json").write_text(json.dumps(summary | {"flags": settings}, indent=1), encoding="utf8")
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    table.add_column("")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    if trained.train_loss is not None:
        table.add_row("train loss", "", f"{trained.train_loss:.4f}")
    if before is not None and after is not None:
        table.add_row("held-out loss", f"{before:.4f}", f"{after:.4f}")
        table.add_row("held-out perplexity", f"{perplexity(before):.3f}", f"[bold cyan]{perplexity(after):.3f}[/]")
    table.add_row("steps", "", str(trained.steps))
    table.add_row("tokens/s", "", f"{trained.tokens_per_s:.0f}")
    console.print(table)
    console.print(f"[dim]model[/] {flags.out / 'model'}")
    console.print(f"[dim]talk to it[/] python scripts/chat.py --model {flags.out / 'model'}")


if __name__ == "__main__":
    run(main, tyro.cli(Flags, description=__doc__))
