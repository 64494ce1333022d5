"""What both trainings share: optimizer, schedule, guarded compilation, the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scripts.embedding.config import Config, log


def schedule(progress: float, warmup: float = 0.03, floor: float = 0.02) -> float:
    """Learning-rate factor at ``progress`` in [0, 1]: linear warm-up, then a cosine down to ``floor``."""
    if progress < warmup:
        return progress / warmup + 1e-3
    angle = math.pi * min(1.0, (progress - warmup) / (1.0 - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(angle))


class Optimizers:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for the rest."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        """Sort the parameters."""
        hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
        others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(hidden, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
        )

    def step(self, learning_rate: float) -> None:
        """One step of both, and a clean slate."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()
            part.zero_grad(set_to_none=True)


def autocast(device: str) -> torch.autocast:
    """bfloat16 matrix products."""
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16)


def guarded_compile(
    function: Callable[..., Tensor], example: Callable[[], tuple[Any, ...]], config: Config
) -> Callable[..., Tensor]:
    """``torch.compile(function)`` if it works on one example, forward and backward, else ``function``."""
    if not (config.compile and config.device.startswith("cuda")):
        return function
    began = time.perf_counter()
    try:
        compiled = torch.compile(function)
        with autocast(config.device):
            loss = compiled(*example())
        loss.backward()
    except Exception as error:  # a compiler can fail in any way, and none of them matters here
        log(f"  torch.compile failed, going on without: {type(error).__name__}: {str(error)[:200]}")
        return function
    log(f"  compiled in {time.perf_counter() - began:.1f} s")
    return compiled


def train(
    model: nn.Module,
    loss_of: Callable[..., Tensor],
    batch_at: Callable[[int], tuple[Any, ...]],
    config: Config,
    *,
    steps: int,
    minutes: float,
    learning_rate: float,
    evaluate: Callable[[], float] | None = None,
    report_every: int = 200,
) -> tuple[int, float]:
    """Minimise ``loss_of(*batch_at(step))``; keep the weights with the least ``evaluate()`` if it is given.

    The schedule follows the steps, or the clock if ``minutes`` pass sooner.

    Returns:
        The steps taken and the least evaluation (NaN without ``evaluate``).
    """
    loss_of = guarded_compile(loss_of, lambda: batch_at(0), config)
    model.zero_grad(set_to_none=True)
    optimizer = Optimizers(model, learning_rate)
    best, best_weights = math.nan, None
    began, step, progress, losses = time.perf_counter(), 0, 0.0, []
    while progress < 1.0:
        with autocast(config.device):
            loss = loss_of(*batch_at(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(learning_rate * schedule(progress))
        losses.append(loss.detach())
        step += 1
        if step % 25 == 0:  # the device runs behind the host: without this, the clock would run ahead of the work
            losses[-1].item()
        progress = max(step / steps, (time.perf_counter() - began) / (60.0 * minutes))
        if step % report_every == 0 or progress >= 1.0:
            now = evaluate() if evaluate else math.nan
            if evaluate and not now >= best:
                best, best_weights = now, {name: value.detach().clone() for name, value in model.state_dict().items()}
            mean = torch.stack(losses).mean().item()
            rate = step / (time.perf_counter() - began)
            log(f"  step {step:6d} {progress:4.0%}  loss {mean:.4f}  held-out {now:.4f} {best:.4f}  {rate:.1f} steps/s")
            losses.clear()
    if best_weights is not None:
        model.load_state_dict(best_weights)
    return step, best
