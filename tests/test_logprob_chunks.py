"""Log-probs by blocks of a linear head: a float64 oracle, second derivatives, dtypes, and the work that is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from textenv.logprob_chunks import is_plain_linear
from textenv.logprobs import packed_logprobs

N, H, V = 13, 6, 29


def problem(bias: bool = False) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    """Hidden states, head, targets, and weights of a loss."""
    generator = torch.Generator().manual_seed(1)
    head = nn.Linear(H, V, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(N, H, generator=generator).requires_grad_()
    return hidden, head, torch.randint(V, (N,), generator=generator), torch.randn(2, N, generator=generator)


def oracle(hidden: Tensor, head: nn.Linear, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same in float64 by the definition, and its own leaves: hidden, weight, bias if there is one."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, *head.parameters())]
    logits = leaves[0] @ leaves[1].T
    logits = (logits if len(leaves) == 2 else logits + leaves[2]) / temperature
    probs = logits.exp() / logits.exp().sum(1, keepdim=True)
    chosen = probs[torch.arange(len(targets)), targets].log()
    return chosen, -(probs * probs.log()).sum(1), leaves


@pytest.mark.parametrize("limit", [1, 7, 3 * V, N * V - 1])
@pytest.mark.parametrize(("bias", "temperature", "with_entropy"), [(False, 1.0, False), (True, 0.6, True)])
def test_values_and_gradients_are_those_of_float64(
    limit: int, bias: bool, temperature: float, with_entropy: bool
) -> None:
    hidden, head, targets, weights = problem(bias)
    logprobs, entropy = packed_logprobs(hidden, head, targets, temperature, limit, with_entropy=with_entropy)
    assert logprobs.grad_fn is not None and "BlockLogprobs" in type(logprobs.grad_fn).__name__
    chosen, true_entropy, leaves = oracle(hidden, head, targets, temperature)
    loss, true_loss = (logprobs * weights[0]).sum(), (chosen * weights[0]).sum()
    torch.testing.assert_close(logprobs.double(), chosen, rtol=1e-5, atol=3e-6)
    assert (entropy is not None) == with_entropy
    if entropy is not None:
        torch.testing.assert_close(entropy.double(), true_entropy, rtol=1e-5, atol=3e-6)
        loss, true_loss = loss + (entropy * weights[1]).sum(), true_loss + (true_entropy * weights[1]).sum()
    loss.backward()
    true_loss.backward()
    for ours, true in zip((hidden, *head.parameters()), leaves, strict=True):
        assert ours.grad is not None and true.grad is not None
        torch.testing.assert_close(ours.grad.double(), true.grad, rtol=1e-4, atol=2e-5)  # float32 sums of 13 × 29


def test_what_is_frozen_gets_no_gradient() -> None:
    hidden, head, targets, _ = problem(bias=True)
    packed_logprobs(hidden, head, targets, 1.0, V)[0].sum().backward()
    full, expected = hidden.grad, head.weight.grad
    hidden.grad = None
    head.requires_grad_(False).zero_grad()
    packed_logprobs(hidden, head, targets, 1.0, V)[0].sum().backward()
    assert full is not None and hidden.grad is not None and torch.equal(hidden.grad, full)
    assert head.weight.grad is None and head.bias.grad is None
    head.requires_grad_(True)
    packed_logprobs(hidden.detach(), head, targets, 1.0, V)[0].sum().backward()
    assert expected is not None and head.weight.grad is not None and torch.equal(head.weight.grad, expected)


def test_tied_weights_get_both_gradients() -> None:
    _, head, targets, _ = problem()
    gradients = []
    for limit in (V, 10**6):
        embedding = nn.Embedding(V, H)
        embedding.weight = head.weight
        head.zero_grad()
        packed_logprobs(embedding(targets.flip(0)), head, targets, 1.0, limit)[0].sum().backward()
        assert head.weight.grad is not None
        gradients.append(head.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_a_second_derivative() -> None:
    """A Hessian-vector product, as natural gradients need, against float64."""
    hidden, head, targets, weights = problem(bias=True)
    logprobs, entropy = packed_logprobs(hidden, head, targets, 0.8, 2 * V, with_entropy=True)
    chosen, true_entropy, leaves = oracle(hidden, head, targets, 0.8)
    products = []
    for p, e, inputs in ((logprobs, entropy, [hidden, *head.parameters()]), (chosen, true_entropy, leaves)):
        loss = (p * p * weights[0].to(p.dtype)).sum() + (e * e).sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        along = torch.stack([(grad * grad.detach().cos()).sum() for grad in first]).sum()
        products.append(torch.autograd.grad(along, inputs))
    for ours, true in zip(*products, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-3, atol=1e-3)  # entries are of the size of 10 to 100


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_rounds_as_the_plain_computation_does(autocast: bool) -> None:
    found = []
    for limit in (3 * V, 10**6):
        hidden, head, targets, weights = problem()
        if not autocast:
            hidden, head = hidden.detach().bfloat16().requires_grad_(), head.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logprobs, entropy = packed_logprobs(hidden, head, targets, 1.0, limit, with_entropy=True)
        assert entropy is not None and logprobs.dtype == entropy.dtype == torch.float32
        ((logprobs * weights[0]).sum() + (entropy * weights[1]).sum()).backward()
        assert hidden.grad is not None and head.weight.grad is not None
        assert hidden.grad.dtype == hidden.dtype and head.weight.grad.dtype == head.weight.dtype
        found.append((logprobs.detach(), entropy.detach(), hidden.grad.float(), head.weight.grad.float()))
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=1e-5, atol=5e-6)  # the same rounded logits
    # Rounded gradients of logits, summed in another order: one part in 2^8 of the terms.
    torch.testing.assert_close(found[0][2:], found[1][2:], rtol=2e-2, atol=2e-2)


def test_a_bias_may_exclude_tokens() -> None:
    hidden, head, targets, _ = problem(bias=True)
    with torch.no_grad():
        head.bias[:] = torch.where(torch.arange(V) % 3 == 0, 0.0, -torch.inf)
    found = []
    for limit in (2, 10**6):
        hidden.grad = None
        logprobs, entropy = packed_logprobs(hidden, head, targets // 3 * 3, 1.0, limit, with_entropy=True)
        assert entropy is not None
        (logprobs + entropy).sum().backward()
        assert hidden.grad is not None
        found.append((logprobs.detach(), entropy.detach(), hidden.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_any_other_head_goes_by_rows() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    hidden, head, targets, _ = problem()
    hooked = nn.Linear(H, V, bias=False)
    hooked.register_forward_hook(lambda module, args, output: output + output)
    assert is_plain_linear(head) and not is_plain_linear(nn.Sequential(head)) and not is_plain_linear(lambda h: h)
    for other in (Doubled(H, V, bias=False), hooked):
        other.load_state_dict(head.state_dict())
        assert not is_plain_linear(other)
        ours = packed_logprobs(hidden, other, targets, 1.0, V)[0]
        assert torch.allclose(ours, packed_logprobs(hidden, head, targets, 0.5, V)[0], atol=1e-5)


class Work(TorchDispatchMode):
    """Keeps every storage that an operation returns, so that no two have one address, and counts products."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.multiplications += len(a) * b.numel()
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = storage
        return out


