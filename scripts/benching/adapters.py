"""What other libraries' PPO costs here, against the native one, with and without prefix cache and sharing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium as gym
import torch

import textenv
import textenv.models
import textenv.packing
from agents import PPO, PPOConfig, ValueHeadLM
from scripts.benching.models import FreeScore, story_model
from scripts.benching.timing import Competitor, Timing, measure, table

ROWS, PROMPT, TOKENS, EPOCHS, MINIBATCHES = 64, 8, 48, 4, 4
NATIVE = "native"

_TEXT = """## Any library's PPO

One iteration: {rows} responses of {tokens} tokens to prompts of {prompt}, {epochs} epochs of {minibatches}
minibatches, a critic on the policy's trunk, a free reward ({model}).

"stock" is the library's algorithm as it is, whose shuffled minibatches touch every episode; "by episode" draws
minibatches of whole episodes; "naive" is stock with prefix cache and prefix sharing switched off, and "padded" has
padding-free forwards switched off, too, so that each state is a row of a plain forward. The last two are timed once.

"""


def run(rounds: int, model: Path | None, tell: Callable[[str], None]) -> tuple[str, list[Timing]]:
    """Measure; the text of the page, and what was found."""
    folder = story_model(model)
    competitors = [Competitor(NATIVE, lambda: _native(folder))]
    competitors += _tianshou(folder) + _sb3(folder)
    timings = measure(competitors, rounds, tell)
    return page(timings, folder.name), timings


def page(timings: Sequence[Timing], model: str) -> str:
    """What is said of the timings."""
    text = _TEXT.format(rows=ROWS, tokens=TOKENS, prompt=PROMPT, epochs=EPOCHS, minibatches=MINIBATCHES, model=model)
    cpu = {timing.name: timing.cpu for timing in timings}
    lines = [
        f"- {library}: stock {cpu[f'{library}, naive'] / cpu[f'{library}, stock']:.1f} times less than naive, "
        f"by episode {cpu[f'{library}, naive'] / cpu[f'{library}, by episode']:.1f} times less; than padded, "
        f"{cpu[f'{library}, padded'] / cpu[f'{library}, stock']:.1f} and "
        f"{cpu[f'{library}, padded'] / cpu[f'{library}, by episode']:.1f} times less.\n"
        for library in ("Tianshou", "Stable-Baselines3")
    ]
    return text + table(timings, [NATIVE]) + "\n" + "".join(lines)


def _policy(folder: Path) -> ValueHeadLM:
    torch.manual_seed(0)
    return ValueHeadLM.from_pretrained(folder)


def _envs(folder: Path, rows: int, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    width = textenv.models.load_config(folder, argument="model").vocab_size
    return gym.make_vec(
        "RLHF-Text-v0",
        num_envs=rows,
        reference=str(folder),
        reward=FreeScore(),
        prompts=torch.randint(3, width, (4 * ROWS, PROMPT), generator=generator).tolist(),
        max_new_tokens=TOKENS,
        stop_token_ids=[],
        kl_coef=0.1,
        **options,
    )


def _native(folder: Path) -> Callable[[], object]:
    config = PPOConfig(batch_episodes=ROWS, epochs=EPOCHS, minibatches=MINIBATCHES, lr_schedule="constant")
    agent = PPO(_policy(folder), _envs(folder, 1), config)
    return lambda: agent.learn(1)


def _padded(work: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with mock.patch.object(textenv.packing, "_can_pack", lambda *_: False):
            return work()

    return run


def _tianshou(folder: Path) -> list[Competitor]:
    from agents.adapters import tianshou_bridge as bridge

    def prepare(by_episode: bool, prefix: bool) -> Callable[[], object]:
        config = bridge.TianshouConfig(
            iterations=1,
            episodes=ROWS,
            epochs=EPOCHS,
            minibatches=MINIBATCHES,
            by_episode=by_episode,
            linear_schedule=False,
            cache=prefix,
            share=prefix,
        )
        setup = bridge.make_algorithm("ppo", _policy(folder), _envs(folder, ROWS, autoreset_mode="Disabled"), config)
        return lambda: bridge.train(setup)

    return [
        Competitor("Tianshou, by episode", lambda: prepare(True, True)),
        Competitor("Tianshou, stock", lambda: prepare(False, True)),
        Competitor("Tianshou, naive", lambda: prepare(False, False), rounds=1),
        Competitor("Tianshou, padded", lambda: _padded(prepare(False, False)), rounds=1),
    ]


def _sb3(folder: Path) -> list[Competitor]:
    from stable_baselines3 import PPO as SB3PPO

    from agents.adapters import sb3_bridge

    def prepare(by_episode: bool, prefix: bool) -> Callable[[], object]:
        changes = {"n_epochs": EPOCHS, "batch_size": ROWS * TOKENS // MINIBATCHES, "learning_rate": 2e-4}
        model = sb3_bridge.make(
            SB3PPO, _policy(folder), _envs(folder, ROWS), changes, by_episode=by_episode, cache=prefix, share=prefix
        )
        return lambda: sb3_bridge.learn(model, 1)

    return [
        Competitor("Stable-Baselines3, by episode", lambda: prepare(True, True)),
        Competitor("Stable-Baselines3, stock", lambda: prepare(False, True)),
        Competitor("Stable-Baselines3, naive", lambda: prepare(False, False), rounds=1),
        Competitor("Stable-Baselines3, padded", lambda: _padded(prepare(False, False)), rounds=1),
    ]
