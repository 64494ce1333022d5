"""Assessments: what is measured on each response, against float64 loops over plain forwards."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from agents.assessment import Assessment, assess, state_laws
from tests.agent_fixtures import even_share, identical, make_env, make_policy, weights
from tests.conftest import make_gpt2
from textenv import Shared

HELDOUT = [[5, 6, 7], [8], [9, 10]]
TEMPERATURE = 0.7


def laws_of(model: Any, ids: list[int], start: int) -> torch.Tensor:
    """Log-probs `[T, V]` of the tokens from `start` on, float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double() / TEMPERATURE
    return torch.log_softmax(logits, -1)[start - 1 : len(ids) - 1]


@pytest.fixture(scope="module")
def found() -> tuple[Any, Any, Any, Assessment]:
    lm, reference = make_gpt2(), make_gpt2(initializer_range=0.2)
    envs = make_env(reference, temperature=TEMPERATURE)

    def second(prompts: Any, responses: Any) -> list[int]:
        return [prompt[0] + len(response) for prompt, response in zip(prompts, responses, strict=True)]

    return lm, reference, envs, assess(make_policy(lm), envs, HELDOUT, per_prompt=3, second_reward=second, seed=2)


def test_every_number_of_a_response(found: Any) -> None:
    lm, reference, envs, result = found
    assert [json.loads(prompt) for prompt in result.prompts] == HELDOUT
    assert len(set(result.responses)) > 5  # responses to one prompt are different draws
    for row, text in enumerate(result.responses):
        prompt, response = HELDOUT[row // 3], json.loads(text)
        ours, theirs = (laws_of(model, prompt + response, len(prompt)) for model in (lm, reference))
        chosen = [(t, token) for t, token in enumerate(response)]
        assert result.lengths[row] == len(response)
        assert result.scores[row] == pytest.approx(even_share(prompt, response))
        assert result.second_scores is not None and result.second_scores[row] == prompt[0] + len(response)
        assert result.kls[row] == pytest.approx(sum(float(ours[c] - theirs[c]) for c in chosen), abs=1e-4)
        assert result.ref_nlls[row] == pytest.approx(-sum(float(theirs[c]) for c in chosen), abs=1e-4)
        assert result.exact_kls[row] == pytest.approx(float((ours.exp() * (ours - theirs)).sum()), abs=1e-4)
        assert result.entropies[row] == pytest.approx(float(-(ours.exp() * ours).sum()), abs=1e-4)
        assert result.finish_reasons[row] == (1 if response[-1] in envs.task.stop_token_ids else 2)


def test_chunks_change_nothing(found: Any) -> None:
    lm, reference, *_ = found
    policy, ids = make_policy(lm), torch.tensor([[5, 6, 7, 8, 9], [8, 3, 4, 0, 0]])
    lengths = torch.tensor([2, 1]), torch.tensor([3, 2])
    whole, parts = (
        state_laws(policy, Shared(reference), ids, *lengths, temperature=TEMPERATURE, max_chunk_elements=size)
        for size in (2**20, 2 * policy.vocab_size)
    )
    assert whole.kl.shape == (2, 3) and bool((whole.kl[1, 2] == 0) & (whole.entropy[1, 2] == 0))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


def test_the_reference_is_at_no_distance_from_itself() -> None:
    lm = make_gpt2()
    result = assess(make_policy(lm), make_env(lm), HELDOUT)
    assert result.exact_kls == pytest.approx([0.0] * 3, abs=1e-6)
    assert result.second_scores is None


def test_the_exact_kl_has_the_mean_of_k1_and_less_spread() -> None:
    envs = make_env(make_gpt2(initializer_range=0.25))
    result = assess(make_policy(make_gpt2()), envs, HELDOUT, per_prompt=300)
    difference = result.by_prompt(result.kls) - result.by_prompt(result.exact_kls)
    assert abs(difference.mean()) < 4 * difference.std() / 900**0.5  # false alarm: 6 in 100,000
    assert result.by_prompt(result.exact_kls).std(1).mean() < 0.7 * result.by_prompt(result.kls).std(1).mean()


def test_a_seed_repeats_and_nothing_is_touched() -> None:
    policy, envs = make_policy(), make_env()
    before, rng = weights(policy), torch.get_rng_state()
    first = assess(policy, envs, HELDOUT, per_prompt=2, seed=4)
    assert assess(policy, envs, HELDOUT, per_prompt=2, seed=4) == first
    assert assess(policy, envs, HELDOUT, per_prompt=2, seed=5).responses != first.responses
    assert identical(before, weights(policy)) and torch.equal(rng, torch.get_rng_state()) and policy.training


def test_bad_input(found: Any) -> None:
    result = found[-1]
    policy = make_policy()
    with pytest.raises(ValueError, match=r"^envs: expected an environment with a reference, got kl_coef=0"):
        assess(policy, make_env(kl_coef=0.0), HELDOUT)
    with pytest.raises(ValueError, match=r"^per_prompt: expected an integer >= 1, got 0"):
        assess(policy, make_env(), HELDOUT, per_prompt=0)
    with pytest.raises(ValueError, match=r"^prompts: expected at least one"):
        assess(policy, make_env(), [])
    with pytest.raises(ValueError, match=r"^kls: expected 9 entries, 3 a prompt, got 8"):
        replace(result, kls=result.kls[:-1])
    with pytest.raises(ValueError, match=r"^per_prompt: expected at least one response"):
        replace(result, per_prompt=0)
