"""What each setting of PPO does, and what is logged, each against a loop or a formula of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from agents import PPO, PPOConfig, Rollout, ValueHeadLM
from agents.schedule import lr_factor
from agents.update import targets
from tests import oracles
from tests.agent_fixtures import (
    PROMPTS,
    distance,
    episodes,
    even_share,
    identical,
    make_agent,
    make_env,
    make_policy,
    small_config,
    weights,
)
from tests.conftest import make_gpt2, make_llama
from textenv import Shared

# Metrics, recomputed row by row in plain Python.


def tables(policy: ValueHeadLM, rollout: Rollout, temperature: float) -> tuple[list[list[float]], ...]:
    """Log-probs, entropies and values of each response: one row at a time, unpadded, float64 softmax."""
    logprobs, entropies, values = [], [], []
    for row, length in episodes(rollout):
        start = int(rollout.prompt_lengths[row])
        ids = rollout.ids[row : row + 1, : start + length]
        with torch.no_grad():
            output = policy(ids)
        laws = [
            oracles.log_softmax((output.logits[0, t] / temperature).tolist())
            for t in range(start - 1, start + length - 1)
        ]
        logprobs.append([law[int(ids[0, start + t])] for t, law in enumerate(laws)])
        entropies.append([-math.fsum(math.exp(x) * x for x in law) for law in laws])
        values.append(output.values[0, start - 1 : start + length - 1].tolist())
    return logprobs, entropies, values


def flat(rows: list[list[float]]) -> list[float]:
    return [number for row in rows for number in row]


def ragged(tensor: torch.Tensor, rollout: Rollout) -> list[list[float]]:
    return [tensor[row, :length].tolist() for row, length in episodes(rollout)]


def test_rollout_metrics_equal_plain_loops() -> None:
    lm = make_gpt2()
    reference = copy.deepcopy(lm)
    with torch.no_grad():
        lm.transformer.h[0].mlp.c_fc.weight.mul_(1.3)
    agent = PPO(make_policy(lm, "separate+"), make_env(reference, temperature=0.7, max_prompt_tokens=4), small_config())
    rollout = agent.collect()
    logprobs, entropies, values = tables(agent.policy, rollout, 0.7)
    ref_logprobs, _, _ = tables(ValueHeadLM(reference), rollout, 0.7)
    returns = ragged(targets(rollout, agent.algorithm, agent.config).returns, rollout)
    metrics = agent.update(rollout)
    lengths = [length for _, length in episodes(rollout)]
    responses = [rollout.ids[row, int(rollout.prompt_lengths[row]) :][:n].tolist() for row, n in episodes(rollout)]
    scores = [even_share([], response) for response in responses]
    kls = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(logprobs, ref_logprobs, strict=True)]
    sequence_kl = oracles.mean([sum(row) for row in kls])
    stops = agent.task.stop_token_ids
    errors = [r - v for r, v in zip(flat(returns), flat(values), strict=True)]
    expected = {
        "score/mean": oracles.mean(scores),
        "score/std": math.sqrt(oracles.variance(scores, unbiased=False)),
        "kl/sequence": sequence_kl,
        "kl/token": oracles.mean(flat(kls)),
        "kl/coef": 0.1,
        "objective": oracles.mean(scores) - 0.1 * sequence_kl,
        "reward/sequence": oracles.mean(scores) - 0.1 * sequence_kl,
        "entropy": oracles.mean(flat(entropies)),
        "value/mean": oracles.mean(flat(values)),
        "value/explained_variance": 1 - oracles.variance(errors, False) / oracles.variance(flat(returns), False),
        "length/mean": oracles.mean([float(n) for n in lengths]),
        "length/max": max(lengths),
        "finish/stop": oracles.mean([float(response[-1] in stops) for response in responses]),
        "finish/length": oracles.mean([float(response[-1] not in stops) for response in responses]),
        "sampler/logprob_gap": 0.0,
        "lr": 1e-3,
        "steps": 4,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert 0 < metrics["finish/stop"] < 1
    assert abs(sequence_kl) > 0.01
    phases = [metrics[f"time/{phase}"] for phase in ("sample", "evaluate", "reward", "update")]
    assert metrics["time/total"] == pytest.approx(sum(phases))
    assert metrics["speed/tokens_per_s"] == pytest.approx(sum(lengths) / sum(phases))


LOSSES: dict[str, dict[str, Any]] = {
    "default": {},
    "asymmetric": {"clip_eps": 0.1, "clip_eps_high": 0.4},
    "dual clip": {"dual_clip": 1.5},
    "no value clip": {"value_clip_eps": None},
    "narrow value clip": {"value_clip_eps": 0.01},
    "no whitening": {"whiten_advantages": False, "gamma": 0.9, "gae_lambda": 0.8},
    "whitened rewards": {"whiten_rewards": True},
    "uncorrected": {"correction": "none"},
    "corrected and dropped": {"correction_drop": True, "correction_cap": 1.5},
    "corrected by sequence": {"correction": "sequence", "correction_cap": 3.0},
    "sequences dropped": {"correction": "sequence", "correction_cap": 3.0, "correction_drop": True},
}


def correction(old: list[float], behavior: list[float], config: PPOConfig) -> list[float]:
    """The weights of one response's tokens."""
    gaps = [a - b for a, b in zip(old, behavior, strict=True)]
    if config.correction == "sequence":
        gaps = [math.fsum(gaps)] * len(gaps)
    ratios = [1.0 if config.correction == "none" else math.exp(gap) for gap in gaps]
    cut = 0.0 if config.correction_drop else config.correction_cap
    return [ratio if ratio <= config.correction_cap else cut for ratio in ratios]


