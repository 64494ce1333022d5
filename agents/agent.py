"""The agent: any algorithm, and the loop of collecting and learning."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

import agents.checkpoint as checkpoint
import agents.compatibility as compatible
from agents.algorithms.base import Algorithm
from agents.config import TrainConfig
from agents.evaluation import Evaluation, evaluate
from agents.metrics import rollout_metrics, update_metrics
from agents.mismatch import check_mismatch
from agents.policy import ValueHeadLM
from agents.rollout import Rollout, collect
from agents.sampling import Fingerprint, Sampler, TransformersSampler
from agents.sampling.sync import Comparisons, WeightSync, check_synced
from agents.schedule import lr_factor
from agents.undo import undone_on_failure
from agents.update import Step, minibatches, optimizer_steps, targets
from agents.value_scale import update_value_scale
from textenv.prompts import Prompt

Callback = Callable[[int, Mapping[str, float]], Any]
"""`(updates done, metrics)`; returning False ends `learn`."""


class Agent:
    """A policy, an algorithm, an optimizer, and the loop of collecting and learning.

    `learn` is `collect` and `update` in turn; a loop of your own calls the two itself. The environment is never
    stepped: responses are sampled whole and replayed, which pays exactly what stepping would.

    Attributes:
        policy: The `ValueHeadLM` that learns.
        algorithm: How it learns.
        task: The environment's: its models, prompts, limits and β.
        updates: Updates done.
        collections: Rollouts collected.
        memory: What the algorithm's estimator remembers of earlier updates.
    """

    def __init__(
        self,
        policy: ValueHeadLM,
        envs: Any,
        algorithm: Algorithm,
        config: TrainConfig | None = None,
        sampler: Sampler | None = None,
        *,
        eval_prompts: Sequence[Prompt] | None = None,
    ) -> None:
        """Prepare to learn.

        Args:
            policy: What learns.
            envs: A `TextEnv` or `TextVectorEnv`, wrapped or not.
            algorithm: How: one of `agents.algorithms.RECIPES`, or your own.
            config: Settings of the loop; None: those that suit the algorithm, `algorithm.defaults`.
            sampler: Draws responses; None: `TransformersSampler(policy)`.
            eval_prompts: Held-out prompts, evaluated every `eval_every` updates.

        Raises:
            ValueError: If the environment cannot be learnt from with this policy, or the algorithm with these settings.
        """
        compatible.check_parts(policy, envs)
        self.policy, self.envs, self.algorithm = policy, envs, algorithm
        self.config = compatible.check_settings(algorithm, config)
        if self.config.eval_every and not eval_prompts:
            raise ValueError("eval_prompts: expected held-out prompts, because eval_every is set, got none")
        self.task = envs.unwrapped.task
        compatible.check_evaluations(self.config, self.task)
        compatible.check_actions(envs)
        compatible.check_task(algorithm, self.task)
        self.sampler = sampler or TransformersSampler(policy)
        self.eval_prompts = None if eval_prompts is None else self.task.tokenize(eval_prompts)
        self.prompts = self.task.prompt_stream(seed=self.config.seed, group=algorithm.group_size)
        self._autocast = _autocast(self.task.device, self.config.bf16)
        self._sync, self.comparisons = WeightSync(), Comparisons()
        self.optimizer = _optimizer(policy, self.config, with_critic=algorithm.critic is not None)
        self.memory: dict[str, float] = {}
        self.updates = self.collections = 0
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
            folder: Where the best policy is kept, in `best/`; needs `eval_every`, and no running statistics of scores.

        Returns:
            The metrics of each update.

        Raises:
            ValueError: If `iterations` is no count.
        """
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
            raise ValueError(f"iterations: expected an integer >= 0, got {iterations!r}")
        if folder is not None:
            compatible.check_best(self.config, self.task)
        if self.config.schedule_updates is None:
            self.schedule_updates = max(self.schedule_updates or 0, self.updates + iterations)
        history = []
        for _ in range(iterations):
            rollout = self.collect()
            metrics = self.update(rollout)
            if self.config.eval_every and self.updates % self.config.eval_every == 0:
                metrics |= _evaluated(self, None if folder is None else Path(folder) / "best")
            history.append(metrics)
            if callback is not None and callback(self.updates, metrics) is False:
                break
        return history

    @undone_on_failure
    def collect(self, prompts: Sequence[Prompt] | None = None) -> Rollout:
        """Sample and record one rollout.

        Args:
            prompts: One group of `group_size` episodes each; None: the next of the environment's prompts, as many as
                make `batch_episodes` episodes.

        Raises:
            SamplerMismatch: If the sampler drew from other weights, or its law is further from the trainer's than
                `mismatch_alarm`. After this and any other error the agent is as it was.
        """
        # The environment may have been wrapped, or told of a policy, since.
        compatible.check_actions(self.envs)
        compatible.check_task(self.algorithm, self.task)
        chosen = _chosen(self, prompts)
        seed = _seed(self.config.seed, self.collections, 0)
        self.collections += 1
        trained = self._sync.push(self.sampler, self.policy.lm, self.updates)
        rollout = collect(
            self.policy,
            self.task,
            self.sampler,
            chosen,
            self.config,
            seed=seed,
            compare=self.comparisons.due(self.sampler),
            group_size=self.algorithm.group_size,
            with_values=self.algorithm.critic is not None,
            with_greedy=self.algorithm.greedy,
            charge_kl=self.algorithm.kl_loss is None,
            autocast=self._autocast,
        )
        return _checked(self, rollout, trained)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Learn from one rollout: epochs × minibatches optimizer steps.

        Returns:
            The metrics of the rollout and of the update, as the PPO page of the documentation defines them.
        """
        start, config, critic = time.perf_counter(), self.config, self.algorithm.critic
        target = targets(replace(rollout, memory=self.memory), self.algorithm, config)
        if critic is not None and target.returns is not None:
            update_value_scale(self.policy.value_head, target.returns, rollout.mask, critic.stats_decay)
        factor = lr_factor(self.updates, config, self.schedule_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        step = Step(
            self.algorithm,
            config,
            temperature=self.task.options.temperature,
            max_new_tokens=self.task.options.max_new_tokens,
            kl_coef=self.task.kl_coef,
            critic_only=self.updates < config.critic_warmup_updates,
        )
        batches = minibatches(len(rollout.ids), config, _seed(config.seed, self.updates, 1))
        sums = optimizer_steps(self.policy, self.optimizer, rollout, target, batches, step, self._autocast)
        # Before the controller moves, and the reward's statistics: these are told with what was paid.
        returns = None if critic is None else target.returns
        metrics = rollout_metrics(rollout, returns, self.task) | update_metrics(sums)
        if self.task.reference is not None:
            self.task.controller.update(float(rollout.kl.sum(1).mean()), len(rollout.ids))
        self.task.reward.update(rollout.paid)
        self.updates, self.memory = self.updates + 1, dict(target.memory)
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
        trained = self._sync.push(self.sampler, self.policy.lm, self.updates)
        how: Any = {"sampler": self.sampler, "seed": seed, "autocast": self._autocast, "trained": trained}
        return evaluate(self.policy, self.envs, chosen, **how)

    # ------------------------------------------------------------------------------------------------- checkpoints

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint from which `load` goes on, on a CPU bit for bit; a failure leaves the previous one whole.

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
        algorithm: Algorithm | None = None,
    ) -> Self:
        """Go on from a checkpoint.

        Args:
            folder: What `save` wrote.
            envs: The environment that it learnt in, made again.
            sampler: As in the constructor.
            eval_prompts: As in the constructor.
            policy: `ValueHeadLM.from_pretrained(folder, ...)` with options of your own, or made before the environment
                because its `reference()` is the environment's; None: loaded here.
            algorithm: The one that was saved, where it holds functions or classes of your own; None: made again here.

        Raises:
            ValueError: If the folder holds no checkpoint, or one of another model or algorithm.
        """
        saved = checkpoint.read(Path(folder))
        config, algorithm = saved.config(), saved.algorithm(algorithm)
        policy = saved.policy(envs) if policy is None else policy
        agent = cls(policy, envs, algorithm, config, sampler, eval_prompts=eval_prompts)
        saved.restore(agent)
        return agent


def _seed(seed: int, count: int, purpose: int) -> int:
    """A seed for each update and purpose, so that a resumed run needs no random state."""
    return int(np.random.SeedSequence((seed, count, purpose)).generate_state(1)[0])


def _chosen(agent: Agent, prompts: Sequence[Prompt] | None) -> Sequence[Sequence[int]]:
    """These as token ids, or the environment's next, one a group."""
    if prompts is not None:
        return agent.task.tokenize(prompts)
    indices = agent.prompts.take(agent.config.batch_episodes)[:: agent.algorithm.group_size]
    return [agent.task.prompts[index] for index in indices]


