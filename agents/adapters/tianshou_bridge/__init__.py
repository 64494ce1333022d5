"""Tianshou 2 on text: its Collector, buffers, trainers, loggers and algorithms, at the price of the native agent.

    setup = make_algorithm("ppo", policy, envs)      # envs: gym.make_vec(..., autoreset_mode="Disabled")
    history = train(setup)

or the parts, for an algorithm of your own; see docs/tianshou.md.
"""

from agents.adapters.tianshou_bridge.collect import KLCharge, TextCollectStats, charge_of, make_collector
from agents.adapters.tianshou_bridge.env import TextBatchEnv
from agents.adapters.tianshou_bridge.episodes import (
    ByEpisode,
    EpisodeA2C,
    EpisodeBatch,
    EpisodeNPG,
    EpisodePPO,
    EpisodeReinforce,
    EpisodeReplayBuffer,
    EpisodeTRPO,
)
from agents.adapters.tianshou_bridge.optim import AdamFactory
from agents.adapters.tianshou_bridge.policy import TextPolicy, TokenLaw
from agents.adapters.tianshou_bridge.reader import StateReader, TextActor, TextCritic
from agents.adapters.tianshou_bridge.recipes import (
    ALGORITHMS,
    DEFAULTS,
    Setup,
    TianshouConfig,
    make_algorithm,
    use_eager_attention,
    uses_eager_attention,
)
from agents.adapters.tianshou_bridge.soft import (
    SoftDQN,
    SoftQ,
    SoftQCritic,
    SoftQModel,
    SoftQPolicy,
    SoftSAC,
    SoftSACPolicy,
)
from agents.adapters.tianshou_bridge.token_store import TokenStore
from agents.adapters.tianshou_bridge.training import train

__all__ = [
    "ALGORITHMS",
    "DEFAULTS",
    "AdamFactory",
    "ByEpisode",
    "EpisodeA2C",
    "EpisodeBatch",
    "EpisodeNPG",
    "EpisodePPO",
    "EpisodeReinforce",
    "EpisodeReplayBuffer",
    "EpisodeTRPO",
    "KLCharge",
    "Setup",
    "SoftDQN",
    "SoftQ",
    "SoftQCritic",
    "SoftQModel",
    "SoftQPolicy",
    "SoftSAC",
    "SoftSACPolicy",
    "StateReader",
    "TextActor",
    "TextBatchEnv",
    "TextCollectStats",
    "TextCritic",
    "TextPolicy",
    "TianshouConfig",
    "TokenLaw",
    "TokenStore",
    "charge_of",
    "make_algorithm",
    "make_collector",
    "train",
    "use_eager_attention",
    "uses_eager_attention",
]
