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
from agents.sampling import Samples, TransformersSampler, fingerprint, named_weights, sync
from agents.sampling.engine import EngineSampler
from agents.sampling.names import weight_names
from agents.sampling.sync import checksum
from tests.agent_fixtures import make_agent, make_env, make_policy, small_config
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


def adapted(lm: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        lm, LoraConfig(**{"r": 2, "init_lora_weights": False, "target_modules": ["q_proj"], **options})
    )


def test_of_modules_that_peft_trains_whole_the_one_in_use_comes() -> None:
    lm = make_llama()
    model = adapted(copy.deepcopy(lm), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    found = dict(named_weights(model))
    assert found.keys() == set(weight_names(model)) == dict(lm.named_parameters()).keys()
    assert torch.equal(found["lm_head.weight"], lm.lm_head.weight + 1)
    with model.disable_adapter():
        assert all(torch.equal(tensor, lm.get_parameter(name)) for name, tensor in named_weights(model))


def test_buffers_that_a_checkpoint_holds_come_too() -> None:
    lm = make_llama()
    lm.register_buffer("kept", torch.arange(3.0))
    lm.register_buffer("forgotten", torch.arange(3.0), persistent=False)
    assert set(weight_names(lm)) == set(dict(named_weights(lm))) == {*dict(lm.named_parameters()), "kept"}


@pytest.mark.parametrize("target", ["q_proj", "up_proj"])
def test_names_are_told_without_merging(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(make_llama(), target_modules=[target])
    names = [name for name, _ in named_weights(model)]
    monkeypatch.setattr(copy, "deepcopy", None)
    assert weight_names(model) == names


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=16, **sizes))


def tokens_only() -> Any:
    return adapted(make_llama(), trainable_token_indices=[1, 2])


MISREAD = {
    "adapters of a tied head": (
        lambda: adapted(make_gpt2(), target_modules=["lm_head"]),
        "lm_head.weight, which is also",
    ),
    "a tied head of its own": (
        lambda: adapted(make_gpt2(), target_modules=["c_attn"], modules_to_save=["lm_head"]),
        "got lm_head.weight, which is also transformer.wte.weight",
    ),
    "some tokens": (tokens_only, "expected adapters or modules_to_save, got another wrapper at model.embed_tokens"),
    "experts that transformers fuses": (mixtral, "got MixtralForCausalLM, whose weights transformers fuses"),
}


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("name", MISREAD)
def test_what_an_engine_would_misread_is_refused_before_one_starts(name: str) -> None:
    make, message = MISREAD[name]
    started: list[None] = []
    with pytest.raises(ValueError, match=message):
        EngineSampler(make(), lambda: started.append(None))  # type: ignore[arg-type,return-value]
    assert not started


@pytest.mark.parametrize("bf16", [False, True])
def test_adapters_under_autocast_are_the_same_weights(bf16: bool) -> None:
    """Merging under autocast would round the product of the two, and the sampler's would be other weights."""
    lm = adapted(make_llama())
    agent = make_agent(small_config(bf16=bf16), lm=lm, envs=make_env(make_llama()))
    agent.learn(2)


def test_merging_takes_no_notice_of_autocast() -> None:
    """An engine that dies is given the weights again in the middle of a rollout, under the trainer's autocast."""
    model = adapted(make_llama())
    expected = fingerprint(named_weights(model), 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert fingerprint(named_weights(model), 0) == expected


def test_a_live_sampler_reads_what_the_trainer_has_read_no_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, read = make_agent(small_config(bf16=True)), []
    real = sync.bit_sum
    monkeypatch.setattr(sync, "bit_sum", lambda tensor: read.append(tensor) or real(tensor))
    tensors = len(list(named_weights(agent.policy.lm)))
    agent.learn(2)
    assert len(read) == 2 * tensors
    version = sync.live_fingerprint(agent.policy.lm, 5)
    assert version == fingerprint(named_weights(agent.policy.lm), 5)  # it changed in the last update: read anew
    with torch.no_grad():
        next(agent.policy.lm.parameters())[0, 0] += 1
    assert sync.live_fingerprint(agent.policy.lm, 5) == fingerprint(named_weights(agent.policy.lm), 5) != version


def test_a_write_that_leaves_no_trace_is_pushed_all_the_same() -> None:
    agent = agent_with("")
    agent.collect()
    next(agent.policy.lm.parameters()).data[3, 3] += 1e-7
    agent.collect()
    assert agent.sampler.pushes == [0, 0]


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
        return replace(samples, logprobs=logprobs, fingerprint=None if self.broken == "silent" else self.loaded)

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
    assert rollout.fingerprint == fingerprint(named_weights(ours.policy.lm), 3)


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
        ("another temperature", r"nats per token \(bounded KL\) from the trainer's, above the alarm of 0\.01"),
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


def test_an_evaluation_of_other_weights_is_refused() -> None:
    agent = agent_with("skipped")
    agent.learn(1)
    with pytest.raises(SamplerMismatch, match="version 0, the trainer has 1"):
        agent.evaluate([[5, 6]])


def test_the_alarm_can_be_set_and_switched_off() -> None:
    gap = agent_with("another temperature", mismatch_alarm=None).learn(1)[0]["sampler/bounded_kl"]
    agent_with("another temperature", mismatch_alarm=1.01 * gap).learn(1)
    with pytest.raises(SamplerMismatch):
        agent_with("another temperature", mismatch_alarm=0.99 * gap).learn(1)


def test_a_sampler_that_says_nothing_is_watched_by_its_numbers_alone() -> None:
    agent_with("silent").learn(2)
