"""Evaluations score in units that running statistics do not move."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agents import PPO, evaluate
from tests.agent_fixtures import PROMPTS, even_share, make_agent, make_env, make_policy, small_config
from textenv.rewards import (
    Affine,
    Clip,
    Ensemble,
    LengthControlled,
    LengthPenalty,
    RunningNormalization,
    TokenFunction,
    WeightedSum,
)
from textenv.rewards.base import Scores
from textenv.rewards.binding import as_reward
from textenv.rewards.reward import Reward
from textenv.rewards.running import in_fixed_units


class First:
    """s: the first id."""

    wants_ids = True

    def __call__(self, prompts: Any, responses: Any) -> list[float]:
        return [float(response[0]) for response in responses]


RESPONSES = [[4, 0], [10, 0, 0, 0]]  # s = 4 and 10, |y| = 2 and 4
NORMAL = RunningNormalization(First())
HEAD = TokenFunction(lambda prompt, response: [float(token) for token in response])


def bound(reward: Any) -> Reward:
    return as_reward(reward, tokenizer=None, stop_token_ids=[])


def moved(reward: Any) -> Reward:
    """Bound, and updated with scores of another scale and place than those of `RESPONSES`."""
    made = bound(reward)
    made.update(made.whole([[1]] * 3, [[100], [200, 0, 0], [600, 0]]))
    return made


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (First(), [4, 10]),
        (NORMAL, [4, 10]),
        (LengthControlled(First()), [4, 10]),
        (LengthControlled(RunningNormalization(First(), decay=0.5)), [4, 10]),
        (RunningNormalization(Clip(First(), 0, 7)), [4, 7]),  # clipped before it is normalised: in units of s
        (Clip(NORMAL, -3, 3), [4, 10]),  # bounds in standard deviations clip no raw score
        (Clip(Clip(NORMAL, -3, 3), -2, 2), [4, 10]),
        (Clip(LengthControlled(First()), 0, 7), [4, 7]),  # in units of s, which do not move
        (Clip(LengthControlled(NORMAL), 0, 7), [4, 10]),
        (WeightedSum({"a": (Clip(NORMAL, -3, 3), 0.5), "b": (Clip(First(), 0, 7), 2.0)}), [0.5 * 4 + 8, 0.5 * 10 + 14]),
        (Affine(NORMAL, gain=-2.0, bias=1.0), [-7, -19]),
        (LengthPenalty(NORMAL, coef=0.5), [3, 8]),
        (Ensemble({"a": NORMAL, "b": First()}, coef=1.0), [4, 10]),
        (WeightedSum({"dense": (HEAD, 1.0), "end": (NORMAL, 1.0)}), [8, 20]),  # the outcome of a reward of tokens
    ],
)
def test_scores_are_those_of_before_the_first_update(reward: Any, expected: list[float]) -> None:
    made = moved(reward)
    scores, state = made.scores([[1]] * 2, RESPONSES).tolist(), json.dumps(made.state_dict())
    with in_fixed_units(made):
        assert made.scores([[1]] * 2, RESPONSES).tolist() == expected
    assert made.scores([[1]] * 2, RESPONSES).tolist() == scores
    assert json.dumps(made.state_dict()) == state
    assert (scores != expected) == made.learns


def test_an_error_inside_leaves_the_statistics_as_they_were() -> None:
    made = moved(Clip(NORMAL, -3, 3))
    scores, state = made.scores([[1]] * 2, RESPONSES).tolist(), made.state_dict()
    with pytest.raises(KeyError), in_fixed_units(made):
        raise KeyError
    assert (made.scores([[1]] * 2, RESPONSES).tolist(), made.state_dict()) == (scores, state)


class Own(First):
    """Shifted by how often it was updated."""

    count = 0

    def __call__(self, prompts: Any, responses: Any) -> list[float]:
        return [score + self.count for score in super().__call__(prompts, responses)]

    def update(self, scores: Scores) -> None:
        self.count += 1


class Known(Own):
    @contextmanager
    def fixed_units(self) -> Iterator[None]:
        count, self.count = self.count, 0
        yield
        self.count = count


def test_statistics_of_ones_own_are_refused_or_say_what_is_fixed() -> None:
    made = moved(WeightedSum({"known": (Known(), 1.0), "normal": (NORMAL, 1.0)}))
    with in_fixed_units(made):
        assert made.scores([[1]] * 2, RESPONSES).tolist() == [8, 20]
    made = moved(WeightedSum({"own": (Own(), 1.0), "normal": (NORMAL, 1.0)}))
    state, message = made.state_dict(), r"^reward 'own': expected a method fixed_units\(\), .* got Own with update"
    with pytest.raises(ValueError, match=message), in_fixed_units(made):
        pass
    assert made.state_dict() == state
    with pytest.raises(ValueError, match=message):
        evaluate(make_policy(), make_env(reward=WeightedSum({"own": (Own(), 1.0)})), PROMPTS)


# Agents.


def by_hand(responses: list[str]) -> list[float]:
    """The raw scores of responses, which read as their ids where there is no tokenizer."""
    return [even_share([], ast.literal_eval(text)) for text in responses]


class Even:
    wants_ids = True

    def __call__(self, prompts: Any, responses: Any) -> list[float]:
        return [even_share(p, r) for p, r in zip(prompts, responses, strict=True)]


def test_before_and_after_are_in_the_units_of_the_raw_score() -> None:
    agent = make_agent(envs=make_env(reward=Clip(RunningNormalization(Even()), -1, 1)))
    evaluations = [agent.evaluate(PROMPTS)]
    agent.learn(3)
    assert agent.task.reward.state_dict()["raw"]["moments"]["count"] == 24
    evaluations.append(agent.evaluate(PROMPTS))
    for evaluation in evaluations:
        assert evaluation.scores == pytest.approx(by_hand(evaluation.responses))
    assert evaluations[0].responses != evaluations[1].responses


def test_a_policy_that_stands_still_scores_the_same_while_statistics_move() -> None:
    config = small_config(learning_rate=0.0, eval_every=1)
    agent = PPO(make_policy(), make_env(reward=RunningNormalization(Even())), config, eval_prompts=PROMPTS)
    rows = agent.learn(3)
    assert len({row["eval/score_mean"] for row in rows}) == 1
    assert not any("eval/objective" in row for row in rows)


def test_none_is_found_best_where_what_is_optimised_changes(tmp_path: Path) -> None:
    for reward in (RunningNormalization(Even()), LengthControlled(Even())):
        agent = PPO(make_policy(), make_env(reward=reward), small_config(eval_every=1), eval_prompts=PROMPTS)
        with pytest.raises(ValueError, match=r"^folder: expected None, because the reward's running statistics"):
            agent.learn(1, folder=tmp_path)
        assert agent.updates == 0


def test_a_reward_without_fixed_units_is_refused_before_anything_is_learnt() -> None:
    envs = make_env(reward=WeightedSum({"own": (Own(), 1.0)}))
    PPO(make_policy(), envs, small_config())
    with pytest.raises(ValueError, match=r"^reward 'own': expected a method fixed_units"):
        PPO(make_policy(), envs, small_config(eval_every=1), eval_prompts=PROMPTS)