@pytest.mark.parametrize("name", LOSSES)
def test_update_metrics_equal_plain_loops(name: str) -> None:
    config = small_config(learning_rate=0.0, epochs=1, minibatches=1, value_stats_decay=1.0, **LOSSES[name])
    agent = make_agent(config, lm=make_gpt2(), critic="separate+")
    recorded = agent.collect()
    generator = torch.Generator().manual_seed(5)

    def shaken(tensor: torch.Tensor, size: float) -> torch.Tensor:
        return tensor + size * torch.randn(tensor.shape, generator=generator) * recorded.mask

    # As if collected by another policy and critic, so that ratios and clips are not trivial.
    rollout = replace(recorded, old_logprobs=shaken(recorded.old_logprobs, 1.0), values=shaken(recorded.values, 0.1))
    mean, std = (float(getattr(agent.policy.value_head, f"value_{which}")) for which in ("mean", "std"))
    logprobs, _, values = tables(agent.policy, rollout, 1.0)
    metrics = agent.update(rollout)
    rewards = ragged(rollout.rewards, rollout)
    if config.whiten_rewards:
        rewards = oracles.whiten(rewards, [[True] * len(row) for row in rewards], shift_mean=False, unbiased=True)
    old_values = ragged(rollout.values, rollout)
    advantages = [
        oracles.advantages_of_episode(r, v, config.gamma, config.gae_lambda)
        for r, v in zip(rewards, old_values, strict=True)
    ]
    returns = [a + v for a, v in zip(flat(advantages), flat(old_values), strict=True)]
    if config.whiten_advantages:
        everything = [[True] * len(row) for row in advantages]
        advantages = oracles.whiten(advantages, everything, shift_mean=True, unbiased=True)
    new, old = flat(logprobs), flat(ragged(rollout.old_logprobs, rollout))
    expect: dict[str, list[float]] = {"loss/policy": [], "loss/value": [], "kl/update": [], "ratio/mean": []}
    expect |= {"clip/policy": [], "clip/value": []}
    behavior = ragged(rollout.behavior_logprobs, rollout)
    weights = flat(
        [correction(*pair, config) for pair in zip(ragged(rollout.old_logprobs, rollout), behavior, strict=True)]
    )
    assert config.correction == "none" or len({round(weight, 3) for weight in weights}) > 2
    eps, high, value_eps = config.clip_eps, config.clip_eps_high or config.clip_eps, config.value_clip_eps
    for lp, olp, adv, v, ov, ret, weight in zip(
        new, old, flat(advantages), flat(values), flat(old_values), returns, weights, strict=True
    ):
        ratio = math.exp(lp - olp)
        expect["loss/policy"].append(weight * oracles.clipped_surrogate(lp, olp, adv, eps, high, config.dual_clip))
        u, ou, target = ((x - mean) / std for x in (v, ov, ret))
        expect["loss/value"].append(oracles.clipped_value(u, ou, target, value_eps))
        expect["kl/update"].append(ratio - 1 - (lp - olp))
        expect["ratio/mean"].append(ratio)
        bound = math.inf if config.dual_clip is None else config.dual_clip
        outside = (adv > 0 and ratio > 1 + high) or (adv < 0 and (ratio < 1 - eps or ratio > bound))
        expect["clip/policy"].append(float(outside))
        if value_eps is not None:
            unclipped = oracles.clipped_value(u, ou, target, None)
            expect["clip/value"].append(float(oracles.clipped_value(u, ou, target, value_eps) > unclipped))
    for key, numbers in expect.items():
        if numbers:
            assert metrics[key] == pytest.approx(oracles.mean(numbers), rel=1e-3, abs=1e-4), key
    assert metrics["clip/policy"] > 0.05
    assert ("clip/value" in metrics) == (value_eps is not None)


