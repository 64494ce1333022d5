"""Make the embedded models: a storyteller, its reward model, openings, and a corpus.

    python -m scripts.make_embedded --material ../shared/material --output textenv/embedded

About an hour on two CPU cores. `--quick` runs every stage at toy size in two minutes. A stage whose result is in
`--work` is skipped.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from scripts.embedding.card import write_card
from scripts.embedding.config import Config, log, shrink
from scripts.embedding.corpus import write_corpus
from scripts.embedding.openings import make_openings, openings_of
from scripts.embedding.reward_model import train_reward_model
from scripts.embedding.stories import read_real, read_sampled, sample_teacher
from scripts.embedding.storyteller import train_storyteller
from scripts.embedding.tokenization import load_tokenizer, story_rows, train_tokenizer
from textenv.rewards import read_lexicon


def make(config: Config) -> None:
    """Run the stages that have no result yet."""
    config = shrink(config) if config.quick else config
    config.work.mkdir(parents=True, exist_ok=True)
    config.output.mkdir(parents=True, exist_ok=True)
    data = config.material / "data"
    real, unseen = read_real(data / "tinystories_sample.txt", config.seed)

    told = config.work / "teacher.json"
    _stage("teacher stories", told, lambda: sample_teacher(config, told))
    sampled = read_sampled(told)

    words = config.work / "tokenizer"
    texts = [story.text for story in real] + [story.text for story in sampled[: 4 * len(real)]]
    _stage("tokenizer", words, lambda: train_tokenizer(texts, config.vocabulary, config.context, words))
    tokenizer = load_tokenizer(words)

    storyteller_figures, reward_figures = config.work / "storyteller.json", config.work / "reward.json"
    rows = [story_rows(tokenizer, stories, config.context) for stories in (real, sampled, unseen)]
    teller = config.output / "storyteller"
    _stage(
        "storyteller",
        storyteller_figures,
        lambda: train_storyteller(config, tokenizer, rows[0], rows[1], rows[2], teller),
    )
    model: Any = LlamaForCausalLM.from_pretrained(teller, dtype=torch.float32)
    model.to(config.device).eval()

    prompts, heldout = (config.output / name for name in ("prompts.txt", "heldout.txt"))
    _stage("openings", heldout, lambda: _write_openings((prompts, heldout), config, model, tokenizer, real, sampled))
    train_on, evaluate_on = (path.read_text(encoding="utf8").splitlines() for path in (prompts, heldout))
    extra = openings_of(rows[1][: config.extra_openings].tolist(), tokenizer, random.Random(config.seed))
    lexicon = read_lexicon(data / "vader_lexicon.txt")
    _stage(
        "reward model",
        reward_figures,
        lambda: train_reward_model(
            config, model, tokenizer, train_on + extra, evaluate_on, train_on, lexicon, config.output / "reward"
        ),
    )
    corpus_figures = config.work / "corpus.json"
    _stage("corpus", corpus_figures, lambda: write_corpus(config, model, tokenizer, train_on, lexicon))
    figures = _architecture(config) | {"prompts": len(train_on), "heldout": len(evaluate_on)}
    made = (storyteller_figures, reward_figures, corpus_figures)
    write_card(config.output, figures | {name: value for path in made for name, value in _read(path).items()})
    log("done")


def make_corpus(config: Config) -> None:
    """The corpus of models that are there; the card learns its size."""
    tokenizer = load_tokenizer(config.output / "storyteller")
    model: Any = LlamaForCausalLM.from_pretrained(config.output / "storyteller", dtype=torch.float32)
    model.to(config.device).eval()
    openings = (config.output / "prompts.txt").read_text(encoding="utf8").splitlines()
    lexicon = read_lexicon(config.material / "data" / "vader_lexicon.txt")
    figures = write_corpus(config, model, tokenizer, openings, lexicon)
    write_card(config.output, _read(config.output / "card.json") | figures)


def _write_openings(paths: Sequence[Path], *arguments: Any) -> None:
    for path, lines in zip(paths, make_openings(*arguments), strict=True):
        path.write_text("\n".join(lines) + "\n", encoding="utf8")


def _architecture(config: Config) -> dict[str, Any]:
    names = ("layers", "hidden", "heads", "key_value_heads", "context", "vocabulary", "batch_rows", "learning_rate")
    figures = {name: getattr(config, name) for name in (*names, "preference_sharpness", "device")}
    return figures | {"head_dim": config.hidden // config.heads}


def _stage(name: str, result: Path, run: Callable[[], Any]) -> None:
    """Run a stage without a result; figures that it returns become the result."""
    if result.exists():
        log(f"{name}: {result} is there")
        return
    log(f"{name} ...")
    figures = run()
    if figures is not None:
        result.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf8")
    log(f"{name}: done")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf8"))


def main() -> None:
    """Make what the flags say."""
    import tyro

    config = tyro.cli(Config, description=__doc__)
    make_corpus(config) if config.corpus_only else make(config)


if __name__ == "__main__":
    main()
