"""The agent with any algorithm: KL once, groups, no critic where there is none, microbatches, scale, checkpoints."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agents import PPO, Agent, PPOConfig, Rollout, TrainConfig, algorithms
from agents.algorithms import RECIPES, Algorithm, Targets
from agents.update import Step, microbatch_loss, targets
from agents.value_head import ValueHead
from tests.agent_fixtures import (
    distance,
    episodes,
    even_share,
    identical,
    make_agent,
    make_algorithm_agent,
    make_env,
    make_policy,
    small_algorithm,
    small_config,
    weights,
)
from tests.conftest import make_gpt2, make_llama
from textenv import Shared

NAMES = sorted(RECIPES)
WITHOUT_CRITIC = sorted(name for name in RECIPES if RECIPES[name]().critic is None)
GROUPED = sorted(name for name in RECIPES if RECIPES[name]().group_size > 1)


def moved(lm: Any) -> Any:
    """The model with its weights shifted, so that it has a KL to what it was."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return lm


def agent_away(algorithm: Algorithm, **env: Any) -> Agent:
    """An agent whose policy is not its reference any more."""
    return Agent(make_policy(moved(make_llama())), make_env(make_llama(), **env), algorithm)


# PPO is one of them.


def test_ppo_is_an_agent_with_the_algorithm_of_its_config() -> None:
    config = small_config(clip_eps=0.1, gae_lambda=0.9, whiten_advantages=False, value_clip_eps=None)
    loop = TrainConfig(**{name: getattr(config, name) for name in TrainConfig.__dataclass_fields__})
    one = make_agent(config)
    other = Agent(make_policy(), make_env(), algorithms.from_config(config), loop)
    for agent in (one, other):
        agent.learn(2)
    assert identical(weights(one.policy), weights(other.policy))
    assert algorithms.from_config(config).objective == algorithms.Clipped(0.1)
    assert algorithms.from_config(config).estimator == algorithms.GAE(0.9)


def test_settings_that_would_not_act_are_refused() -> None:
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: Agent(make_policy(), make_env(), algorithms.rloo(), PPOConfig()), "config: expected a TrainConfig"),
        (lambda: Agent(make_policy(), make_env(), algorithms.grpo), "algorithm: expected an Algorithm"),  # type: ignore[arg-type]
        (lambda: Agent(make_policy(), make_env(), algorithms.rloo(), {}), "config: expected a TrainConfig, got dict"),  # type: ignore[arg-type]
        (
            lambda: Agent(make_policy(), make_env(), algorithms.rloo(), TrainConfig(critic_warmup_updates=1)),
            "critic_warmup_updates: expected 0, because rloo has no critic, got 1",
        ),
        (
            lambda: Agent(make_policy(), make_env(), algorithms.rloo(), TrainConfig(critic_learning_rate=1e-3)),
            "critic_learning_rate: expected None, because rloo has no critic, got 0.001",
        ),
        (
            lambda: Agent(make_policy(), make_env(), algorithms.rloo(group_size=5)),
            "batch_episodes: expected a multiple of group_size=5, got 64",
        ),
        (
            lambda: Agent(make_policy(), make_env(length_end="truncate"), algorithms.rloo()),
            "length_end: expected 'terminate', because rloo has no critic to bootstrap a cut with, got 'truncate'",
        ),
        (
            lambda: Agent(make_policy(), make_env(kl_source="reference"), algorithms.rloo()),
            "kl_source: expected 'agent' or 'policy', got 'reference'",
        ),
    ]
    for act, message in cases:
        with pytest.raises(ValueError, match=message):
            act()


# The ratio, the batches, the unit.


@pytest.mark.parametrize("name", NAMES)
def test_ratio_is_one_at_rate_zero(name: str) -> None:
    one_step = isinstance(RECIPES[name]().objective, algorithms.PolicyGradient)
    several = {} if one_step else {"epochs": 2, "minibatches": 2}
    agent = make_algorithm_agent(small_algorithm(name, learning_rate=0.0, **several), lm=make_gpt2())
    before = weights(agent.policy.lm)
    for row in agent.learn(2):
        assert row["ratio/mean"] == pytest.approx(1, abs=1e-5)
        assert abs(row["kl/update"]) < 1e-6
        assert row.get("clip/policy", 0.0) == 0.0
    assert identical(before, weights(agent.policy.lm))