def test_grad_norm_is_that_before_the_clip() -> None:
    config = small_config(epochs=1, minibatches=1, max_grad_norm=None, learning_rate=0.0)
    agent = make_agent(config, critic="separate+")
    metrics = agent.update(agent.collect())
    for part in ("policy", "critic"):
        gradients = [p.grad for p in getattr(agent.policy, f"{part}_parameters")()]
        norm = math.sqrt(math.fsum(float(g.double().square().sum()) for g in gradients if g is not None))
        assert metrics[f"grad_norm/{part}"] == pytest.approx(norm, rel=1e-4)
        assert norm > 0


# The optimizer.


@pytest.mark.parametrize("max_norm", [1e-3, 1e3, None])
def test_max_grad_norm_bounds_policy_and_critic_apart(max_norm: float | None) -> None:
    config = small_config(epochs=1, minibatches=1, max_grad_norm=max_norm, learning_rate=0.0)
    agent = make_agent(config, critic="separate+")
    metrics = agent.update(agent.collect())
    for part in ("policy", "critic"):
        left = math.sqrt(
            math.fsum(float(p.grad.double().square().sum()) for p in getattr(agent.policy, f"{part}_parameters")())
        )
        assert metrics[f"grad_norm/{part}"] > 1e-2
        assert left == pytest.approx(1e-3 if max_norm == 1e-3 else metrics[f"grad_norm/{part}"], rel=1e-2)


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_the_first_step_is_adam_with_this_epsilon(eps: float) -> None:
    changes = {} if eps == 1e-5 else {"adam_eps": eps}  # 1e-5 is the default
    config = small_config(
        epochs=1, minibatches=1, learning_rate=1e-2, critic_learning_rate=3e-2, lr_schedule="constant", **changes
    )
    agent = make_agent(config, critic="separate+")
    rollout = agent.collect()
    before = weights(agent.policy)
    agent.update(rollout)
    for name, parameter in agent.policy.named_parameters():
        lr = 1e-2 if name.startswith("lm.") else 3e-2
        assert parameter.grad is not None
        gradient = parameter.grad.double()
        moved = before[name].double() - lr * gradient / (gradient.abs() + eps)  # m̂ = g and v̂ = g² at the first step
        if not name.startswith("value_head"):  # whose weights the statistics move too
            assert torch.allclose(parameter.double(), moved, rtol=0, atol=2e-6), name


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [(1 + math.cos(math.pi * u / 4)) / 2 for u in range(4)]),
        ("constant", 2, [0.5, 1, 1, 1]),
        ("linear", 4, [0.25, 0.375, 0.375, 0.25]),
    ],
)
def test_each_schedule_sets_both_rates(schedule: Any, warmup: int, factors: list[float]) -> None:
    config = small_config(lr_schedule=schedule, warmup_updates=warmup, learning_rate=1e-4, critic_learning_rate=1e-3)
    agent = make_agent(config)
    rates: list[tuple[float, ...]] = []
    history = agent.learn(4, lambda *_: rates.append(tuple(g["lr"] for g in agent.optimizer.param_groups)))
    assert rates == [(pytest.approx(1e-4 * f), pytest.approx(1e-3 * f)) for f in factors]
    assert [row["lr"] for row in history] == [pytest.approx(1e-4 * f) for f in factors]


def test_rates_reach_the_weights() -> None:
    def moved(critic_lr: float, lr: float) -> tuple[float, float]:
        config = small_config(learning_rate=lr, critic_learning_rate=critic_lr)
        agent = make_agent(config, critic="separate")
        parts: tuple[Any, Any] = agent.policy.lm, agent.policy.critic_backbone
        before = [weights(part) for part in parts]
        agent.learn(1)
        lm, critic = (distance(old, weights(part)) for old, part in zip(before, parts, strict=True))
        return lm, critic

    assert moved(1e-3, 0.0)[0] == 0.0 < moved(1e-3, 0.0)[1]
    assert moved(0.0, 1e-3)[0] > 0.0 == moved(0.0, 1e-3)[1]


