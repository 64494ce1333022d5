"""The batched environment in TorchRL: its `GymWrapper`, the infos that learning needs, and the KL in the reward."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from tensordict import TensorDictBase
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase, GymWrapper, TransformedEnv
from torchrl.envs.gym_like import default_info_dict_reader
from torchrl.envs.transforms import Transform

import textenv.kl as kl
from agents.adapters.checks import text_vector_env
from agents.compatibility import refuse_reference
from textenv.task import Task
from textenv.vector_env import TextVectorEnv

_SUMS = ("episode_logprob", "episode_kl")


class KLCharge(Transform):
    """Charges the KL in the reward, from the policy's `action_log_prob` and the environment's `ref_logprob`.

    r_t ← r_t − β·(log π(a_t|s_t) − log π_ref(a_t|s_t)) under `kl_source="agent"`; with `kl_credit="sequence"` the sum
    with the last token. Under `"policy"` the environment has charged it. The sums of log π and of the KL over the
    episode so far are kept in `episode_logprob` and `episode_kl`, `[N, 1]`.
    """

    def __init__(self, task: Task) -> None:
        """Charge for a task.

        Args:
            task: The environment's; its β is read at each step.

        Raises:
            ValueError: Under `kl_source="reference"`.
        """
        super().__init__(in_keys=["reward"], out_keys=["reward"])
        refuse_reference(task)
        self.task = task

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        logprobs = tensordict.get("action_log_prob", None)
        if logprobs is None:
            raise ValueError("policy: expected one that writes 'action_log_prob', as actor_critic's does, got none")
        reward = next_tensordict.get("reward")
        owed = logprobs.double().reshape(reward.shape)
        ref = next_tensordict.get("ref_logprob").double().reshape(reward.shape)
        spoken = tensordict.get("episode_logprob") + owed
        if self.task.reference is None:
            owed = ref = torch.zeros_like(owed)
        elif self.task.options.kl_credit == "sequence":  # the whole sum with the last token, and 0 before it
            done = next_tensordict.get("done")
            owed, ref = spoken * done, next_tensordict.get("ref_logprobs").double().sum(-1, keepdim=True) * done
        everything = torch.ones_like(owed, dtype=torch.bool)
        coefficient, source = self.task.kl_coef, self.task.kl_source
        charged = kl.charge(reward.double(), owed, ref, everything, kl_coef=coefficient, kl_source=source)
        next_tensordict.set("reward", charged.to(reward.dtype))
        next_tensordict.set("episode_logprob", spoken)
        next_tensordict.set("episode_kl", tensordict.get("episode_kl") + owed - ref)
        return next_tensordict

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        shape = (*tensordict_reset.batch_size, 1)
        for key in _SUMS:  # of a partial reset, the library takes the rows that begin and no others
            tensordict_reset.set(key, torch.zeros(shape, dtype=torch.float64, device=tensordict_reset.device))
        return tensordict_reset

    def transform_observation_spec(self, observation_spec: Any) -> Any:
        """With the two sums."""
        shape = torch.Size([*observation_spec.shape, 1])
        for key in _SUMS:
            observation_spec[key] = Unbounded(shape, dtype=torch.float64, device=observation_spec.device)
        return observation_spec


class _Lent(VectorWrapper):
    """An environment that its borrower cannot close: TorchRL's wrappers and collectors do when they are collected."""

    def __init__(self, envs: VectorEnv, mode: AutoresetMode) -> None:
        """Lend `envs`; TorchRL looks for the mode on the outermost wrapper."""
        super().__init__(envs)
        self.autoreset_mode = mode

    def close(self, **kwargs: Any) -> None:
        """Leave it open."""


def make_env(envs: VectorEnv) -> EnvBase:
    """TorchRL's `GymWrapper` around the batched environment, with infos, and the KL charged.

    Closing it leaves `envs` open.

    Args:
        envs: `gym.make_vec("RLHF-Text-v0", num_envs=N, autoreset_mode="Disabled")`, wrapped or not. `SameStep` works
            too, at a higher price.

    Raises:
        ValueError: If it is anything else, or of `kl_source="reference"`.
    """
    inner = text_vector_env(envs)
    if inner.obs_type != "numpy":
        raise ValueError(f"envs: expected obs_type='numpy', got {inner.obs_type!r}")
    if inner.autoreset_mode is AutoresetMode.NEXT_STEP:
        raise ValueError("envs: expected autoreset DISABLED or SAME_STEP, got NEXT_STEP, which TorchRL refuses")
    task, disabled = inner.task, inner.autoreset_mode is AutoresetMode.DISABLED
    if task.options.length_end == "truncate" and not disabled:
        # Of observations that are dictionaries, its wrapper loses the last one under SAME_STEP, and bootstraps from it.
        raise ValueError("envs: expected autoreset DISABLED with length_end='truncate', got SAME_STEP")
    if task.constraint is not None and not disabled:  # where its wrapper takes random steps to learn the infos
        raise ValueError("envs: expected autoreset DISABLED with a constraint, got SAME_STEP")
    charge = KLCharge(task)
    env: Any = GymWrapper(_Lent(envs, inner.autoreset_mode), categorical_action_encoding=True, device=task.device)
    if disabled:  # else the wrapper has made a reader by itself
        env.set_info_dict_reader(_info_reader(inner))
    return env.append_transform(charge) if isinstance(env, TransformedEnv) else TransformedEnv(env, charge)


def _info_reader(envs: TextVectorEnv) -> default_info_dict_reader:
    """Of what the transform and the metrics need, and of the mask of actions if there is a constraint."""
    rows, task = envs.num_envs, envs.task
    spec: dict[str, Any] = {key: Unbounded(torch.Size([rows])) for key in ("score", "ref_logprob")}
    if task.options.kl_credit == "sequence":
        spec["ref_logprobs"] = Unbounded(torch.Size([rows, task.options.max_new_tokens]))
    if task.constraint is not None:
        spec["action_mask"] = Unbounded(torch.Size([rows, task.vocab_size]), dtype=torch.int8)
    spec["response_length"] = Unbounded(torch.Size([rows]), dtype=torch.int64)
    return default_info_dict_reader(list(spec), spec=Composite(spec, shape=torch.Size([rows])).to(task.device))
