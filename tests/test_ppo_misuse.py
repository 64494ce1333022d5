"""What users do that must neither fail silently nor train on something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from agent_fixtures import identical, make_agent, make_env, make_policy, small_config, weights

from agents import PPO, ValueHeadLM
from textenv.kl import FixedKL


def test_without_a_reference_no_kl_is_charged_whatever_the_controller_says() -> None:
    env = make_env(kl_coef=0)
    env.task.controller = FixedKL(0.2)  # as resuming a checkpoint of β = 0.2 would set it
    rollout = PPO(make_policy(), env, small_config()).collect()
    assert env.task.reference is None
    assert torch.allclose(rollout.rewards.sum(1), rollout.scores)


def test_a_policy_saved_over_another_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    lora = pytest.importorskip("peft").LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    make_policy().save_pretrained(tmp_path / "base")
    with_adapter = ValueHeadLM.from_pretrained(tmp_path / "base", lora=lora)
    with_adapter.save_pretrained(tmp_path / "out")
    make_policy().save_pretrained(tmp_path / "out")
    assert type(ValueHeadLM.from_pretrained(tmp_path / "out").lm).__module__.split(".")[0] == "transformers"


def test_values_are_float32_under_autocast() -> None:
    rollout = make_agent(small_config(bf16=True)).collect()
    assert rollout.values.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make_policy().value_head(torch.randn(2, 32)).dtype == torch.float32


def test_collecting_twice_samples_twice() -> None:
    agent = make_agent()
    prompts = [agent.task.prompts[0]] * 8
    first, second = agent.collect(prompts), agent.collect(prompts)
    assert first.ids.shape != second.ids.shape or not torch.equal(first.ids, second.ids)


def test_a_rollout_that_is_not_finite_moves_no_weight() -> None:
    agent = make_agent()
    rollout = agent.collect()
    before = weights(agent.policy.lm)
    with pytest.raises(ValueError, match="rollout: expected finite losses"):
        agent.update(replace(rollout, rewards=torch.full_like(rollout.rewards, float("nan"))))
    assert identical(before, weights(agent.policy.lm))


def test_the_first_value_scale_is_that_of_what_is_learnt() -> None:
    agent = make_agent(small_config(whiten_rewards=True), envs=make_env(scale=1000.0))
    rollout = agent.collect()
    rewards = rollout.rewards[rollout.mask].double()
    whitened = torch.zeros_like(rollout.rewards, dtype=torch.float64)
    whitened[rollout.mask] = (rewards - rewards.mean()) / rewards.std() + rewards.mean()
    returns = whitened.flip(1).cumsum(1).flip(1)[rollout.mask]
    assert float(agent.policy.value_head.value_mean) == pytest.approx(float(returns.mean()), rel=1e-4)
    assert float(agent.policy.value_head.value_std) == pytest.approx(float(returns.std(correction=0)), rel=1e-4)


def test_the_action_of_a_resting_row_means_nothing() -> None:
    env = make_env(num_envs=2, autoreset_mode="NextStep", max_new_tokens=1)
    env.reset(seed=0)
    env.step(np.array([1, 1]))
    _, rewards, *_ = env.step(np.array([-1, 10**6]))
    assert rewards.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.nn.Linear(1, 1), None), "policy: expected a ValueHeadLM"),
        ((None, object()), "envs: expected gym.make"),
        ((None, None, {"epochs": 1}), "config: expected a PPOConfig"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple, message: str) -> None:
    policy, env, *config = arguments
    with pytest.raises(ValueError, match=message):
        PPO(policy or make_policy(), env or make_env(), *config)


def test_a_folder_without_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder: expected None, because eval_every is 0"):
        make_agent().learn(1, folder=tmp_path)


def test_one_string_is_no_list_of_prompts() -> None:
    with pytest.raises(ValueError, match="prompts: expected a list of prompts, got one string"):
        make_env().replay("Once", [[1]] * 4)
