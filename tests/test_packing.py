"""Rows without their padding, against each row alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import textenv.packing as packing
import textenv.short_attention as short_attention
from agents import ValueHeadLM
from tests.conftest import MAKERS, V, make_llama, make_qwen2
from textenv.attention import attend_packed
from textenv.packing import Packing, packed_hidden
from textenv.row_cache import RowDecoder


def in_double(model: Any) -> Any:
    """All of it: RMSNorm of transformers rounds to float32, which tells sums of gradients from gradients of sums."""
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if type(norm).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                exact.load_state_dict(norm.state_dict())
                setattr(module, name, exact)
    return model.double()


MODELS = {name: in_double(make()) for name, make in MAKERS.items()}
lengths_of_rows = st.lists(st.integers(1, 30), min_size=1, max_size=9)


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """How many tokens each forward of the first layer's products saw."""
    seen: list[int] = []
    linear = model.base_model.layers[0].mlp.up_proj
    handle = linear.register_forward_hook(lambda module, given, out: seen.append(out.shape[:-1].numel()))
    yield seen
    handle.remove()


def rows_of(lengths: list[int], seed: int = 0, vocabulary: int = V) -> torch.Tensor:
    """Random ids, and random ids as padding; of a small vocabulary, many rows begin alike."""
    return torch.randint(vocabulary, (len(lengths), max(lengths) + 2), generator=torch.Generator().manual_seed(seed))


