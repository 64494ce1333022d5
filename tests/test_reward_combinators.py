"""Rewards made of others: values on paper, names of parts, running statistics, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import env_fixtures as fixtures
import numpy as np
import pytest
import torch
from env_fixtures import EOS
from hypothesis import given, settings
from hypothesis import strategies as st
from reward_fixtures import CONTEXT

from textenv import Shared
from textenv.rewards import (
    Affine,
    Clip,
    Ensemble,
    LengthControlled,
    LengthPenalty,
    RewardError,
    RunningNormalization,
    Scores,
    TokenAggregate,
    TokenFunction,
    WeightedSum,
    as_reward,
)
from textenv.rewards.binding import bind_reward
from textenv.rewards.reward import Reward
from textenv.rewards.running import Moments

TEXTS = [[1]] * 4


class First:
    """The first id of the response, over a divisor."""

    wants_ids = True

    def __init__(self, divisor: float = 1.0) -> None:
        self.divisor = divisor

    def __call__(self, prompts: Any, responses: Any) -> list[float]:
        return [response[0] / self.divisor for response in responses]


def count_y(prompts: Sequence[str], responses: Sequence[str]) -> list[int]:
    return [response.count("y") for response in responses]


DENSE = TokenFunction(lambda prompt, response: [float(token) for token in response])


def bound(reward: Any) -> Reward:
    return bind_reward(reward, CONTEXT)


def of(reward: Any, *responses: list[int]) -> list[float]:
    return bound(reward).scores([[1]] * len(responses), responses).tolist()


# Sums.


def test_a_sum_of_text_and_ids_tells_each_before_its_weight() -> None:
    reward = bound(WeightedSum({"ys": (count_y, 0.5), "first": (First(2), -1)}))
    whole = reward.whole([[1]] * 2, [[7, 7, 3], [4, EOS]])  # " by by ax" and " ay"
    assert whole.total.tolist() == [0.5 * 2 - 3.5, 0.5 * 1 - 2]
    assert {name: part.tolist() for name, part in whole.parts.items()} == {"ys": [2, 1], "first": [3.5, 2]}
    assert not reward.per_token and reward.decoder is None


def test_a_sum_of_tokens_pays_at_each_token() -> None:
    reward = bound(WeightedSum({"a": (DENSE, 0.5), "b": (DENSE, 1.0)}))
    paid = reward.pay([[1]] * 2, [[4, 6], [2]], [True, False])
    assert [row.tolist() for row in paid.total] == [[6, 9], [3]]
    assert [row.tolist() for row in paid.parts["b"]] == [[4, 6], [2]]


def test_a_mixed_sum_pays_the_rest_at_the_end_and_only_there() -> None:
    reward = bound(WeightedSum({"tokens": (DENSE, 0.5), "first": (First(), 10.0), "ys": (count_y, 1.0)}))
    paid = reward.pay([[1]] * 2, [[4, 6], [4, 6]], [True, False])
    assert [row.tolist() for row in paid.total] == [[2, 3 + 40 + 1], [2, 3]]
    assert reward.names == ("tokens", "first", "ys")
    assert [row.tolist() for row in paid.parts["first"]] == [[0, 4], [0, 0]]
    assert [row.tolist() for row in paid.parts["tokens"]] == [[4, 6], [4, 6]]


def test_sums_of_sums() -> None:
    inner = WeightedSum({"tokens": (DENSE, 1.0), "first": (First(), 1.0)})
    reward = bound(WeightedSum({"inner": (inner, 2.0), "clipped": (Clip(First(), 0, 3), 1.0)}))
    assert sorted(reward.names) == ["clipped", "clipped/raw", "inner", "inner/first", "inner/tokens"]
    paid = reward.pay([[1]], [[4, 6]], [True])
    # Tokens 4 and 6, then 4 for the first: 2·(4), 2·(6 + 4) + 3; `inner` is both of its parts.
    assert paid.total[0].tolist() == [8, 23]
    assert paid.parts["inner"][0].tolist() == [4, 10]
    assert paid.parts["inner/first"][0].tolist() == [0, 4]
    assert paid.parts["clipped"][0].tolist() == [0, 3] and paid.parts["clipped/raw"][0].tolist() == [0, 4]


# Maps and ensembles.


def test_maps_of_one_score() -> None:
    responses = [[1], [3, 3], [6, 6, 6, 6], [20]]
    assert of(Clip(First(), 2, 5), *responses) == [2, 3, 5, 5]
    assert of(Affine(First(), 0.5, -1), *responses) == [-0.5, 0.5, 2, 9]
    assert of(LengthPenalty(First(), 0.25, 2), *responses) == [1.25, 3, 5.5, 20.25]
    raw = bound(Clip(Affine(First(), 2), 0, 5)).whole(TEXTS, responses)
    assert raw.parts["raw"].tolist() == [2, 6, 12, 40] and raw.parts["raw/raw"].tolist() == [1, 3, 6, 20]


def test_normalising_by_samples() -> None:
    # 1, 3, 5, 7: mean 4, population deviation √5.
    reward = Affine.normalizing(First(), [1, 3, 5, 7])
    assert (reward.gain, reward.bias) == (pytest.approx(1 / math.sqrt(5)), pytest.approx(-4 / math.sqrt(5)))
    scores = of(reward, [1], [3], [5], [7])
    assert np.mean(scores) == pytest.approx(0, abs=1e-6) and np.std(scores) == pytest.approx(1, abs=1e-6)
    for samples in ([], [2.0, 2.0]):
        with pytest.raises(ValueError, match="samples: expected scores that differ"):
            Affine.normalizing(First(), samples)


def test_an_ensemble_pays_agreement() -> None:
    # 12, 6, 3: mean 7, deviations 5, −1, −4: √(42/3) = √14.
    members = {"a": First(), "b": First(2), "c": First(4)}
    reward = bound(Ensemble(members, 0.5))
    whole = reward.whole([[1]], [[12, 5]])
    assert whole.total.tolist() == pytest.approx([7 - 0.5 * math.sqrt(14)], abs=1e-6)
    assert whole.parts["sd"].tolist() == pytest.approx([math.sqrt(14)], abs=1e-6)
    assert [float(whole.parts[name][0]) for name in "abc"] == [12, 6, 3]
    assert of(Ensemble(members, 0), [12]) == [7]
    assert of(Ensemble({"a": First(), "b": First()}, 9), [12]) == [12]


def test_token_values_enter_maps_as_one_number() -> None:
    assert of(Clip(TokenAggregate(DENSE), 0, 9), [4, 6], [1, 2]) == [9, 3]
    for make, by in (
        (lambda r: Clip(r, 0, 1), "Clip"),
        (Affine, "Affine"),
        (lambda r: LengthPenalty(r, 1), "LengthPenalty"),
        (lambda r: Ensemble({"a": r, "b": First()}), "Ensemble"),
        (RunningNormalization, "RunningNormalization"),
        (LengthControlled, "LengthControlled"),
    ):
        with pytest.raises(
            ValueError, match=f"expected one number a response in {by}, got one value per token; TokenA"
        ):
            bound(make(DENSE))


# Running statistics.


def told(reward: Reward, *responses: list[int]) -> None:
    """What the agent does after a rollout."""
    reward.update(reward.whole([[1]] * len(responses), responses))


def test_running_normalisation_begins_raw_and_moves_in_update_only() -> None:
    reward = bound(RunningNormalization(First()))
    responses = [[2], [4], [6], [8]]
    for _ in range(2):  # asking changes nothing
        assert reward.scores(TEXTS, responses).tolist() == [2, 4, 6, 8]
    told(reward, *responses)  # mean 5, deviation √5
    expected = [(x - 5) / math.sqrt(5) for x in (2, 4, 6, 8)]
    for _ in range(2):
        assert reward.scores(TEXTS, responses).tolist() == pytest.approx(expected, abs=1e-6)
    assert reward.whole(TEXTS, responses).parts["raw"].tolist() == [2, 4, 6, 8]
    told(reward, [11], [11])  # six in all: mean 7, Σx² = 362, deviation √(362/6 − 49)
    assert reward.scores([[1]], [[7]]).tolist() == pytest.approx([0], abs=1e-6)
    assert reward.scores([[1]], [[8]]).tolist() == pytest.approx([1 / math.sqrt(362 / 6 - 49)], abs=1e-6)


def test_the_past_may_fade() -> None:
    reward = bound(RunningNormalization(First(), decay=0.5))
    told(reward, [2], [6])  # weight 2, mean 4, M 8
    told(reward, [10])  # weight 1 of mean 4 and M 4, and 1 of 10: mean 7, M 4 + 6²·1·1/2 = 22, over 2
    assert reward.scores([[1]], [[9]]).tolist() == pytest.approx([2 / math.sqrt(11)], abs=1e-6)


def test_without_a_centre_only_the_scale_changes() -> None:
    reward = bound(RunningNormalization(First(), center=False))
    told(reward, [2], [6])
    assert reward.scores([[1]], [[6]]).tolist() == [3]


def test_equal_scores_have_no_scale() -> None:
    reward = bound(RunningNormalization(First(10)))
    told(reward, *[[1]] * 7)  # 0.1, whose sums are rounded
    told(reward, *[[1]] * 3)
    assert reward.scores([[1]] * 2, [[1], [21]]).tolist() == pytest.approx([0, 2], abs=1e-6)
    told(reward, [2])
    assert reward.scores([[1]], [[1]]).tolist() == pytest.approx([-(0.1**0.5)], abs=1e-3)  # −(0.1/11)/(0.1·√10/11)


def test_the_unit_of_the_scores_does_not_matter() -> None:
    small, large = (bound(RunningNormalization(First(d))) for d in (2.0**7, 2.0**-7))
    for reward in (small, large):
        told(reward, [3], [8], [9])
        told(reward, [17], [2])
    responses = [[5], [6], [7], [30]]
    assert small.scores(TEXTS, responses).tolist() == large.scores(TEXTS, responses).tolist()


def test_length_is_controlled_by_the_fitted_line() -> None:
    # s = 3·|y| + 1 exactly, then one that is 2 above the line.
    line = [[4], [7, 0], [10, 0, 0], [13, 0, 0, 0]]
    reward = bound(LengthControlled(First()))
    assert reward.scores(TEXTS, line).tolist() == [4, 7, 10, 13]
    told(reward, *line)
    assert reward.scores(TEXTS, line).tolist() == pytest.approx([8.5] * 4, abs=1e-5)
    assert reward.scores([[1]], [[12, 0, 0]]).tolist() == pytest.approx([10.5], abs=1e-5)
    same = bound(LengthControlled(First()))
    told(same, [4], [6])  # one length: no line
    assert same.scores([[1]], [[9, 0, 0]]).tolist() == [9]


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.lists(st.tuples(st.floats(-50, 50), st.floats(1, 40)), min_size=1, max_size=6), min_size=1, max_size=5)
)
def test_moments_are_those_of_all_vectors_at_once(batches: list[list[tuple[float, float]]]) -> None:
    moments = Moments.none(2)
    for batch in batches:
        moments = moments.joined(np.array(batch))
    rows = [row for batch in batches for row in batch]
    means = [math.fsum(row[i] for row in rows) / len(rows) for i in (0, 1)]
    assert moments.count == len(rows)
    assert moments.mean.tolist() == pytest.approx(means, abs=1e-9)
    for i in (0, 1):
        for j in (0, 1):
            expected = math.fsum((row[i] - means[i]) * (row[j] - means[j]) for row in rows)
            assert moments.comoments[i, j] == pytest.approx(expected, abs=1e-7)


def test_equal_numbers_have_no_spread_however_their_mean_is_rounded() -> None:
    rows = np.full((3, 1), 0.1)
    assert rows.mean() != 0.1
    assert Moments.none(1).joined(rows).joined(rows).comoments.tolist() == [[0]]


def nested() -> WeightedSum:
    """Normalised raw scores in two depths, one of them paid at the end of a sum of tokens."""
    normal = RunningNormalization(Affine(First(), 3, 1))
    controlled = LengthControlled(RunningNormalization(count_y, decay=0.7))
    return WeightedSum({"normal": (normal, 0.5), "controlled": (controlled, 2.0), "tokens": (DENSE, 0.1)})


def test_each_normaliser_learns_its_own_raw_values() -> None:
    reward = bound(nested())
    assert reward.learns and not bound(fixtures.a_mixed_sum()).learns
    responses = [[4, 7], [5], [7, 7, 7]]
    told(reward, *responses)
    state = reward.state_dict()["outcome"]
    assert state["normal"]["moments"]["mean"] == [3 * (4 + 5 + 7) / 3 + 1]
    assert state["controlled"]["raw"]["moments"]["mean"] == [pytest.approx((2 + 0 + 3) / 3)]
    # The controller saw what the inner normaliser said, which was raw then, and the lengths.
    assert state["controlled"]["moments"]["mean"] == [pytest.approx(5 / 3), 2]


def test_the_state_goes_through_json_bit_for_bit() -> None:
    one, two = bound(nested()), bound(nested())
    told(one, [4, 7], [5], [9, 9, 9])
    told(one, [7, 7, 8], [6, 3])
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.state_dict() == one.state_dict()
    responses = [[3, 7, 7], [20]]
    for _ in range(2):
        one_paid, two_paid = (r.pay([[1]] * 2, responses, [True] * 2) for r in (one, two))
        for a, b in zip(one_paid.total, two_paid.total, strict=True):
            assert a.tobytes() == b.tobytes()
        told(one, *responses), told(two, *responses)
    assert two.state_dict() == one.state_dict()


def test_statistics_belong_to_the_environment_not_to_the_object() -> None:
    reward = RunningNormalization(First())
    one, two = bound(reward), bound(reward)
    told(one, [2], [4])
    assert one.scores([[1]], [[3]]).tolist() == [0] and two.scores([[1]], [[3]]).tolist() == [3]


def test_another_rewards_state_is_refused() -> None:
    state = bound(nested()).state_dict()
    for reward, message in (
        (First(), "reward: expected the reward whose statistics these are"),
        (
            WeightedSum({"other": (RunningNormalization(First()), 1.0)}),
            r"expected statistics of \['other'\], got those of",
        ),
        (RunningNormalization(First()), "reward: expected count, mean and comoments in its statistics, got {}"),
    ):
        with pytest.raises(ValueError, match=message):
            bound(reward).load_state_dict(state)
    lone = bound(RunningNormalization(First())).state_dict()
    with pytest.raises(ValueError, match="reward: expected statistics of 2 numbers"):
        bound(LengthControlled(First())).load_state_dict(lone)


class Learner:
    """A reward of one's own with statistics of its own."""

    part_names = ("length",)
    wants_ids = True

    def __init__(self) -> None:
        self.seen: list[Scores] = []

    def __call__(self, prompts: Any, responses: Any) -> Scores:
        return Scores([float(r[0]) for r in responses], {"length": [len(r) for r in responses]})

    def update(self, scores: Scores) -> None:
        self.seen.append(scores)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": len(self.seen)}

    def load_state_dict(self, state: Any) -> None:
        self.seen = [Scores([])] * state["updates"]


