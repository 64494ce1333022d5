"""Training: the settings that suit text, and the callback that charges the KL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize, unwrap_vec_wrapper

import textenv.kl as kl
from agents.adapters.checks import check_learner
from agents.adapters.sb3_bridge.buffers import EpisodeRolloutBuffer, MaskableEpisodeRolloutBuffer
from agents.adapters.sb3_bridge.env import TextVecEnv
from agents.adapters.sb3_bridge.policy import LivePolicy, MaskableTextPolicy, TextPolicy
from agents.compatibility import refuse_reference
from agents.policy import ValueHeadLM
from agents.returns import discounted_returns
from agents.value_scale import first_value_scale, update_value_scale
from textenv.task import Task


class TextCallback(BaseCallback):
    """Charges the KL in the rewards before the buffer stores them, and keeps β and the critic's scale.

    Under `kl_source="agent"` each step's reward becomes r_t − β·(log π(a_t|s_t) − log π_ref(a_t|s_t)), with the
    log-prob that the token was drawn with; with `kl_credit="sequence"` the sum is charged with the last token. Under
    `"policy"` the environment has charged it. After each rollout β's controller sees the mean KL of the episodes that
    ended.

    The critic learns (V − R)² in reward units, whose gradient grows with the square of their scale. So V = σu + μ is
    rescaled to the running moments of the returns, and the model's `vf_coef` is set to value_coef / (2σ²): the loss is
    then `value_coef` × the native agent's ½(u − (R − μ)/σ)².

    Attributes:
        history: One dictionary a rollout, as logged under `rollout/`: means over the episodes that ended in it, NaN
            where none did. Without a reference (β = 0) `kl` is NaN and `objective` is the score. NaN is not logged.
    """

    def __init__(self, *, value_coef: float | None = 1.0, value_stats_decay: float = 0.9, verbose: int = 0) -> None:
        """Make one for a call of `learn`.

        Args:
            value_coef: Weight of the value loss in units of the returns' variance; None: leave scale and `vf_coef` be.
            value_stats_decay: Memory of the returns' moments, per rollout.
            verbose: Of the library.
        """
        super().__init__(verbose)
        self.value_coef, self.value_stats_decay = value_coef, value_stats_decay
        self.history: list[dict[str, float]] = []
        self._scores: list[float] = []
        self._kls: list[float] = []
        self._lengths: list[int] = []
        self._cuts: list[list[bool]] = []

    def _init_callback(self) -> None:
        venv, policy = self.training_env.unwrapped, self.model.policy
        if not isinstance(venv, TextVecEnv):
            raise ValueError(f"env: expected a TextVecEnv, got {type(venv).__name__}")
        if not isinstance(policy, TextPolicy | MaskableTextPolicy):
            raise ValueError(f"policy: expected TextPolicy or MaskableTextPolicy, got {type(policy).__name__}")
        normalizer = unwrap_vec_wrapper(self.training_env, VecNormalize)
        if normalizer is not None and normalizer.norm_reward:
            raise ValueError("env: expected rewards in the unit that β is in, got VecNormalize(norm_reward=True)")
        self._venv, self._task, self._network = venv, venv.text_envs.task, policy.network
        _check_task(self._task, isinstance(policy, MaskableTextPolicy))
        check_learner(self._network.policy, self._task, self.training_env.action_space, self._network.temperature)
        self._policy: Any = policy
        self._algorithm: Any = self.model

    def _on_rollout_start(self) -> None:
        for kept in (self._scores, self._kls, self._lengths, self._cuts):
            kept.clear()
        self._policy.begin_rollout()

    def _on_step(self) -> bool:
        venv, done = self._venv, self.locals["dones"]
        logprobs = self.locals["log_probs"].double().cpu().numpy()
        owed, ref = logprobs, venv.latest["ref_logprob"].astype(np.float64)
        venv.logprob_sums += logprobs
        if self._task.reference is None:
            owed = ref = np.zeros_like(logprobs)
        elif self._task.options.kl_credit == "sequence":  # the whole sum with the last token, and 0 before it
            owed, ref = done * venv.logprob_sums, done * venv.latest["ref_logprobs"].sum(1, dtype=np.float64)
        venv.kl_sums += owed - ref
        rewards = self.locals["rewards"]
        paid, owed, ref = (torch.from_numpy(one.astype(np.float64))[:, None] for one in (rewards, owed, ref))
        everything, coefficient, source = torch.ones_like(paid).bool(), self._task.kl_coef, self._task.kl_source
        # In place: the library stores this very array when the callback is done.
        rewards[:] = kl.charge(paid, owed, ref, everything, kl_coef=coefficient, kl_source=source)[:, 0].numpy()
        self._policy.settle()
        self._cuts.append([info.get("TimeLimit.truncated", False) for info in self.locals["infos"]])
        for kept, values in (
            (self._scores, venv.latest["score"]),
            (self._kls, venv.kl_sums),
            (self._lengths, venv.latest["response_length"]),
        ):
            kept.extend(values[done].tolist())
        return True

    def _on_rollout_end(self) -> None:
        charged = self._task.reference is not None
        score, length = _mean(self._scores), _mean(self._lengths)
        divergence = _mean(self._kls) if charged else math.nan
        row = {
            "score": score,
            "kl": divergence,
            "objective": score - self._task.kl_coef * divergence if charged else score,
            "kl_coef": self._task.kl_coef,
            "response_length": length,
            "episodes": len(self._scores),
            "timesteps": self.num_timesteps,
        }
        self.history.append(row)
        for name, value in row.items():
            if not math.isnan(value):
                self.logger.record(f"rollout/{name}", value)
        if charged and self._scores:
            self._task.controller.update(divergence, len(self._scores))
        if self.value_coef is not None:
            self._rescale(self.value_coef)

    def _rescale(self, value_coef: float) -> None:
        """Move the critic's μ and σ, and give its loss the weight that makes it one of u."""
        buffer, head = self._algorithm.rollout_buffer, self._network.policy.value_head
        if head.value_count == 0:
            before = float(head.value_mean)
            ends = np.concatenate([buffer.episode_starts[1:], self.locals["dones"][None]])
            discounts = torch.from_numpy((buffer.gamma * (1.0 - ends)).T.astype(np.float32))
            sums = discounted_returns(torch.from_numpy(buffer.rewards.T.copy()), discounts)
            if first_value_scale(head, sums, torch.ones_like(sums, dtype=torch.bool)):
                # A new critic foresees the mean of the first returns, from this rollout on.
                mean = float(head.value_mean)
                buffer.values[:] = mean
                # The library has paid γV of what was truncated, with the V of before.
                buffer.rewards += buffer.gamma * (mean - before) * np.array(self._cuts, dtype=np.float32)
                last = torch.full((buffer.n_envs, 1), mean)
                buffer.compute_returns_and_advantage(last_values=last, dones=self.locals["dones"])
        returns = torch.from_numpy(buffer.returns)
        update_value_scale(head, returns, torch.ones_like(returns, dtype=torch.bool), self.value_stats_decay)
        self._algorithm.vf_coef = value_coef / (2.0 * float(head.value_std) ** 2)