def alone(model: Any, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Each row through the model's public forward."""
    states = [
        model(input_ids=ids[row : row + 1, :n], output_hidden_states=True, use_cache=False).hidden_states[-1][0]
        for row, n in enumerate(lengths)
    ]
    return torch.cat(states)


def in_rows(hidden: torch.Tensor, pack: Packing, lengths: list[int]) -> torch.Tensor:
    """The tokens with the rows in their order again."""
    return torch.cat([hidden[start : start + n] for start, n in zip(pack.starts.tolist(), lengths, strict=True)])


@pytest.mark.parametrize("name", sorted(MODELS))
@settings(max_examples=25, deadline=None)
@given(
    lengths=lengths_of_rows,
    spare=st.sampled_from([1, 200, 10**9]),
    short=st.sampled_from([0, 64]),
    few=st.sampled_from([0, 12]),
    span=st.sampled_from([1, 2**30]),
    vocabulary=st.sampled_from([1, 2, V]),
)
@example(lengths=[2, 70], spare=1, short=64, few=12, span=2**30, vocabulary=V)
@example(lengths=[2, 47, 60, 60], spare=10**9, short=64, few=12, span=1, vocabulary=1)
@example(lengths=[2, 47, 60, 60], spare=10**9, short=64, few=0, span=1, vocabulary=2)
@example(lengths=[9, 2, 9, 70, 8, 70, 5], spare=1, short=0, few=0, span=1, vocabulary=2)
def test_any_rows_are_each_row_alone_with_gradients(
    name: str, lengths: list[int], spare: int, short: int, few: int, span: int, vocabulary: int
) -> None:
    model, ids = MODELS[name], rows_of(lengths, vocabulary=vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(packing._CALL_IN_CELLS, "cpu", spare)
        patch.setattr(packing, "_WORTH_IT", 1.0)
        patch.setattr(packing, "_WORTH_IT_SHORT", 1.0)
        patch.setattr(packing, "_WORTH_SHARING", 1.0)
        patch.setattr(short_attention, "_WIDTH", short)
        patch.setattr(short_attention, "_WIDTH_OF_SMALL", short)
        patch.setattr(short_attention, "_FEW_COLUMNS", few)
        patch.setattr(short_attention, "_SPAN_IN_WEIGHTS", span)
        pack = Packing.of(torch.tensor(lengths), ids)
        found = in_rows(packed_hidden(model.base_model, ids, pack), pack, lengths)
        expected = alone(model, ids, lengths)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        every_other = in_rows(torch.arange(sum(lengths)), pack, lengths)[::2]
        some = packed_hidden(model.base_model, ids, pack, every_other)
        torch.testing.assert_close(some, expected[::2], rtol=0, atol=1e-12)
        weights = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1))
        parameters = list(model.base_model.parameters())
        ours = torch.autograd.grad((found * weights).sum(), parameters)
        theirs = torch.autograd.grad((expected * weights).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert model.config._attn_implementation == "sdpa"


def test_short_rows_that_learn_take_their_own_attention_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken, forward = make_llama(head_dim=16), [], short_attention.ShortAttention.forward

    def counted_forward(*args: Any) -> Any:
        taken.append(None)
        return forward(*args)

    monkeypatch.setattr(short_attention.ShortAttention, "forward", staticmethod(counted_forward))

    def calls(lengths: list[int]) -> int:
        taken.clear()
        packed_hidden(model.base_model, rows_of(lengths), Packing.of(torch.tensor(lengths)))
        return len(taken)

    layers = len(model.base_model.layers)
    assert calls([3, 20, 5]) == layers
    assert calls([3, short_attention._WIDTH + 1, 5]) == 0
    with torch.no_grad():
        assert calls([3, 20, 5]) == 0
    assert calls([20, 20, 20]) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert calls([20, 20, 20]) == layers  # reduced precision is worth it without padding
        assert calls([9, 9, 9]) == 0  # but for rows that would be widened to a register
    model = make_llama(head_dim=8)
    calls([3, 20, 5])  # the model is looked at once
    with torch.no_grad():
        assert calls([3, 20, 5]) == calls([20, 20, 20]) == layers  # small heads pay without a backward, too
        assert calls([3, short_attention._WIDTH + 1, 5]) == 0
    assert calls([20, 20, 20]) == layers  # and without padding
    assert calls([9, 9, 9]) == 0
    assert calls([3, short_attention._WIDTH + 1, 5]) == layers  # and longer
    assert calls([3, short_attention._WIDTH_OF_SMALL + 1, 5]) == 0


@pytest.mark.parametrize("lengths", [[3, 20, 9, 18], [3, 20, 9, 47, 48]])
@pytest.mark.parametrize("span", [1, 2**30])
def test_a_row_that_is_not_finite_stays_alone(monkeypatch: pytest.MonkeyPatch, lengths: list[int], span: int) -> None:
    monkeypatch.setattr(short_attention, "_SPAN_IN_WEIGHTS", span)
    monkeypatch.setitem(packing._CALL_IN_CELLS, "cpu", 10**9)
    model = make_llama()
    ids, pack = rows_of(lengths).clamp(max=V - 2), Packing.of(torch.tensor(lengths))
    ids[0, 1] = V - 1
    model.get_input_embeddings().weight.data[V - 1] = torch.nan
    for learning in (True, False):
        with torch.set_grad_enabled(learning):
            hidden = packed_hidden(model.base_model, ids, pack)
        rows = in_rows(hidden, pack, lengths).isfinite().all(-1).split(lengths)
        assert [bool(row.all()) for row in rows] == [row > 0 for row in range(len(lengths))]


@pytest.mark.parametrize("span", [1, 2**30])
@pytest.mark.parametrize("wrong", range(5))
def test_nor_does_its_gradient_leave_it(monkeypatch: pytest.MonkeyPatch, wrong: int, span: int) -> None:
    monkeypatch.setattr(short_attention, "_SPAN_IN_WEIGHTS", span)
    monkeypatch.setitem(packing._CALL_IN_CELLS, "cpu", 10**9)
    lengths = torch.tensor([3, 20, 9, 47, 48])
    pack = Packing.of(lengths)
    start, after = int(pack.starts[wrong]), int(pack.starts[wrong] + lengths[wrong])
    tensors = [torch.randn(1, n, int(lengths.sum()), 8) for n in (4, 2, 2)]
    for tensor in tensors:
        tensor[:, :, start:after] = torch.nan
        tensor.requires_grad_()
    query, key, value = tensors
    found, _ = attend_packed(None, query, key, value, pack.mask, packing=pack)
    mine = torch.zeros(int(lengths.sum()), dtype=torch.bool).index_fill_(0, torch.arange(start, after), True)
    for gradient in torch.autograd.grad(found[:, ~mine].sum(), tensors):
        assert gradient[:, :, ~mine].isfinite().all()


def make_mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1))