@pytest.mark.parametrize(("frozen", "products"), [(False, 4), (True, 3)])
def test_the_work_is_one_more_product_and_one_gradient(frozen: bool, products: int) -> None:
    """Bytes: one block at a time, one gradient of the weights if they learn. Products: the plain ones and one again."""
    rows, width, vocab, limit = 64, 16, 1000, 2048
    hidden, head = torch.randn(rows, width, requires_grad=True), nn.Linear(width, vocab, bias=False)
    head.requires_grad_(not frozen)
    targets = torch.arange(rows)
    with Work() as work:
        packed_logprobs(hidden, head, targets, 1.0, limit)[0].sum().backward()
    assert work.multiplications == products * rows * width * vocab
    weight = 4 * vocab * width
    own = {hidden.untyped_storage().data_ptr(), head.weight.untyped_storage().data_ptr()}
    sizes = [storage.nbytes() for address, storage in work.storages.items() if address not in own]
    assert sum(size >= weight for size in sizes) == (0 if frozen else 1)
    assert max(size for size in sizes if size < weight) <= 4 * limit


def test_a_second_derivative_with_tied_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 6, dtype=torch.float64, generator=generator).requires_grad_()
    head = nn.Linear(6, 40, bias=False, dtype=torch.float64)
    head.weight = nn.Parameter(weight.detach().clone())
    ids, targets = torch.randint(40, (9,), generator=generator), torch.randint(40, (9,), generator=generator)
    first = []
    for limit in (64, 2**22):
        found, _ = packed_logprobs(head.weight[ids], head, targets, 1.0, limit)
        [gradient] = torch.autograd.grad(found.sum(), [head.weight], create_graph=True)
        first.append(gradient)
    torch.testing.assert_close(*first)


def test_a_head_whose_forward_was_replaced_goes_by_rows() -> None:
    head = nn.Linear(6, 40)
    original = head.forward
    head.forward = lambda hidden: 2 * original(hidden)  # as accelerate's hooks do
    hidden, targets = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), torch.arange(9)
    small, large = (packed_logprobs(hidden, head, targets, 1.0, limit)[0] for limit in (64, 2**22))
    torch.testing.assert_close(small, large)
