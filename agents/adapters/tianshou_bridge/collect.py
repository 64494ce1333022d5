"""Collecting with Tianshou's own Collector: the KL in the rewards, exactly once, and figures that keep it apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from tianshou.algorithm.algorithm_base import Algorithm
from tianshou.data import Collector, CollectStats, SequenceSummaryStats, VectorReplayBuffer
from torch import Tensor

from agents.adapters.tianshou_bridge.env import TextBatchEnv
from textenv import kl


@dataclass(kw_only=True)
class TextCollectStats(CollectStats):
    """What was collected, with the score, the KL and the objective of each episode apart.

    Tianshou's own `returns` are sums of the rewards that are learnt from, so they hold the KL or a part of it.
    """

    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """`[E]`: what the reward function gave each episode."""
    kls: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """`[E]`: Σ_t log π(a_t|s_t) − log π_ref(a_t|s_t), of the law that acted; zeros without a reference."""
    objectives: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """`[E]`: what the environment paid without any KL, minus β times the KL."""
    score_stat: SequenceSummaryStats | None = None
    """Of `scores`."""
    kl_stat: SequenceSummaryStats | None = None
    """Of `kls`."""
    objective_stat: SequenceSummaryStats | None = None
    """Of `objectives`."""
    kl_coef: float = 0.0
    """β during the collection."""

    def update_at_step_batch(self, step_batch: Any, refresh_sequence_stats: bool = False) -> None:
        """Count; the standard deviation of token ids under π that Tianshou would compute means nothing."""
        self.n_collected_steps += len(step_batch)

    def refresh_all_sequence_stats(self) -> None:
        """Close the books: Tianshou calls it once, when a collection is over."""
        super().refresh_all_sequence_stats()
        close: Callable[[TextCollectStats], None] | None = getattr(self, "_close", None)
        if close is not None:
            del self._close
            close(self)
        if len(self.scores):
            self.score_stat = SequenceSummaryStats.from_sequence(self.scores)
            self.kl_stat = SequenceSummaryStats.from_sequence(self.kls)
            self.objective_stat = SequenceSummaryStats.from_sequence(self.objectives)

    _close = None  # no annotation: no field, so asdict() leaves it alone


class KLCharge:
    """A Collector's step hook that charges −β·(log π − log π_ref) before rewards enter the buffer.

    Under `kl_source="agent"` only, through `textenv.kl.charge`, with the log-probs of the very law that acted; under
    `policy` and `reference` the environment has paid its side and nothing is added. It also keeps the books of each
    episode, and lets the adaptive β see the KL once per collection.

    Attributes:
        rewards: What each token of each episode of the last collection earned, minus β·k_t, whoever charged it: the
            rewards whose sums are values.
        collections: Collections begun.
        latest: Figures of the last collection that is over.
    """

    def __init__(self, venv: TextBatchEnv) -> None:
        """Charge what is collected from `venv`."""
        self.venv, self.task = venv, venv.task
        steps = self.task.options.max_new_tokens
        # Of the running episodes.
        self._logprobs = torch.zeros(len(venv), steps)
        self._kls, self._earned = (np.zeros((len(venv), steps)) for _ in range(2))
        self.collections = 0
        self.latest: TextCollectStats | None = None
        self._begin()

    def _begin(self) -> None:
        self.collections += 1
        self.rewards: list[np.ndarray] = []
        self._books: list[tuple[float, float, float]] = []

    def __call__(self, action_batch: Any, rollout_batch: Any) -> None:
        """Tianshou's step hook: what was chosen and by which law, and what came of it."""
        rows, info = self.venv.last_rows, self.venv.last_info
        self.venv.store.owes_kl = False
        at = info["response_length"] - 1
        logprobs = self._law(action_batch, len(rows))
        self._logprobs[rows, at] = logprobs
        done = np.asarray(rollout_batch.terminated) | np.asarray(rollout_batch.truncated)
        self._earned[rows, at] = info["reward_parts/score"] + info["reward_parts/missing_eos"]
        paid = torch.as_tensor(np.asarray(rollout_batch.rew), dtype=torch.float32)
        if self.task.kl_coef > 0:
            paid = self._charge(paid, logprobs, rows, at, done)
        rollout_batch.rew = paid.double().numpy()
        for row, t, ended in zip(np.flatnonzero(done), at[done], rows[done], strict=True):
            self._close_episode(int(row), int(ended), int(t) + 1)
        if not self.venv.info_keys:
            rollout_batch.pop("info")  # nothing is in it, and the buffer would keep a reference for each token

    def _law(self, action_batch: Any, count: int) -> Tensor:
        """Log π of what was chosen."""
        chosen = torch.as_tensor(np.asarray(action_batch.act))
        law = action_batch.dist
        if law is None:  # Collector.collect(random=True) draws uniformly
            return torch.full((count,), -float(np.log(self.venv.envs.single_action_space.n)))
        return law.log_prob(chosen.to(law.logits.device)).detach().float().cpu()

    def _charge(self, paid: Tensor, logprobs: Tensor, rows: np.ndarray, at: np.ndarray, done: np.ndarray) -> Tensor:
        """Rewards `[r]` with the KL in them; the k_t that are known by now are booked."""
        options = self.task.options
        if options.kl_credit == "token":
            refs = torch.as_tensor(self.venv.last_info["ref_logprob"])
            self._kls[rows, at] = (logprobs - refs).numpy()
            mask = torch.ones_like(paid, dtype=torch.bool)
            return self._pay(paid[:, None], logprobs[:, None], refs[:, None], mask[:, None])[:, 0]
        if not done.any():
            return paid
        last = torch.as_tensor(at[done])[:, None]
        mask = torch.arange(options.max_new_tokens) <= last
        refs = torch.as_tensor(self.venv.last_info["ref_logprobs"][done])
        spoken = torch.where(mask, self._logprobs[rows[done]], 0.0)
        refs = torch.where(mask, refs, 0.0)
        self._kls[rows[done]] = (spoken - refs).numpy()
        due = torch.zeros_like(spoken).scatter_(1, last, paid[done][:, None])
        paid[done] = self._pay(due, spoken, refs, mask).gather(1, last)[:, 0]
        return paid

    def _pay(self, rewards: Tensor, logprobs: Tensor, refs: Tensor, mask: Tensor) -> Tensor:
        task = self.task
        credit = task.options.kl_credit
        return kl.charge(
            rewards, logprobs, refs, mask, kl_coef=task.kl_coef, kl_source=task.kl_source, kl_credit=credit
        )

    def _close_episode(self, place: int, row: int, length: int) -> None:
        rewards = self._earned[row, :length] - self.task.kl_coef * self._kls[row, :length]
        score, total = self.venv.last_info["score"][place], self._kls[row, :length].sum()
        self._books.append((float(score), float(total), float(rewards.sum())))
        self.rewards.append(rewards)
        self._kls[row] = 0.0

    def open_books(self, training: bool) -> TextCollectStats:
        """The statistics of a collection that begins now.

        Args:
            training: Whether its KL moves an adaptive β.
        """
        self._begin()
        stats = TextCollectStats(kl_coef=self.task.kl_coef)

        def close(closing: TextCollectStats) -> None:
            books = np.array(self._books).reshape(-1, 3)
            closing.scores, closing.kls, closing.objectives = books.T.copy()
            self.latest = closing
            if training and len(books):
                self.task.controller.update(float(books[:, 1].mean()), len(books))

        stats._close = close  # type: ignore[method-assign]
        return stats


