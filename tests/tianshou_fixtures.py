"""Tianshou over a tiny policy and environment, and plain computations to hold it to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tianshou.algorithm import algorithm_base
from tianshou.data.buffer import manager
from tianshou.utils.torch_utils import policy_within_training_step

from agents.adapters.tianshou_bridge import DEFAULTS, Setup, TextBatchEnv, make_algorithm, use_eager_attention
from tests.agent_fixtures import make_env, make_policy
from tests.conftest import make_gpt2, make_llama
from textenv.wrappers import VectorTopKActions

# Third parties, at import: none of it is about what we do.
WARNINGS = (
    # pygame, which Tianshou imports through PettingZoo, asks setuptools for something that is going away.
    "ignore:pkg_resources is deprecated:UserWarning",
)

# Tianshou's loops as plain Python: compiling them takes longer than all that the tests compute.
for module, names in ((algorithm_base, ("_gae", "_nstep_return")), (manager, ("_prev_index", "_next_index"))):
    for name in names:
        compiled = getattr(module, name)
        setattr(module, name, getattr(compiled, "py_func", compiled))  # pytest imports this file twice, for doctests


def make_venv(rows: int = 4, k: int = 0, lm: Any = None, **options: Any) -> TextBatchEnv:
    """A tiny environment as Tianshou sees it; ragged responses."""
    envs: Any = make_env(lm, num_envs=rows, autoreset_mode="Disabled", **options)
    return TextBatchEnv(VectorTopKActions(envs, k=k) if k else envs)


def make_setup(
    name: str = "ppo",
    *,
    rows: int = 4,
    k: int = 0,
    critic: str = "shared+",
    moved: float = 0.3,
    gpt2: bool = False,
    env: dict[str, Any] | None = None,
    **changes: Any,
) -> Setup:
    """An algorithm on a policy that has moved away from its reference."""
    lm = make_gpt2() if gpt2 else make_llama()
    options = dict(env or {})
    if name in ("dqn", "sac"):
        options.setdefault("kl_source", "reference")
    venv = make_venv(rows, k, copy.deepcopy(lm), **options)
    move(lm, moved)
    policy = make_policy(lm, critic)
    if name in ("npg", "trpo"):
        use_eager_attention(policy)
    config = replace(DEFAULTS[name], **{"episodes": 8, "iterations": 2, **changes})
    return make_algorithm(name, policy, venv, config)


def move(lm: Any, size: float) -> None:
    """Add noise to the weights."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(size * p.std().nan_to_num(1.0) * torch.randn(p.shape, generator=generator))


def collect(setup: Setup, episodes: int = 8, seed: int = 0) -> Any:
    """One collection, as a trainer does it."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    setup.venv.seed(seed)
    setup.collector.reset()
    with policy_within_training_step(setup.algorithm.policy):
        return setup.collector.collect(n_episode=episodes)


def episodes_in(setup: Setup) -> list[dict[str, Any]]:
    """The episodes of the buffer: `prompt`, `response` and the arrays of their transitions."""
    buffer, store = setup.collector.buffer, setup.venv.store
    every = buffer.sample_indices(0)
    handles = np.asarray(buffer.obs[every])
    found = []
    for number in dict.fromkeys(handles[:, 0].tolist()):
        places = every[handles[:, 0] == number]
        tokens, start, candidates = store.episode(number)
        found.append(
            {
                "number": number,
                "prompt": tokens[:start].tolist(),
                "response": tokens[start:].tolist(),
                "candidates": None if candidates is None else candidates[:-1],
                "lengths": buffer.obs[places][:, 1].tolist(),
                "next_lengths": buffer.obs_next[places][:, 1].tolist(),
                "act": buffer.act[places].tolist(),
                "rew": buffer.rew[places].tolist(),
                "terminated": buffer.terminated[places].tolist(),
            }
        )
    return found


@torch.no_grad()
def plain_laws(
    lm: Any, prompt: Sequence[int], response: Sequence[int], allowed: Any = None, temperature: float = 1.0
) -> torch.Tensor:
    """log π of every token in every state of a response, `[T, V]`, by one float64 forward.

    `allowed` `[T, k]` renormalises over candidates; the others have −inf.
    """
    double = copy.deepcopy(lm).double().eval()
    logits = double(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / temperature
    if allowed is not None:
        mask = torch.full_like(logits, -torch.inf)
        logits = logits + mask.scatter_(1, torch.as_tensor(np.asarray(allowed, dtype=np.int64)), 0.0)
    return logits.log_softmax(-1)


def plain_logprobs(
    lm: Any, prompt: Sequence[int], response: Sequence[int], allowed: Any = None, temperature: float = 1.0
) -> list[float]:
    """log π of each token of a response."""
    laws = plain_laws(lm, prompt, response, allowed, temperature)
    return [float(laws[t, token]) for t, token in enumerate(response)]
