"""What samples is what trains: checksums, versions, and the alarm."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from agents import ValueHeadLM
from agents.mismatch import SamplerMismatch
from agents.sampling import Samples, TransformersSampler, fingerprint, named_weights
from agents.sampling.sync import checksum
from tests.agent_fixtures import make_agent, make_policy, small_config
from tests.conftest import make_gpt2, make_llama

# Checksums.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("count", [1, 5, 4096, 2**20 + 3])
def test_a_checksum_sees_every_bit_and_the_order(dtype: torch.dtype, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    tensor = torch.randint(0, 200, (count,), generator=generator).to(dtype)
    assert checksum(tensor) == checksum(tensor.clone()) == checksum(tensor.view(1, -1))
    for place in {0, count // 2, count - 1}:
        other = tensor.clone()
        other.view(torch.uint8)[place * tensor.element_size()] ^= 1
        assert checksum(other) != checksum(tensor)
    if count > 4096:
        for first, second in ((0, 1), (3, 4099), (1, count - 1)):  # of a row, of two rows, of two slabs
            other = tensor.clone()
            other[first], other[second] = tensor[second] + 1, tensor[first]
            swapped = other.clone()
            swapped[first], swapped[second] = other[second], other[first]
            assert checksum(swapped) != checksum(other)
    assert checksum(torch.cat([tensor, tensor.new_zeros(1)])) != checksum(tensor)


def test_a_checksum_does_not_depend_on_the_layout_in_memory() -> None:
    tensor = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    assert checksum(tensor.T.contiguous().T) == checksum(tensor)


# Names.


def test_tied_weights_come_once_and_nothing_of_the_critic() -> None:
    policy = make_policy(make_gpt2(), "separate")
    names = [name for name, _ in named_weights(policy.lm)]
    assert names == [name for name, _ in make_gpt2().named_parameters()]
    assert not any("value" in name or "lm_head" in name for name in names)


def test_adapters_come_merged_and_stay_as_they_are() -> None:
    from peft import LoraConfig, get_peft_model

    lm = make_llama()
    wanted = ["q_proj", "up_proj"]
    adapted = get_peft_model(copy.deepcopy(lm), LoraConfig(r=2, target_modules=wanted, init_lora_weights=False))
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    found = dict(named_weights(adapted))
    merged = dict(copy.deepcopy(adapted).merge_and_unload().named_parameters())
    assert found.keys() == dict(lm.named_parameters()).keys() == merged.keys()
    assert all(torch.equal(found[name], merged[name]) for name in merged)
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], lm.model.layers[0].mlp.up_proj.weight)
    after = adapted.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with adapted.disable_adapter():
        assert all(torch.equal(tensor, lm.get_parameter(name)) for name, tensor in named_weights(adapted))


# An engine with a copy of the weights, and what may go wrong with it.


class CopySampler:
    """Samples from a model of its own, as an engine does."""

    def __init__(self, policy: ValueHeadLM, broken: str = "") -> None:
        self.model, self.broken = copy.deepcopy(policy.lm), broken
        self.inner = TransformersSampler(self.model)
        self.pushes: list[int] = []
        self.loaded = fingerprint([], -1)

    def push(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self.pushes.append(version)
        if self.broken == "skipped" and len(self.pushes) > 1:
            return
        own, arrived = dict(self.model.named_parameters()), {}
        for name, tensor in weights:
            if self.broken == "wrong layer" and name.startswith("model.layers.1.mlp.up"):
                tensor = arrived[name.replace("layers.1", "layers.0")]
            arrived[name] = tensor
            own[name].data.copy_(tensor)
        self.loaded = fingerprint(arrived.items(), version)

    def sample(self, prompts: Sequence[Sequence[int]], *, temperature: float, **options: Any) -> Samples:
        samples = self.inner.sample(prompts, temperature=temperature, **options)
        logprobs = samples.logprobs
        if self.broken == "another temperature":
            logprobs = [[value * temperature for value in row] for row in logprobs]
        if self.broken == "NaN":
            logprobs = [[float("nan")] * len(row) for row in logprobs]
        return replace(samples, logprobs=logprobs, weights=None if self.broken == "silent" else self.loaded)

    def close(self) -> None:
        """Nothing."""


def agent_with(broken: str, **changes: Any) -> Any:
    agent = make_agent(small_config(learning_rate=1e-6, **changes), temperature=0.7)
    agent.sampler = CopySampler(agent.policy, broken)
    return agent


def test_an_engine_that_is_pushed_to_learns_as_the_live_model_does() -> None:
    ours, live = agent_with(""), make_agent(small_config(learning_rate=1e-6), temperature=0.7)
    rows, expected = ours.learn(3), live.learn(3)
    assert ours.sampler.pushes == [0, 1, 2]
    assert [row["score/mean"] for row in rows] == [row["score/mean"] for row in expected]
    for (name, tensor), (_, other) in zip(named_weights(ours.policy.lm), named_weights(live.policy.lm), strict=True):
        assert torch.equal(tensor, other), name
    rollout = ours.collect()
    assert rollout.weights == fingerprint(named_weights(ours.policy.lm), 3)


def test_nothing_is_pushed_twice_and_weights_changed_by_hand_are() -> None:
    agent = agent_with("")
    agent.collect()
    agent.collect()
    agent.evaluate([[5, 6]])
    assert agent.sampler.pushes == [0]
    with torch.no_grad():
        next(agent.policy.lm.parameters())[3, 3] += 1e-7
    agent.evaluate([[5, 6]])
    agent.collect()
    assert agent.sampler.pushes == [0, 0]
    agent.sampler = CopySampler(agent.policy)  # another one has none of them
    agent.collect()
    assert agent.sampler.pushes == [0]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("skipped", r"version 0, the trainer has 1: .*model\.embed_tokens\.weight.* more differ"),
        ("wrong layer", r"model\.layers\.1\.mlp\.up_proj\.weight differ"),
        ("another temperature", r"nats per token \(KL\) from the trainer's, above the alarm of 0\.005"),
        ("NaN", r"nan nats per token"),
    ],
)
def test_what_goes_wrong_stops_training_within_an_iteration(broken: str, message: str) -> None:
    agent = agent_with(broken)
    learnt = 0
    with pytest.raises(SamplerMismatch, match=message):
        for _ in range(2):
            before = {name: tensor.clone() for name, tensor in named_weights(agent.policy.lm)}
            agent.learn(1)
            learnt += 1
    assert learnt == (1 if broken == "skipped" else 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in named_weights(agent.policy.lm))


def test_the_alarm_can_be_set_and_switched_off() -> None:
    gap = agent_with("another temperature", mismatch_alarm=None).learn(1)[0]["sampler/kl"]
    agent_with("another temperature", mismatch_alarm=1.01 * gap).learn(1)
    with pytest.raises(SamplerMismatch):
        agent_with("another temperature", mismatch_alarm=0.99 * gap).learn(1)


def test_a_sampler_that_says_nothing_is_watched_by_its_numbers_alone() -> None:
    agent_with("silent").learn(2)
