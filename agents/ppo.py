"""Proximal policy optimization of a language model (Schulman et al. 2017; Ziegler et al. 2019)."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents import checkpoint
from agents.config import PPOConfig
from agents.evaluation import Evaluation, evaluate
from agents.metrics import rollout_metrics, update_metrics
from agents.policy import ValueHeadLM
from agents.rollout import Rollout, collect
from agents.sampling import Sampler, TransformersSampler
from agents.schedule import lr_factor
from agents.update import Targets, microbatch_loss, targets
from agents.value_scale import update_value_scale
from textenv.prompts import Prompt, PromptStream

Callback = Callable[[int, Mapping[str, float]], Any]
"""`(updates done, metrics)`; returning False ends `learn`."""


class PPO:
    """A policy, an optimizer, and the loop of collecting and learning.

    `learn` is `collect` and `update` in turn; a loop of your own calls the two itself. The environment is never
    stepped: responses are sampled whole and replayed, which pays exactly what stepping would.

    Attributes:
        policy: The `ValueHeadLM` that learns.
        task: The environment's: its models, prompts, limits and β.
        updates: Updates done.
    """

    def __init__(
        self,
        policy: ValueHeadLM,
        envs: Any,
        config: PPOConfig | None = None,
        sampler: Sampler | None = None,
        *,
        eval_prompts: Sequence[Prompt] | None = None,
    ) -> None:
        """Prepare to learn.

        Args:
            policy: What learns.
            envs: A `TextEnv` or `TextVectorEnv`, wrapped or not.
            config: Settings; None: the defaults.
            sampler: Draws responses; None: `TransformersSampler(policy)`.
            eval_prompts: Held-out prompts, evaluated every `eval_every` updates.

        Raises:
            ValueError: If the environment cannot be learnt from with this policy.
        """
        self.policy, self.envs, self.config = policy, envs, config or PPOConfig()
        self.task = envs.unwrapped.task
        if self.task.kl_source == "reference":
            raise ValueError(
                "kl_source: expected 'agent' or 'policy', got 'reference', which is for maximum-entropy algorithms; "
                "under PPO it teaches short responses"
            )
        if policy.vocab_size != self.task.vocab_size:
            raise ValueError(
                f"policy: expected the reference's vocabulary of {self.task.vocab_size}, got {policy.vocab_size}"
            )
        if self.config.eval_every and not eval_prompts:
            raise ValueError("eval_prompts: expected held-out prompts, because eval_every is set, got none")
        self.sampler = sampler or TransformersSampler(policy)
        self.eval_prompts = None if eval_prompts is None else self.task.tokenize(eval_prompts)
        self.prompts = PromptStream(len(self.task.prompts), seed=self.config.seed)
        self.optimizer = _optimizer(policy, self.config)
        self.updates = 0
        self.schedule_updates = self.config.schedule_updates
        self.best_objective = -float("inf")

    # ------------------------------------------------------------------------------------------------- the loop

    def learn(
        self, iterations: int, callback: Callback | None = None, *, folder: str | Path | None = None
    ) -> list[dict[str, float]]:
        """Collect and update, over and over.

        Args:
            iterations: How many updates to do now.
            callback: Called after each with the updates done and its metrics, a tracker's `log` for one.
            folder: Where the policy that evaluated best is kept, in `best/`; needs `eval_every`.

        Returns:
            The metrics of each update.
        """
        if self.schedule_updates is None:
            self.schedule_updates = self.updates + iterations
        history = []
        for _ in range(iterations):
            rollout = self.collect()
            metrics = self.update(rollout)
            if self.config.eval_every and self.updates % self.config.eval_every == 0:
                metrics |= self._evaluate(None if folder is None else Path(folder) / "best")
            history.append(metrics)
            if callback is not None and callback(self.updates, metrics) is False:
                break
        return history

    def collect(self, prompts: Sequence[Prompt] | None = None) -> Rollout:
        """Sample and record one rollout.

        Args:
            prompts: One episode each; None: the next `batch_episodes` of the environment's prompts.
        """
        if prompts is None:
            chosen = [self.task.prompts[index] for index in self.prompts.take(self.config.batch_episodes)]
        else:
            chosen = self.task.tokenize(prompts)
        return collect(
            self.policy,
            self.task,
            self.sampler,
            chosen,
            seed=self._seed(0),
            microbatch_episodes=self._microbatch_episodes,
            gamma=self.config.gamma,
            score_clip=self.config.score_clip,
            autocast=self._autocast,
        )

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Learn from one rollout: epochs × minibatches optimizer steps.

        Returns:
            The metrics of the rollout and of the update, as the PPO page of the documentation defines them.
        """
        start, config = time.perf_counter(), self.config
        target = targets(rollout, config)
        update_value_scale(self.policy.value_head, target.returns, rollout.mask, config.value_stats_decay)
        factor = lr_factor(self.updates, config, self.schedule_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        sums: defaultdict[str, float] = defaultdict(float)
        generator = torch.Generator().manual_seed(self._seed(1))
        for rows in self._minibatches(len(rollout.ids), generator):
            if not self._step(rollout.select(rows), Targets(*(t[rows] for t in target)), sums):
                break
        self.updates += 1
        self.task.controller.update(float(rollout.kl.sum(1).mean()), len(rollout.ids))
        metrics = rollout_metrics(rollout, target.returns, self.task) | update_metrics(sums)
        metrics["lr"] = config.learning_rate * factor
        metrics["time/update"] = time.perf_counter() - start
        metrics["time/total"] = metrics["time/update"] + sum(rollout.seconds.values())
        metrics["speed/tokens_per_s"] = float(rollout.mask.sum()) / metrics["time/total"]
        return metrics

    def evaluate(self, prompts: Sequence[Prompt] | None = None, *, seed: int = 0) -> Evaluation:
        """Sample one response a prompt and score it; nothing is learnt, no random state is moved."""
        chosen = self.eval_prompts if prompts is None else self.task.tokenize(prompts)
        if not chosen:
            raise ValueError("prompts: expected some, because the agent has no eval_prompts, got none")
        with self._autocast():
            return evaluate(self.policy, self.envs, chosen, sampler=self.sampler, seed=seed)

    # ------------------------------------------------------------------------------------------------- checkpoints

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint from which `load` goes on bit for bit; a failure leaves the previous one whole.

        The folder is also a Hugging Face folder: `AutoModelForCausalLM.from_pretrained(folder)` loads the policy.
        """
        checkpoint.save(self, Path(folder))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        envs: Any,
        sampler: Sampler | None = None,
        *,
        eval_prompts: Sequence[Prompt] | None = None,
        **policy_options: Any,
    ) -> PPO:
        """Go on from a checkpoint.

        Args:
            folder: What `save` wrote.
            envs: The environment that it learnt in, made again.
            sampler: As in the constructor.
            eval_prompts: As in the constructor.
            **policy_options: Of `ValueHeadLM.from_pretrained`, such as `device` and `gradient_checkpointing`.

        Raises:
            ValueError: If the folder holds no checkpoint, or one of another model.
        """
        return checkpoint.load(cls, Path(folder), envs, sampler, eval_prompts, policy_options)

    # ------------------------------------------------------------------------------------------------- helpers

    @property
    def _microbatch_episodes(self) -> int:
        return self.config.microbatch_episodes or -(-self.config.batch_episodes // self.config.minibatches)

    def _seed(self, purpose: int) -> int:
        """A seed for each update and purpose, so that a resumed run needs no random state."""
        return int(np.random.SeedSequence((self.config.seed, self.updates, purpose)).generate_state(1)[0])

    def _autocast(self) -> AbstractContextManager:
        device = self.task.device.type
        enabled = self.config.bf16 if self.config.bf16 is not None else device == "cuda"
        return torch.autocast(device, dtype=torch.bfloat16) if enabled else nullcontext()

    def _minibatches(self, episodes: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Row indices of each optimizer step, reshuffled every epoch."""
        for _ in range(self.config.epochs):
            order = torch.randperm(episodes, generator=generator).to(self.task.device)
            yield from order.tensor_split(min(self.config.minibatches, episodes))

    def _step(self, rollout: Rollout, target: Targets, sums: dict[str, float]) -> bool:
        """One optimizer step on a minibatch; False, and no step, if the policy has moved too far already."""
        config, tokens = self.config, int(rollout.mask.sum())
        critic_only = self.updates < config.critic_warmup_updates
        self.optimizer.zero_grad(set_to_none=True)
        found: defaultdict[str, float] = defaultdict(float)
        for rows in torch.arange(len(rollout.ids), device=self.task.device).split(self._microbatch_episodes):
            part = rollout.select(rows)
            steps = part.mask.shape[1]
            with self._autocast():
                loss, stats = microbatch_loss(
                    self.policy,
                    part,
                    Targets(*(t[rows, :steps] for t in target)),
                    config,
                    tokens=tokens,
                    temperature=self.task.options.temperature,
                    critic_only=critic_only,
                )
            loss.backward()
            for name, value in stats.items():
                found[name] += float(value)
        if config.max_update_kl is not None and found["kl/update"] / tokens > config.max_update_kl:
            return False
        found["grad_norm/policy"] = tokens * _clip(self.policy.policy_parameters(), config.max_grad_norm)
        found["grad_norm/critic"] = tokens * _clip(self.policy.critic_parameters(), config.max_grad_norm)
        self.optimizer.step()
        found["tokens"], found["steps"] = tokens, 1
        for name, value in found.items():
            sums[name] += value
        return True

    def _evaluate(self, best: Path | None) -> dict[str, float]:
        summary = self.evaluate().summary
        objective = summary["score_mean"] - self.task.kl_coef * summary["kl_mean"]
        if objective > self.best_objective:
            self.best_objective = objective
            if best is not None:
                self.save(best)
        return {f"eval/{name}": value for name, value in summary.items()} | {"eval/objective": objective}


def _clip(parameters: Iterator[torch.nn.Parameter], max_norm: float | None) -> float:
    """The norm of a gradient, which is scaled to `max_norm` where it is larger."""
    learning = [p for p in parameters if p.grad is not None]
    if not learning:
        return 0.0
    return float(torch.nn.utils.clip_grad_norm_(learning, float("inf") if max_norm is None else max_norm))


def _optimizer(policy: ValueHeadLM, config: PPOConfig) -> torch.optim.Optimizer:
    critic_lr = config.learning_rate if config.critic_learning_rate is None else config.critic_learning_rate
    groups = [
        {"params": list(policy.policy_parameters()), "lr": config.learning_rate, "initial_lr": config.learning_rate},
        {"params": list(policy.critic_parameters()), "lr": critic_lr, "initial_lr": critic_lr},
    ]
    return torch.optim.Adam(groups, eps=config.adam_eps, fused=True)
