"""Drawing prompts: epochs, groups, mixtures, and going on from a checkpoint."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textenv import MixedPromptStream, PromptStream


def test_a_stream_is_epochs_without_repetition() -> None:
    stream = PromptStream(5, seed=3)
    drawn = stream.take(20)
    assert all(sorted(drawn[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 20, 5))
    assert len({tuple(drawn[i : i + 5]) for i in range(0, 20, 5)}) > 1
    assert drawn != PromptStream(5, seed=4).take(20)


def test_a_stream_does_not_depend_on_how_it_is_taken() -> None:
    parts = PromptStream(5, seed=3, group=2)
    assert [i for n in (1, 4, 7, 3) for i in parts.take(n)] == PromptStream(5, seed=3, group=2).take(15)


def test_groups_repeat() -> None:
    single, groups = PromptStream(4, seed=0).take(6), PromptStream(4, seed=0, group=3).take(18)
    assert groups == [index for index in single for _ in range(3)]


def test_a_stream_goes_on_from_its_state() -> None:
    stream = PromptStream(7, seed=1, group=2)
    stream.take(9)
    state = json.loads(json.dumps(stream.state_dict()))
    again = PromptStream(7, seed=99, group=2)
    again.load_state_dict(state)
    assert again.take(12) == stream.take(12)
    with pytest.raises(ValueError, match="prompts: expected the checkpoint's 7 prompts in groups of 2, got 8"):
        PromptStream(8, seed=1, group=2).load_state_dict(state)
    with pytest.raises(ValueError, match="expected integers >= 1, got 0 and 1"):
        PromptStream(0, seed=1)


MIXTURES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4)


def source_of(index: int, sizes: list[int]) -> tuple[int, int]:
    """Which source an index of the concatenation is in, and which of its prompts, by counting."""
    for source, size in enumerate(sizes):
        if index < size:
            return source, index
        index -= size
    raise AssertionError("the index is in no source")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(mixture=MIXTURES, seed=st.integers(0, 9))
def test_a_mixture_is_exact_over_a_cycle_and_in_epochs_of_each_source(
    mixture: list[tuple[int, int]], seed: int
) -> None:
    sizes, weights = ([pair[i] for pair in mixture] for i in (0, 1))
    total = sum(weights)
    drawn = [source_of(index, sizes) for index in MixedPromptStream(sizes, weights, seed=seed).take(4 * total)]
    for cycle in range(4):
        of = [source for source, _ in drawn[cycle * total : (cycle + 1) * total]]
        assert [of.count(source) for source in range(len(sizes))] == weights
    for source, size in enumerate(sizes):
        places = [place for of, place in drawn if of == source]
        for start in range(0, len(places) - size + 1, size):
            assert sorted(places[start : start + size]) == list(range(size))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    mixture=st.lists(st.tuples(st.integers(1, 5), st.floats(0.01, 50)), min_size=1, max_size=4),
    group=st.integers(1, 3),
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=6),
)
def test_a_mixture_goes_on_from_its_state_anywhere(
    mixture: list[tuple[int, float]], group: int, counts: list[int]
) -> None:
    sizes, weights = [pair[0] for pair in mixture], [pair[1] for pair in mixture]
    whole = MixedPromptStream(sizes, weights, seed=2, group=group).take(sum(counts))
    parts, stream = [], MixedPromptStream(sizes, weights, seed=2, group=group)
    for count in counts:
        parts += stream.take(count)
        state = json.loads(json.dumps(stream.state_dict()))
        stream = MixedPromptStream(sizes, weights, seed=77, group=group)
        stream.load_state_dict(state)
    assert parts == whole
    single = MixedPromptStream(sizes, weights, seed=2).take(-(-sum(counts) // group))
    assert whole == [index for index in single for _ in range(group)][: sum(counts)]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(weights=st.lists(st.floats(0.01, 50), min_size=2, max_size=5))
def test_shares_are_never_far_off(weights: list[float]) -> None:
    stream, drawn = MixedPromptStream([1] * len(weights), weights, seed=0), [0] * len(weights)
    exact = [Fraction(str(weight)) for weight in weights]
    for draws in range(1, 60):
        drawn[stream.take(1)[0]] += 1
        off = [abs(n - draws * weight / sum(exact)) for n, weight in zip(drawn, exact, strict=True)]
        assert max(off) < len(weights)


def test_by_hand() -> None:
    # w = 2, 1: draw 0 is behind by 2·1 and 1·1 -> A; draw 1 by 2·2 − 3 = 1 and 2 -> B; draw 2 by 3 and 0 -> A.
    stream = MixedPromptStream([1, 1], [2, 1], seed=0)
    assert stream.take(9) == [0, 1, 0] * 3
    # w = 1, 2: behind by 1 and 2 -> B; by 2 and 4 - 3 = 1 -> A; by 3 - 3 = 0 and 6 - 3 = 3 -> B.
    assert MixedPromptStream([1, 1], [1, 2], seed=0).take(6) == [1, 0, 1] * 2
    assert MixedPromptStream([1, 1], [0.2, 0.1], seed=0).weights == [2, 1]
    assert MixedPromptStream([1, 1, 1], [1, 1, 1], seed=0).take(6) == [0, 1, 2] * 2


def test_the_first_source_is_in_the_order_of_its_own_stream_and_others_are_not() -> None:
    assert MixedPromptStream([9], [0.3], seed=4, group=2).take(40) == PromptStream(9, seed=4, group=2).take(40)
    drawn = MixedPromptStream([9, 9], [1, 1], seed=4).take(36)
    assert drawn[::2] == PromptStream(9, seed=4).take(18)
    assert [index - 9 for index in drawn[1::2]] != drawn[::2]


def test_a_state_of_another_mixture_is_refused() -> None:
    state = MixedPromptStream([2, 3], [1, 2], seed=0).state_dict()
    for sizes, weights, group, name in (
        ([3, 3], [1, 2], 1, "sizes"),
        ([2, 3], [1, 1], 1, "weights"),
        ([2, 3], [1, 2], 2, "group"),
    ):
        with pytest.raises(ValueError, match=f"prompts: expected the checkpoint's {name}, "):
            MixedPromptStream(sizes, weights, seed=0, group=group).load_state_dict(state)
    with pytest.raises(ValueError, match="prompts: expected the checkpoint's None prompts in groups of 1, got 5"):
        PromptStream(5, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match=r"prompts: expected the checkpoint's sizes, None, got \[5\]"):
        MixedPromptStream([5], [1], seed=0).load_state_dict(PromptStream(5, seed=0).state_dict())


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([], [], r"sizes, group: expected integers >= 1, got \[\] and 1"),
        ([2, 0], [1, 1], r"sizes, group: expected integers >= 1, got \[2, 0\] and 1"),
        ([2, 3], [1], r"weights: expected 2 finite numbers > 0, got \[1\]"),
        ([2, 3], [1, 0], r"weights: expected 2 finite numbers > 0, got \[1, 0\]"),
        ([2, 3], [1, float("nan")], r"weights: expected 2 finite numbers > 0"),
    ],
)
def test_bad_mixed_streams(sizes: list[int], weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedPromptStream(sizes, weights, seed=0)
