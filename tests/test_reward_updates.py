"""Parts and running statistics of rewards in environments, agents and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import env_fixtures as fixtures
import gymnasium as gym
import numpy as np
import pytest
import torch
from env_fixtures import EOS, DenseReward, IdReward, options
from gymnasium.utils.env_checker import check_env

from agents import PPO
from agents.adapters.checks import check_learner
from tests.agent_fixtures import PROMPTS, identical, make_agent, make_env, make_policy, small_config, weights
from textenv import TextEnv, TextVectorEnv
from textenv.rewards import Clip, LengthControlled, LengthPenalty, RunningNormalization, SoftOverlong, WeightedSum


def parts(info: Any, row: Any = ()) -> dict[str, float]:
    return {key.removeprefix("reward_parts/"): float(info[key][row]) for key in info if key.startswith("reward_parts/")}


def sum_of_two() -> WeightedSum:
    return WeightedSum({"dense": (DenseReward(), 0.5), "ids": (IdReward(), 2.0)})


def test_parts_are_in_every_info() -> None:
    env = TextEnv(**options(reward=sum_of_two(), kl_coef=0, max_new_tokens=2, stop_token_ids=[EOS]))
    _, info = env.reset(options={"prompt_index": 1})
    assert parts(info) == {"score": 0, "kl": 0, "missing_eos": 0, "dense": 0, "ids": 0}
    prompt = fixtures.PROMPTS[1]
    dense, score = DenseReward.one(prompt, [5, 6]), IdReward.one(prompt, [5, 6])
    _, first, _, _, info = env.step(5)
    assert parts(info) == pytest.approx(
        {"score": dense[0] / 2, "kl": 0, "missing_eos": 0, "dense": dense[0], "ids": 0}, abs=1e-6
    )
    _, last, terminated, _, info = env.step(6)
    assert terminated
    assert parts(info)["ids"] == pytest.approx(score) and parts(info)["dense"] == pytest.approx(dense[1])
    assert last == pytest.approx(dense[1] / 2 + 2 * score, abs=1e-6)
    assert float(info["score"]) == pytest.approx(first + last, abs=1e-6)


def test_a_cut_pays_tokens_and_no_outcome() -> None:
    arguments = options(reward=sum_of_two(), kl_coef=0, max_new_tokens=2, length_end="truncate", stop_token_ids=[EOS])
    env = TextEnv(**arguments)
    env.reset(options={"prompt_index": 1})
    env.step(5)
    _, reward, terminated, truncated, info = env.step(6)
    assert truncated and not terminated and parts(info)["ids"] == 0 == float(info["score"])
    assert reward == pytest.approx(DenseReward.one(fixtures.PROMPTS[1], [5, 6])[1] / 2, abs=1e-6)
    record = env.replay([fixtures.PROMPTS[1]], [[5, 6]])
    assert record.rewards[0, 1] == pytest.approx(reward, abs=1e-6)
    assert not record.score_parts["ids"].any() and record.score_parts["dense"].any()


def test_an_aborted_response_has_no_outcome() -> None:
    envs = TextVectorEnv(1, **options(reward=sum_of_two(), kl_coef=0))
    record = envs.replay(fixtures.PROMPTS[:2], [[5, 6], [5, EOS]], aborted=[True, False])
    assert record.score_parts["ids"].tolist() == pytest.approx([0, IdReward.one(fixtures.PROMPTS[1], [5, EOS])])
    assert record.scored.tolist() == [False, True]
    assert record.rewards[0, :2].tolist() == pytest.approx(
        [x / 2 for x in DenseReward.one(fixtures.PROMPTS[0], [5, 6])]
    )


def test_gymnasiums_checker_accepts_parts() -> None:
    reward = WeightedSum({"normal": (RunningNormalization(IdReward()), 1.0), "rest": (sum_of_two(), 0.5)})
    check_env(gym.make("RLHF-Text-v0", **options(reward=reward)).unwrapped)


def test_limits_and_stops_come_from_the_environment() -> None:
    envs = TextVectorEnv(1, **options(reward=SoftOverlong(2), kl_coef=0, max_new_tokens=4))
    record = envs.replay([fixtures.PROMPTS[0]] * 3, [[5, EOS], [5, 6, EOS], [5, 6, 7, 8]])
    assert record.scores.tolist() == [0, -0.5, -1]


# Agents.


def learning_reward() -> WeightedSum:
    """Statistics in two depths; of ids alone, as the tiny agents have no tokenizer."""

    class Even:
        wants_ids = True

        def __call__(self, prompts: Any, responses: Any) -> list[float]:
            return [sum(token % 2 == 0 for token in response) / len(response) for response in responses]

    normal = RunningNormalization(Even(), decay=0.9)
    return WeightedSum(
        {"even": (normal, 1.0), "short": (LengthControlled(Clip(LengthPenalty(Even(), 0.1), -2, 2)), 0.5)}
    )


def test_the_agent_logs_parts_and_tells_the_reward_once_a_rollout() -> None:
    agent = make_agent(envs=make_env(reward=learning_reward()))
    reward = agent.task.reward
    before = json.dumps(reward.state_dict())
    rollout = agent.collect()
    assert json.dumps(reward.state_dict()) == before  # collecting changes nothing
    metrics = agent.update(rollout)
    raw = rollout.score_parts["even/raw"]
    assert metrics["score/even/raw"] == pytest.approx(float(raw.mean()))
    assert metrics["score/even"] == metrics["score/even/raw"]  # told as it was paid: raw, the first time
    moments = reward.state_dict()["even"]["moments"]
    assert moments["count"] == 8 and moments["mean"] == pytest.approx([float(raw.mean())])
    agent.evaluate(PROMPTS)
    assert reward.state_dict()["even"]["moments"] == moments
    metrics = agent.update(agent.collect())
    assert metrics["score/even"] != pytest.approx(metrics["score/even/raw"])
    assert reward.state_dict()["even"]["moments"]["count"] == pytest.approx(0.9 * 8 + 8)


def test_only_scored_episodes_are_told() -> None:
    agent = make_agent(envs=make_env(reward=learning_reward(), length_end="truncate"))
    rollout = agent.collect()
    scored = int(rollout.scored.sum())
    assert 0 < scored < 8
    assert len(rollout.paid.total) == scored == len(rollout.paid.parts["even/raw"])
    assert rollout.paid.total.dtype == np.float64
    agent.update(rollout)
    assert agent.task.reward.state_dict()["even"]["moments"]["count"] == scored


def test_selecting_episodes_selects_their_parts() -> None:
    rollout = make_agent(envs=make_env(reward=learning_reward())).collect()
    rows = torch.tensor([3, 0])
    assert torch.equal(rollout.select(rows).score_parts["even/raw"], rollout.score_parts["even/raw"][rows])


def test_resuming_with_statistics_equals_an_uninterrupted_run_bit_for_bit(tmp_path: Path) -> None:
    def env() -> Any:
        return make_env(reward=learning_reward())

    config = small_config(batch_episodes=4, schedule_updates=8)
    whole, part = make_agent(config, envs=env()), make_agent(config, envs=env())
    whole.learn(4)
    part.learn(2)
    part.save(tmp_path / "checkpoint")
    resumed = PPO.load(tmp_path / "checkpoint", env())
    halfway = part.task.reward.state_dict()
    assert resumed.task.reward.state_dict() == halfway and halfway["even"]["moments"]["count"] > 4
    rows = resumed.learn(2)
    assert identical(weights(whole.policy), weights(resumed.policy))
    assert whole.task.reward.state_dict() == resumed.task.reward.state_dict()
    forgetful = PPO.load(tmp_path / "checkpoint", env())
    forgetful.task.reward.load_state_dict(make_env(reward=learning_reward()).task.reward.state_dict())
    assert forgetful.learn(2)[-1]["score/mean"] != rows[-1]["score/mean"]  # the statistics matter


def test_a_checkpoint_of_another_reward_is_refused(tmp_path: Path) -> None:
    plain, learning = make_agent(), make_agent(envs=make_env(reward=learning_reward()))
    plain.save(tmp_path / "plain")
    learning.save(tmp_path / "learning")
    with pytest.raises(ValueError, match="reward: expected the reward whose statistics these are"):
        PPO.load(tmp_path / "learning", make_env())
    with pytest.raises(ValueError, match="reward: expected count, mean and comoments"):
        PPO.load(tmp_path / "plain", make_env(reward=learning_reward()))
    state = json.loads((tmp_path / "plain" / "trainer.json").read_text("utf8"))
    assert state.pop("reward") == {}
    (tmp_path / "plain" / "trainer.json").write_text(json.dumps(state), "utf8")
    assert PPO.load(tmp_path / "plain", make_env()).updates == 0  # written before rewards had states


def test_adapters_refuse_statistics_that_they_would_never_move() -> None:
    policy = make_policy()
    check_learner(policy, make_env().task)
    with pytest.raises(
        ValueError, match="reward: expected one without running statistics, which only the native agents"
    ):
        check_learner(policy, make_env(reward=learning_reward()).task)