def make_gemma4() -> Any:
    """Its configuration raises where it is asked for the size of a head, which differs between layers."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    options: dict[str, Any] = {"head_dim": 8, "global_head_dim": 16, "num_kv_shared_layers": 0}
    config = Gemma4TextConfig(
        vocab_size=V,
        vocab_size_per_layer_input=V,
        hidden_size=16,
        hidden_size_per_layer_input=4,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["sliding_attention", "full_attention"],
        **options,
    )
    return Gemma4ForCausalLM(config)


@pytest.mark.parametrize("make", [make_mamba, make_gemma4])
def test_a_model_without_heads_or_with_several_kinds_is_read_too(make: Any) -> None:
    model = make().double().eval()
    for lengths in ([3, 5], [9, 9], [2, 40]):
        ids, pack = rows_of(lengths), Packing.of(torch.tensor(lengths))
        found = in_rows(packed_hidden(model.base_model, ids, pack), pack, lengths)
        torch.testing.assert_close(found, alone(model, ids, lengths), rtol=0, atol=1e-12)


@pytest.mark.parametrize("autocast", [True, False])
def test_reduced_precision_is_that_of_the_tensors_and_not_of_the_attention(autocast: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 40, 5, 40])
    query, key, value = (torch.randn(1, n, 88, 16, generator=generator).bfloat16().requires_grad_() for n in (4, 2, 2))
    weights = torch.randn(1, 88, 4, 16, generator=generator).bfloat16()

    def of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, _ = attend_packed(None, q, k, v, pack.mask, packing=pack)
            return [found, *torch.autograd.grad((found * weights).sum(), (query, key, value))]

    pack = Packing.of(lengths)
    found, exact = of(query, key, value), of(query.double(), key.double(), value.double())
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.bfloat16
        # Each is float32's, rounded once: half a unit of 8 bits.
        torch.testing.assert_close(one.double(), other.double(), rtol=2**-8, atol=1e-5)


@given(lengths=lengths_of_rows, spare=st.sampled_from([1, 50, 10**9]))
def test_groups_hold_every_token_once(lengths: list[int], spare: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(packing._CALL_IN_CELLS, "cpu", spare)
        pack = Packing.of(torch.tensor(lengths))
    assert sum(group.rows for group in pack.groups) == len(lengths)
    tokens = [(row, place) for row, n in enumerate(lengths) for place in range(n)]
    assert sorted(pack.cells.tolist()) == sorted(row * max(lengths) + place for row, place in tokens)
    numbers = torch.arange(1, sum(lengths) + 1)
    cells = pack.padded(numbers)
    assert torch.equal(pack.unpadded(cells), numbers) and int(cells.sum()) == int(numbers.sum())
    rows = [row for group in pack.split(pack.padded(pack.positions + 1)) for row in group]
    for row, length in zip(rows, sorted(lengths), strict=True):
        assert row.tolist() == [*range(1, length + 1), *[0] * (len(row) - length)]


def test_padding_costs_nothing() -> None:
    model = make_llama(head_dim=16)
    packed_hidden(model.base_model, rows_of([1, 9]), Packing.of(torch.tensor([1, 9])))  # the model is looked at once
    with counted(model) as seen:
        packed_hidden(model.base_model, rows_of([3, 20, 5]), Packing.of(torch.tensor([3, 20, 5])))
        packed_hidden(model.base_model, rows_of([20, 19, 20]), Packing.of(torch.tensor([20, 19, 20])))
    assert seen == [28, 60]  # a little padding is cheaper than leaving it out


def test_attention_of_similar_rows_goes_together() -> None:
    assert Packing.of(torch.tensor([100, 20, 22, 100, 21, 98])).groups == ((3, 22), (3, 100))
    assert Packing.of(torch.tensor([100, 2, 100, 1, 98])).groups == ((2, 2), (3, 100))
    assert Packing.of(torch.tensor([100, 8, 100, 1, 98])).groups == ((2, 16), (3, 100))  # at least a register


def test_a_window_is_not_forgotten() -> None:
    model = make_qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=0, layer_types=None).double()
    lengths = [3, 20, 5]
    ids, pack = rows_of(lengths), Packing.of(torch.tensor(lengths))
    found = in_rows(packed_hidden(model.base_model, ids, pack), pack, lengths)
    torch.testing.assert_close(found, alone(model, ids, lengths), rtol=0, atol=1e-12)


@pytest.mark.parametrize("fault", ["drops", "raises"])
def test_a_model_that_does_not_hand_on_the_packing_is_padded(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama().double()
    attention = type(model.base_model.layers[0].self_attn)
    original = attention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        pack = kwargs.get("packing")
        if pack is not None and fault == "drops":  # as if each token were a row of its own
            kwargs["packing"] = Packing.of(torch.ones(len(pack.positions), dtype=torch.int64))
        elif pack is not None:
            del kwargs["packing"]
        return original(self, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    lengths = [3, 20, 5]
    ids, pack = rows_of(lengths), Packing.of(torch.tensor(lengths))
    with counted(model) as seen:
        found = in_rows(packed_hidden(model.base_model, ids, pack), pack, lengths)
    assert seen[-1] == 60
    torch.testing.assert_close(found, alone(model, ids, lengths), rtol=0, atol=1e-12)


def test_eager_attention_is_padded() -> None:
    model = make_llama(attn_implementation="eager")
    with counted(model) as seen:
        packed_hidden(model.base_model, rows_of([3, 20]), Packing.of(torch.tensor([3, 20])))
    assert seen == [40]


def gradients(policy: ValueHeadLM) -> list[np.ndarray]:
    ids, prompts, responses = rows_of([4, 24, 9, 5]), torch.tensor([2, 3, 4, 1]), torch.tensor([2, 21, 5, 4])
    ids[2, :2] = ids[1, :2]
    found = policy.evaluate(ids, prompts, responses, temperature=1.0, with_entropy=True)
    policy.zero_grad()
    (found.logprobs.sum() + found.values.square().sum() + found.entropy.sum()).backward()
    return [p.grad.numpy() for p in policy.parameters() if p.grad is not None]


@pytest.mark.parametrize("how", ["ours", "copied", "theirs"])
def test_checkpointed_layers_do_the_same_again(how: str, tiny_lm_folder: Path) -> None:
    def load(checkpointing: bool) -> ValueHeadLM:
        policy = ValueHeadLM.from_pretrained(
            tiny_lm_folder, critic="separate", dtype=torch.float64, gradient_checkpointing=checkpointing
        )
        torch.nn.init.constant_(policy.value_head.linear.weight, 0.1)
        return policy

    policy = load(how != "theirs")
    if how == "copied":
        policy = copy.deepcopy(policy)
    elif how == "theirs":
        policy.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = gradients(load(False))
    with counted(policy.lm) as seen:
        found = gradients(policy)
    assert seen[-2:] == [36, 36]  # once in the backward pass, too; the first two tokens of two rows are the same
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # the value head is float32


def test_threads_do_not_disturb_each_other() -> None:
    model = make_llama()
    lengths = [3, 20, 5]
    ids, pack = rows_of(lengths), Packing.of(torch.tensor(lengths))

    def packed(_: int) -> torch.Tensor:
        with torch.no_grad():
            return packed_hidden(model.base_model, ids, pack)

    def plain(_: int) -> torch.Tensor:
        with torch.no_grad():
            return model.base_model(ids, use_cache=False).last_hidden_state

    def decoded(_: int) -> torch.Tensor:
        decoder = RowDecoder(model, 3, 12)
        decoder.prefill(None, ids[:, :4], torch.tensor([4, 2, 3]))
        return decoder.advance(ids[:, 5])

    for work in (packed, plain, decoded):
        work(0)
    with ThreadPoolExecutor(3) as pool:
        for work, found in [(work, pool.map(work, range(30))) for work in (packed, plain, decoded)]:
            expected = work(0)
            for one in found:
                torch.testing.assert_close(one, expected, rtol=0, atol=2e-5)


def test_a_large_constant_channel_does_not_hide_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MAKERS["gpt2"]().double()
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 1e6
    original = packing._packed
    one_row = Packing.of(torch.tensor([6]))
    monkeypatch.setattr(  # rows that see each other, as if nobody told attention where they end
        packing,
        "_packed",
        lambda trunk, tokens, pack: original(trunk, tokens, replace(one_row, positions=pack.positions)),
    )
    assert not packing._agrees(model.base_model)
    monkeypatch.setattr(packing, "_packed", original)
    assert packing._agrees(model.base_model)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    model, lengths = MODELS["llama"], [9, 5, 3, 7]
    ids, parameters = rows_of(lengths), list(MODELS["llama"].base_model.parameters())
    hidden = packed_hidden(model.base_model, ids, Packing.of(torch.tensor(lengths)))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(hidden.pow(2).sum(), parameters, create_graph=True)


def test_what_rows_begin_with_alike_is_computed_once() -> None:
    model = make_llama()
    packed_hidden(model.base_model, rows_of([1, 9]), Packing.of(torch.tensor([1, 9])))  # the model is looked at once
    ids, lengths = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [5, 6, 7, 3], [4, 6, 7, 8]]), torch.tensor([4, 3, 4, 4])
    with counted(model) as seen:
        packed_hidden(model.base_model, ids, Packing.of(lengths, ids))
        packed_hidden(model.base_model, ids, Packing.of(lengths))
    assert seen == [10, 15]  # 5 6 7 8, 9, 3, 4 6 7 8


def test_a_packing_of_other_ids_is_refused() -> None:
    ids, lengths = torch.tensor([[5, 6], [5, 7]]), torch.tensor([2, 2])
    with pytest.raises(ValueError, match="another batch"):
        packed_hidden(make_llama().base_model, ids.flip(0), Packing.of(lengths, ids))
