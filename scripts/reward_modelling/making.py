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
from scripts.reward_modelling.network import Scorer, encode, load_base, standardise
from scripts.reward_modelling.training import FIT, fit
from scripts.reward_modelling.words import WordSettings, fit_words, standardise_words
from scripts.trainer_config import TrainerConfig
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
    fit: TrainerConfig = FIT
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
    resume: bool = False,
    trust_remote_code: bool = False,
    tell: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Train, normalise, save, load again, and measure on the held-out rows.

    Args:
        training: Rows with `prompt` and what the task needs.
        heldout: Rows of the same kind; none of their texts is trained on.
        recipe: What to make.
        folder: Where `model` and `checkpoints` go.
        base: Language model to start from; unused for words.
        device: Where it trains.
        reference: Texts that get mean 0 and standard deviation 1; None: the training texts.
        resume: Whether to go on from the newest of the checkpoints, if there is one; words have none.
        trust_remote_code: Whether the base may bring Python code.
        tell: Takes lines on the progress.

    Returns:
        The report.

    Raises:
        ValueError: Before anything is trained, if a side has no example, or the ratings no comparison.
    """
    sides = {"training": training, "heldout": heldout}
    examples, counts = {}, {}
    for side, rows in sides.items():
        examples[side], ties = examples_of(rows, recipe, heldout=side == "heldout")
        counts[side] = {"rows": len(rows), "ties": ties}
    network = None
    if recipe.kind == "lm":
        network = _Network.load(base, recipe, device, examples, reference, trust_remote_code)
        examples = {side: network.readable(side, found, tell) for side, found in examples.items()}
    for side in sides:
        counts[side]["examples"] = len(examples[side])
        if not examples[side]:
            raise ValueError(f"{side}: expected at least one example, got none of {len(sides[side])} rows")
    compared = _drawn(examples["heldout"], recipe, True) if recipe.task == "ratings" else []
    texts = _reference(examples["training"], reference, recipe.seed)
    if network is not None:
        made = network.train(examples["training"], texts, recipe, folder, resume, tell)
    else:
        made = _words(examples["training"], texts, recipe, folder / "model")
    tell(f"measuring on {len(examples['heldout'])} held-out examples")
    return {
        "task": recipe.task,
        "kind": recipe.kind,
        "model": str(base) if recipe.kind == "lm" else None,
        "seed": recipe.seed,
        "data": counts,
        "training": made.training,
        "normalisation": made.way_back,
        "heldout": measure(made, examples["heldout"], compared, recipe.task),
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


def measure(made: Made, heldout: Sequence[Example], compared: Sequence[Example], task: Task) -> dict[str, Any]:
    """Figures of the loaded model on held-out examples, and on comparisons of them where they are ratings."""
    texts = list(dict.fromkeys(text for example in heldout for text in example.texts))
    scores = np.asarray(made.reward([t.prompt for t in texts], [t.response for t in texts]), dtype=np.float64)
    raw = made.way_back["scale"] * scores + made.way_back["offset"]
    known = dict(zip(texts, raw.tolist(), strict=True))
    return rating_figures(heldout, compared, known) if task == "ratings" else choice_figures(task, heldout, known)


@dataclass(frozen=True)
class _Network:
    """A classifier before its training, and the texts that it can read."""

    scorer: Scorer
    """On its device."""
    tokenizer: Any
    """Goes into the folder, too."""
    context: int | None
    """Longest text, in tokens."""
    ids: Mapping[Text, list[int]]
    """Of the texts that it can read."""
    trust_remote_code: bool
    """Whether its folder may bring Python code."""

    @classmethod
    def load(
        cls,
        base: str | Path,
        recipe: Recipe,
        device: str,
        examples: Mapping[str, Sequence[Example]],
        reference: Sequence[Text] | None,
        trust_remote_code: bool,
    ) -> _Network:
        """Put a head on the base, on the device, and encode all texts."""
        scorer, tokenizer = load_base(base, seed=recipe.seed, trust_remote_code=trust_remote_code)
        context = context_length(scorer.classifier.config)
        texts = [text for side in examples.values() for example in side for text in example.texts]
        ids = encode(tokenizer, [*texts, *(reference or ())], context)
        return cls(scorer.to(device), tokenizer, context, ids, trust_remote_code)

    def readable(self, side: str, examples: Sequence[Example], tell: Callable[[str], object]) -> list[Example]:
        """The examples whose texts it can read."""
        read = [example for example in examples if all(text in self.ids for text in example.texts)]
        if len(read) < len(examples):
            dropped = len(examples) - len(read)
            tell(f"{side}: dropped {dropped} of {len(examples)} examples, longer than {self.context} tokens")
        return read

    def train(
        self,
        examples: Sequence[Example],
        reference: Sequence[Text],
        recipe: Recipe,
        folder: Path,
        resume: bool,
        tell: Callable[[str], object],
    ) -> Made:
        """Train, normalise on the reference, save, load again."""
        known = [self.ids[text] for text in reference if text in self.ids]
        if not known:
            raise ValueError(f"reference: expected texts of 1 to {self.context} tokens, got none of {len(reference)}")
        objective = objective_of(recipe.task, examples)
        figures = fit(
            self.scorer, objective, examples, self.ids, recipe.fit,
            seed=recipe.seed, folder=folder / "checkpoints", tell=tell, resume=resume,
        )  # fmt: skip
        way_back = standardise(self.scorer, known, objective)
        with no_progress_bar():
            self.scorer.classifier.save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(folder / "model")
        device = self.scorer.classifier.device
        reward = ClassifierReward(folder / "model", device=device, trust_remote_code=self.trust_remote_code)
        return Made(reward, way_back, figures)


def _words(examples: Sequence[Example], reference: Sequence[Text], recipe: Recipe, folder: Path) -> Made:
    fitted = fit_words(recipe.task, examples, recipe.words)
    reward, way_back = standardise_words(fitted, reference)
    reward.save(folder)
    return Made(type(reward).load(folder), way_back, {"terms": len(reward.terms)})


def _reference(examples: Sequence[Example], given: Sequence[Text] | None, seed: int) -> list[Text]:
    if given is not None:
        return list(given)
    texts = list(dict.fromkeys(text for example in examples for text in example.texts))
    return [texts[place] for place in np.random.default_rng(seed).permutation(len(texts))[:REFERENCE_TEXTS]]
