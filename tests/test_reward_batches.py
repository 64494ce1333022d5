"""Every reward: a batch is its rows one by one, in any order; and scoring changes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from env_fixtures import EOS, VOCAB
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reward_fixtures import CONTEXT, EVERY, KINDS, PROMPT_TEXTS, PROMPTS, save_judge, save_model

import textenv
import textenv.rewards as rewards
from textenv.rewards.binding import bind_reward
from textenv.rewards.reward import Reward

ROOT = Path(__file__).resolve().parents[1]
EPISODES = st.lists(
    st.tuples(
        st.sampled_from(PROMPTS),
        st.lists(st.sampled_from([i for i in range(VOCAB) if i != EOS]), min_size=0, max_size=6),
        st.booleans(),  # ends with a stop token
    ),
    min_size=2,
    max_size=6,
)
SETTINGS = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reward]:
    """One of every reward; those with running statistics have some."""
    folders: dict[str, Path] = {kind: save_model(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}
    folders["judge"] = save_judge(tmp_path_factory.mktemp("judge"))
    made = {name: bind_reward(make(folders), CONTEXT) for name, make in EVERY.items()}
    for reward in made.values():
        reward.update(reward.whole(PROMPTS, [[5, 6], [7, 8, 9, EOS], [20]]))
    return made


def test_the_prompts_read_as_the_fixtures_say() -> None:
    assert CONTEXT.decoder(PROMPTS, [[5]] * 3)[0] == PROMPT_TEXTS


def test_every_reward_of_the_package_is_here() -> None:
    others = {"Reward", "RewardContext", "RewardError", "RewardFunction", "Scores", "TokenLogprobs"}
    helpers = {"PairClassifier", "Pointwise"}  # of PreferenceReward
    classes = {name for name in rewards.__all__ if name[0].isupper()} - others - helpers
    assert {name.split()[0] for name in EVERY} == classes


def test_the_page_names_every_reward() -> None:
    page = (ROOT / "docs" / "rewards.md").read_text("utf8")
    tables = [line for line in page.splitlines() if line.startswith("| `")]
    assert {name.split()[0] for name in EVERY} == {
        re.match(r"\| `(\w+)", line)[1] for line in tables if line[3].isupper()
    }  # type: ignore[index]


def test_the_page_runs() -> None:
    from test_docs import run_page

    if not textenv.embedded.STORYTELLER.exists():
        pytest.skip("the embedded models are not made yet")
    run_page(ROOT / "docs" / "rewards.md")


def flat(reward: Reward, prompts: Any, responses: Any) -> list[np.ndarray]:
    """All that a reward pays and tells, a row a response."""
    paid = reward.pay(prompts, responses, [True] * len(prompts))
    return [np.stack(rows) for rows in zip(paid.total, *(paid.parts[name] for name in reward.names), strict=True)]


@pytest.mark.parametrize("name", EVERY)
@SETTINGS
@given(episodes=EPISODES)
def test_a_batch_is_its_rows_one_by_one(bound: dict[str, Reward], name: str, episodes: list[Any]) -> None:
    reward = bound[name]
    prompts = [prompt for prompt, _, _ in episodes]
    responses = [[*body, EOS] if stop or not body else body for _, body, stop in episodes]
    state = json.dumps(reward.state_dict())
    batch = flat(reward, prompts, responses)
    alone = [flat(reward, [prompt], [response])[0] for prompt, response in zip(prompts, responses, strict=True)]
    back = flat(reward, prompts[::-1], responses[::-1])[::-1]
    for one, two, three in zip(batch, alone, back, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=2e-5)  # padded against unpadded forwards, float32
        np.testing.assert_allclose(one, three, rtol=0, atol=2e-5)
    if name != "HumanReward":  # it keeps answers, which change nothing
        assert json.dumps(reward.state_dict()) == state


OF_RESPONSES_ALONE = {"RegexMatch", "LengthTarget", "SoftOverlong", "MissingEOS", "LexiconReward", "WordsReward"}


@pytest.mark.parametrize("name", EVERY)
def test_a_mix_up_of_rows_would_show(bound: dict[str, Reward], name: str) -> None:
    """The test above would pass for a constant: these tell responses apart, and prompts where they are read."""
    responses = [[5, 6], [7, EOS], [3, EOS], [20, 5, 30, 31, 5, 6, 7], [4], [13, 9, EOS]]

    def scores(prompts: list[list[int]]) -> list[float]:
        return bound[name].scores(prompts, responses).round(4).tolist()

    of_first = scores([PROMPTS[0]] * 6)
    assert len(set(of_first)) > 1 and of_first[::-1] != of_first
    others = [scores([prompt] * 6) for prompt in PROMPTS[1:]]
    assert (of_first in others) == (name in OF_RESPONSES_ALONE)


@pytest.mark.parametrize("name", EVERY)
def test_parts_are_as_declared_and_the_whole_is_the_sum_of_what_is_paid(bound: dict[str, Reward], name: str) -> None:
    reward = bound[name]
    responses = [[5, 6, 20], [7, EOS], [3]]
    paid, whole = reward.pay(PROMPTS, responses, [True, True, False]), reward.whole(PROMPTS, responses)
    assert tuple(paid.parts) == tuple(whole.parts) == reward.names
    for row, response in enumerate(responses):
        assert all(values[row].shape == (len(response),) for values in (paid.total, *paid.parts.values()))
    for row in (0, 1):
        assert paid.total[row].sum() == pytest.approx(whole.total[row], abs=1e-5)
    if not reward.per_token:
        assert paid.total[2].tolist() == [0] and not paid.total[0][:-1].any()


DENSE = [
    "TokenClassifierReward",
    "TokenFunction",
    "StepReward",
    "ImplicitReward per token",
    "WeightedSum of tokens too",
]


def test_which_rewards_are_dense(bound: dict[str, Reward]) -> None:
    assert [name for name, reward in bound.items() if reward.per_token] == DENSE


@pytest.mark.parametrize("name", DENSE)
def test_dense_values_depend_on_nothing_later(bound: dict[str, Reward], name: str) -> None:
    reward, response = bound[name], [5, 6, 20, 7, EOS]
    whole = reward.pay([PROMPTS[0]], [response], [False])
    for length in range(1, 6):
        part = reward.pay([PROMPTS[0]], [response[:length]], [False])
        for seen, paid in ((part.total, whole.total), *((part.parts[n], whole.parts[n]) for n in reward.names)):
            np.testing.assert_allclose(seen[0], paid[0][:length], rtol=0, atol=2e-5)