def make_collector(
    policy: Any, venv: TextBatchEnv, buffer: Any = None, *, size: int = 0, training: bool = True
) -> Collector[TextCollectStats]:
    """Tianshou's Collector over a text environment, with the KL charged and the buffer watched by the store.

    Args:
        policy: A Tianshou policy or algorithm.
        venv: The environment.
        buffer: A buffer of Tianshou's, with a sub-buffer a row; None: a `VectorReplayBuffer` for `size` transitions.
        size: Transitions of the buffer that is made; 0: one response a row.
        training: Whether what is collected moves an adaptive β.

    Raises:
        ValueError: If a buffer and a size are given, or the policy's algorithm cannot learn under this `kl_source`.
    """
    actor = policy.policy if isinstance(policy, Algorithm) else policy
    legal = getattr(actor, "kl_sources", (venv.task.kl_source,))
    if venv.task.kl_source not in legal:
        expected = f"{' or '.join(map(repr, legal))} for {type(actor).__name__}"
        raise ValueError(f"kl_source: expected {expected}, got {venv.task.kl_source!r}")
    if buffer is not None and size:
        raise ValueError(f"size: expected 0 with a buffer, got {size}")
    if buffer is None:
        size = size or len(venv) * venv.task.options.max_new_tokens
        buffer = VectorReplayBuffer(size, len(venv))
    venv.store.watch(buffer)
    charge = KLCharge(venv)
    stats = cast(type[TextCollectStats], lambda: charge.open_books(training))
    return Collector(policy, venv, buffer, on_step_hook=charge, collect_stats_class=stats)


def charge_of(collector: Collector[Any]) -> KLCharge:
    """The hook of a collector that `make_collector` made."""
    hook = collector.get_on_step_hook()
    if not isinstance(hook, KLCharge):
        raise ValueError(f"collector: expected one of make_collector, got the step hook {hook!r}")
    return hook
