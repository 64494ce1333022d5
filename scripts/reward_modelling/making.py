"""From rows of data to a folder with a reward model and a report on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scripts.reward_modelling.examples import Example, Task, Text, comparisons, draw_comparisons, judged
from scripts.reward_modelling.figures import choice_figures, rating_figures
from scripts.reward_modelling.losses import objective_of
from scripts.reward_modelling.network import encode, load_base, standardise
from scripts.reward_modelling.training import FitSettings, fit
from scripts.reward_modelling.words import WordSettings, fit_words, standardise_words
from textenv.models import context_length, no_progress_bar
from textenv.rewards import ClassifierReward, RewardFunction

REFERENCE_TEXTS = 2048
"""Training texts that scores are normalised on, where no reference is given: at most so many."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """What is made of the rows."""

    task: Task = "pairs"
    """What the rows are: pairs (prompt, chosen, rejected), ratings (prompt, response, rating: regression), ranked (the
    same rows, compared with each other), or labels (prompt, response, label)."""
    kind: Literal["lm", "words"] = "lm"
    """A language model with a head, or a weighted sum of words."""
    model: str | None = None
    """Language model or reward model to start from; the embedded storyteller if absent."""
    fit: FitSettings = field(default_factory=FitSettings)
    """How a language model is trained."""
    words: WordSettings = field(default_factory=WordSettings)
    """How a sum of words is fitted."""
    min_gap: float = 1.0
    """Texts are compared if their ratings are further apart than this."""
    rounds: int = 5
    """Training comparisons drawn for each text, of which those of too small a gap are dropped."""
    heldout_rounds: int = 5
    """As `rounds`, of the held-out texts."""
    seed: int = 0
    """Of the head, the order of the examples and the drawn comparisons."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: Naming the setting.
        """
        for name in ("rounds", "heldout_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {getattr(self, name)}")
        if not self.min_gap >= 0:
            raise ValueError(f"min_gap: expected a number >= 0, got {self.min_gap}")
        if self.kind == "words" and self.model is not None:
            raise ValueError(f"model: expected none with kind='words', got {self.model!r}")


@dataclass(frozen=True)
class Made:
    """A reward model that was saved, as it is when it is loaded again."""

    reward: RewardFunction
    """What scores."""
    way_back: Mapping[str, float]
    """`bias`, and `scale` and `offset` of raw = scale · score + offset."""
    training: Mapping[str, Any]
    """Figures of the training."""


def make(
    training: Rows,
    heldout: Rows,
    recipe: Recipe,
    folder: Path,
    *,
    base: str | Path,
    device: str = "cpu",
    reference: Sequence[Text] | None = None,
    trust_remote_code: bool = False,
    tell: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Train, normalise, save, load again, and measure on the held-out rows.

    Args:
        training: Rows with `prompt` and what the task needs.
        heldout: Rows of the same kind; none of their texts is trained on.
        recipe: What to make.
        folder: Where the model goes.
        base: Language model to start from; unused for words.
        device: Where it trains.
        reference: Texts that get mean 0 and standard deviation 1; None: the training texts.
        trust_remote_code: Whether the base may bring Python code.
        tell: Takes lines on the progress.

    Returns:
        The report.

    Raises:
        ValueError: If a side has no example.
    """
    sides = {"training": training, "heldout": heldout}
    examples, counts = {}, {}
    for side, rows in sides.items():
        examples[side], ties = examples_of(rows, recipe, heldout=side == "heldout")
        counts[side] = {"rows": len(rows), "ties": ties}
    if recipe.kind == "lm":
        made, examples = _network(examples, recipe, folder, base, device, reference, trust_remote_code, tell)
    else:
        made = _words(examples["training"], recipe, folder, reference)
    for side in sides:
        counts[side]["examples"] = len(examples[side])
        if not examples[side]:
            raise ValueError(f"{side}: expected at least one example, got none of {len(sides[side])} rows")
    tell(f"measuring on {len(examples['heldout'])} held-out examples")
    figures = measure(made, examples["heldout"], recipe)
    return {
        "task": recipe.task,
        "kind": recipe.kind,
        "model": str(base) if recipe.kind == "lm" else None,
        "seed": recipe.seed,
        "data": counts,
        "training": made.training,
        "normalisation": made.way_back,
        "heldout": figures,
    }


