"""Sampling: the law drawn from, the log-probs told, seeds, stops, and independence of rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agents.policy import ValueHeadLM
from agents.sampling import Samples, TransformersSampler
from agents.sampling.draw import draw
from tests.conftest import MAKERS, V, make_llama
from textenv.models import Shared
from textenv.row_cache import RowDecoder
from textenv.types import FinishReason

PROMPTS = [[1, 5, 9, 22], [1, 7], [1, 30, 31, 32, 33, 34], [1, 7]]


def _sample(model: Any, prompts: list[list[int]] = PROMPTS, **changes: Any) -> Samples:
    max_batch = changes.pop("max_batch", None)
    options: dict[str, Any] = {"max_new_tokens": 12, "stop_token_ids": [], "temperature": 1.0, "seed": 0, **changes}
    return TransformersSampler(model, max_batch=max_batch).sample(prompts, **options)


def _rows(prompts: list[list[int]], responses: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    texts = [p + r for p, r in zip(prompts, responses, strict=True)]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    return ids, torch.tensor([len(p) for p in prompts]), torch.tensor([len(r) for r in responses])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("prompts", [PROMPTS, [p[:2] for p in PROMPTS]])
def test_logprobs_are_those_of_the_policy(tiny_lm: Any, temperature: float, prompts: list[list[int]]) -> None:
    policy = ValueHeadLM(tiny_lm)
    samples = _sample(policy, prompts, temperature=temperature, stop_token_ids=[3, 4, 5, 6, 8])
    got = policy.evaluate(*_rows(prompts, samples.responses), temperature=temperature).logprobs
    for row, expected in zip(samples.logprobs, got, strict=True):
        assert torch.allclose(torch.tensor(row), expected[: len(row)], atol=1e-4)


class _Fixed(torch.nn.Module):
    """A model's head that gives the same logits whatever it reads."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(len(logits), 32))
        self.logits = torch.tensor(logits)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*hidden.shape[:-1], -1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_law_is_softmax_at_the_temperature(temperature: float) -> None:
    """Chi-square with 4 degrees of freedom: a right sampler exceeds 23.5 once in 10,000 seeds; ours is fixed."""
    odds = np.array([0.35, 0.3, 0.2, 0.1, 0.05])
    logits = [*np.log(odds).tolist(), *[-np.inf] * (V - 5)]
    model = make_llama()
    model.lm_head = _Fixed(logits)
    samples = _sample(model, [[1]] * 500, max_new_tokens=20, temperature=temperature, seed=3)
    counts = np.bincount(np.concatenate(samples.responses), minlength=V)
    law = odds ** (1 / temperature) / (odds ** (1 / temperature)).sum()
    expected = 10_000 * law
    assert counts.sum() == 10_000 and not counts[5:].any()
    assert ((counts[:5] - expected) ** 2 / expected).sum() < 23.5
    wrong = 10_000 * (odds if temperature != 1 else odds**2 / (odds**2).sum())  # the other temperature is told apart
    assert ((counts[:5] - wrong) ** 2 / wrong).sum() > 100
    told = np.concatenate(samples.logprobs)
    assert np.allclose(told, np.log(law)[np.concatenate(samples.responses)], atol=1e-5)
    # No dependence between neighbours, in time or among rows: the correlation of 10,000 pairs has sd 0.01.
    table = np.array(samples.responses, dtype=float)
    for one, other in ((table[:, 1:], table[:, :-1]), (table[1:], table[:-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.04


def test_first_tokens_follow_the_models_law(tiny_gpt2: Any) -> None:
    prompt = [1, 5, 9]
    law = torch.softmax(tiny_gpt2(torch.tensor([prompt])).logits[0, -1].double(), -1).detach().numpy()
    samples = _sample(tiny_gpt2, [prompt] * 4000, max_new_tokens=1, seed=1)
    counts = np.bincount(np.concatenate(samples.responses), minlength=V)
    likely = law * 4000 > 5
    chi = ((counts - 4000 * law) ** 2 / (4000 * law))[likely].sum()
    degrees = likely.sum()
    assert chi < degrees + 4 * np.sqrt(2 * degrees)  # mean and four standard deviations


def test_draw_inverts_the_distribution() -> None:
    logits = torch.log(torch.tensor([[0.0, 0.5, 0.25, 0.25, 0.0]])).expand(6, -1)
    uniforms = torch.tensor([0.0, 0.4999, 0.5001, 0.7501, 1 - 2**-53, 0.25], dtype=torch.float64)
    tokens, logprobs = draw(logits, uniforms, 1.0)
    assert tokens.tolist() == [1, 1, 2, 3, 3, 1]  # ids 0 and 4 have probability 0: not even at the ends
    assert torch.allclose(logprobs.exp(), torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25, 0.5]))


@pytest.mark.parametrize("vocab", [2047, 2048, 2049, 5000])
def test_draw_inverts_large_vocabularies_too(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = 4 * torch.randn(300, vocab, generator=generator)
    logits[:, 128:512] = -torch.inf  # whole blocks without probability, and the end
    logits[:, -130:] = -torch.inf
    logits[150:, :128] = -torch.inf
    uniforms = torch.rand(300, dtype=torch.float64, generator=generator)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    uniforms[:2], uniforms[150:152] = ends, ends
    tokens, logprobs = draw(logits, uniforms, 1.0)
    for row, u, token in zip(logits.softmax(-1).double().numpy(), uniforms.tolist(), tokens.tolist(), strict=True):
        sums = np.cumsum(row)
        assert token == np.searchsorted(sums, u * sums[-1], side="right")
        assert row[token] > 0
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0], rtol=1e-5, atol=1e-5)


