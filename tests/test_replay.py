"""`replay` beyond the law of equivalence: what is given, what is refused, and that the KL is charged exactly once."""

from __future__ import annotations

from typing import Any

import env_fixtures as fixtures
import numpy as np
import pytest
import torch
from env_fixtures import options

from textenv import FinishReason, TextEnv, TextVectorEnv, kl
from textenv.reference import BATCH_TOKENS

PROMPTS = [[1, 5, 20], [1, 30], [1, 7, 8, 21, 22]]
RESPONSES = [[9, 2], [4, 6, 7, 8], [2]]
BETA = 0.3


def walk(env: TextEnv, prompt: list[int], response: list[int]) -> list[Any]:
    env.reset(options={"prompt": prompt})
    return [env.step(token) for token in response]


def law(model: Any, prompt: list[int], response: list[int]) -> list[float]:
    """Log-probs of a response by one plain forward in float64, written beside the library."""
    logits = fixtures.float64_logits("llama", seed=model)
    result = []
    for t, token in enumerate(response):
        row = np.array(logits((*prompt, *response[:t])))
        result.append(float(row[token] - row.max() - np.log(np.exp(row - row.max()).sum())))
    return result


@pytest.mark.parametrize("kl_credit", ["token", "sequence"])
@pytest.mark.parametrize("kl_source", ["agent", "policy", "reference"])
def test_kl_is_charged_exactly_once(kl_source: str, kl_credit: str) -> None:
    arguments = options(kl_source=kl_source, kl_credit=kl_credit, kl_coef=BETA)
    envs, single = TextVectorEnv(2, **arguments), TextEnv(**arguments)
    logprobs = [law(7, p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    record = envs.replay(PROMPTS, RESPONSES, logprobs)
    held = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in logprobs], batch_first=True)
    charged = kl.charge(
        record.rewards,
        held,
        record.ref_logprobs,
        record.mask,
        kl_coef=envs.task.kl_coef,
        kl_source=envs.kl_source,
        kl_credit=kl_credit,
    )
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        refs = law(0, prompt, response)
        score = fixtures.IdReward.one(prompt, response)
        once = score - BETA * (sum(logprobs[row]) - sum(refs))
        full = score + BETA * sum(refs) if kl_source == "reference" else once
        assert float(charged[row].sum()) == pytest.approx(full, abs=1e-4)
        # The same through `step`, with the collecting side's share added by the same function.
        said = walk(single, prompt, response)
        rewards = torch.tensor([[step[1] for step in said]])
        told = said[-1][-1].get("ref_logprobs", [step[-1]["ref_logprob"] for step in said])[: len(response)]
        stepped = kl.charge(
            rewards,
            torch.tensor([logprobs[row]]),
            torch.as_tensor(np.array(told))[None],
            torch.ones_like(rewards, dtype=torch.bool),
            kl_coef=single.task.kl_coef,
            kl_source=single.kl_source,
            kl_credit=kl_credit,
        )
        assert float(stepped.sum()) == pytest.approx(full, abs=1e-4)
        assert torch.allclose(record.rewards[row, : len(response)].double(), rewards[0].double(), atol=1e-4)


def test_beta_is_read_when_it_is_charged() -> None:
    envs = TextVectorEnv(1, **options(kl_source="reference", kl_coef=kl.AdaptiveKL(0.3, target=6, horizon=100)))
    before = envs.replay(PROMPTS, RESPONSES).reward_parts["kl"]
    envs.task.controller.update(100.0, 50)
    after = envs.replay(PROMPTS, RESPONSES).reward_parts["kl"]
    assert torch.allclose(after, before * 1.1)


def test_given_logprobs_are_believed_and_the_policy_is_left_alone() -> None:
    policy = fixtures.LastLogits(fixtures.tiny_llama(seed=7))
    envs = TextVectorEnv(1, **options(kl_source="policy", policy=fixtures_shared(policy)))
    given = [[-1.0] * len(r) for r in RESPONSES]
    record = envs.replay(PROMPTS, RESPONSES, given)
    assert policy.asked == 0
    expected = torch.where(record.mask, -BETA * (-1.0 - record.ref_logprobs), 0.0)
    assert torch.allclose(record.reward_parts["kl"], expected)
    padded = torch.full((3, 4), -1.0)
    padded[0, 2:] = torch.nan  # what lies past the end is never looked at
    assert torch.equal(envs.replay(PROMPTS, RESPONSES, padded).rewards, record.rewards)
    assert torch.equal(envs.replay(PROMPTS, [torch.tensor(r) for r in RESPONSES], given).rewards, record.rewards)


