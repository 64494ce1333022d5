"""A sequence classifier with one score: from a language model, on the texts of a batch, into a folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.reward_modelling.examples import Text
from scripts.reward_modelling.losses import Objective
from textenv.dropout import disable_dropout
from textenv.models import align, load_config, load_tokenizer, no_progress_bar
from textenv.packing import Packing, packed_hidden
from textenv.rewards.batching import by_length, padded

BATCH_TOKENS = 16_384


class Scorer(nn.Module):
    """w·h_last (+ b, of a head that has one) of right-padded rows: what `textenv.rewards.ClassifierReward` computes.

    The last token is found by the rows' lengths: an id that equals PAD may be one that was written.
    """

    def __init__(self, classifier: Any) -> None:
        """Score with a causal sequence classifier.

        Raises:
            ValueError: If its head is no linear map named score.
        """
        super().__init__()
        if not isinstance(getattr(classifier, "score", None), nn.Linear):
            raise ValueError(
                f"model: expected a family whose classifier has a linear head named score, got "
                f"{type(classifier).__name__}"
            )
        self.classifier = classifier

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Scores `[B]` of rows `[B, L]`."""
        packing = Packing.of(lengths, input_ids)
        last = packed_hidden(self.classifier.base_model, input_ids, packing, packing.starts + lengths - 1)
        head = self.classifier.score
        with torch.autocast(last.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            return F.linear(last.float(), head.weight.float(), bias).squeeze(-1)


def load_base(source: str | Path, *, seed: int, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A classifier without dropout on a language model's trunk, and the tokenizer.

    Its head is drawn from N(0, 1/(d + 1)), d being the model's width (Stiennon et al. 2020), unless the source
    is a classifier with one score already.

    Raises:
        ValueError: If there is no such model, or none that can be a classifier.
    """
    from transformers import AutoModelForSequenceClassification

    config = load_config(source, argument="model", trust_remote_code=trust_remote_code)
    config.num_labels = 1
    tokenizer = load_tokenizer(source, argument="model")
    try:
        with _quiet(), no_progress_bar():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model: expected a language model or a classifier with one score, got {source} ({reason})"
        ) from error
    scorer = Scorer(model)
    missing = {name for name in report["missing_keys"] if not name.startswith("score.")}
    if missing:
        raise ValueError(f"model: expected weights of a trunk, got {source} without {', '.join(sorted(missing)[:3])}")
    if report["missing_keys"]:
        head, generator = model.score, torch.Generator().manual_seed(seed)
        nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1), generator=generator)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    model.config.reward_bias = 0.0
    model.config.pad_token_id = tokenizer.pad_token_id  # by which a plain forward of several texts finds their ends
    disable_dropout(align(model))
    return scorer, tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from telling that the head is new."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def encode(tokenizer: Any, texts: Sequence[Text], context: int | None) -> dict[Text, list[int]]:
    """Ids of the texts that the model can read, prompt and response as one text; others are left out."""
    distinct = list(dict.fromkeys(texts))
    rows = tokenizer([text.prompt + text.response for text in distinct])["input_ids"] if distinct else []
    return {text: ids for text, ids in zip(distinct, rows, strict=True) if ids and len(ids) <= (context or len(ids))}


@torch.no_grad()
def scores_of(scorer: Scorer, rows: Sequence[Sequence[int]]) -> Tensor:
    """Scores `[n]` of rows of ids, in batches of similar lengths."""
    scores = torch.empty(len(rows))
    for batch in by_length([len(row) for row in rows], BATCH_TOKENS):
        scores[batch] = scorer(*padded([rows[row] for row in batch], scorer.classifier.device)).cpu()
    return scores


def standardise(scorer: Scorer, reference: Sequence[Sequence[int]], objective: Objective) -> Mapping[str, float]:
    """Make the reference's scores have mean 0 and standard deviation 1.

    The gain goes into the head, the bias into the configuration (`reward_bias`), as does the way back:
    raw = `reward_scale` · score + `reward_offset` is what the loss saw.

    Raises:
        ValueError: If the scores are all the same.
    """
    outputs = scores_of(scorer, reference).double()
    mean, sd = float(outputs.mean()), float(outputs.std(correction=0))
    if not sd > 1e-6 * abs(mean):  # equal texts differ by rounding in a batch
        raise ValueError(f"reference: expected texts whose scores differ, got {len(reference)} scores of {mean}")
    head, config = scorer.classifier.score, scorer.classifier.config
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.div_(sd)
    config.reward_bias = -mean / sd
    config.reward_scale = objective.unit * sd
    config.reward_offset = objective.unit * mean + objective.centre
    return {"bias": config.reward_bias, "scale": config.reward_scale, "offset": config.reward_offset}
