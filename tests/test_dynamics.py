"""The pure transition against a loop over Python lists."""

from __future__ import annotations

import random

import pytest
import torch

from textenv import dynamics
from textenv.types import FinishReason

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(10))
def test_append_is_list_append(seed: int) -> None:
    rng = random.Random(seed)
    rows, longest, stops = 4, 3, (2, 7)
    prompts = [[rng.randrange(9) for _ in range(rng.randint(1, 4))] for _ in range(rows)]
    state = dynamics.empty(rows, 7, device=CPU, pad_token_id=8)
    padded = torch.tensor([p + [8] * (7 - len(p)) for p in prompts])
    state = dynamics.begin(state, torch.arange(rows), padded, torch.tensor([len(p) for p in prompts]))
    responses: list[list[int]] = [[] for _ in range(rows)]
    reasons = [0] * rows
    for _ in range(longest):
        acting = [row for row in range(rows) if not reasons[row] and rng.random() < 0.8]
        actions = [rng.randrange(9) for _ in acting]
        before, copied = state, state.ids.clone()
        state = dynamics.append(
            state,
            torch.tensor(actions, dtype=torch.int64),
            torch.tensor(acting, dtype=torch.int64),
            stop_token_ids=torch.tensor(stops),
            max_new_tokens=longest,
        )
        assert torch.equal(before.ids, copied)  # pure
        for row, action in zip(acting, actions, strict=True):
            responses[row].append(action)
            reasons[row] = 1 if action in stops else 2 if len(responses[row]) == longest else 0
        for row in range(rows):
            text = prompts[row] + responses[row]
            assert state.ids[row].tolist() == text + [8] * (7 - len(text))
        assert state.finish_reasons.tolist() == reasons
        assert state.response_lengths.tolist() == [len(r) for r in responses]


def test_begin_forgets_only_the_rows_named() -> None:
    state = dynamics.empty(2, 4, device=CPU, pad_token_id=0)
    state = dynamics.begin(state, torch.arange(2), torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0]]), torch.tensor([2, 1]))
    ended = {"stop_token_ids": torch.tensor([2]), "max_new_tokens": 2}
    state = dynamics.append(state, torch.tensor([2, 2]), torch.arange(2), **ended)
    state = dynamics.begin(state, torch.tensor([1]), torch.tensor([[9, 9, 9, 0]]), torch.tensor([3]))
    assert state.ids.tolist() == [[5, 6, 2, 0], [9, 9, 9, 0]]
    assert state.lengths.tolist() == [3, 3] and state.finish_reasons.tolist() == [FinishReason.STOP, FinishReason.NONE]


def test_no_stop_tokens() -> None:
    none = torch.tensor([], dtype=torch.int64)
    reasons = dynamics.finish_reasons(torch.tensor([0, 0]), torch.tensor([1, 2]), stop_token_ids=none, max_new_tokens=2)
    assert reasons.tolist() == [FinishReason.NONE, FinishReason.LENGTH]


@pytest.mark.parametrize(
    ("length_end", "terminated", "truncated"),
    [("terminate", [0, 1, 1, 0], [0, 0, 0, 1]), ("truncate", [0, 1, 0, 0], [0, 0, 1, 1])],
)
def test_endings(length_end, terminated, truncated) -> None:
    flags = dynamics.endings(torch.arange(4), length_end=length_end)
    assert [flag.int().tolist() for flag in flags] == [terminated, truncated]