def test_a_schedule_of_its_own_length_and_one_that_grows_with_learn() -> None:
    fixed = make_agent(small_config(schedule_updates=8, learning_rate=1.0e-4))
    assert [row["lr"] for row in fixed.learn(2)] == [pytest.approx(1e-4), pytest.approx(0.875e-4)]
    growing = make_agent(small_config(learning_rate=1e-4))
    rates = [row["lr"] for row in growing.learn(2) + growing.learn(2)]
    assert rates == [pytest.approx(1e-4 * f) for f in (1, 0.5, 0.5, 0.25)]  # never stuck at 0
    assert lr_factor(9, small_config(), 4) == 0.0
    assert lr_factor(9, small_config(), None) == 1.0


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_critic_warmup_moves_the_critic_alone(critic: str) -> None:
    agent = make_agent(small_config(critic_warmup_updates=2, entropy_coef=0.1), critic=critic)
    lm, head = weights(agent.policy.lm), weights(agent.policy.value_head.linear)
    metrics = agent.learn(2)[-1]
    assert identical(lm, weights(agent.policy.lm))
    assert distance(head, weights(agent.policy.value_head.linear)) > 1e-4
    assert metrics["grad_norm/policy"] == 0.0
    agent.learn(1)
    assert distance(lm, weights(agent.policy.lm)) > 1e-5


def test_trunk_value_coef_zero_keeps_the_value_loss_out_of_a_shared_trunk() -> None:
    def trunk(coef: float, value_coef: float) -> Mapping[str, torch.Tensor]:
        config = small_config(trunk_value_coef=coef, value_coef=value_coef, max_grad_norm=None)
        agent = make_agent(config, critic="shared+")
        agent.update(agent.collect())
        return weights(agent.policy.lm)

    assert identical(dict(trunk(0.0, 1.0)), dict(trunk(0.0, 5.0)))
    assert not identical(dict(trunk(1.0, 1.0)), dict(trunk(1.0, 5.0)))


# Settings of the loss and of the rollout.


def test_max_update_kl_stops_before_the_step_that_would_go_too_far() -> None:
    def run(bound: float | None) -> dict[str, float]:
        return make_agent(small_config(max_update_kl=bound, learning_rate=1e-2, epochs=4)).learn(1)[0]

    free, bounded = run(None), run(0.05)
    assert free["steps"] == 8
    assert 1 <= bounded["steps"] < 8
    assert free["kl/update"] > 0.05 > bounded["kl/update"]


def test_an_entropy_bonus_raises_entropy() -> None:
    def gain(coef: float) -> float:
        config = small_config(entropy_coef=coef, lr_schedule="constant", learning_rate=3e-3)
        agent = make_agent(config, score=lambda *_: 1.0, kl_coef=0.0, stop_token_ids=[])
        history = agent.learn(5)
        return history[-1]["entropy"] - history[0]["entropy"]

    assert gain(0.1) > 0.3
    assert abs(gain(0.0)) < 0.1


def test_score_clip_bounds_what_is_learnt_from_and_not_what_is_told() -> None:
    clipped = make_agent(small_config(score_clip=0.3), missing_eos_penalty=0.5, kl_coef=0.0).collect()
    assert float(clipped.scores.max()) > 0.3
    for row, length in episodes(clipped):
        penalty = 0.5 if clipped.finish_reasons[row] == 2 else 0.0
        expected = min(float(clipped.scores[row]), 0.3) - penalty
        assert float(clipped.rewards[row, length - 1]) == pytest.approx(expected)


def test_score_clip_leaves_the_kl_alone() -> None:
    options: dict[str, Any] = {"kl_credit": "sequence", "score": lambda *_: 5.0}
    lm = make_llama(initializer_range=0.2)
    agents = [PPO(make_policy(lm), make_env(**options), small_config(score_clip=clip)) for clip in (None, 1.0)]
    free, clipped = (agent.collect() for agent in agents)
    assert abs(float(free.kl.sum())) > 1
    assert torch.allclose(free.rewards.sum(1) - 4.0, clipped.rewards.sum(1), atol=1e-5)