def settings(
    algorithm: type[OnPolicyAlgorithm],
    policy: ValueHeadLM,
    envs: VectorEnv | VecEnv,
    *,
    n_steps: int | None = None,
    by_episode: bool = True,
    cache: bool = True,
    share: bool = True,
) -> dict[str, Any]:
    """The arguments of the library's algorithm that suit a language model; change any of them by `|`.

    γ = 1; a rollout of `max_new_tokens` steps, which is whole episodes if all are that long; four minibatches; a
    learning rate that falls to 0 over the run; normalised advantages; no value clip.

    Args:
        algorithm: `PPO`, `A2C` or `MaskablePPO`, or a subclass.
        policy: What learns.
        envs: `gym.make_vec("RLHF-Text-v0", ...)`, or a `TextVecEnv`, wrapped or not.
        n_steps: Steps of each row in a rollout; None: `max_new_tokens`.
        by_episode: Whether minibatches are whole episodes, which costs much less than shuffled transitions.
        cache: Whether acting keeps keys and values.
        share: Whether learning forwards an episode once.

    Raises:
        ValueError: If the environment or the policy does not fit.
    """
    venv = envs if isinstance(envs, VecEnv) else VecMonitor(TextVecEnv(envs))
    inner = venv.unwrapped
    if not isinstance(inner, TextVecEnv):
        raise ValueError(f"envs: expected gym.make_vec of 'RLHF-Text-v0' or a TextVecEnv, got {type(inner).__name__}")
    if not issubclass(algorithm, PPO | A2C | MaskablePPO):
        raise ValueError(f"algorithm: expected PPO, A2C or MaskablePPO, got {algorithm.__name__}")
    task, masked = inner.text_envs.task, issubclass(algorithm, MaskablePPO)
    _check_task(task, masked)
    check_learner(policy, task, venv.action_space)
    steps = n_steps or task.options.max_new_tokens
    common: dict[str, Any] = {
        "policy": MaskableTextPolicy if masked else TextPolicy,
        "env": venv,
        "n_steps": steps,
        "gamma": 1.0,
        "gae_lambda": 0.98,
        "max_grad_norm": 1.0,
        "normalize_advantage": True,
        "rollout_buffer_class": MaskableEpisodeRolloutBuffer if masked else EpisodeRolloutBuffer,
        "rollout_buffer_kwargs": {"by_episode": by_episode},
        "policy_kwargs": {
            "lm": LivePolicy(policy),
            "temperature": task.options.temperature,
            "cache": cache,
            "share": share,
            "owes_kl": task.kl_source == "agent" and task.reference is not None,
        },
        "device": policy.device,
        "seed": 0,
    }
    if issubclass(algorithm, A2C):  # one step a rollout, so a large one
        return common | {"learning_rate": LinearSchedule(1e-3, 0.0, 1.0), "use_rms_prop": False}
    total = steps * venv.num_envs
    # The library warns of a last minibatch that is smaller, so as near to four as goes evenly.
    size = next((total // count for count in range(4, 9) if total % count == 0), -(-total // 4))
    batch = {"batch_size": size, "n_epochs": 2, "clip_range": 0.2}
    return common | batch | {"learning_rate": LinearSchedule(2e-4, 0.0, 1.0)}


def make(
    algorithm: type[OnPolicyAlgorithm],
    policy: ValueHeadLM,
    envs: VectorEnv | VecEnv,
    changes: Mapping[str, Any] | None = None,
    *,
    by_episode: bool = True,
    cache: bool = True,
    share: bool = True,
) -> Any:
    """The library's model with `settings`, some of them changed.

    Args:
        algorithm: As in `settings`.
        policy: As in `settings`.
        envs: As in `settings`.
        changes: Arguments of the algorithm's own.
        by_episode: As in `settings`.
        cache: As in `settings`.
        share: As in `settings`.
    """
    changes = dict(changes or {})
    steps = changes.get("n_steps")
    chosen = settings(algorithm, policy, envs, n_steps=steps, by_episode=by_episode, cache=cache, share=share)
    return algorithm(**(chosen | changes))


def learn(
    model: OnPolicyAlgorithm, iterations: int, callback: TextCallback | None = None, *, reset: bool = True
) -> list[dict[str, float]]:
    """Collect and learn, over and over.

    Args:
        model: What `make` made, or `load` loaded.
        iterations: Rollouts of n_steps × rows.
        callback: Charges the KL; None: a `TextCallback`.
        reset: Whether this is a run of its own, for the schedules and counters of the library; False: it goes on.

    Returns:
        `history` of the callback.
    """
    callback = callback or TextCallback()
    model.learn(iterations * model.n_steps * model.n_envs, callback=callback, reset_num_timesteps=reset)
    return callback.history


def _mean(numbers: Sequence[float]) -> float:
    return float(np.mean(numbers)) if numbers else math.nan


def _check_task(task: Task, masked: bool) -> None:
    refuse_reference(task)
    if task.constraint is not None and not masked:
        raise ValueError("algorithm: expected MaskablePPO, because there is a constraint, got one that reads no masks")
