"""The storyteller: a small Llama trained from scratch."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.embedding.config import Config, log
from scripts.embedding.sampling import make_generator, sample
from scripts.embedding.tokenization import decode
from scripts.embedding.training import train


def model_config(config: Config, tokenizer: Any, layers: int, **head: Any) -> LlamaConfig:
    """The architecture that both models share."""
    return LlamaConfig(
        vocab_size=config.vocabulary, hidden_size=config.hidden, intermediate_size=config.intermediate,
        num_hidden_layers=layers, num_attention_heads=config.heads, num_key_value_heads=config.key_value_heads,
        head_dim=config.hidden // config.heads, max_position_embeddings=config.context, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **head,
    )  # fmt: skip


def token_losses(model: LlamaForCausalLM, rows: Tensor, pad_id: int) -> Tensor:
    """-log p(rows[b, t + 1] | rows[b, : t + 1]) for every t, 0 where the target is padding, [B, L - 1]."""
    # Padding is on the right and attention looks left, so no mask is needed.
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
    targets = torch.where(rows[:, 1:] == pad_id, -100, rows[:, 1:])
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


@torch.no_grad()
def heldout_nats(model: LlamaForCausalLM, rows: Tensor, pad_id: int, chunk: int = 64) -> tuple[float, int]:
    """Total -log p of the rows in nats, and the number of predicted tokens."""
    total = sum(token_losses(model, part.long(), pad_id).double().sum().item() for part in rows.split(chunk))
    return total, int((rows[:, 1:] != pad_id).sum())


def train_one(
    config: Config, tokenizer: Any, real: Tensor, sampled: Tensor, heldout: Tensor, share: float
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """Train one storyteller with ``share`` of real stories in every batch."""
    torch.manual_seed(config.seed)
    model: Any = LlamaForCausalLM(model_config(config, tokenizer, config.layers))
    model.to(config.device)
    model.train()
    pad_id = tokenizer.pad_token_id
    generator = make_generator(config.device, config.seed + 1)
    real_rows = max(1, round(share * config.batch_rows))

    def batch_at(step: int) -> tuple[Tensor]:
        some_real = torch.randint(len(real), (real_rows,), device=config.device, generator=generator)
        some_sampled = torch.randint(
            len(sampled), (config.batch_rows - real_rows,), device=config.device, generator=generator
        )
        rows = torch.cat([real[some_real], sampled[some_sampled]]).long()
        if step % 4:
            return (rows[:, : config.short_rows + 1],)
        few = rows[torch.randperm(len(rows), device=rows.device, generator=generator)]
        return (few[: max(1, len(rows) * config.short_rows // config.context)],)

    def loss_of(rows: Tensor) -> Tensor:
        return token_losses(model, rows, pad_id).sum() / (rows[:, 1:] != pad_id).sum()

    def evaluate() -> float:
        nats, count = heldout_nats(model, heldout, pad_id)
        return nats / count

    steps, best = train(
        model, loss_of, batch_at, config, steps=config.steps, minutes=config.minutes,
        learning_rate=config.learning_rate, evaluate=evaluate,
    )  # fmt: skip
    return model, {"real_share": share, "steps": steps, "heldout_nats_per_token": best}


def train_storyteller(
    config: Config, tokenizer: Any, real: Tensor, sampled: Tensor, heldout: Tensor, folder: Path
) -> dict[str, object]:
    """Train one storyteller per share of real text, save the best on held-out text as float16; return its figures."""
    began = time.perf_counter()
    real, sampled, heldout = (rows.to(config.device) for rows in (real, sampled, heldout))
    best, arms = None, []
    for share in config.real_fractions:
        log(f"  storyteller with {share:.0%} real stories")
        model, figures = train_one(config, tokenizer, real, sampled, heldout, share)
        arms.append(figures)
        if best is None or figures["heldout_nats_per_token"] <= min(arm["heldout_nats_per_token"] for arm in arms):
            best = model
    if best is None:
        raise ValueError(f"real_fractions must not be empty, got {config.real_fractions}")
    best.eval().half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    best.float()
    nats, count = heldout_nats(best, heldout, tokenizer.pad_token_id)
    size = sum(len(text.encode()) for text in decode(tokenizer, heldout.tolist()))
    start = torch.full((8, 1), tokenizer.bos_token_id, device=config.device)
    rows, _ = sample(
        best, start, min(200, config.context - 1), stop_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
        generator=make_generator(config.device, config.seed + 2),
    )  # fmt: skip
    return {
        "parameters": sum(p.numel() for p in best.parameters()),
        "arms": arms,
        **min(arms, key=lambda arm: arm["heldout_nats_per_token"]),
        "training_stories_real": len(real),
        "training_stories_sampled": len(sampled),
        "training_tokens_distinct": int((real[:, 1:] != tokenizer.pad_token_id).sum())
        + int((sampled[:, 1:] != tokenizer.pad_token_id).sum()),
        "heldout_stories": len(heldout),
        "heldout_nats_per_token": nats / count,
        "heldout_bits_per_byte": nats / math.log(2.0) / size,
        "seconds": time.perf_counter() - began,
        "samples": decode(tokenizer, rows.tolist()),
    }