@pytest.mark.parametrize("score", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_constant_rewards_break_nothing(score: float, whiten_rewards: bool, critic: str) -> None:
    config = small_config(whiten_rewards=whiten_rewards)
    agent = make_agent(config, critic=critic, score=lambda *_: score, kl_coef=0.0, stop_token_ids=[])
    for metrics in agent.learn(3):
        assert all(math.isfinite(value) for value in metrics.values())
    assert all(bool(tensor.isfinite().all()) for tensor in weights(agent.policy).values())


def test_an_episode_of_one_token_breaks_nothing() -> None:
    agent = make_agent(small_config(batch_episodes=1, minibatches=1), max_new_tokens=1)
    for metrics in agent.learn(2):
        assert all(math.isfinite(value) for value in metrics.values())


def test_dense_rewards_are_paid_where_they_are_earned() -> None:
    class Even:
        wants_ids, per_token = True, True

        def __call__(self, prompts: Any, responses: Any) -> list[list[float]]:
            return [[float(token % 2 == 0) for token in response] for response in responses]

    agent = make_agent(reward=Even(), kl_coef=0.0)
    rollout = agent.collect()
    for row, length in episodes(rollout):
        response = rollout.ids[row, int(rollout.prompt_lengths[row]) :][:length]
        assert rollout.rewards[row, :length].tolist() == (response % 2 == 0).float().tolist()


# The loop.


def test_learn_stops_when_the_callback_says_so_and_goes_on_otherwise() -> None:
    agent = make_agent()
    seen: list[int] = []

    def stop(update: int, metrics: Mapping[str, float]) -> bool | None:
        seen.append(update)
        assert "score/mean" in metrics
        return False if update == 2 else None

    assert len(agent.learn(5, stop)) == 2
    assert seen == [1, 2]
    assert agent.updates == 2
    assert agent.learn(0) == []


def test_collect_takes_prompts_of_ones_own() -> None:
    agent = make_agent()
    rollout = agent.collect([[5], [6, 7]])
    assert [rollout.ids[row, : int(n)].tolist() for row, n in enumerate(rollout.prompt_lengths)] == [[5], [6, 7]]
    assert agent.prompts.position == 0
    agent.update(rollout)  # of another size than batch_episodes
    agent.collect()
    assert agent.prompts.position == 8


def test_collect_takes_each_prompt_once_an_epoch() -> None:
    rollout = make_agent(small_config(batch_episodes=6)).collect()
    prompts = [rollout.ids[row, : int(n)].tolist() for row, n in enumerate(rollout.prompt_lengths)]
    assert sorted(prompts) == sorted(PROMPTS)


def test_a_single_environment_and_a_wrapped_one_will_do() -> None:
    import gymnasium as gym

    from tests.agent_fixtures import STOPS, IdsReward
    from textenv import TextEnv

    single = TextEnv(
        reference=Shared(make_llama()),
        prompts=PROMPTS,
        reward=IdsReward(even_share),
        stop_token_ids=STOPS,
        max_new_tokens=6,
        kl_coef=0.1,
    )
    agents = [PPO(make_policy(), env, small_config()) for env in (single, gym.Wrapper(single), make_env())]
    for agent in agents:
        agent.learn(1)
    first = weights(agents[0].policy)
    assert all(identical(first, weights(agent.policy)) for agent in agents[1:])


# LoRA.


def test_lora_end_to_end_with_one_copy_of_the_weights(tiny_lm_folder: Any) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules="all-linear")
    policy = ValueHeadLM.from_pretrained(tiny_lm_folder, lora=adapter)
    agent = PPO(policy, make_env(policy.reference()), small_config(learning_rate=1e-2, lr_schedule="constant"))
    assert agent.task.reference is not None
    assert agent.task.reference.model.module is policy.lm
    base = {name: tensor for name, tensor in weights(policy.lm).items() if "lora_" not in name}
    history = agent.learn(3)
    assert abs(history[0]["kl/sequence"]) < 1e-5  # a new adapter adds nothing
    assert history[-1]["kl/sequence"] > 0.05
    after = weights(policy.lm)
    assert all(torch.equal(tensor, after[name]) for name, tensor in base.items())
    assert any("lora_" in name for name in after)
    assert {name.split(".")[-3] for name, p in policy.lm.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


# Config.


def test_the_config_is_frozen_and_says_its_defaults() -> None:
    config = PPOConfig()
    with pytest.raises(AttributeError):
        config.epochs = 3  # type: ignore[misc]
    assert (config.adam_eps, config.gamma, config.clip_eps, config.whiten_advantages) == (1e-5, 1.0, 0.2, True)
    assert small_config(batch_episodes=9, minibatches=2).forward_episodes == 5
