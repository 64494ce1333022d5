"""Make the embedded models: a storyteller, its reward model, and openings.

    python scripts/make_embedded.py --material ../shared/material --output textenv/embedded --device cuda

About eight minutes on one large GPU, hours on a CPU. `--quick` runs every stage at toy size in two minutes. A stage whose
result is in `--work` is skipped.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from scripts.embedding.card import write_card
from scripts.embedding.config import Config, log, shrink
from scripts.embedding.judge import read_lexicon
from scripts.embedding.openings import make_openings, openings_of
from scripts.embedding.reward_model import train_reward_model
from scripts.embedding.stories import read_real, read_sampled, sample_teacher
from scripts.embedding.storyteller import train_storyteller
from scripts.embedding.tokenization import load_tokenizer, story_rows, train_tokenizer


def make(config: Config) -> None:
    """Run the stages that have no result yet."""
    config = shrink(config) if config.quick else config
    config.work.mkdir(parents=True, exist_ok=True)
    config.output.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = True
    data = config.material / "data"
    real, heldout_stories = read_real(data / "tinystories_sample.txt", config.seed)

    told = config.work / "teacher.json"
    _stage("teacher stories", told, lambda: sample_teacher(config, told))
    sampled = read_sampled(told)

    words = config.work / "tokenizer"
    texts = [story.text for story in real] + [story.text for story in sampled[: 4 * len(real)]]
    _stage("tokenizer", words, lambda: train_tokenizer(texts, config.vocabulary, config.context, words))
    tokenizer = load_tokenizer(words)

    figures, teller = config.work / "storyteller.json", config.output / "storyteller"
    _stage(
        "storyteller",
        figures,
        lambda: _write(
            figures,
            train_storyteller(
                config,
                tokenizer,
                *(story_rows(tokenizer, stories, config.context) for stories in (real, sampled, heldout_stories)),
                teller,
            ),
        ),
    )
    model = LlamaForCausalLM.from_pretrained(teller, dtype=torch.float32).to(config.device).eval()

    prompts, heldout = (config.output / name for name in ("prompts.txt", "heldout.txt"))

    def openings() -> None:
        for path, lines in zip((prompts, heldout), make_openings(config, model, tokenizer, real, sampled), strict=True):
            path.write_text("\n".join(lines) + "\n", encoding="utf8")

    _stage("openings", heldout, openings)
    train_on, evaluate_on = (path.read_text(encoding="utf8").splitlines() for path in (prompts, heldout))

    scored = config.work / "reward.json"
    rows = story_rows(tokenizer, sampled[: config.extra_openings], config.context).tolist()
    extra = openings_of(rows, tokenizer, random.Random(config.seed))
    lexicon = read_lexicon(data / "vader_lexicon.txt")
    _stage(
        "reward model",
        scored,
        lambda: _write(
            scored,
            train_reward_model(
                config, model, tokenizer, train_on + extra, evaluate_on, train_on, lexicon, config.output / "reward"
            ),
        ),
    )
    told_of, scored_of = (json.loads(path.read_text()) for path in (figures, scored))
    best = min(told_of["arms"], key=lambda arm: arm["heldout_nats_per_token"])
    write_card(
        config.output,
        {
            **told_of, **scored_of, "steps": best["steps"], "share": best["real_share"], "layers": config.layers,
            "hidden": config.hidden, "heads": config.heads, "head_dim": config.hidden // config.heads,
            "kv_heads": config.key_value_heads, "context": config.context, "vocabulary": config.vocabulary,
            "batch_rows": config.batch_rows, "learning_rate": config.learning_rate,
            "sharpness": config.preference_sharpness, "prompts": len(train_on), "heldout": len(evaluate_on),
            "device": config.device,
        },
    )  # fmt: skip
    log("done")


def _stage(name: str, result: Path, run: Callable[[], Any]) -> None:
    if result.exists():
        log(f"{name}: {result} is there")
        return
    log(f"{name} ...")
    run()
    log(f"{name}: done")


def _write(path: Path, figures: dict[str, object]) -> None:
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf8")


def main() -> None:
    """Make what the flags say."""
    import tyro

    make(tyro.cli(Config, description=__doc__))


if __name__ == "__main__":
    main()