def test_seeds() -> None:
    model = make_llama()
    assert _sample(model) == _sample(model)
    distinct = {str(_sample(model, seed=seed).responses) for seed in range(8)}
    assert len(distinct) == 8
    twins = _sample(model, [[1, 7]] * 6).responses  # equal prompts are drawn apart
    assert len({str(r) for r in twins}) == 6


def test_global_random_state_is_neither_read_nor_moved(tiny_llama: Any) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[union-attr]
        results.append(_sample(tiny_llama))
        after = torch.random.get_rng_state(), np.random.get_state()[1], random.getstate()
        assert torch.equal(before[0], after[0]) and (before[1] == after[1]).all() and before[2] == after[2]
    assert results[0] == results[1]


def test_stops(tiny_llama: Any) -> None:
    free = _sample(tiny_llama, max_new_tokens=12)
    assert free.finish_reasons == [FinishReason.LENGTH] * 4 and all(len(r) == 12 for r in free.responses)
    stop = free.responses[0][5]
    cut = _sample(tiny_llama, max_new_tokens=12, stop_token_ids=[stop])
    for whole, response, logprobs, reason, all_logprobs in zip(
        free.responses, cut.responses, cut.logprobs, cut.finish_reasons, free.logprobs, strict=True
    ):
        # The same draws, cut after the first stop token, which is kept.
        length = whole.index(stop) + 1 if stop in whole else 12
        assert response == whole[:length] and len(logprobs) == length
        assert logprobs == pytest.approx(all_logprobs[:length], abs=1e-5)
        assert reason == (FinishReason.STOP if stop in whole else FinishReason.LENGTH)


def test_a_stop_token_as_the_last_allowed_is_a_stop(tiny_llama: Any) -> None:
    free = _sample(tiny_llama, [[1, 5]], max_new_tokens=6).responses[0]
    place = free.index(free[-1])  # where it first occurs, so that it is the last token of a response that long
    samples = _sample(tiny_llama, [[1, 5]], max_new_tokens=place + 1, stop_token_ids=[free[-1]])
    assert len(samples.responses[0]) == place + 1 and samples.finish_reasons == [FinishReason.STOP]


def test_stop_tokens_in_the_prompt_do_not_count(tiny_llama: Any) -> None:
    stop = 1  # begins every prompt, as in models whose EOS is their BOS
    free, samples = _sample(tiny_llama), _sample(tiny_llama, stop_token_ids=[stop])
    expected = [r[: r.index(stop) + 1] if stop in r else r for r in free.responses]
    assert samples.responses == expected and all(len(r) > 1 for r in expected)


def test_rows_do_not_depend_on_how_they_are_batched() -> None:
    for name, make in MAKERS.items():
        model = make()
        together = _sample(model, stop_token_ids=[3, 4, 5, 6, 8, 9, 10])
        for max_batch in (1, 2, 3):
            split = _sample(model, stop_token_ids=[3, 4, 5, 6, 8, 9, 10], max_batch=max_batch)
            assert split.responses == together.responses, name
            for one, other in zip(split.logprobs, together.logprobs, strict=True):
                assert one == pytest.approx(other, abs=1e-5)
        first = _sample(model, PROMPTS[:1], stop_token_ids=[3, 4, 5, 6, 8, 9, 10])
        assert first.responses[0] == together.responses[0]