@pytest.mark.parametrize("name", [*NAMES, "grpo with a KL loss"])
def test_microbatches_do_not_change_an_update(name: str) -> None:
    results = []
    for size in (None, 1, 3):
        # Adam's ε is large, or the first step would blow rounding up where a gradient is nearly 0.
        algorithm = small_algorithm(name.split()[0], microbatch_episodes=size, entropy_coef=0.1, adam_eps=1e-3)
        if "KL" in name:
            algorithm = replace(algorithm, kl_loss=algorithms.ReferenceKL())
        agent = agent_away(algorithm)
        start = weights(agent.policy)
        rollout = agent.collect()
        assert len(set(rollout.response_lengths.tolist())) > 2, "lengths must be ragged"
        agent.update(rollout)
        results.append(weights(agent.policy))
    assert distance(start, results[0]) > 5e-4
    assert distance(results[0], results[1]) < 2e-6  # float32 sums in another order; a step is 1e-3
    assert distance(results[0], results[2]) < 2e-6


def scaled(algorithm: Algorithm, scale: float) -> tuple[list[Any], dict[str, Any]]:
    agent = make_algorithm_agent(algorithm, scale=scale, missing_eos_penalty=0.3 * scale)
    tokens = []
    for _ in range(3):
        rollout = agent.collect()
        tokens.append(rollout.ids.tolist())
        agent.update(rollout)
    return tokens, weights(agent.policy.lm)


@pytest.mark.parametrize("name", NAMES)
def test_powers_of_two_change_no_bit(name: str) -> None:
    tokens, ours = scaled(small_algorithm(name), 1.0)
    for power in (7, -7):
        scaled_tokens, theirs = scaled(small_algorithm(name), 2.0**power)
        assert scaled_tokens == tokens
        assert identical(ours, theirs)


def test_raw_advantages_and_a_kl_in_the_loss_give_the_invariance_up() -> None:
    raw = replace(small_algorithm("rloo"), estimator=algorithms.LeaveOneOut())
    in_loss = replace(small_algorithm("grpo"), kl_loss=algorithms.ReferenceKL())
    for algorithm in (raw, in_loss):
        assert distance(scaled(algorithm, 1.0)[1], scaled(algorithm, 128.0)[1]) > 1e-4


# KL, charged exactly once.


@pytest.mark.parametrize("source", ["agent", "policy"])
@pytest.mark.parametrize("name", NAMES)
def test_kl_in_the_reward_is_charged_exactly_once(name: str, source: str) -> None:
    policy = make_policy(moved(make_llama()))
    options: dict[str, Any] = {"policy": Shared(policy.next_logits)} if source == "policy" else {}
    agent = Agent(policy, make_env(make_llama(), kl_coef=0.3, **options), small_algorithm(name))
    rollout = agent.collect()
    kls = rollout.kl.sum(1)
    assert float(kls.abs().min()) > 0.01
    expected = rollout.scores - 0.3 * kls
    assert torch.allclose(rollout.rewards.sum(1), expected, atol=1e-4)


def test_kl_in_the_loss_is_charged_there_alone() -> None:
    algorithm = replace(small_algorithm("grpo"), kl_loss=algorithms.ReferenceKL())
    agent = agent_away(algorithm, kl_coef=0.3)
    rollout = agent.collect()
    assert float(rollout.kl.sum(1).abs().min()) > 0.01
    assert torch.allclose(rollout.rewards.sum(1), rollout.scores, atol=1e-6), "nothing in the reward"
    target, count = targets(rollout, algorithm, agent.config), len(rollout.ids)

    def loss(beta: float) -> tuple[Any, dict[str, Any]]:
        step = Step(algorithm, agent.config, temperature=1.0, max_new_tokens=6, kl_coef=beta)
        return microbatch_loss(agent.policy, rollout, target, step, tokens=int(rollout.mask.sum()), count=count)

    with torch.no_grad():
        (without, _), (full, sums) = loss(0.0), loss(0.3)
    # On policy k2 is ½ (log π − log π_ref)²; grpo takes its mean over each response.
    k2 = [[0.5 * float(rollout.kl[row, t]) ** 2 for t in range(n)] for row, n in episodes(rollout)]
    assert float(full - without) == pytest.approx(0.3 * sum(sum(r) / len(r) for r in k2) / len(k2), rel=1e-4)
    assert float(sums["loss/kl"]) == pytest.approx(sum(map(sum, k2)), rel=1e-4)
    metrics = agent.update(rollout)
    assert metrics["loss/kl"] > 0
    assert metrics["kl/coef"] == 0.3


