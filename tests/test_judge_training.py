"""Training with a judge over HTTP: outages that pass change nothing, and one that lasts costs nothing but time."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_server import Asked, JudgeServer, Reply

from agents import PPO
from tests.agent_fixtures import identical, make_agent, make_env, small_config, weights
from textenv.rewards.judge import JudgeConfig, JudgeError, JudgeReward, Retries

QUICK = Retries(attempts=5, seconds=20.0, first_wait=0.01, longest_wait=0.02)
ITERATIONS = 4


def even_share(asked: Asked) -> Mapping[str, Any]:
    """The share of words with an even number, `w8` for one; 0 for an empty response."""
    words = [[int(word[1:]) % 2 == 0 for word in text.split()] for text in asked.body["responses"]]
    return {"scores": [sum(even) / max(1, len(even)) for even in words]}


class Judged:
    """Environments and agents whose reward is a judge."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def env(self, server: JudgeServer, **changes: Any) -> Any:
        settings: dict[str, Any] = {"url": server.url, "retries": QUICK, "batch_size": 3, "concurrency": 2}
        return make_env(reward=JudgeReward(JudgeConfig(**{**settings, **changes})), tokenizer=self.tokenizer)

    def agent(self, server: JudgeServer, **changes: Any) -> PPO:
        return make_agent(small_config(schedule_updates=ITERATIONS), envs=self.env(server, **changes))


@pytest.fixture(scope="module")
def judged(tiny_tokenizer: Any) -> Judged:
    return Judged(tiny_tokenizer)


@pytest.fixture(scope="module")
def healthy(judged: Judged) -> dict[str, torch.Tensor]:
    """The weights after all iterations with a judge that never fails."""
    with JudgeServer(even_share) as server:
        agent = judged.agent(server)
        before = weights(agent.policy)
        agent.learn(ITERATIONS)
        assert not identical(before, weights(agent.policy))
        return weights(agent.policy)


OUTAGES = [
    Reply({"error": "busy"}, 503),
    Reply(cut=-1),
    Reply(b"<html>"),
    Reply({"scores": []}),
    Reply({"scores": [0.5]}, cut=4),
    Reply({"error": "slow down"}, 429),
]


def test_a_judge_that_recovers_changes_nothing(judged: Judged, healthy: dict[str, torch.Tensor]) -> None:
    """Of three requests two fail, each in another way."""

    def failing(asked: Asked) -> Any:
        return even_share(asked) if asked.number % 3 == 0 else OUTAGES[asked.number % len(OUTAGES)]

    with JudgeServer(failing) as server:
        # Two run at once and which of them meets the third request is chance: many attempts, so that it is none.
        agent = judged.agent(server, retries=Retries(attempts=200, seconds=20.0, first_wait=0.001, longest_wait=0.002))
        agent.learn(ITERATIONS)
        assert len(server.asked) > 3 * ITERATIONS
    assert identical(weights(agent.policy), healthy)


def test_a_judge_that_dies_leaves_a_whole_checkpoint(
    judged: Judged, healthy: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    last_request = [10**9]

    def mortal(asked: Asked) -> Any:
        return even_share(asked) if asked.number <= last_request[0] else Reply(cut=-1)

    def save(updates: int, metrics: Any) -> None:
        agent.save(tmp_path / "checkpoint")
        if updates == 2:
            last_request[0] = len(server.asked) + 1  # one more, so that it dies within the third iteration

    with JudgeServer(mortal) as server:
        agent = judged.agent(server)
        with pytest.raises(JudgeError, match=r"after 5 of 5 attempts .*; [1-3] of [4-8] asked for were scored"):
            agent.learn(ITERATIONS, save)
        asked = len(server.asked)
    assert agent.updates == 2 and asked <= last_request[0] + 2 * QUICK.attempts
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    with JudgeServer(even_share) as server:  # back, at another port
        resumed = PPO.load(tmp_path / "checkpoint", judged.env(server))
        assert resumed.updates == 2
        resumed.learn(ITERATIONS - 2)
    assert identical(weights(resumed.policy), healthy)


def test_nothing_is_learnt_from_a_rollout_without_scores(judged: Judged) -> None:
    down = [False]

    def moody(asked: Asked) -> Any:
        return Reply({}, 503) if down[0] else even_share(asked)

    with JudgeServer(moody) as server:
        agent = judged.agent(server)
        agent.learn(2)
        down[0], before = True, weights(agent.policy)
        with pytest.raises(JudgeError, match="HTTP 503"):
            agent.learn(1)
        assert agent.updates == 2 and identical(weights(agent.policy), before)
        down[0] = False
        agent.learn(1)
        assert agent.updates == 3 and not identical(weights(agent.policy), before)


def test_a_run_is_repeated_from_the_file_of_scores_alone(judged: Judged, tmp_path: Path) -> None:
    """The judge draws its scores, so only the file can make the two runs the same."""
    draw = random.Random(0)

    def noisy(asked: Asked) -> Any:
        return {"scores": [draw.gauss(0, 1) for _ in asked.body["responses"]]}

    with JudgeServer(noisy) as server:
        first = judged.agent(server, cache_path=tmp_path / "scores")
        first.learn(2)
        asked = len(server.asked)
        second = judged.agent(server, cache_path=tmp_path / "scores")
        second.learn(2)
        assert len(server.asked) == asked > 0
        fresh = judged.agent(server)
        fresh.learn(2)
    assert identical(weights(first.policy), weights(second.policy))
    assert not identical(weights(first.policy), weights(fresh.policy))
