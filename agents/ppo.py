"""Proximal policy optimization of a language model (Schulman et al. 2017; Ziegler et al. 2019)."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

import agents.checkpoint as checkpoint
from agents.config import PPOConfig
from agents.evaluation import Evaluation, evaluate
from agents.metrics import rollout_metrics, update_metrics
from agents.policy import ValueHeadLM
from agents.rollout import Rollout, collect
from agents.sampling import Sampler, TransformersSampler
from agents.schedule import lr_factor
from agents.update import Targets, minibatches, optimizer_step, targets
from agents.value_scale import update_value_scale
from textenv.env import TextEnv
from textenv.prompts import Prompt, PromptStream
from textenv.vector_env import TextVectorEnv

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
        collections: Rollouts collected.
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
        _check_parts(policy, envs, self.config)
        if self.config.eval_every and not eval_prompts:
            raise ValueError("eval_prompts: expected held-out prompts, because eval_every is set, got none")
        self.task = envs.unwrapped.task
        self.sampler = sampler or TransformersSampler(policy)
        self.eval_prompts = None if eval_prompts is None else self.task.tokenize(eval_prompts)
        self.prompts = PromptStream(len(self.task.prompts), seed=self.config.seed)
        self.optimizer = _optimizer(policy, self.config)
        self.updates = 0
        self.collections = 0
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

        Raises:
            ValueError: If `iterations` is no count.
        """
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
            raise ValueError(f"iterations: expected an integer >= 0, got {iterations!r}")
        if folder is not None and not self.config.eval_every:
            raise ValueError("folder: expected None, because eval_every is 0 and nothing is found best, got a folder")
        if self.config.schedule_updates is None:
            self.schedule_updates = max(self.schedule_updates or 0, self.updates + iterations)
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
        seed = self._seed(0, self.collections)
        self.collections += 1
        return collect(
            self.policy,
            self.task,
            self.sampler,
            chosen,
            seed=seed,
            microbatch_episodes=self.config.forward_episodes,
            gamma=self.config.gamma,
            whiten_rewards=self.config.whiten_rewards,
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
        for rows in minibatches(len(rollout.ids), config, self._seed(1, self.updates)):
            found = optimizer_step(
                self.policy,
                self.optimizer,
                rollout.select(rows.to(rollout.ids.device)),
                Targets(*(t[rows.to(t.device)] for t in target)),
                config,
                temperature=self.task.options.temperature,
                critic_only=self.updates < config.critic_warmup_updates,
                autocast=self._autocast,
            )
            if found is None:
                break
            for name, value in found.items():
                sums[name] += value
        # Before the controller moves: these are told with the β that was paid.
        metrics = rollout_metrics(rollout, target.returns, self.task) | update_metrics(sums)
        if self.task.reference is not None:
            self.task.controller.update(float(rollout.kl.sum(1).mean()), len(rollout.ids))
        self.updates += 1
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
        return evaluate(self.policy, self.envs, chosen, sampler=self.sampler, seed=seed, autocast=self._autocast)

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
        policy: ValueHeadLM | None = None,
    ) -> PPO:
        """Go on from a checkpoint.

        Args:
            folder: What `save` wrote.
            envs: The environment that it learnt in, made again.
            sampler: As in the constructor.
            eval_prompts: As in the constructor.
            policy: `ValueHeadLM.from_pretrained(folder, ...)` with options of your own, or made before the environment
                because its `reference()` is the environment's; None: loaded here.

        Raises:
            ValueError: If the folder holds no checkpoint, or one of another model.
        """
        return checkpoint.load(cls, Path(folder), envs, sampler, eval_prompts, policy)

    # ------------------------------------------------------------------------------------------------- helpers

    def _seed(self, purpose: int, count: int) -> int:
        """A seed for each update and purpose, so that a resumed run needs no random state."""
        return int(np.random.SeedSequence((self.config.seed, count, purpose)).generate_state(1)[0])

    def _autocast(self) -> AbstractContextManager:
        device = self.task.device.type
        enabled = self.config.bf16 if self.config.bf16 is not None else device == "cuda"
        return torch.autocast(device, dtype=torch.bfloat16) if enabled else nullcontext()

    def _evaluate(self, best: Path | None) -> dict[str, float]:
        summary = self.evaluate().summary
        objective = summary["score_mean"] - self.task.kl_coef * summary["kl_mean"]
        if objective > self.best_objective:
            self.best_objective = objective
            if best is not None:
                self.save(best)
        return {f"eval/{name}": value for name, value in summary.items()} | {"eval/objective": objective}


def _check_parts(policy: Any, envs: Any, config: Any) -> None:
    """What cannot learn, or not together."""
    if not isinstance(policy, ValueHeadLM):
        raise ValueError(f"policy: expected a ValueHeadLM (ValueHeadLM(model) makes one), got {type(policy).__name__}")
    if not isinstance(getattr(envs, "unwrapped", None), TextEnv | TextVectorEnv):
        raise ValueError(f"envs: expected gym.make or gym.make_vec of 'RLHF-Text-v0', got {type(envs).__name__}")
    if not isinstance(config, PPOConfig):
        raise ValueError(f"config: expected a PPOConfig, got {type(config).__name__}")
    task = envs.unwrapped.task
    if task.kl_source == "reference":
        raise ValueError(
            "kl_source: expected 'agent' or 'policy', got 'reference', which is for maximum-entropy algorithms; "
            "under PPO it teaches short responses"
        )
    if policy.vocab_size != task.vocab_size:
        raise ValueError(f"policy: expected the reference's vocabulary of {task.vocab_size}, got {policy.vocab_size}")
    if policy.device.type != task.device.type:
        raise ValueError(f"policy: expected it on the environment's {task.device}, got {policy.device}")


def _optimizer(policy: ValueHeadLM, config: PPOConfig) -> torch.optim.Optimizer:
    critic_lr = config.learning_rate if config.critic_learning_rate is None else config.critic_learning_rate
    groups = [
        {"params": list(policy.policy_parameters()), "lr": config.learning_rate, "initial_lr": config.learning_rate},
        {"params": list(policy.critic_parameters()), "lr": critic_lr, "initial_lr": critic_lr},
    ]
    return torch.optim.Adam(groups, eps=config.adam_eps, fused=True)