def test_finished_rows_are_dropped_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from textenv.row_cache import RowDecoder

    sizes = []
    inner = RowDecoder.advance
    monkeypatch.setattr(RowDecoder, "advance", lambda self, tokens: sizes.append(len(tokens)) or inner(self, tokens))
    model, stops = make_llama(), list(range(0, V, 4))
    prompts = [[1, 3 + i] for i in range(16)]
    samples = _sample(model, prompts, stop_token_ids=stops, max_new_tokens=20)
    assert sizes[0] <= 16 and sizes[-1] < 8 and sizes == sorted(sizes, reverse=True)
    free = _sample(model, prompts, max_new_tokens=20)
    for whole, response in zip(free.responses, samples.responses, strict=True):
        ends = [i for i, token in enumerate(whole) if token in stops]
        assert response == whole[: ends[0] + 1 if ends else 20]


def test_the_model_is_left_alone(tiny_lm_folder: Path) -> None:
    policy = ValueHeadLM.from_pretrained(tiny_lm_folder, gradient_checkpointing=True)
    plain = _sample(make_llama())
    assert _sample(policy).responses == plain.responses
    assert policy.lm.training and policy.lm.is_gradient_checkpointing
    assert all(p.grad is None and p.requires_grad for p in policy.lm.parameters())
    policy.eval()
    assert _sample(policy).responses == plain.responses
    assert not policy.lm.training
    # The samples can still be trained on: nothing of inference mode sticks to the weights.
    policy.train().evaluate(*_rows(PROMPTS, plain.responses), temperature=1.0).logprobs.sum().backward()


def test_changed_weights_are_seen(tiny_llama: Any) -> None:
    sampler = TransformersSampler(tiny_llama)
    options: dict[str, Any] = {"max_new_tokens": 8, "stop_token_ids": [], "temperature": 1.0, "seed": 0}
    before = sampler.sample(PROMPTS, **options)
    with torch.no_grad():
        for p in tiny_llama.parameters():
            p.mul_(0.5)
    after = sampler.sample(PROMPTS, **options)
    got = ValueHeadLM(tiny_llama).evaluate(*_rows(PROMPTS, after.responses), temperature=1.0).logprobs
    assert before != after
    assert torch.allclose(torch.tensor(after.logprobs), got, atol=1e-4)


def test_lora_and_its_reference(tiny_llama: Any) -> None:
    peft = pytest.importorskip("peft")
    base = _sample(tiny_llama)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    policy = ValueHeadLM(peft.get_peft_model(tiny_llama, config))
    samples = _sample(policy)
    got = policy.evaluate(*_rows(PROMPTS, samples.responses), temperature=1.0).logprobs
    assert torch.allclose(torch.tensor(samples.logprobs), got, atol=1e-4)
    assert samples.responses != base.responses
    assert _sample(policy.reference()).responses == base.responses


def test_a_model_with_a_short_window() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    size = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    config = MistralConfig(
        **size, num_attention_heads=2, num_key_value_heads=1, sliding_window=4, initializer_range=0.5
    )
    policy = ValueHeadLM(MistralForCausalLM(config).eval())
    samples = _sample(policy)
    got = policy.evaluate(*_rows(PROMPTS, samples.responses), temperature=1.0).logprobs
    assert torch.allclose(torch.tensor(samples.logprobs), got, atol=1e-4)