def fixtures_shared(policy: Any) -> Any:
    from textenv import Shared

    return Shared(policy)


@pytest.mark.parametrize("reward", [fixtures.IdReward(), fixtures.DenseReward()], ids=["score", "dense"])
def test_an_aborted_response_is_unscored_and_truncated(reward: Any) -> None:
    envs = TextVectorEnv(1, **options(reward=reward, missing_eos_penalty=0.7, kl_source="reference"))
    record = envs.replay(PROMPTS[:2], [[9, 2], [4, 6]], aborted=[False, True])
    assert record.finish_reasons.tolist() == [FinishReason.STOP, FinishReason.ABORTED]
    assert record.terminated.tolist() == record.scored.tolist() == [True, False]
    assert record.truncated.tolist() == [False, True]
    assert record.scores[1] == 0 and (record.reward_parts["missing_eos"] == 0).all()
    dense = fixtures.DenseReward.one(PROMPTS[1], [4, 6]) if isinstance(reward, fixtures.DenseReward) else [0.0, 0.0]
    expected = record.reward_parts["kl"][1] + torch.tensor(dense)
    assert torch.allclose(record.rewards[1], expected) and (record.reward_parts["kl"][1] != 0).all()


def test_an_episode_under_way_is_left_alone() -> None:
    env, twin = (TextEnv(**options(kl_source="policy")) for _ in range(2))
    env.reset(seed=3), twin.reset(seed=3)
    env.step(5), twin.step(5)
    env.replay(PROMPTS, RESPONSES)
    one, two = env.step(6), twin.step(6)
    assert one[1] == two[1] and one[-1] == two[-1]
    assert env.reset()[1] == twin.reset()[1]


def test_a_stop_token_in_the_prompt_means_nothing() -> None:
    record = TextEnv(**options()).replay([[1, 2, 2]], [[5, 6, 7, 2]])
    assert record.finish_reasons.tolist() == [FinishReason.STOP] and int(record.response_lengths[0]) == 4


def test_batches_of_similar_length_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    env = TextEnv(**options())
    whole = env.replay(PROMPTS, RESPONSES).ref_logprobs
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 7)
    assert torch.allclose(env.replay(PROMPTS, RESPONSES).ref_logprobs, whole, atol=1e-5)


BAD = [
    ({"prompts": []}, "prompts: expected at least one, got none"),
    ({"responses": RESPONSES[:2]}, "responses: expected 3, one a prompt, got 2"),
    ({"aborted": [True]}, "aborted: expected 3 flags, one a response, got 1"),
    ({"responses": [[9, 2], [], [2]]}, "responses: expected at least one token, got an empty response in row 1"),
    ({"responses": [[9, 2], [4, 6, 7, 8, 9], [2]]}, r"at most max_new_tokens=4 tokens, got 5 in row 1"),
    (
        {"responses": [[9, 2], [2, 9, 9, 9], [2]]},
        r"first stop token to be the last token, got 2 at position 0 of 4 in row 1",
    ),
    (
        {"responses": [[9, 2], [4, 6], [2]]},
        r"a stop token or max_new_tokens=4 tokens at the end, got 2 tokens .* in row 1",
    ),
    ({"responses": [[9, 2], [4, 40], [2]]}, r"responses: expected ids in \[0, 40\), got \[4, 40\] in row 1"),
    ({"responses": [[9, 2], [-1, 2], [2]]}, r"responses: expected ids in \[0, 40\), got \[-1, 2\] in row 1"),
    ({"responses": [[9, 2], [4.5, 2], [2]]}, r"responses: expected integer ids, got \[4.5, 2\] in row 1"),
    ({"prompts": [[1], [], [1]]}, "prompts: at 1: expected at least one token, got an empty prompt"),
    ({"prompts": [[1], [1] * 6, [1]]}, "prompts: at 1: expected at most max_prompt_tokens=5 tokens, got 6"),
    (
        {"logprobs": [[-1.0], [-1.0] * 4, [-1.0]]},
        r"logprobs: expected one per response token, \[2, 4, 1\], got \[1, 4, 1\]",
    ),
    ({"logprobs": torch.zeros(3, 5)}, r"logprobs: expected shape \(3, 4\), got \(3, 5\)"),
    (
        {"logprobs": [[-1.0, float("nan")], [-1.0] * 4, [-1.0]]},
        r"logprobs: expected finite numbers, got .*nan.* in row 0",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    env = TextEnv(**options(max_prompt_tokens=5))
    with pytest.raises(ValueError, match=message):
        env.replay(**{"prompts": PROMPTS, "responses": RESPONSES, **changes})
