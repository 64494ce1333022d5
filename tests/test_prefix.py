"""Any batch of observations, through caches and shared rows, against a plain forward of each row alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import ValueHeadLM
from agents.critic import build_critic
from agents.prefix import Prefixes, PrefixNetwork, distinct_prefixes
from tests.conftest import MAKERS, V, make_gpt2, make_llama
from textenv.models import backbone

TOLERANCE = 1e-4
"""Float32 rounding of logits of size 10; a wrong mask, position or weight is off by more than 0.1."""

LENGTH = 16
CRITICS = ("shared", "separate")


def make_policy(name: str = "llama", critic: str = "shared") -> ValueHeadLM:
    """A tiny policy whose values differ from state to state and whose statistics are not 0 and 1."""
    lm = MAKERS[name]()
    policy = ValueHeadLM(lm, build_critic(lm, critic)).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        policy.value_head.linear.weight.normal_(0, 0.1, generator=generator)
        if policy.critic_backbone is not None:  # a copy of the policy's trunk would hide that one reads the other's
            for parameter in policy.critic_backbone.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    policy.value_head.rescale_values(2.0, 3.0, preserve=False)
    return policy


POLICIES = {(name, critic): make_policy(name, critic) for name in MAKERS for critic in CRITICS}


def alone(policy: ValueHeadLM, row: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and value of one state through the models' public forwards: no padding, no cache, no batch."""
    ids = torch.tensor([row])
    output = policy.lm(input_ids=ids, use_cache=False, output_hidden_states=True)
    hidden = output.hidden_states[-1][0, -1]
    if policy.critic_backbone is not None:
        hidden = policy.critic_backbone(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
    linear = policy.value_head.linear
    return output.logits[0, -1], 2.0 + 3.0 * (linear.weight[0] @ hidden + linear.bias[0])


def batch(rows: list[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((len(rows), LENGTH), pad)
    mask = torch.zeros(len(rows), LENGTH, dtype=torch.int8)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


def check(network: PrefixNetwork, rows: list[list[int]], pad: int = 0) -> None:
    logits, values = network(*batch(rows, pad))
    for row, logit, value in zip(rows, logits, values, strict=True):
        with torch.no_grad():
            expected, expected_value = alone(network.policy, row)
        assert torch.allclose(logit, expected / network.temperature, atol=TOLERANCE, rtol=1e-5), row
        assert torch.allclose(value, expected_value, atol=TOLERANCE, rtol=1e-5), row


@contextmanager
def counted_tokens(policy: ValueHeadLM) -> Iterator[list[int]]:
    """The shape of each forward through the policy's trunk."""
    seen: list[int] = []
    trunk = backbone(policy.lm)
    hook = trunk.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["input_ids"].numel()), with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


token = st.integers(0, V - 1)
text = st.lists(token, min_size=1, max_size=5)
event = st.one_of(
    st.tuples(st.just("extend"), st.lists(token, min_size=8, max_size=8)),
    st.tuples(st.just("extend"), st.lists(token, min_size=8, max_size=8)),
    st.tuples(st.just("some"), st.dictionaries(st.integers(0, 7), token, min_size=1)),
    st.tuples(st.just("reset"), st.dictionaries(st.integers(0, 7), text, min_size=1)),
    st.tuples(st.just("order"), st.lists(st.integers(0, 7), min_size=1, max_size=8)),
    st.tuples(st.just("shorten"), st.lists(st.integers(0, 3), min_size=8, max_size=8)),
    st.tuples(st.just("again"), st.none()),
    st.tuples(st.just("learn"), st.none()),
    st.tuples(st.just("prefixes"), st.none()),
    st.tuples(st.just("weights"), st.floats(-0.1, 0.1)),
)


def happen(rows: list[list[int]], what: str, detail: Any) -> list[list[int]]:
    """The rows after an event: what environments and libraries do to them between calls."""
    count = len(rows)
    if what == "extend":
        return [[*row, detail[i]][:LENGTH] for i, row in enumerate(rows)]
    if what == "some":
        return [[*row, detail[i]][:LENGTH] if i in detail else row for i, row in enumerate(rows)]
    if what == "reset":
        return [detail.get(i, row) for i, row in enumerate(rows)]
    if what == "order":  # permuted, dropped and repeated
        return [rows[i % count] for i in detail]
    if what == "shorten":
        return [row[: max(1, len(row) - detail[i])] for i, row in enumerate(rows)]
    return rows


@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize("critic", CRITICS)
@settings(max_examples=25, deadline=None)
@given(start=st.lists(text, min_size=1, max_size=8), events=st.lists(event, max_size=10), pad=token)
def test_any_history_equals_each_row_alone(name: str, critic: str, start: list, events: list, pad: int) -> None:
    network = PrefixNetwork(copy.deepcopy(POLICIES[name, critic]), temperature=0.7)
    rows = start
    with torch.no_grad():
        check(network, rows, pad)
    for what, detail in events:
        if what == "weights":
            with torch.no_grad():
                for parameter in network.policy.parameters():
                    parameter.mul_(1 + detail)
        rows = happen(rows, what, detail)
        with torch.set_grad_enabled(what == "learn"):
            prefixes = [row[:n] for row in rows for n in range(1, len(row) + 1)]
            check(network, prefixes if what in ("learn", "prefixes") else rows, pad)


rows_of_prefixes = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(rows=rows_of_prefixes, pad=token, factor=st.sampled_from([1, 70_000, 255, 256]))
def test_distinct_prefixes_are_the_maximal_rows(rows: list[list[int]], pad: int, factor: int) -> None:
    rows = [[factor * i for i in row] for row in rows]
    states = distinct_prefixes(batch(rows, pad)[0], torch.tensor([len(row) for row in rows]))
    owners = [row[:n].tolist() for row, n in zip(states.ids, states.lengths.tolist(), strict=True)]
    maximal = {tuple(a) for a in rows if not any(len(b) > len(a) and b[: len(a)] == a for b in rows)}
    assert len(owners) == len(maximal) and {tuple(row) for row in owners} == maximal
    for row, owner, at in zip(rows, states.owner.tolist(), states.at.tolist(), strict=True):
        assert owners[owner][:at] == row


# ------------------------------------------------------------------------------------------------- what it costs


def test_acting_costs_a_token_a_row() -> None:
    network = PrefixNetwork(make_policy())
    rows = [[5, 6, 7], [8, 9], [10, 11, 12]]
    with torch.no_grad(), counted_tokens(network.policy) as seen:
        network(*batch(rows))
        assert seen == [9]  # one forward for logits and values, padded to the longest
        seen.clear()
        for token_id in range(20, 26):
            rows = [[*row, token_id] for row in rows]
            network(*batch(rows))
        assert seen == [3] * 6
        seen.clear()
        rows = [[*rows[2], 30], [33, 34], [*rows[0], 31]]  # moved, one reset, one dropped
        network(*batch(rows))
        assert seen == [1, 3]  # all but the last token of the new prompt, then a token for each row
        seen.clear()
        network(*batch(rows))
        assert seen == []


def test_equal_prompts_are_read_once() -> None:
    network = PrefixNetwork(make_policy())
    rows = [[5, 6, 7]] * 4 + [[8, 9]] * 4
    with torch.no_grad(), counted_tokens(network.policy) as seen:
        network(*batch(rows))
        assert seen == [6]
        rows = [[*row, 20 + i] for i, row in enumerate(rows)]
        network(*batch(rows))
        assert seen == [6, 8]
        network(*batch([*rows[:4], *[[9, 9, 9]] * 4]))
        assert seen == [6, 8, 2, 8]


def test_learning_costs_the_distinct_rows() -> None:
    network = PrefixNetwork(make_policy())
    episodes = torch.randint(0, V, (3, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    transitions = [row[:n] for row in episodes for n in range(2, LENGTH + 1)]
    order = np.random.default_rng(0).permutation(len(transitions))
    shuffled = [transitions[i] for i in order]
    network(*batch(shuffled))  # the first batch makes sure that the model can leave padding out
    network.clear()
    with counted_tokens(network.policy) as seen:
        network(*batch(shuffled))
    assert seen == [3 * LENGTH]
    with torch.no_grad(), counted_tokens(network.policy) as seen:
        network(*batch(shuffled))
    assert seen == [3 * LENGTH]


def test_switched_off_it_costs_every_row() -> None:
    network = PrefixNetwork(make_policy(), cache=False, share=False)
    rows = [[5, 6, 7], [5, 6], [5]]
    network(*batch(rows))  # the first ragged batch makes sure that the model can leave padding out
    network.clear()
    with counted_tokens(network.policy) as seen:
        network(*batch(rows))
    with torch.no_grad(), counted_tokens(network.policy) as more:
        network(*batch(rows))
        network(*batch([[*row, 9] for row in rows]))
    # Actor and critic share a graph, but nothing is kept without one: a target network's weights move unseen.
    assert (seen, more) == ([6], [6, 6, 9, 9])


# ------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize("critic", CRITICS)
def test_gradients_are_those_of_row_by_row(name: str, critic: str) -> None:
    policy = make_policy(name, critic)
    generator = torch.Generator().manual_seed(1)
    episodes = torch.randint(0, V, (4, LENGTH), generator=generator).tolist()
    rows = [row[:n] for row in episodes for n in range(3, LENGTH)] + [episodes[0], episodes[0]]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator)]
    actions = torch.randint(0, V, (len(rows),), generator=generator)
    weights = torch.randn(len(rows), generator=generator)

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        policy.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    network = PrefixNetwork(policy)
    states = network.states(*batch(rows))
    logp = network.logits(states).log_softmax(-1).gather(1, actions[:, None])[:, 0]
    shared = gradients((weights * logp).sum() + (weights * network.values(states) ** 2).sum())
    pairs = [alone(policy, row) for row in rows]
    one_by_one = sum(
        w * logits.log_softmax(-1)[a] + w * value**2
        for w, a, (logits, value) in zip(weights, actions, pairs, strict=True)
    )
    expected = gradients(one_by_one)
    assert shared.keys() == expected.keys()
    for key, gradient in expected.items():
        # Sums of 54 rows in another order: float32 rounding of the largest entries.
        assert torch.allclose(shared[key], gradient, atol=2e-5 * float(gradient.abs().max()) + 1e-7), key


def test_logprobs_and_entropy_are_those_of_the_logits() -> None:
    network = PrefixNetwork(make_policy(), temperature=1.3)
    rows = [[5, 6, 7], [5, 6], [9]]
    states = network.states(*batch(rows))
    logprobs, entropy = network.logprobs(states, torch.tensor([3, 4, 5]), with_entropy=True)
    law = torch.log_softmax(torch.stack([alone(network.policy, row)[0] for row in rows]).double() / 1.3, -1)
    assert torch.allclose(logprobs.double(), law[range(3), [3, 4, 5]], atol=1e-5)
    assert entropy is not None and torch.allclose(entropy.double(), -(law.exp() * law).sum(-1), atol=1e-5)


def test_two_backwards_in_turn_are_as_good_as_one() -> None:
    """Natural-gradient methods go backward through the actor before they ask the critic."""
    network = PrefixNetwork(make_policy())
    states = network.states(*batch([[5, 6, 7], [8, 9]]))
    network.logits(states).sum().backward()
    network.values(states).sum().backward()
    network.logits(states).sum().backward()


def test_values_after_a_backward_see_weights_written_through_data() -> None:
    network = PrefixNetwork(make_policy())
    rows = [[5, 6, 7], [8, 9]]
    states = network.states(*batch(rows))
    network.logits(states).sum().backward()
    for parameter in network.policy.parameters():
        parameter.data.mul_(1.5)
    values = network.values(states)
    with torch.no_grad():
        assert torch.allclose(values, torch.stack([alone(network.policy, row)[1] for row in rows]), atol=TOLERANCE)


def test_one_forward_serves_every_prefix_of_the_same_rows() -> None:
    network = PrefixNetwork(make_policy())
    rows = Prefixes(torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([3, 2]), torch.tensor([0]), torch.tensor([1]))
    network.logits(rows)  # the first ragged batch makes sure that the model can leave padding out
    network.clear()
    for learning in (True, False):
        with torch.set_grad_enabled(learning), counted_tokens(network.policy) as seen:
            for owner, at in (([0, 0, 1], [1, 2, 1]), ([0, 0, 1], [2, 3, 2])):
                states = rows._replace(owner=torch.tensor(owner), at=torch.tensor(at))
                logits, values = network.logits(states), network.values(states)
                forwards = len(seen)
                for b, (row, n) in enumerate(zip(owner, at, strict=True)):
                    expected, value = alone(network.policy, rows.ids[row, :n].tolist())
                    assert torch.allclose(logits[b], expected, atol=TOLERANCE)
                    assert torch.allclose(values[b], value, atol=TOLERANCE)
                del seen[forwards:]
        assert seen == [5]


def test_actor_and_critic_may_be_asked_about_different_states() -> None:
    network = PrefixNetwork(make_policy())
    rows, others = [[5, 6, 7], [8, 9]], [[5, 6, 8], [8, 9]]
    network.logits(network.states(*batch(rows)))
    values = network.values(network.states(*batch(others)))
    assert torch.allclose(values, torch.stack([alone(network.policy, row)[1] for row in others]), atol=TOLERANCE)


def test_a_forward_without_gradients_gives_none_to_the_next() -> None:
    network = PrefixNetwork(make_policy())
    rows = [[5, 6, 7], [5, 6], [5]]  # shared, with and without gradients
    with torch.no_grad():
        assert not network(*batch(rows))[0].requires_grad
    states = network.states(*batch(rows))
    assert network.logits(states).requires_grad
    with torch.no_grad():
        assert not network.logits(states).requires_grad


def test_a_forward_with_gradients_ends_what_acting_kept() -> None:
    """Libraries that write weights through `p.data` (natural gradients) learn through the network before."""
    network = PrefixNetwork(make_policy())
    rows = [[5, 6, 7], [8, 9]]
    with torch.no_grad():
        network(*batch(rows))
    network(*batch(rows))[0].sum().backward()
    for parameter in network.policy.lm.parameters():
        parameter.data.mul_(1.5)
    with torch.no_grad():
        check(network, [[*row, 4] for row in rows])


def test_without_a_cache_nothing_is_kept_without_gradients() -> None:
    """Target networks are moved through `p.data`, again and again."""
    network = PrefixNetwork(make_policy(), cache=False)
    rows = [[5, 6, 7], [5, 6], [8]]
    with torch.no_grad():
        for _ in range(3):
            for parameter in network.policy.parameters():
                parameter.data.mul_(1.1)
            check(network, rows)


# ------------------------------------------------------------------------------------------------- changed weights


def loss_of(policy: ValueHeadLM) -> torch.Tensor:
    return (policy.lm(input_ids=torch.arange(10)[None]).logits ** 2).mean()


ADAMS: dict[str, dict[str, Any]] = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@pytest.mark.parametrize("kind", sorted(ADAMS))
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_of_adam_is_noticed(kind: str, name: str) -> None:
    network = PrefixNetwork(make_policy(name))
    rows = [[5, 6, 7], [8, 9]]
    with torch.no_grad():
        check(network, rows)
    optimizer = torch.optim.Adam(network.policy.parameters(), lr=0.05, **ADAMS[kind])
    loss_of(network.policy).backward()  # not through the network, which a forward with gradients would warn
    optimizer.step()
    with torch.no_grad():
        check(network, rows)
        check(network, [[*row, 11] for row in rows])


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_is_noticed(assign: bool) -> None:
    network = PrefixNetwork(make_policy())
    rows = [[5, 6, 7], [8, 9]]
    other = {
        key: value * 1.1 if value.is_floating_point() else value for key, value in make_policy().state_dict().items()
    }
    other |= {key: value for key, value in make_policy().state_dict().items() if key.startswith("value_head.value_")}
    with torch.no_grad():
        check(network, rows)
        network.policy.load_state_dict(other, assign=assign)
        check(network, rows)


def test_new_tensors_at_old_addresses_are_noticed() -> None:
    """`vector_to_parameters` replaces each `p.data`; the allocator likes to give the same addresses again."""
    network = PrefixNetwork(make_policy())
    rows = [[5, 6, 7], [8, 9]]
    vector = torch.nn.utils.parameters_to_vector(network.policy.lm.parameters()).detach()
    with torch.no_grad():
        for factor in (1.1, 0.9, 1.2, 0.8, 1.3, 0.7):
            for scale in (2.0, factor):
                torch.nn.utils.vector_to_parameters(vector * scale, network.policy.lm.parameters())
            check(network, rows)


def test_another_autocast_is_noticed() -> None:
    network = PrefixNetwork(make_policy())
    rows = [[5, 6, 7], [8, 9]]
    found = []
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                found.append(network(*batch(rows))[0])
    assert not torch.equal(*found)


def test_rows_may_outgrow_an_attention_window() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=V, num_key_value_heads=2, sliding_window=8, initializer_range=0.3, **sizes)
    policy = ValueHeadLM(MistralForCausalLM(config).eval())
    policy.value_head.rescale_values(2.0, 3.0, preserve=False)
    network, rows = PrefixNetwork(policy), [[5, 6, 7], [8, 9, 10]]
    with torch.no_grad():
        for token_id in range(20, 20 + LENGTH - 3):
            rows = [[*row, token_id] for row in rows]
            ids = torch.tensor(rows)  # no wider than the rows: the cache must grow
            logits, _ = network(ids, torch.ones_like(ids))
            expected = torch.stack([alone(policy, row)[0] for row in rows])
            assert torch.allclose(logits, expected, atol=TOLERANCE)


def test_switches_act_at_once() -> None:
    network = PrefixNetwork(make_policy())
    rows = [[5, 6, 7], [8, 9]]
    with torch.no_grad():
        network(*batch(rows))
        network.cache = False
        for parameter in network.policy.lm.parameters():
            parameter.data.mul_(1.2)
        check(network, rows)


def test_padding_may_be_anything() -> None:
    network = PrefixNetwork(make_policy())
    rows = [[5, 6, 7], [8, 9]]
    for learning in (True, False):
        with torch.set_grad_enabled(learning):
            check(network, rows, pad=-1)


def test_adapters_switched_on_and_off_are_noticed() -> None:
    from peft import LoraConfig, get_peft_model

    lm: Any = get_peft_model(make_llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    policy = ValueHeadLM(lm)
    policy.value_head.rescale_values(2.0, 3.0, preserve=False)
    network = PrefixNetwork(policy)
    rows = [[5, 6, 7], [8, 9]]
    with torch.no_grad():
        check(network, rows)
        adapted = network(*batch(rows))[0]
        with lm.disable_adapter():
            check(network, rows)
            plain = network(*batch(rows))[0]
        assert float((adapted - plain).abs().max()) > 0.1
        check(network, [[*row, 7] for row in rows])
        lm.merge_adapter()  # which writes through `.data`
        check(network, [[*row, 7] for row in rows])


def test_a_write_through_data_needs_clear() -> None:
    network = PrefixNetwork(make_policy())
    rows = [[5, 6, 7], [8, 9]]
    with torch.no_grad():
        before = network(*batch(rows))[0].clone()
        for parameter in network.policy.lm.model.layers.parameters():
            parameter.data.mul_(1.2)
        assert torch.equal(network(*batch(rows))[0], before)  # what the documentation warns of
        network.clear()
        check(network, rows)


def test_copies_are_networks_of_their_own() -> None:
    network = PrefixNetwork(make_policy())
    rows = [[5, 6, 7], [8, 9]]
    with torch.no_grad():
        network(*batch(rows))
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            for parameter in other.policy.parameters():
                parameter.data.mul_(1.1)
            check(other, rows)
        check(network, [[*row, 3] for row in rows])


def test_inference_mode_and_no_grad_may_alternate() -> None:
    network = PrefixNetwork(make_policy())
    rows = [[5, 6, 7], [8, 9]]
    with torch.inference_mode():
        check(network, rows)
    with torch.no_grad():
        check(network, [[*row, 3] for row in rows])
    with torch.inference_mode():
        check(network, [[*row, 3, 4] for row in rows])


def test_next_logits_are_what_an_environment_asks_for() -> None:
    network = PrefixNetwork(make_gpt2_policy(), temperature=0.5)
    ids, mask = batch([[5, 6, 7], [8, 9]])
    expected = torch.stack([alone(network.policy, row)[0] for row in ([5, 6, 7], [8, 9])])
    assert torch.allclose(network.next_logits(ids, mask), expected, atol=TOLERANCE)


def make_gpt2_policy() -> ValueHeadLM:
    policy = ValueHeadLM(make_gpt2())
    policy.value_head.rescale_values(2.0, 3.0, preserve=False)
    return policy


def test_floats_are_read_as_ids() -> None:
    """Stable-Baselines3 hands out observations as float32."""
    network = PrefixNetwork(make_policy())
    ids, mask = batch([[5, 6, 7], [8, 9]])
    assert torch.equal(network(ids.float(), mask.float())[0], network(ids, mask)[0])


@pytest.mark.parametrize(
    ("ids", "mask", "complaint"),
    [
        (torch.zeros(2, 4), torch.ones(2, 3), r"input_ids and attention_mask.*\(2, 4\) and \(2, 3\)"),
        (torch.zeros(2, 4), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]), "attention_mask: expected tokens first"),
        (torch.zeros(1, 4), torch.zeros(1, 4), "attention_mask: expected tokens first"),
        (torch.zeros(1, 4), torch.tensor([[1, 0, 1, 0]]), "attention_mask: expected tokens first"),
    ],
)
def test_what_cannot_be_read_is_refused(ids: torch.Tensor, mask: torch.Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PrefixNetwork(POLICIES["llama", "shared"]).states(ids, mask)


def test_a_temperature_is_positive() -> None:
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        PrefixNetwork(POLICIES["llama", "shared"], temperature=0)
