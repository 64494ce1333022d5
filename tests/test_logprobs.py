"""Chunked log-probs: hand numbers, a float64 loop, gradients, memory, masked NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from textenv.logprobs import selected_logprobs, selected_logprobs_and_entropy

B, T, H, V = 3, 5, 8, 11


def _problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, H, generator=generator).to(dtype)
    head = nn.Linear(H, V, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, H, generator=generator))
    return hidden.requires_grad_(), head.to(dtype), torch.randint(0, V, (B, T), generator=generator)


def _loop(hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, temperature: float) -> tuple[list, list]:
    """A plain float64 loop over positions and tokens."""
    weight = head.weight.double().tolist()
    logprobs, entropies = [], []
    for row, ids in zip(hidden.double().tolist(), targets.tolist(), strict=True):
        for h, target in zip(row, ids, strict=True):
            logits = [sum(a * b for a, b in zip(w, h, strict=True)) / temperature for w in weight]
            top = max(logits)
            log_norm = top + math.log(sum(math.exp(x - top) for x in logits))
            logprobs.append(logits[target] - log_norm)
            entropies.append(-sum(math.exp(x - log_norm) * (x - log_norm) for x in logits))
    return logprobs, entropies


def test_hand_numbers() -> None:
    hidden = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]]))
    got = selected_logprobs(hidden, nn.Identity(), torch.tensor([[1, 2]]))
    assert torch.allclose(got.exp(), torch.tensor([[0.25, 0.7]]))
    # At temperature 1/2 the odds are squared: .0625 / (.25 + .0625 + .0625) = 1/6.
    got = selected_logprobs(hidden, nn.Identity(), torch.tensor([[1, 2]]), temperature=0.5)
    assert torch.allclose(got.exp(), torch.tensor([[1 / 6, 0.49 / 0.54]]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("max_chunk_elements", [1, V, 4 * V, 10**6])
def test_equals_a_float64_loop(temperature: float, max_chunk_elements: int) -> None:
    hidden, head, targets = _problem()
    expected, entropies = _loop(hidden, head, targets, temperature)
    options = {"temperature": temperature, "max_chunk_elements": max_chunk_elements}
    got, entropy = selected_logprobs_and_entropy(hidden, head, targets, **options)
    alone = selected_logprobs(hidden, head, targets, **options)
    assert got.shape == entropy.shape == alone.shape == (B, T)
    for have, want in ((got, expected), (entropy, entropies), (alone, expected)):
        assert torch.allclose(have.double().flatten(), torch.tensor(want, dtype=torch.float64), atol=2e-6)


@pytest.mark.parametrize("with_mask", [False, True])
def test_chunks_change_no_gradient(with_mask: bool) -> None:
    gradients = []
    for max_chunk_elements in (10**6, 2 * V):
        hidden, head, targets = _problem()
        mask = torch.arange(T)[None] < torch.tensor([5, 2, 4])[:, None] if with_mask else None
        logprobs, entropy = selected_logprobs_and_entropy(
            hidden, head, targets, temperature=0.7, mask=mask, max_chunk_elements=max_chunk_elements
        )
        weights = torch.arange(B * T).reshape(B, T).float()
        ((logprobs * weights).sum() + (entropy * weights.cos()).sum()).backward()
        assert hidden.grad is not None and head.weight.grad is not None
        gradients.append((hidden.grad, head.weight.grad))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_chunks_bound_what_is_held() -> None:
    """Neither the forward nor what backward keeps ever has the logits of more than one chunk."""
    largest = {}
    for name, limit in (("chunked", 3 * V), ("whole", 10**6)):
        hidden, head, targets = _problem()
        seen = []

        def record(tensor: torch.Tensor, seen: list[int] = seen) -> torch.Tensor:
            if tensor.shape[-1:] == (V,):
                seen.append(tensor.numel())
            return tensor

        head.register_forward_hook(lambda module, args, out, record=record: record(out))
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            logprobs = selected_logprobs(hidden, head, targets, max_chunk_elements=limit)
            kept_for_backward = list(seen)
            logprobs.sum().backward()
        assert kept_for_backward
        largest[name] = max(seen)
    assert largest == {"chunked": 3 * V, "whole": B * T * V}


def test_nothing_flows_where_the_mask_is_false() -> None:
    hidden, head, targets = _problem()
    mask = torch.arange(T)[None] < torch.tensor([5, 2, 0])[:, None]
    clean = selected_logprobs(hidden, head, targets, mask=mask)
    with torch.no_grad():
        hidden[~mask] = torch.nan
    dirty, entropy = selected_logprobs_and_entropy(hidden, head, targets.where(mask, -1), mask=mask)
    (dirty.sum() + entropy.sum()).backward()
    assert torch.equal(dirty[mask], clean[mask])
    assert (dirty[~mask] == 0).all() and (entropy[~mask] == 0).all()
    assert hidden.grad is not None and hidden.grad.isfinite().all() and (hidden.grad[~mask] == 0).all()
    assert head.weight.grad is not None and head.weight.grad.isfinite().all()


def test_an_empty_mask_gives_zeros_and_a_graph() -> None:
    hidden, head, targets = _problem()
    got = selected_logprobs(hidden, head, targets, mask=torch.zeros(B, T, dtype=torch.bool))
    got.sum().backward()
    assert (got == 0).all() and hidden.grad is not None and (hidden.grad == 0).all()


def test_excluded_tokens_make_no_nan() -> None:
    logits = torch.tensor([[[0.0, -torch.inf, 0.0]]], requires_grad=True)
    logprobs, entropy = selected_logprobs_and_entropy(logits, nn.Identity(), torch.tensor([[2]]))
    assert torch.allclose(entropy, torch.tensor([[math.log(2)]])) and torch.allclose(logprobs, -entropy)
    (logprobs + entropy).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_softmax_is_float32_in_bfloat16() -> None:
    hidden, head, targets = _problem(torch.bfloat16)
    got = selected_logprobs(hidden, head, targets, temperature=0.9)
    logits = head(hidden).float() / 0.9  # the logits themselves are rounded to bfloat16, nothing after them
    expected = torch.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1)
    assert got.dtype == torch.float32 and torch.allclose(got, expected, atol=1e-6)


def test_refusals() -> None:
    hidden, head, targets = _problem()
    with pytest.raises(ValueError, match="temperature must be positive; got 0"):
        selected_logprobs(hidden, head, targets, temperature=0)
    with pytest.raises(ValueError, match="targets"):
        selected_logprobs(hidden, head, targets[:, :-1])
    with pytest.raises(ValueError, match="mask must be bool"):
        selected_logprobs(hidden, head, targets, mask=torch.ones(B, T))
    with pytest.raises(ValueError, match="max_chunk_elements"):
        selected_logprobs(hidden, head, targets, max_chunk_elements=0)
