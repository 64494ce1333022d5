"""The KL penalty is charged exactly once, whoever charges it; the agent so far is PPO."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from agents import PPO, Rollout
from tests.agent_fixtures import episodes, make_env, make_policy, small_config
from tests.conftest import make_gpt2, make_llama
from textenv import Shared
from textenv.kl import AdaptiveKL

BETA = 0.3
TEMPERATURE = 0.7


def moved(lm: Any) -> Any:
    """The model with its weights shifted, so that it has a KL to what it was."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return lm


def sequence_kls(lm: Any, reference: Any, rollout: Rollout) -> list[float]:
    """Σ_t log π − log π_ref of each response: row by row, without padding, a token at a time."""
    totals = []
    for row, length in episodes(rollout):
        start = int(rollout.prompt_lengths[row])
        ids = rollout.ids[row : row + 1, : start + length]
        with torch.no_grad():
            laws = [torch.log_softmax(m(input_ids=ids).logits[0].double() / TEMPERATURE, -1) for m in (lm, reference)]
        at = range(start - 1, start + length - 1)
        totals.append(sum(float(laws[0][t, ids[0, t + 1]] - laws[1][t, ids[0, t + 1]]) for t in at))
    return totals


@pytest.mark.parametrize("maker", [make_llama, make_gpt2])
@pytest.mark.parametrize("credit", ["token", "sequence"])
@pytest.mark.parametrize("source", ["agent", "policy", "attached"])
@pytest.mark.parametrize("beta", [BETA, 0.0, "adaptive"])
def test_kl_is_charged_exactly_once(maker: Any, credit: str, source: str, beta: Any) -> None:
    reference = maker()
    policy = make_policy(moved(maker()))
    options: dict[str, Any] = {"policy": Shared(policy.next_logits)} if source == "policy" else {}
    coefficient = AdaptiveKL(BETA, target=6.0) if beta == "adaptive" else beta
    envs = make_env(reference, kl_coef=coefficient, kl_credit=credit, temperature=TEMPERATURE, **options)
    if source == "attached":
        envs.attach(policy.next_logits)
    assert envs.kl_source == ("agent" if source == "agent" else "policy")
    rollout = PPO(policy, envs, small_config()).collect()
    kls = sequence_kls(policy.lm, reference, rollout)
    assert min(map(abs, kls)) > 0.01, "no KL, no test"
    price = BETA if beta == "adaptive" else beta
    for row, length in episodes(rollout):
        expected = float(rollout.scores[row]) - price * kls[row]
        assert float(rollout.rewards[row].sum()) == pytest.approx(expected, abs=2e-4)  # float32 log-probs, 6 tokens
        assert not rollout.rewards[row, length:].any()
        if credit == "sequence":
            assert not rollout.rewards[row, : length - 1].any()


def test_the_reference_source_is_refused() -> None:
    with pytest.raises(ValueError, match="kl_source: expected 'agent' or 'policy', got 'reference'"):
        PPO(make_policy(), make_env(kl_source="reference"))


def test_the_controller_is_told_the_kl_once_an_update_and_metrics_use_the_beta_that_was_paid() -> None:
    told: list[tuple[float, int]] = []

    class Recorded(AdaptiveKL):
        def update(self, mean_sequence_kl: float, episodes: int) -> None:
            told.append((mean_sequence_kl, episodes))
            super().update(mean_sequence_kl, episodes)

    reference, controller = make_llama(), Recorded(BETA, target=0.01, horizon=8.0)
    policy = make_policy(moved(make_llama()))
    agent = PPO(policy, make_env(reference, kl_coef=controller, temperature=TEMPERATURE), small_config())
    before = copy.deepcopy(policy.lm)
    rollout = agent.collect()
    metrics = agent.update(rollout)
    expected = sum(sequence_kls(before, reference, rollout)) / 8
    assert told == [(pytest.approx(expected, abs=1e-4), 8)]
    assert metrics["kl/coef"] == BETA
    assert metrics["objective"] == pytest.approx(metrics["score/mean"] - BETA * expected, abs=1e-4)
    assert agent.task.kl_coef == pytest.approx(BETA * 1.2)  # the KL is far above 0.01, so the error is clipped at 0.2


def test_without_beta_no_reference_is_loaded_and_no_kl_is_told() -> None:
    agent = PPO(make_policy(), make_env(kl_coef=0.0), small_config())
    assert agent.task.reference is None
    metrics = agent.learn(1)[0]
    assert not [name for name in metrics if name.startswith("kl/") and name != "kl/update"]