def test_kl_in_the_loss_needs_the_agent_to_charge() -> None:
    algorithm = algorithms.grpo(kl_loss=True)
    message = "kl_source: expected 'agent', because grpo charges the KL in its loss, got 'policy'"
    policy = make_policy()
    with pytest.raises(ValueError, match=message):
        Agent(policy, make_env(policy=Shared(policy.next_logits)), algorithm)
    late = make_env()
    agent = Agent(policy, late, small_algorithm("rloo"))
    agent.algorithm = replace(agent.algorithm, kl_loss=algorithms.ReferenceKL())
    late.attach(policy.next_logits)
    with pytest.raises(ValueError, match="kl_source: expected 'agent'"):
        agent.collect()


def test_without_a_reference_there_is_no_kl_in_the_loss() -> None:
    algorithm = replace(small_algorithm("grpo"), kl_loss=algorithms.ReferenceKL())
    metrics = make_algorithm_agent(algorithm, kl_coef=0.0).learn(1)[0]
    assert "loss/kl" not in metrics


def test_a_kl_loss_holds_the_policy_at_home() -> None:
    """Seven to fourteen times closer, for β from 1 to 10."""

    def kl(beta: float) -> float:
        algorithm = small_algorithm("grpo", batch_episodes=16, lr_schedule="constant")
        algorithm = replace(algorithm, kl_loss=algorithms.ReferenceKL())
        history = make_algorithm_agent(algorithm, kl_coef=beta).learn(12)
        return sum(row["kl/sequence"] for row in history[-4:]) / 4

    assert kl(1e-6) > 3 * abs(kl(3.0))


