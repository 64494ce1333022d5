"""The reward model: the storyteller's trunk with one score, trained on preference pairs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from scripts.embedding.config import Config, log
from scripts.embedding.judge import correlation, valence
from scripts.embedding.preferences import WIDTH, Candidates, collect_candidates, continuations
from scripts.embedding.sampling import make_generator
from scripts.embedding.storyteller import model_config
from scripts.embedding.tokenization import encode, pad
from scripts.embedding.training import train


def scores(model: LlamaForSequenceClassification, rows: Tensor, lengths: Tensor) -> Tensor:
    """W · h at each row's last token, [B]."""
    hidden = model.model(input_ids=rows.long(), use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(rows), device=rows.device), lengths - 1]
    return F.linear(last.float(), model.score.weight.float()).squeeze(-1)


def pair_loss(model: LlamaForSequenceClassification, chosen: Tensor, rejected: Tensor, lengths: Tensor) -> Tensor:
    """Bradley-Terry, -log σ(r_chosen - r_rejected), with a weak pull of the mean score to 0.

    Args:
        model: The reward model.
        chosen: Token ids [P, L].
        rejected: Token ids [P, L].
        lengths: [2 P], those of the chosen first.
    """
    both = scores(model, torch.cat([chosen, rejected]), lengths)
    good, bad = both.chunk(2)
    return -F.logsigmoid(good - bad).mean() + 1e-3 * both.mean() ** 2


def draw_pairs(
    candidates: Candidates, count: int, sharpness: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of continuations, two thirds of them of one opening, labelled by a noisy judge.

    The other third are of any two openings: without them an opening's own level would never be learnt, and would stay
    in the scores as noise.

    P(a preferred) = σ(sharpness · (u_a - u_b)).

    Returns:
        Indices of the preferred and of the other, and whether the label is the noiseless one; [count] each.
    """
    device, per = candidates.utilities.device, candidates.per_opening
    opening = torch.randint(len(candidates.utilities) // per, (count,), device=device, generator=generator) * per
    first = torch.randint(per, (count,), device=device, generator=generator)
    second = (first + torch.randint(1, per, (count,), device=device, generator=generator)) % per
    a, b = opening + first, opening + second
    anywhere = torch.randint(len(candidates.utilities), (count,), device=device, generator=generator)
    b = torch.where(torch.rand(count, device=device, generator=generator) < 1 / 3, anywhere, b)
    gap = candidates.utilities[a] - candidates.utilities[b]
    prefers_a = torch.rand(count, device=device, generator=generator) < torch.sigmoid(sharpness * gap)
    return torch.where(prefers_a, a, b), torch.where(prefers_a, b, a), prefers_a == (gap > 0)


def train_reward_model(
    config: Config, storyteller: LlamaForCausalLM, tokenizer: Any, openings: Sequence[str],
    heldout: Sequence[str], reference_openings: Sequence[str], lexicon: Mapping[str, float], folder: Path,
) -> dict[str, object]:  # fmt: skip
    """Train, normalise and save the reward model; return its figures."""
    began = time.perf_counter()
    told = collect_candidates(config, storyteller, tokenizer, openings, lexicon, config.seed + 10)
    unseen = collect_candidates(config, storyteller, tokenizer, heldout, lexicon, config.seed + 20)
    told, unseen = (_to(candidates, config.device) for candidates in (told, unseen))
    torch.manual_seed(config.seed)
    model: Any = LlamaForSequenceClassification(model_config(config, tokenizer, config.reward_layers, num_labels=1))
    trunk: Any = copy.deepcopy(storyteller.model)
    trunk.layers = trunk.layers[: config.reward_layers]
    model.model.load_state_dict(trunk.float().state_dict())
    torch.nn.init.normal_(model.score.weight, std=1.0 / math.sqrt(config.hidden + 1))
    model.to(config.device).train()
    generator = make_generator(config.device, config.seed + 4)

    def batch_at(step: int) -> tuple[Tensor, Tensor, Tensor]:
        good, bad, _ = draw_pairs(told, config.reward_pairs, config.preference_sharpness, generator)
        return told.rows[good], told.rows[bad], told.lengths[torch.cat([good, bad])]

    steps, _ = train(
        model, lambda good, bad, lengths: pair_loss(model, good, bad, lengths), batch_at, config,
        steps=config.reward_steps, minutes=config.reward_minutes, learning_rate=config.reward_learning_rate,
    )  # fmt: skip
    model.eval().requires_grad_(False)
    model.half().float()  # what is saved is what is measured
    bias = _normalise(config, model, storyteller, tokenizer, reference_openings)
    model.config.reward_bias = bias
    figures = _measure(config, model, unseen, lexicon) | {
        "pairs": steps * config.reward_pairs,
        "reward_layers": config.reward_layers,
    }
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return figures | {"reward_seconds": time.perf_counter() - began}


def _to(candidates: Candidates, device: str) -> Candidates:
    moved = {name: getattr(candidates, name).to(device) for name in ("rows", "lengths", "utilities")}
    return candidates._replace(**moved)


@torch.no_grad()
def _all_scores(config: Config, model: LlamaForSequenceClassification, rows: Tensor, lengths: Tensor) -> Tensor:
    parts = zip(rows.split(config.score_rows), lengths.split(config.score_rows), strict=True)
    return torch.cat([scores(model, part.to(config.device), size.to(config.device)) for part, size in parts])


def _normalise(
    config: Config, model: LlamaForSequenceClassification, storyteller: LlamaForCausalLM,
    tokenizer: Any, openings: Sequence[str],
) -> float:  # fmt: skip
    """Scale the head so that the storyteller's own responses have standard deviation 1; the bias that centres them."""
    told = continuations(config, storyteller, tokenizer, openings, 4, seed=config.seed + 30)
    texts = [opening + text for opening, group in zip(openings, told, strict=True) for text in group]
    ids = encode(tokenizer, texts)
    rows, lengths = pad(ids, WIDTH, tokenizer.pad_token_id), torch.tensor([min(len(row), WIDTH) for row in ids])
    model.score.weight.div_(_all_scores(config, model, rows, lengths).std())
    model.half().float()
    return -float(_all_scores(config, model, rows, lengths).mean())


def _measure(
    config: Config, model: LlamaForSequenceClassification, unseen: Candidates, lexicon: Mapping[str, float]
) -> dict[str, object]:
    """Accuracy on pairs of openings that were not trained on, and what the score goes with."""
    given = _all_scores(config, model, unseen.rows, unseen.lengths)
    good, bad, noiseless = draw_pairs(
        unseen, 20_000, config.preference_sharpness, make_generator(config.device, config.seed + 5)
    )
    right = given[good] > given[bad]
    told = [index for index in range(len(unseen.texts)) if index % unseen.per_opening < config.sampled_per_opening // 3]
    plain = given[told].tolist()
    figures: dict[str, object] = {
        "accuracy_noisy": right.float().mean().item(),
        "accuracy_noiseless": (right == noiseless).float().mean().item(),
        "label_noise": 1.0 - noiseless.float().mean().item(),
        "correlation_with_valence": correlation(plain, [valence(unseen.texts[index], lexicon) for index in told]),
        "correlation_with_utility": correlation(given.tolist(), unseen.utilities.tolist()),
    }
    log(f"  held-out accuracy {figures['accuracy_noiseless']:.3f}, with label noise {figures['accuracy_noisy']:.3f}")
    return figures
