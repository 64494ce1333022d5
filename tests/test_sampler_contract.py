"""One contract for every sampler: the law, its log-probs, ends, seeds, and weights that are pushed.

Those of vLLM run where it is installed, on a CPU in float32 (`make test-vllm`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from agents.sampling import Samples, TransformersSampler, fingerprint, named_weights
from agents.sampling.continuous_sampler import ContinuousSampler
from textenv.types import FinishReason

pytestmark = pytest.mark.filterwarnings("ignore")  # of vLLM, at its import and when an engine starts
HAS_VLLM = find_spec("vllm") is not None
V, CONTEXT, EOS = 64, 512, 1
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 96}


def llama(**changes: Any) -> Any:
    options = {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False, **changes}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, bos_token_id=EOS, eos_token_id=EOS, **SIZES, **options))


def qwen2() -> Any:
    options = {"num_key_value_heads": 1, "max_position_embeddings": CONTEXT, "tie_word_embeddings": True}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=V, bos_token_id=EOS, eos_token_id=EOS, **SIZES, **options))


def gpt2() -> Any:
    dropouts = {f"{part}_pdrop": 0.0 for part in ("attn", "embd", "resid")}
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, bos_token_id=EOS, eos_token_id=EOS, **sizes, **dropouts))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "qwen2": qwen2,
    "gpt2": gpt2,
}


def vllm_sampler(model: Any, **changes: Any) -> Any:
    from agents.sampling.vllm_config import VLLMConfig
    from agents.sampling.vllm_sampler import VLLMSampler

    return VLLMSampler(model, VLLMConfig(max_num_seqs=16, **changes))


def vllm_server_sampler(model: Any) -> Any:
    from agents.sampling.vllm_config import VLLMConfig
    from agents.sampling.vllm_server import VLLMServerSampler

    return VLLMServerSampler(model, engine=VLLMConfig(max_num_seqs=16))


needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: `make test-vllm` runs this")
BACKENDS: dict[str, Callable[[Any], Any]] = {
    "transformers": TransformersSampler,
    "continuous": ContinuousSampler,
    "vllm": vllm_sampler,
    "vllm process": lambda model: vllm_sampler(model, multiprocess=True),
    "vllm server": vllm_server_sampler,
}
# Processes take their time to start: one model each.
PAIRS = [(backend, name) for backend in BACKENDS for name in MODELS if " " not in backend or name == "qwen2"]
PARAMETERS = [
    pytest.param(pair, id="-".join(pair), marks=[needs_vllm] if pair[0].startswith("vllm") else []) for pair in PAIRS
]


class World:
    """A model and a sampler of it."""

    def __init__(self, backend: str, name: str) -> None:
        torch.manual_seed(0)
        self.backend, self.model = backend, MODELS[name]()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.7)  # a law that is neither uniform nor settled
        self.sampler = BACKENDS[backend](self.model)
        self.version = 0
        self.push()

    def push(self) -> None:
        self.version += 1
        self.sampler.push(named_weights(self.model), self.version)

    def sample(self, prompts: list[list[int]], **changes: Any) -> Samples:
        options = {"max_new_tokens": 12, "stop_token_ids": [EOS, 2, 3, 4], "temperature": 0.7, "seed": 5, **changes}
        return self.sampler.sample(prompts, **options)

    def logprobs(self, prompt: list[int], response: list[int], temperature: float = 0.7) -> list[float]:
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        law = torch.log_softmax(logits.double() / temperature, -1)
        return law.gather(1, torch.tensor(response)[:, None])[:, 0].tolist()

    def worst(self, prompts: list[list[int]], samples: Samples, temperature: float = 0.7) -> float:
        """Largest difference between the log-probs told and the trainer's."""
        return max(
            abs(told - true)
            for prompt, response, logprobs in zip(prompts, samples.responses, samples.logprobs, strict=True)
            for told, true in zip(logprobs, self.logprobs(prompt, response, temperature), strict=True)
        )