def examples_of(rows: Rows, recipe: Recipe, *, heldout: bool) -> tuple[list[Example], int]:
    """The examples of one side, and how many ties were dropped."""
    if recipe.task == "pairs":
        return comparisons(rows)
    if recipe.task == "labels":
        return judged(rows, "label"), 0
    ratings = judged(rows, "rating")
    if recipe.task == "ratings":
        return ratings, 0
    return _drawn(ratings, recipe, heldout), 0


def _drawn(ratings: Sequence[Example], recipe: Recipe, heldout: bool) -> list[Example]:
    rounds, seed = (recipe.heldout_rounds, recipe.seed + 1) if heldout else (recipe.rounds, recipe.seed)
    return draw_comparisons(ratings, min_gap=recipe.min_gap, rounds=rounds, seed=seed)


def measure(made: Made, heldout: Sequence[Example], recipe: Recipe) -> dict[str, Any]:
    """Figures of the loaded model on held-out examples."""
    texts = list(dict.fromkeys(text for example in heldout for text in example.texts))
    scores = np.asarray(made.reward([t.prompt for t in texts], [t.response for t in texts]), dtype=np.float64)
    raw = made.way_back["scale"] * scores + made.way_back["offset"]
    known = dict(zip(texts, raw.tolist(), strict=True))
    if recipe.task == "ratings":
        return rating_figures(heldout, _drawn(heldout, recipe, True), known)
    return choice_figures(recipe.task, heldout, known)


def _network(
    examples: Mapping[str, list[Example]],
    recipe: Recipe,
    folder: Path,
    base: str | Path,
    device: str,
    reference: Sequence[Text] | None,
    trust_remote_code: bool,
    tell: Callable[[str], object],
) -> tuple[Made, dict[str, list[Example]]]:
    """A classifier, and the examples that it can read."""
    scorer, tokenizer = load_base(base, seed=recipe.seed, trust_remote_code=trust_remote_code)
    scorer.to(device)
    context = context_length(scorer.classifier.config)
    texts = [text for side in examples.values() for example in side for text in example.texts]
    ids = encode(tokenizer, [*texts, *(reference or ())], context)
    read = {side: [e for e in found if all(text in ids for text in e.texts)] for side, found in examples.items()}
    for side, found in examples.items():
        if len(read[side]) < len(found):
            tell(
                f"{side}: dropped {len(found) - len(read[side])} of {len(found)} examples, longer than {context} tokens"
            )
    learnt = read["training"]
    if not learnt:
        raise ValueError(f"data: expected examples of 1 to {context} tokens, got none of {len(examples['training'])}")
    objective = objective_of(recipe.task, learnt)
    figures = fit(
        scorer, objective, learnt, ids, recipe.fit, seed=recipe.seed, device=device, folder=folder, tell=tell
    )  # fmt: skip
    known = [text for text in _reference(learnt, reference, recipe.seed) if text in ids]
    way_back = standardise(scorer, [ids[text] for text in known], objective)
    with no_progress_bar():
        scorer.classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reward = ClassifierReward(folder, device=device, trust_remote_code=trust_remote_code)
    return Made(reward, way_back, figures), read


def _words(examples: Sequence[Example], recipe: Recipe, folder: Path, reference: Sequence[Text] | None) -> Made:
    fitted = fit_words(recipe.task, examples, recipe.words)
    reward, way_back = standardise_words(fitted, _reference(examples, reference, recipe.seed))
    reward.save(folder)
    return Made(type(reward).load(folder), way_back, {"terms": len(reward.terms)})


def _reference(examples: Sequence[Example], given: Sequence[Text] | None, seed: int) -> list[Text]:
    if given is not None:
        return list(given)
    texts = list(dict.fromkeys(text for example in examples for text in example.texts))
    return [texts[place] for place in np.random.default_rng(seed).permutation(len(texts))[:REFERENCE_TEXTS]]