# Methods without a critic pay for none.


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_without_a_critic_no_value_is_computed_learnt_or_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_algorithm_agent(name, critic="separate+", lm=make_llama())
    before = weights(agent.policy)

    def forward(*_: Any) -> Any:
        raise AssertionError("the value head was read")

    monkeypatch.setattr(ValueHead, "forward", forward)
    assert agent.policy.critic_backbone is not None
    agent.policy.critic_backbone.register_forward_pre_hook(forward)
    metrics = agent.learn(2)[-1]
    after = weights(agent.policy)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("lm.") for key in changed)
    assert not {key for key in metrics if key.startswith("value/") or key in ("loss/value", "clip/value")}
    assert "grad_norm/critic" not in metrics
    learning = {id(p) for group in agent.optimizer.param_groups for p in group["params"]}
    assert learning == {id(p) for p in agent.policy.lm.parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_metrics_that_there_are(name: str) -> None:
    metrics = make_algorithm_agent(name).learn(1)[0]
    algorithm = RECIPES[name]()
    assert ("clip/policy" in metrics) == (not isinstance(algorithm.objective, algorithms.PolicyGradient))
    assert ("value/mean" in metrics) == (algorithm.critic is not None)
    assert ("greedy/reward" in metrics) == algorithm.greedy
    clip = algorithm.critic is not None and algorithm.critic.clip_eps is not None
    assert ("clip/value" in metrics) == clip
    assert metrics["steps"] == agent_steps(algorithm)


def agent_steps(algorithm: Algorithm) -> int:
    return algorithm.defaults.epochs * min(2, algorithm.defaults.minibatches)


# Groups.


@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_side_by_side(name: str) -> None:
    agent = make_algorithm_agent(name)
    rollout = agent.collect()
    assert rollout.groups is not None
    assert rollout.groups.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    prompts = [rollout.ids[row, : int(n)].tolist() for row, n in enumerate(rollout.prompt_lengths)]
    assert prompts[0] == prompts[3] != prompts[4] == prompts[7]
    assert agent.prompts.position == 8
    assert [row.tolist() for row in rollout.select(torch.tensor([1, 6])).groups] == [0, 1]  # type: ignore[union-attr]


def test_prompts_of_ones_own_get_a_group_each() -> None:
    agent = make_algorithm_agent("rloo")
    rollout = agent.collect([[5], [6, 7]])
    prompts = [rollout.ids[row, : int(n)].tolist() for row, n in enumerate(rollout.prompt_lengths)]
    assert prompts == [[5]] * 4 + [[6, 7]] * 4
    agent.update(rollout)


def test_any_algorithm_takes_groups() -> None:
    agent = make_algorithm_agent(replace(small_algorithm("ppo"), group_size=2))
    rollout = agent.collect()
    assert rollout.groups is not None and rollout.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    agent.update(rollout)


def test_estimates_are_made_before_minibatches_cut_groups() -> None:
    """The sum of −Â over all minibatches' rows at ratio 1 is that of the whole rollout."""
    algorithm = small_algorithm("rloo", learning_rate=0.0, epochs=1, minibatches=4)
    agent = make_algorithm_agent(algorithm)
    rollout = agent.collect()
    whole = targets(rollout, algorithm, agent.config).advantages
    mean = float(-(whole * rollout.mask).sum() / rollout.mask.sum())
    assert agent.update(rollout)["loss/policy"] == pytest.approx(mean, rel=1e-4, abs=1e-6)


# The greedy response.


def greedy_decoding(lm: Any, prompt: list[int], stops: tuple[int, ...], limit: int) -> list[int]:
    """Plain: one forward of the whole text a token."""
    response: list[int] = []
    while len(response) < limit and (not response or response[-1] not in stops):
        with torch.no_grad():
            response.append(int(lm(input_ids=torch.tensor([prompt + response])).logits[0, -1].argmax()))
    return response


@pytest.mark.parametrize("source", ["agent", "policy"])
def test_greedy_returns_are_those_of_the_most_likely_tokens(source: str) -> None:
    policy = make_policy(moved(make_llama()))
    options: dict[str, Any] = {"policy": Shared(policy.next_logits)} if source == "policy" else {}
    envs = make_env(make_llama(), kl_coef=0.3, missing_eos_penalty=0.25, **options)
    agent = Agent(policy, envs, replace(small_algorithm("remax"), group_size=2))
    rollout = agent.collect()
    assert rollout.greedy is not None
    for row, start in enumerate(rollout.prompt_lengths.tolist()):
        prompt = rollout.ids[row, :start].tolist()
        response = greedy_decoding(policy.lm, prompt, agent.task.stop_token_ids, 6)
        penalty = 0.25 if response[-1] not in agent.task.stop_token_ids else 0.0
        assert float(rollout.greedy[row]) == pytest.approx(even_share(prompt, response) - penalty, abs=1e-5)
    assert len(set(rollout.greedy.tolist())) > 1


def test_scores_of_greedy_responses_are_clipped_too() -> None:
    algorithm = small_algorithm("remax", score_clip=0.25)
    agent = make_algorithm_agent(algorithm, score=lambda *_: 4.0)
    assert agent.collect().greedy.tolist() == [0.25] * 8  # type: ignore[union-attr]


# Memory and checkpoints.


def test_a_running_baseline_is_remembered() -> None:
    agent = make_algorithm_agent(replace(small_algorithm("reinforce"), estimator=algorithms.RunningBaseline(0.5)))
    rollouts = [agent.collect()]
    mean = float(targets(rollouts[0], agent.algorithm, agent.config).memory["baseline"])
    agent.update(rollouts[0])
    assert agent.memory == {"baseline": mean}
    rollout = agent.collect()
    fresh = float(targets(rollout, agent.algorithm, agent.config).memory["baseline"])  # its own mean
    agent.update(rollout)
    assert agent.memory["baseline"] == pytest.approx(0.5 * mean + 0.5 * fresh)


def moments(agent: Agent) -> dict[str, Any]:
    states = {
        f"{name}/{key}": value.clone()
        for name, parameter in agent.policy.named_parameters()
        for key, value in agent.optimizer.state.get(parameter, {}).items()
    }
    return weights(agent.policy) | states


@pytest.mark.parametrize("name", NAMES)
def test_resuming_is_exact(tmp_path: Path, name: str) -> None:
    algorithm = small_algorithm(name, schedule_updates=4)
    whole, part = (make_algorithm_agent(algorithm) for _ in range(2))
    whole.learn(3)
    part.learn(2)
    part.save(tmp_path / "checkpoint")
    resumed = Agent.load(tmp_path / "checkpoint", make_env())
    assert resumed.algorithm == algorithm
    assert resumed.memory == part.memory
    resumed.learn(1)
    assert identical(moments(whole), moments(resumed))
    assert whole.memory == resumed.memory
    assert whole.prompts.position == resumed.prompts.position


def mine(rollout: Rollout, gamma: float) -> Targets:
    count = rollout.memory.get("count", 0.0)
    return Targets(rollout.scores[:, None] * rollout.mask / (1 + count), memory={"count": count + 1})


def other(rollout: Rollout, gamma: float) -> Targets:
    return Targets(rollout.rewards)


def test_functions_of_ones_own_are_given_again(tmp_path: Path) -> None:
    algorithm = replace(small_algorithm("reinforce", schedule_updates=4), estimator=mine, name="custom")
    whole, part = (make_algorithm_agent(algorithm) for _ in range(2))
    whole.learn(3)
    part.learn(2)
    part.save(tmp_path / "checkpoint")
    load = Agent.load
    with pytest.raises(ValueError, match=r"algorithm: .* because .*test_algorithms_agent.mine in it is not ours"):
        load(tmp_path / "checkpoint", make_env())
    with pytest.raises(ValueError, match=r"algorithm.estimator: expected what was saved, .*\.mine', got .*\.other'"):
        load(tmp_path / "checkpoint", make_env(), algorithm=replace(algorithm, estimator=other))
    with pytest.raises(ValueError, match=r"algorithm.group_size: expected what was saved, 1, got 2"):
        load(tmp_path / "checkpoint", make_env(), algorithm=replace(algorithm, group_size=2))
    resumed = load(tmp_path / "checkpoint", make_env(), algorithm=algorithm)
    resumed.learn(1)
    assert identical(moments(whole), moments(resumed))
    assert whole.memory == resumed.memory == {"count": 3.0}


def test_each_loads_its_own(tmp_path: Path) -> None:
    make_algorithm_agent("grpo").save(tmp_path / "grpo")
    ppo = make_agent()
    ppo.learn(1)
    ppo.save(tmp_path / "ppo")
    with pytest.raises(ValueError, match=r"folder: expected a checkpoint of PPO, got one of grpo"):
        PPO.load(tmp_path / "grpo", make_env())
    agents = [PPO.load(tmp_path / "ppo", make_env()), Agent.load(tmp_path / "ppo", make_env())]
    for agent in agents:
        agent.learn(1)
    assert identical(moments(agents[0]), moments(agents[1]))
    assert json.loads((tmp_path / "ppo" / "trainer.json").read_text())["algorithm"]["settings"]["name"] == "ppo"


# Components of one's own.


def test_an_estimator_of_ones_own_is_held_to_its_shapes() -> None:
    def run(estimator: Any, critic: bool = False) -> Any:
        name = "ppo" if critic else "reinforce"
        agent = make_algorithm_agent(replace(small_algorithm(name), estimator=estimator))
        return agent.learn(1)

    run(lambda rollout, gamma: Targets(rollout.rewards))
    for estimator, critic, message in (
        (lambda rollout, gamma: rollout.rewards, False, "estimator: expected it to return Targets, got Tensor"),
        (lambda rollout, gamma: Targets(rollout.scores), False, "advantages: expected shape"),
        (lambda rollout, gamma: Targets(rollout.rewards), True, "estimator: expected Targets with returns"),
        (lambda rollout, gamma: Targets(rollout.rewards, rollout.scores), True, "returns: expected shape"),
        (lambda rollout, gamma: Targets(rollout.rewards / 0), False, "expected finite losses and gradients"),
    ):
        with pytest.raises(ValueError, match=message):
            run(estimator, critic)


def test_a_broken_estimator_leaves_everything() -> None:
    agent = make_algorithm_agent(replace(small_algorithm("reinforce"), estimator=lambda r, g: Targets(r.rewards / 0)))
    before = weights(agent.policy)
    with pytest.raises(ValueError, match="no step was taken"):
        agent.update(agent.collect())
    assert identical(before, weights(agent.policy))
    assert agent.updates == 0
    assert agent.memory == {}


def test_the_algorithm_of_an_agent_is_shared_by_none() -> None:
    algorithm = small_algorithm("reinforce")
    agents = [make_algorithm_agent(algorithm) for _ in range(2)]
    agents[0].learn(1)
    assert agents[1].memory == {}
    assert copy.deepcopy(algorithm) == algorithm