def test_a_reward_of_ones_own_learns_too() -> None:
    learner = Learner()
    reward = bound(WeightedSum({"mine": (learner, 2.0), "first": (First(), 1.0)}))
    told(reward, [4, 5], [6])
    [seen] = learner.seen
    assert seen.total.tolist() == [4, 6] and seen.parts["length"].tolist() == [2, 1]
    assert reward.state_dict() == {"mine": {"updates": 1}}
    reward.update(reward.whole([], []))
    assert len(learner.seen) == 1  # nothing was scored: nothing is learnt


# Answers and settings that are none.


class Parts:
    wants_ids, part_names = True, ("a", "b")

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, prompts: Any, responses: Any) -> Any:
        return self.answer


BAD_PARTS: list[tuple[Any, str]] = [
    (Scores([1.0], {"a": [1.0]}), r"reward: expected the parts of part_names, \['a', 'b'\], got \['a'\]"),
    ([1.0], r"expected the parts of part_names, \['a', 'b'\], got \[\]"),
    (Scores([1.0], {"a": [1.0], "b": [float("nan")]}), r"reward: expected finite scores, got nan for prompt \[1\]"),
    (Scores([1.0], {"a": [1.0], "b": []}), "reward: expected 1 scores, one a response, got 0"),
]


@pytest.mark.parametrize(("answer", "message"), BAD_PARTS)
def test_bad_parts_are_told(answer: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        of(Parts(answer), [5])


def test_an_error_names_the_part_and_its_response_once() -> None:
    def picky(prompts: Any, responses: Any) -> list[float]:
        if any("f" in response for response in responses):
            raise KeyError("f")
        return [0.0] * len(responses)

    reward = bound(WeightedSum({"style": (Clip(picky, 0, 1), 1.0)}))
    with pytest.raises(RewardError) as caught:
        reward.scores([[1], [1, 3]], [[5], [20]])
    expected = "reward 'raw' of reward 'style': raised KeyError: 'f' for prompt 'ax' and response 'f'"
    assert str(caught.value) == expected


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: WeightedSum({}), "terms: expected rewards and weights by name, got {}"),
    (lambda: WeightedSum({"a": First()}), r"terms: expected \(reward, weight\) for 'a', got"),  # type: ignore[dict-item]
    (lambda: WeightedSum({"a": (First(), float("inf"))}), "terms, weight of 'a': expected a finite number, got inf"),
    (lambda: WeightedSum({"a b": (First(), 1.0)}), "terms: expected names of letters, digits and '_.-', got 'a b'"),
    (lambda: bound(WeightedSum({"a": (3, 1.0)})), "reward 'a': expected a folder, a hub name or a callable"),
    (lambda: Clip(First(), 1, 0), "high: expected a finite number >= 1, got 0"),
    (lambda: Affine(First(), "2"), "gain: expected a finite number, got '2'"),  # type: ignore[arg-type]
    (lambda: LengthPenalty(First(), -1), "coef: expected a finite number >= 0, got -1"),
    (lambda: Ensemble({"a": First()}), "members: expected two or more rewards by name"),
    (lambda: Ensemble({"a": First(), "sd": First()}), "members: expected other names than 'sd'"),
    (lambda: RunningNormalization(First(), decay=0), r"decay: expected a number in \(0, 1\], got 0"),
    (lambda: LengthControlled(First(), decay=True), r"decay: expected a number in \(0, 1\], got True"),
    (lambda: bound(torch.nn.Linear(1, 1)), r"reward: expected live modules to be wrapped, textenv.Shared\(...\)"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:45] for _, message in BAD])