def global_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.fixture(scope="module", params=PARAMETERS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    found = World(*request.param)
    yield found
    found.sampler.close()


# Prompts of several lengths, one longer than two blocks of any cache.
PROMPTS = [[5, 6, 7], [8], [9, EOS, 10, 11], [12] * 150 + [13] * 150, [12] * 150 + [13] * 150, [EOS]]


def test_log_probs_are_the_trainers_before_and_after_a_large_push(world: World) -> None:
    before = world.sample(PROMPTS)
    assert world.worst(PROMPTS, before) < 1e-4
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in world.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    assert world.worst(PROMPTS, before) > 1  # the push is large
    world.push()
    after = world.sample(PROMPTS)
    assert world.worst(PROMPTS, after) < 1e-4
    assert after.fingerprint == fingerprint(named_weights(world.model), world.version)


def test_ends(world: World) -> None:
    samples = world.sample(PROMPTS * 5, max_new_tokens=9)
    reasons = set(samples.finish_reasons)
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    for response, reason in zip(samples.responses, samples.finish_reasons, strict=True):
        stopped = [token in (EOS, 2, 3, 4) for token in response]
        assert not any(stopped[:-1]) and 1 <= len(response) <= 9
        assert reason == (FinishReason.STOP if stopped[-1] else FinishReason.LENGTH)
        assert reason == FinishReason.STOP or len(response) == 9


def test_the_models_own_end_of_text_is_no_end_unless_asked_for(world: World) -> None:
    samples = world.sample([[5]] * 30, stop_token_ids=[], max_new_tokens=20, temperature=2.0)
    assert {len(response) for response in samples.responses} == {20}
    assert any(EOS in response for response in samples.responses)
    assert world.worst([[5]] * 30, samples, temperature=2.0) < 1e-4


def test_seeds(world: World) -> None:
    prompts = [[5, 6]] * 8
    first, again, other = (world.sample(prompts, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.responses != other.responses
    assert len({tuple(response) for response in first.responses}) > 4


def test_global_random_states_are_neither_read_nor_moved(world: World) -> None:
    before = global_states()
    first = world.sample([[5, 6]] * 4)
    assert global_states() == before
    torch.manual_seed(123)
    np.random.seed(4)
    random.seed(5)
    assert world.sample([[5, 6]] * 4) == first


def test_the_first_token_follows_the_law(world: World) -> None:
    """Chi-square over tokens that are expected at least five times; fixed seeds."""
    rows = 400
    samples = world.sample([[5, 6, 7]] * rows, max_new_tokens=1, temperature=2.0, stop_token_ids=[])
    with torch.no_grad():
        law = torch.softmax(world.model(torch.tensor([[5, 6, 7]])).logits[0, -1].double() / 2.0, -1)
    counts = torch.bincount(torch.tensor([response[0] for response in samples.responses]), minlength=V)
    likely = law * rows >= 5
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    expected = torch.cat([law[likely], law[~likely].sum()[None]]) * rows
    chi = float(((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    degrees = int(likely.sum())
    assert degrees >= 3 and chi < degrees + 4 * (2 * degrees) ** 0.5


def test_greedy_takes_the_most_likely_tokens_and_tells_no_log_probs(world: World) -> None:
    samples = world.sample(PROMPTS, greedy=True, stop_token_ids=[])
    assert samples.logprobs == [[]] * len(PROMPTS)
    for prompt, response in zip(PROMPTS, samples.responses, strict=True):
        with torch.no_grad():
            logits = world.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        assert response == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": CONTEXT}, "exceeds the model's context of 512"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"stop_token_ids": [V]}, "stop_token_ids must be from 0 to 63"),
        ({"prompts": [[5], []]}, "prompts must not be empty; row 1 is"),
        ({"prompts": [[V]]}, "prompts must hold ids from 0 to 63"),
    ],
)
def test_what_could_only_be_answered_wrongly_is_refused(world: World, changes: dict[str, Any], message: str) -> None:
    options = {"prompts": [[5]], **changes}
    with pytest.raises(ValueError, match=message):
        world.sample(**options)
    assert world.worst([[5]], world.sample([[5]])) < 1e-4


def test_no_prompts_no_samples(world: World) -> None:
    assert world.sample([]).responses == []


# Samplers on the model that trains.


def test_they_compute_under_the_trainers_autocast(world: World) -> None:
    if world.backend.startswith("vllm"):
        pytest.skip("an engine has a dtype of its own")
    prompts = PROMPTS[:3]
    with torch.autocast("cpu", torch.bfloat16):
        samples = world.sample(prompts)
        assert world.worst(prompts, samples) < 0.2
    assert world.worst(prompts, samples) > 1e-3  # what float32 gives is not that
    assert world.worst(prompts, world.sample(prompts)) < 1e-4


def test_continuous_batching_has_memory_for_no_more_rows_than_allowed() -> None:
    model, blocks = llama(), []
    generate = model.generate_batch

    def noting(*args: Any, continuous_batching_config: Any, **options: Any) -> Any:
        blocks.append(continuous_batching_config.num_blocks)
        return generate(*args, continuous_batching_config=continuous_batching_config, **options)

    model.generate_batch = noting
    world = World.__new__(World)
    world.backend, world.model, world.sampler = "continuous", model, ContinuousSampler(model, max_rows=3)
    prompts = [[5 + row] * (10 + 7 * row) for row in range(9)]
    samples = world.sample(prompts, max_new_tokens=120, stop_token_ids=[])
    assert blocks == [3 * 4]  # pages of 64 tokens: 66 + 120 need three, and one is to spare
    assert {len(response) for response in samples.responses} == {120}
    assert world.worst(prompts, samples) < 1e-4


# Engines with weights of their own.


def test_unknown_and_missing_names_are_refused_and_the_engine_goes_on(world: World) -> None:
    if not world.backend.startswith("vllm"):
        pytest.skip("the model is live: there is nothing to push")
    named = list(named_weights(world.model))
    for wrong, message in (
        ([*named, ("v_head.weight", torch.zeros(3))], "no v_head.weight, got"),
        (named[1:], f"also {named[0][0]}, got"),
    ):
        with pytest.raises(ValueError, match=message):
            world.sampler.push(wrong, 99)
        samples = world.sample(PROMPTS)
        assert world.worst(PROMPTS, samples) < 1e-4 and samples.fingerprint.version == world.version