def test_no_prompts_no_samples(tiny_llama: Any) -> None:
    assert _sample(tiny_llama, []) == Samples([], [], [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive; got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 125}, "row 0 has 4 tokens.* context of 128"),
        ({"stop_token_ids": [V]}, "stop_token_ids must be from 0 to 63"),
        ({"prompts": [[1], []]}, "prompts must not be empty; row 1 is"),
        ({"prompts": [[1, V]]}, "prompts must hold ids from 0 to 63; row 0"),
        ({"max_batch": 0}, "max_batch"),
    ],
)
def test_refusals(tiny_llama: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _sample(Shared(tiny_llama), **changes)


def test_samples_must_agree() -> None:
    with pytest.raises(ValueError, match="one entry per prompt"):
        Samples([[1, 2]], [[0.0]], [FinishReason.STOP])


def test_a_real_model(material: Path) -> None:
    policy = ValueHeadLM.from_pretrained(material / "models" / "stories260K")
    prompts = [[1, 403, 407, 261], [1, 403]]
    samples = _sample(policy, prompts, max_new_tokens=40, stop_token_ids=[1])
    got = policy.evaluate(*_rows(prompts, samples.responses), temperature=1.0).logprobs
    for row, expected in zip(samples.logprobs, got, strict=True):
        assert torch.allclose(torch.tensor(row), expected[: len(row)], atol=1e-4)


# Groups: a prompt that comes several times is read once.


GROUPS = [p for p in ([1, 5, 9, 22], [1, 7], [1, 30, 31, 32, 33, 34]) for _ in range(4)]
MIXED = [GROUPS[row] for row in (0, 4, 8, 0, 4, 8, 0, 0, 4, 8)]


@pytest.mark.parametrize("prompts", [GROUPS, MIXED, [[1, 7]] * 8])
def test_repeated_prompts_are_drawn_as_if_each_were_alone(tiny_lm: Any, prompts: list[list[int]]) -> None:
    options: dict[str, Any] = {"stop_token_ids": [3, 4, 5, 6, 8], "temperature": 0.8}
    together, alone = _sample(tiny_lm, prompts, **options), _sample(tiny_lm, prompts, max_batch=1, **options)
    assert together.responses == alone.responses
    for one, other in zip(together.logprobs, alone.logprobs, strict=True):
        assert np.allclose(one, other, atol=1e-5)
    assert len({str(response) for response in together.responses}) > len(prompts) // 2, "equal prompts differ"


@pytest.mark.parametrize(("prompts", "reads"), [(GROUPS, 3), (MIXED, 3), (PROMPTS, 4)])
def test_repeated_prompts_are_read_once(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], reads: int
) -> None:
    seen: list[int] = []
    real = RowDecoder.prefill

    def prefill(self: RowDecoder, rows: Any, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        seen.append(len(ids))
        return real(self, rows, ids, lengths)

    monkeypatch.setattr(RowDecoder, "prefill", prefill)
    _sample(tiny_llama, prompts)
    assert seen == [reads]  # one prompt that comes twice among four is not worth a copy


def test_groups_without_a_cache() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    size = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    config = MistralConfig(
        **size, num_attention_heads=2, num_key_value_heads=1, sliding_window=4, initializer_range=0.5
    )
    model = MistralForCausalLM(config).eval()
    assert _sample(model, GROUPS).responses == _sample(model, GROUPS, max_batch=1).responses


# Greedy.


def test_greedy_takes_the_most_likely_token_and_tells_no_log_prob(tiny_lm: Any) -> None:
    samples = _sample(tiny_lm, GROUPS, greedy=True, temperature=0.7, stop_token_ids=[3, 4], max_new_tokens=6)
    assert samples == _sample(
        tiny_lm, GROUPS, greedy=True, temperature=0.7, stop_token_ids=[3, 4], max_new_tokens=6, seed=9
    )
    assert samples.logprobs == [[]] * len(GROUPS)
    for prompt, response in zip(GROUPS, samples.responses, strict=True):
        text = list(prompt)
        for token in response:
            with torch.no_grad():
                assert token == int(tiny_lm(torch.tensor([text])).logits[0, -1].argmax())
            text.append(token)


# ------------------------------------------------------------------------------------------------- fixed steps


@pytest.mark.parametrize("stops", [[], [20, 21, 22, 23, 24]])
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6]] * 5])
def test_fixed_steps_draw_the_same_samples(tiny_lm: Any, stops: list[int], greedy: bool, prompts: list) -> None:
    how: dict[str, Any] = {"temperature": 0.7, "seed": 3, "max_new_tokens": 20, "stop_token_ids": stops}
    plain = TransformersSampler(tiny_lm).sample(prompts, greedy=greedy, **how)
    fixed = TransformersSampler(tiny_lm, cuda_graph=True).sample(prompts, greedy=greedy, **how)
    assert fixed.responses == plain.responses and fixed.finish_reasons == plain.finish_reasons
    for ours, theirs in zip(fixed.logprobs, plain.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_fixed_steps_keep_shapes_and_addresses(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph needs of a step: it asks the host for nothing, and touches the same memory each time."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            found = func(*args, **(kwargs or {}))
            shapes = [tuple(t.shape) for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
            seen[-1].append((str(func), shapes))
            return found

    decoder = RowDecoder(tiny_llama, 3, 24)
    decoder.prefill(None, torch.ones(3, 4, dtype=torch.int64), torch.tensor([4, 2, 3]))
    step, tokens = decoder.fixed_step(), torch.tensor([5, 6, 7])
    for _ in range(3):
        seen.append([])
        with Watch(), torch.no_grad():
            step(tokens)
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) > 50


def test_fixed_steps_end_soon_after_the_last_row(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = RowDecoder._forward
    monkeypatch.setattr(RowDecoder, "_forward", lambda self, *args: calls.append(1) or original(self, *args))
    found = TransformersSampler(tiny_llama, cuda_graph=True).sample(
        [[5]] * 4, max_new_tokens=100, stop_token_ids=list(range(8, 64)), temperature=1.0, seed=0
    )
    assert max(map(len, found.responses)) < 16 and len(calls) == 1 + 16