def test_bad_settings_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["score", "kl", "missing_eos", "mean", "std"])
def test_names_that_the_environment_uses_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"reward, part_names: expected none of kl, .*, got '{name}'"):
        as_reward(WeightedSum({name: (First(), 1.0)}), tokenizer=None, stop_token_ids=[])


class Twice(First):
    part_names = ("a", "a")


class Text(First):
    part_names = "ab"


@pytest.mark.parametrize(("reward", "message"), [(Twice(), "expected each name once"), (Text(), "got the string 'ab'")])
def test_bad_part_names(reward: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"reward, part_names: .*{message}"):
        bound(reward)


def test_bound_rewards_are_copied_and_pickled() -> None:
    """Environments are, and a closure would not be."""
    reward = bound(WeightedSum({"a": (RunningNormalization(First()), 1.0), "b": (Clip(First(), 0, 1), 2.0)}))
    told(reward, [2], [4])
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert twin.scores([[1]], [[6]]).tolist() == reward.scores([[1]], [[6]]).tolist() == [5]
        told(twin, [100], [7])
    assert reward.scores([[1]], [[6]]).tolist() == [5]


def test_a_shared_module_may_be_a_child() -> None:
    class Judge(torch.nn.Module):
        def forward(self, prompts: Any, responses: Any) -> torch.Tensor:
            return torch.tensor([float(len(response)) for response in responses])

    assert of(WeightedSum({"judge": (Shared(Judge()), 2.0)}), [5]) == [4]  # "az"
