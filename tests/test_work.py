"""How much work is done, counted and not timed: tokens through the trunk, products, bytes held at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from agents.agent import _seed
from agents.prefix import PrefixNetwork
from agents.sampling import TransformersSampler
from agents.update import minibatches
from tests.agent_fixtures import PROMPTS, distinct_tokens, make_agent, make_env, make_policy, small_config
from tests.conftest import V, make_llama
from textenv.packing import Packing, packed_hidden
from textenv.row_cache import RowDecoder

ROWS, STEPS = 8, 6


@contextmanager
def tokens_through(lm: Any) -> Iterator[list[int]]:
    """How many tokens each forward of a trunk computes."""
    # The first ragged batch makes sure that the model can leave padding out.
    packed_hidden(lm.model, torch.ones(2, 3, dtype=torch.int64), Packing.of(torch.tensor([1, 3])))
    seen: list[int] = []
    layer = lm.model.layers[0].mlp.up_proj
    handle = layer.register_forward_hook(lambda module, given, out: seen.append(out.shape[:-1].numel()))
    yield seen
    handle.remove()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes: views of what it was given are none."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return found


# ------------------------------------------------------------------------------------------------- an iteration


@pytest.mark.parametrize("ragged", [False, True])
def test_tokens_of_an_iteration(ragged: bool) -> None:
    agent = make_agent(small_config(epochs=3), **({} if ragged else {"stop_token_ids": [], "prompts": [[5, 6, 7]]}))
    reference: Any = agent.task.reference
    lm = agent.policy.lm
    with tokens_through(lm) as ours, tokens_through(reference.model.module) as theirs:
        rollout = agent.collect()
        collected = list(ours)
        agent.update(rollout)
    responses = int(rollout.response_lengths.sum())
    # The last token of a row is predicted, never read.
    ends = (rollout.prompt_lengths + rollout.response_lengths - 1).tolist()
    rows = [row[:n].tolist() for row, n in zip(rollout.ids, ends, strict=True)]
    batches = minibatches(ROWS, agent.config, _seed(agent.config.seed, 0, 1))
    once = [distinct_tokens([rows[place] for place in batch]) for batch in batches]
    distinct = len({tuple(row[:n].tolist()) for row, n in zip(rollout.ids, rollout.prompt_lengths, strict=True)})
    longest = int(rollout.prompt_lengths.max())
    parts = ROWS // agent.config.forward_episodes
    sampling, evaluating = collected[:-parts], sum(collected[-parts:])
    # Equal prompts are read once; a row is decoded until it ends, or shortly after.
    assert sampling[0] <= (distinct if 2 * distinct <= ROWS else ROWS) * longest
    assert len(sampling) <= STEPS
    assert sum(sampling[1:]) <= (responses - ROWS) / 0.75 + STEPS if ragged else sum(sampling[1:]) == ROWS * (STEPS - 1)
    # Where rows begin alike, that is read once.
    size = agent.config.forward_episodes
    assert evaluating == sum(distinct_tokens(rows[first : first + size]) for first in range(0, ROWS, size)) < sum(ends)
    assert theirs == [distinct_tokens(rows)]
    assert ours[len(collected) :] == once


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_products_of_an_update_are_the_bare_model_s(critic: str) -> None:
    """Forward and backward of each minibatch, the head at responses alone: nothing is computed twice, nor what rows
    begin with."""
    agent = make_agent(small_config(epochs=1), critic=critic, stop_token_ids=[], prompts=[[5, 6, 7]])
    rollout = agent.collect()
    agent.update(rollout)  # the first looks at the model: can it be packed?
    with FlopCounterMode(display=False) as counter:
        agent.update(rollout)
    config = agent.policy.config
    rows = rollout.ids[:, :-1].tolist()
    batches = minibatches(ROWS, agent.config, _seed(agent.config.seed, 1, 1))
    tokens, acted = sum(distinct_tokens([rows[place] for place in batch]) for batch in batches), ROWS * STEPS
    width, inner, keys = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    layer = 2 * width * width + 2 * width * keys + 3 * width * inner
    trunk = 3 * 2 * tokens * config.num_hidden_layers * layer
    head = 3 * 2 * acted * width * V
    values = 3 * 2 * acted * width
    trunks = 1 if critic == "shared" else 2
    found = counter.get_flop_counts()["Global"]
    # Without those of attention, which are of batches of matrices.
    products = sum(count for name, count in found.items() if str(name) in ("aten.mm", "aten.addmm"))
    assert trunks * trunk + head <= products <= 1.01 * (trunks * trunk + head + values)


def test_groups_read_their_prompt_once() -> None:
    lm = make_llama()
    with tokens_through(lm) as seen:
        TransformersSampler(lm).sample(
            [[5, 6, 7]] * 6 + [[8, 9]] * 6, max_new_tokens=3, stop_token_ids=[], temperature=1.0, seed=0
        )
    assert seen == [2 * 3, 12, 12]


def test_sampling_ends_with_the_last_row() -> None:
    lm = make_llama()
    with tokens_through(lm) as seen:
        found = TransformersSampler(lm).sample(
            [[5]] * 16, max_new_tokens=40, stop_token_ids=list(range(20, 40)), temperature=1.0, seed=0
        )
    lengths = [len(row) for row in found.responses]
    assert len(seen) == max(lengths) and max(lengths) < 40
    assert sum(seen[1:]) <= (sum(lengths) - 16) / 0.75 + len(seen)


# ------------------------------------------------------------------------------------------------- stepping


@pytest.mark.parametrize("credit", ["token", "sequence"])
def test_a_step_is_a_token_of_each_row(credit: str) -> None:
    lm = make_llama()
    network = PrefixNetwork(make_policy(lm))
    envs = make_env(
        copy.deepcopy(lm), num_envs=4, obs_type="torch", kl_credit=credit, stop_token_ids=[], prompts=PROMPTS[:1]
    )
    reference: Any = envs.task.reference
    with tokens_through(lm) as ours, tokens_through(reference.model.module) as theirs:
        observation, _ = envs.reset(seed=0)
        for _ in range(STEPS):
            logits = network.next_logits(observation["input_ids"], observation["attention_mask"])
            observation, *_ = envs.step(logits.argmax(1))
    assert ours == [3, *[4] * (STEPS - 1)]  # one prompt for all four
    whole = 3 + STEPS - 1  # of all four, which are the same
    begin = 4 * 2  # all of the prompt but its last token, again at the end
    assert theirs == ([begin, *[4] * STEPS, begin] if credit == "token" else [whole])


# ------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("with_entropy", [False, True])
def test_logits_of_a_batch_are_never_held_at_once(with_entropy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from textenv import logprobs

    limit = 2**14
    monkeypatch.setattr(logprobs, "MAX_CHUNK_ELEMENTS", limit)
    monkeypatch.setattr(logprobs.packed_logprobs, "__defaults__", (limit,))
    lm = make_llama(vocab_size=2048)
    policy = make_policy(lm)
    ids = torch.randint(2048, (8, 24), generator=torch.Generator().manual_seed(0))
    prompts, responses = torch.full((8,), 4), torch.full((8,), 20)
    with Largest() as seen:
        found = policy.evaluate(ids, prompts, responses, temperature=1.0, with_entropy=with_entropy)
        (found.logprobs.sum() + found.entropy.sum() + found.values.sum()).backward()
    weights = max(p.numel() for p in policy.parameters())
    assert 8 * 20 * 2048 > 4 * weights > limit  # what all logits would be
    assert seen.elements <= max(weights, limit)


def test_a_decoder_holds_keys_and_values_and_no_more() -> None:
    lm = make_llama()
    decoder = RowDecoder(lm, ROWS, 16)
    decoder.prefill(None, torch.ones(ROWS, 4, dtype=torch.int64), torch.full((ROWS,), 4))
    before = [cast(Any, layer.keys).data_ptr() for layer in decoder._layers]
    with Largest() as seen:
        for _ in range(8):
            decoder.advance(torch.ones(ROWS, dtype=torch.int64))
    assert [cast(Any, layer.keys).data_ptr() for layer in decoder._layers] == before  # no step copies the cache
    config = lm.config
    cache = ROWS * config.num_key_value_heads * 16 * config.head_dim
    assert 0 < seen.elements <= ROWS * config.intermediate_size < cache / 2
