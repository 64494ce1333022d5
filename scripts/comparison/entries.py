"""What is compared: how each algorithm is made for the task, and run.

Every entry has 3,840 episodes. Methods that take one optimizer step on a rollout take more of them on smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from agents import Agent, ValueHeadLM
from agents.algorithms import RECIPES
from scripts.valence import make_env, model_folder

EPISODES = 3840
ROWS = 64

Run = Callable[[], Sequence[Mapping[str, float]]]
"""Trains; one mapping a rollout with `episodes`, `score` and `kl`, their means."""


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    library: str
    """Whose algorithm it is."""
    prepare: Callable[[int], Run]
    """Loads everything for a seed."""
    note: str = ""
    """What differs from its defaults."""


def native(name: str, note: str = "", **changes: Any) -> Entry:
    """A recipe of `agents.algorithms`, some settings of its loop changed."""

    def prepare(seed: int) -> Run:
        torch.manual_seed(seed)
        algorithm = RECIPES[name]()
        policy = ValueHeadLM.from_pretrained(model_folder(), critic="separate" if algorithm.critic else "shared")
        config = replace(algorithm.defaults, **changes, seed=seed)
        agent = Agent(policy, make_env(), algorithm, config)
        episodes = config.batch_episodes

        def train() -> Sequence[Mapping[str, float]]:
            return [
                {"episodes": episodes, "score": row["score/mean"], "kl": row["kl/sequence"]}
                for row in agent.learn(EPISODES // episodes)
            ]

        return train

    return Entry("textenv", prepare, note)


def sb3(name: str, note: str = "", *, by_episode: bool = False, changes: Mapping[str, Any] | None = None) -> Entry:
    """An algorithm of Stable-Baselines3 or sb3-contrib, as it is."""

    def prepare(seed: int) -> Run:
        import sb3_contrib
        import stable_baselines3

        from agents.adapters import sb3_bridge

        kind = getattr(stable_baselines3, name, None) or getattr(sb3_contrib, name)
        torch.manual_seed(seed)
        policy = ValueHeadLM.from_pretrained(model_folder(), critic="separate")
        model = sb3_bridge.make(kind, policy, make_env(ROWS), {**(changes or {}), "seed": seed}, by_episode=by_episode)
        return lambda: sb3_bridge.learn(model, EPISODES // ROWS)

    return Entry("Stable-Baselines3", prepare, note)


def torchrl(note: str = "", **changes: Any) -> Entry:
    """TorchRL's collector, GAE and ClipPPOLoss."""

    def prepare(seed: int) -> Run:
        from agents.adapters import torchrl_bridge

        torch.manual_seed(seed)
        policy = ValueHeadLM.from_pretrained(model_folder(), critic="separate")
        envs, settings = make_env(ROWS), torchrl_bridge.Settings(**changes, seed=seed)
        return lambda: torchrl_bridge.train(policy, envs, EPISODES // ROWS, settings)

    return Entry("TorchRL", prepare, note)


def tianshou(name: str, note: str = "", *, candidates: int | None = None, **changes: Any) -> Entry:
    """An algorithm of Tianshou; those off policy act on the reference's most probable `candidates`."""

    def prepare(seed: int) -> Run:
        from agents.adapters import tianshou_bridge as bridge
        from textenv.wrappers import VectorTopKActions

        torch.manual_seed(seed)
        settings = replace(bridge.DEFAULTS[name], **changes, seed=seed)
        policy = ValueHeadLM.from_pretrained(model_folder(), critic="separate")
        if name in ("npg", "trpo"):
            bridge.use_eager_attention(policy)
        envs = make_env(ROWS, autoreset_mode="Disabled", kl_source=None if candidates is None else "reference")
        if candidates is not None:
            envs = VectorTopKActions(envs, candidates)
        setup = bridge.make_algorithm(name, policy, envs, settings)

        def train() -> Sequence[Mapping[str, float]]:
            return [
                {"episodes": settings.episodes, "score": row["score/mean"], "kl": row["kl/sequence"]}
                for row in bridge.train(setup)
            ]

        return train

    return Entry("Tianshou", prepare, note)


ENTRIES: dict[str, Entry] = {
    "ppo": native("ppo"),
    "vapo": native("vapo"),
    "a2c": native("a2c"),
    "reinforce": native("reinforce"),
    "reinforce_baseline": native("reinforce_baseline"),
    "reinforce++": native("reinforce++"),
    "remax": native("remax"),
    "rloo": native("rloo"),
    "grpo": native("grpo"),
    "dr_grpo": native("dr_grpo"),
    "gspo": native("gspo"),
    "tianshou ppo": tianshou("ppo", by_episode=False),
    "tianshou ppo by episode": tianshou("ppo"),
    "tianshou a2c": tianshou("a2c"),
    "tianshou reinforce": tianshou("reinforce"),
    "tianshou npg": tianshou("npg"),
    "tianshou trpo": tianshou("trpo"),
    "tianshou dqn": tianshou("dqn", candidates=64),
    "tianshou sac": tianshou("sac", candidates=64),
    "sb3 ppo": sb3("PPO"),
    "sb3 ppo by episode": sb3("PPO", by_episode=True),
    "sb3 a2c": sb3("A2C"),
    "torchrl ppo": torchrl(),
    "ppo, bf16": native("ppo", "autocast to bfloat16, as by default on a GPU", bf16=True),
}
"""What each is called."""
ASIDE = ("ppo, bf16",)
"""Those that are no part of a whole table, and run if they are named."""

PPO_VARIANTS = tuple(name for name in ENTRIES if "ppo" in name.replace(",", "").split())
"""The native PPO, first, in float32 and in less, and that of each other library."""


def seeds_of(name: str) -> range:
    """The seeds of an entry in a whole table: PPO, whose variants differ little, has more."""
    return range(16) if name in PPO_VARIANTS else range(5)