def _checked(agent: Agent, rollout: Rollout, trained: Fingerprint) -> Rollout:
    """The rollout, if it is of the weights that train and its log-probs are theirs."""
    check_synced(trained, rollout.fingerprint)
    if rollout.trainer_logprobs is not None:
        alarm = agent.config.mismatch_alarm
        check_mismatch(rollout.trainer_logprobs, rollout.behavior_logprobs, rollout.mask, alarm)
    agent.comparisons.passed(agent.sampler)
    return rollout


def _evaluated(agent: Agent, best: Path | None) -> dict[str, float]:
    """Metrics of the held-out prompts; the best policy so far is saved there."""
    summary = agent.evaluate().summary
    metrics = {f"eval/{name}": value for name, value in summary.items()}
    if agent.task.reward.learns:  # what is optimised changes: no objective holds throughout
        return metrics
    objective = summary["score_mean"] - agent.task.kl_coef * summary["kl_mean"]
    if objective > agent.best_objective:
        agent.best_objective = objective
        if best is not None:
            agent.save(best)
    return metrics | {"eval/objective": objective}


def _autocast(device: torch.device, bf16: bool | None) -> Callable[[], AbstractContextManager]:
    """What makes the context of each forward."""
    enabled = device.type == "cuda" if bf16 is None else bf16
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16) if enabled else nullcontext()


def _optimizer(policy: ValueHeadLM, config: TrainConfig, *, with_critic: bool) -> torch.optim.Optimizer:
    critic_lr = config.learning_rate if config.critic_learning_rate is None else config.critic_learning_rate
    parts = [(policy.policy_parameters(), config.learning_rate)]
    if with_critic:
        parts.append((policy.critic_parameters(), critic_lr))
    groups = [{"params": list(parameters), "lr": lr, "initial_lr": lr} for parameters, lr in parts]
    return torch.optim.Adam(groups, eps=config.adam_eps, fused=True)
