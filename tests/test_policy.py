"""The value-headed language model: what it reads, what it trains, what it saves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.policy import ValueHeadLM
from agents.value_head import ValueHead
from tests.conftest import MAKERS, V, make_gpt2, make_llama

TOLERANCE = 1e-4
"""Float32 through two layers, in log-probabilities of the order of 1 to 10."""

PROMPTS = [[1, 5, 9, 22], [1, 7], [1, 30, 31, 32, 33, 34]]
RESPONSES = [[11, 12], [13, 14, 15, 1, 17], [18]]


def _rows(pad: int = 0, extra: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    texts = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    width = max(map(len, texts)) + extra
    ids = torch.tensor([text + [pad] * (width - len(text)) for text in texts])
    return ids, torch.tensor([len(p) for p in PROMPTS]), torch.tensor([len(r) for r in RESPONSES])


def _random_head(policy: ValueHeadLM) -> ValueHeadLM:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        policy.value_head.linear.weight.copy_(torch.randn(1, 32, generator=generator))
        policy.value_head.linear.bias.fill_(0.3)
    policy.rescale_values(2.0, 3.0, preserve=False)
    return policy


@torch.no_grad()
def _oracle(policy: ValueHeadLM, temperature: float) -> tuple[list, list, list, list]:
    """Each row alone and unpadded through the model's public forward, one position at a time, in float64."""
    logprobs, values, entropies, finals = [], [], [], []
    weight, bias = policy.value_head.linear.weight[0].double(), float(policy.value_head.linear.bias)
    mean, std = float(policy.value_head.value_mean), float(policy.value_head.value_std)
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        output = policy.lm(torch.tensor([prompt + response]), output_hidden_states=True, use_cache=False)
        hidden, row_logprobs, row_values, row_entropies = output.hidden_states[-1][0].double(), [], [], []
        for t, action in enumerate(response):
            at = len(prompt) + t - 1
            logits = [x / temperature for x in output.logits[0, at].double().tolist()]
            norm = math.log(sum(math.exp(x) for x in logits))
            row_logprobs.append(logits[action] - norm)
            row_entropies.append(-sum(math.exp(x - norm) * (x - norm) for x in logits))
            row_values.append(std * (float(weight @ hidden[at]) + bias) + mean)
        logprobs.append(row_logprobs)
        values.append(row_values)
        entropies.append(row_entropies)
        finals.append(std * (float(weight @ hidden[-1]) + bias) + mean)
    return logprobs, values, entropies, finals


def _padded(rows: list[list[float]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_evaluate_equals_each_row_alone(tiny_lm: Any, temperature: float) -> None:
    policy = _random_head(ValueHeadLM(tiny_lm))
    logprobs, values, entropies, finals = _oracle(policy, temperature)
    for pad, extra in ((0, 0), (V - 1, 3)):
        ids, prompts, responses = _rows(pad, extra)
        got = policy.evaluate(ids, prompts, responses, temperature=temperature, with_entropy=True, with_bootstrap=True)
        assert torch.allclose(got.logprobs, _padded(logprobs), atol=TOLERANCE)
        assert torch.allclose(got.values, _padded(values), atol=TOLERANCE)
        assert torch.allclose(got.entropy, _padded(entropies), atol=TOLERANCE)
        assert torch.allclose(got.bootstrap_values, torch.tensor(finals), atol=TOLERANCE)
        mask = got.logprobs != 0
        assert torch.allclose(got.values[mask], 3 * got.normalized_values[mask] + 2)
        assert (got.normalized_values[~mask] == 0).all() and (got.values[~mask] == 0).all()
        assert torch.allclose(policy.final_values(ids, prompts + responses), torch.tensor(finals), atol=TOLERANCE)
        without = policy.evaluate(ids, prompts, responses, temperature=temperature, with_values=False)
        assert torch.allclose(without.logprobs, got.logprobs, atol=1e-5)
        assert not without.values.any() and not without.entropy.any() and not without.bootstrap_values.any()


def test_what_lies_past_the_end_has_no_influence(tiny_gpt2: Any) -> None:
    policy = _random_head(ValueHeadLM(tiny_gpt2))
    ids, prompts, responses = _rows(extra=2)
    wild = ids.clone()
    wild[torch.arange(ids.shape[1]) >= (prompts + responses)[:, None]] = -100  # an illegal id
    one, other = (policy.evaluate(i, prompts, responses, temperature=1.0, with_bootstrap=True) for i in (ids, wild))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def test_evaluate_refuses_lengths_that_do_not_fit(tiny_llama: Any) -> None:
    policy = ValueHeadLM(tiny_llama)
    ids, prompts, responses = _rows()
    with pytest.raises(ValueError, match="prompt_lengths must be at least 1"):
        policy.evaluate(ids, prompts * 0, responses, temperature=1.0)
    with pytest.raises(ValueError, match="sums at most"):
        policy.evaluate(ids, prompts, responses + 9, temperature=1.0)
    with pytest.raises(ValueError, match="temperature"):
        policy.evaluate(ids, prompts, responses, temperature=0.0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(tiny_lm: Any, side: str) -> None:
    policy = _random_head(ValueHeadLM(tiny_lm))
    width = max(map(len, PROMPTS)) + 2
    ids, mask = torch.full((3, width), 63), torch.zeros(3, width, dtype=torch.int8)
    for row, prompt in enumerate(PROMPTS):
        at = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
        ids[row, at], mask[row, at] = torch.tensor(prompt), 1
    with torch.no_grad():
        output, following = policy(ids, mask), policy.next_logits(ids, mask)
        for row, prompt in enumerate(PROMPTS):
            alone = policy(torch.tensor([prompt]))
            expected = policy.lm(torch.tensor([prompt])).logits
            assert torch.allclose(alone.logits, expected, atol=1e-5)
            where = mask[row].bool()
            assert torch.allclose(output.logits[row, where], expected[0], atol=TOLERANCE)
            assert torch.allclose(output.values[row, where], alone.values[0], atol=TOLERANCE)
            assert torch.allclose(following[row], expected[0, -1], atol=TOLERANCE)
            assert torch.allclose(policy.next_logits(torch.tensor([prompt]))[0], expected[0, -1], atol=TOLERANCE)
    assert output.logits.isfinite().all()


def test_dropout_is_off_though_training() -> None:
    policy = ValueHeadLM(make_gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)).train()
    ids, prompts, responses = _rows()
    one, other = (policy.evaluate(ids, prompts, responses, temperature=1.0).logprobs for _ in range(2))
    assert torch.equal(one, other) and policy.lm.training


def test_a_new_value_head_gives_the_mean_and_float32() -> None:
    policy = ValueHeadLM(make_llama().to(torch.bfloat16))
    policy.rescale_values(-1.5, 4.0, preserve=False)
    ids, prompts, responses = _rows()
    got = policy.evaluate(ids, prompts, responses, temperature=1.0, with_entropy=True)
    mask = torch.arange(5)[None] < responses[:, None]
    assert (got.values[mask] == -1.5).all()
    assert all(t.dtype == torch.float32 for t in got)
    assert policy.lm.dtype == torch.bfloat16 and policy.value_head.linear.weight.dtype == torch.float32


def test_bfloat16_evaluates_near_float32() -> None:
    ids, prompts, responses = _rows()
    exact = ValueHeadLM(make_llama()).evaluate(ids, prompts, responses, temperature=1.0).logprobs
    rough = ValueHeadLM(make_llama().to(torch.bfloat16)).evaluate(ids, prompts, responses, temperature=1.0).logprobs
    # bfloat16 keeps 8 bits: logits of the order of 10 are off by some hundredths per layer.
    assert 0 < (exact - rough).abs().max() < 0.5
    rough.sum()  # and it can be differentiated
    policy = ValueHeadLM(make_llama().to(torch.bfloat16))
    policy.evaluate(ids, prompts, responses, temperature=1.0).logprobs.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())


def test_rescaling_preserves_values() -> None:
    head = ValueHead(8)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=generator)
    with torch.no_grad():
        head.linear.weight.copy_(torch.randn(1, 8, generator=generator))
    head.rescale_values(2.0, 3.0, preserve=False)
    before = head.denormalize(head(hidden))
    head.rescale_values(-40.0, 0.25, preserve=True)
    after = head.denormalize(head(hidden))
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-5 * 40)  # two float32 roundings at the size of the mean
    assert float(head.value_mean) == -40 and float(head.value_std) == 0.25
    assert torch.allclose(head.normalize(after), head(hidden), atol=1e-3)
    for std in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="std"):
            head.rescale_values(0.0, std)


def test_rescaling_by_hand() -> None:
    head = ValueHead(1)
    with torch.no_grad():
        head.linear.weight.fill_(2.0)
        head.linear.bias.fill_(1.0)
    head.rescale_values(3.0, 4.0)  # w' = 2 · 1/4; b' = (1 · 1 + 0 - 3) / 4
    assert head.linear.weight.item() == 0.5 and head.linear.bias.item() == -0.5


def test_scaling_rewards_by_a_power_of_two_is_bit_exact() -> None:
    heads = []
    for scale in (1.0, 2.0**7):
        head = ValueHead(4)
        torch.manual_seed(0)
        torch.nn.init.normal_(head.linear.weight)
        head.rescale_values(0.3 * scale, 1.7 * scale, preserve=False)
        head.rescale_values(-0.9 * scale, 2.3 * scale, preserve=True)
        heads.append(head)
    assert torch.equal(heads[0].linear.weight, heads[1].linear.weight)
    assert torch.equal(heads[0].linear.bias, heads[1].linear.bias)


def _trunk_gradient(policy: ValueHeadLM, coef: float) -> Tensor:
    policy.zero_grad()
    ids, prompts, responses = _rows()
    got = policy.evaluate(ids, prompts, responses, temperature=1.0, trunk_value_coef=coef)
    got.normalized_values.sum().backward()
    assert policy.value_head.linear.weight.grad is not None
    grads = [p.grad.flatten() for p in policy.policy_parameters() if p.grad is not None]
    return torch.cat(grads) if grads else torch.zeros(1)


def test_trunk_value_coef_scales_what_values_send_into_the_trunk(tiny_llama: Any) -> None:
    policy = _random_head(ValueHeadLM(tiny_llama))
    whole = _trunk_gradient(policy, 1.0)
    assert whole.abs().max() > 0
    assert torch.allclose(_trunk_gradient(policy, 0.25), 0.25 * whole, atol=1e-6 * float(whole.abs().max()))
    assert not _trunk_gradient(policy, 0.0).any()


def test_parameter_groups_are_disjoint_and_complete(tiny_lm_folder: Path, tiny_reward_folder: Path) -> None:
    for critic in ("shared", "separate", tiny_reward_folder):
        policy = ValueHeadLM.from_pretrained(tiny_lm_folder, critic=critic)
        ours, critics = list(policy.policy_parameters()), list(policy.critic_parameters())
        assert {id(p) for p in policy.parameters()} == {id(p) for p in ours} | {id(p) for p in critics}
        assert not {id(p) for p in ours} & {id(p) for p in critics}
        assert (len(critics) == 2) == (critic == "shared")


def test_a_separate_critic_shares_nothing(tiny_lm_folder: Path) -> None:
    policy = _random_head(ValueHeadLM.from_pretrained(tiny_lm_folder, critic="separate"))
    shared = _random_head(ValueHeadLM.from_pretrained(tiny_lm_folder))
    ids, prompts, responses = _rows()
    one, other = (p.evaluate(ids, prompts, responses, temperature=1.0).values for p in (policy, shared))
    assert torch.allclose(one, other, atol=1e-5)  # it starts as a copy
    one.sum().backward()
    assert all(p.grad is None for p in policy.lm.parameters())
    assert policy.critic_backbone is not None
    assert any(p.grad is not None and p.grad.any() for p in policy.critic_backbone.parameters())


def test_a_critic_grown_from_a_reward_model_starts_as_its_score(tiny_lm_folder: Path, tiny_reward_folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    policy = ValueHeadLM.from_pretrained(tiny_lm_folder, critic=tiny_reward_folder)
    reward = AutoModelForSequenceClassification.from_pretrained(tiny_reward_folder)
    ids, prompts, responses = _rows()
    got = policy.final_values(ids, prompts + responses)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        assert torch.allclose(got[row], reward(torch.tensor([prompt + response])).logits[0, 0], atol=TOLERANCE)


def test_critic_refusals(tiny_lm_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"critic: expected .shared., .separate. or the folder"):
        ValueHeadLM.from_pretrained(tiny_lm_folder, critic="nosuch")
    with pytest.raises(ValueError, match="critic must give one score"):
        ValueHeadLM.from_pretrained(tiny_lm_folder, critic=tiny_lm_folder)
    ValueHeadLM.from_pretrained(tiny_lm_folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="critic must be 'shared' or None"):
        ValueHeadLM.from_pretrained(tmp_path, critic="separate")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_changes_memory_only(tiny_lm_folder: Path, checkpointing: bool) -> None:
    policy = _random_head(ValueHeadLM.from_pretrained(tiny_lm_folder, gradient_checkpointing=checkpointing))
    plain = _random_head(ValueHeadLM(make_llama()))
    ids, prompts, responses = _rows()
    policy.evaluate(ids, prompts, responses, temperature=1.0)  # whether rows can be packed is tried once
    calls = []
    policy.lm.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1) and None)
    for p in (policy, plain):
        got = p.evaluate(ids, prompts, responses, temperature=1.0)
        (got.logprobs.sum() + got.values.sum()).backward()
    assert len(calls) == (2 if checkpointing else 1)  # the forward is run again in backward
    for one, other in zip(policy.policy_parameters(), plain.policy_parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", sorted(MAKERS))
@pytest.mark.parametrize("critic", ["shared", "separate", "reward"])
def test_saved_is_loaded_exactly(
    family: str, critic: str, tmp_path: Path, tiny_reward_folder: Path, tiny_tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    MAKERS[family]().save_pretrained(tmp_path / "start")
    kind = tiny_reward_folder if critic == "reward" else critic
    policy = _random_head(ValueHeadLM.from_pretrained(tmp_path / "start", critic=kind))
    with torch.no_grad():
        for p in policy.parameters():  # trained, as it were: trunk and critic part
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    policy.save_pretrained(tmp_path / "saved", tiny_tokenizer)
    again = ValueHeadLM.from_pretrained(tmp_path / "saved")
    ours, theirs = policy.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids, prompts, responses = _rows()
    one, other = (p.evaluate(ids, prompts, responses, temperature=0.8) for p in (policy, again))
    assert torch.equal(one.logprobs, other.logprobs) and torch.equal(one.values, other.values)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(plain(ids).logits, policy.lm(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").decode([3]) == "w3"
    files = {file.suffix for file in (tmp_path / "saved").rglob("*") if file.is_file()}
    assert files <= {".json", ".safetensors", ".jinja"}


def test_an_unknown_format_is_refused(tiny_lm_folder: Path, tmp_path: Path) -> None:
    ValueHeadLM.from_pretrained(tiny_lm_folder).save_pretrained(tmp_path)
    (tmp_path / "value_head.json").write_text('{"format": 99, "critic": "shared"}')
    with pytest.raises(ValueError, match="has format 99"):
        ValueHeadLM.from_pretrained(tmp_path)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    make_gpt2().save_pretrained(tmp_path / "start")
    ValueHeadLM.from_pretrained(tmp_path / "start").save_pretrained(tmp_path / "saved")
    lm = ValueHeadLM.from_pretrained(tmp_path / "saved").lm
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


def _lora_policy(folder: Path, critic: str = "shared") -> ValueHeadLM:
    peft = pytest.importorskip("peft")
    # init_lora_weights=False: an adapter that does something from the start.
    config = peft.LoraConfig(
        r=2, lora_alpha=8, lora_dropout=0.3, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    return ValueHeadLM.from_pretrained(folder, lora=config, critic=critic)


def test_lora_reference_is_the_base_on_the_same_weights(tiny_lm_folder: Path) -> None:
    policy, base = _lora_policy(tiny_lm_folder), make_llama()
    ids, prompts, responses = _rows()
    reference = policy.reference()
    assert reference.module is policy.lm  # one copy of the weights
    with torch.no_grad():
        assert torch.allclose(reference(ids).logits, base(ids).logits, atol=1e-5)
        assert (policy.lm(ids).logits - base(ids).logits).abs().max() > 0.1  # and the adapter is not zero
        assert torch.equal(policy.lm(ids).logits, policy.lm(ids).logits)  # nor has it dropout
    assert policy.lm.training
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("value_head") for name in trainable)
    policy.evaluate(ids, prompts, responses, temperature=1.0).logprobs.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.policy_parameters())


def test_a_full_policy_is_not_its_own_reference(tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match="needs a policy with lora"):
        ValueHeadLM(tiny_llama).reference()


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_lora_is_saved_beside_its_base(tiny_lm_folder: Path, tmp_path: Path, critic: str) -> None:
    from transformers import AutoModelForCausalLM

    policy = _random_head(_lora_policy(tiny_lm_folder, critic))
    policy.save_pretrained(tmp_path)
    ids, prompts, responses = _rows()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain(ids).logits, make_llama()(ids).logits)
    again = ValueHeadLM.from_pretrained(tmp_path)
    ours, theirs = policy.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    one, other = (p.evaluate(ids, prompts, responses, temperature=1.0) for p in (policy, again))
    assert torch.equal(one.logprobs, other.logprobs) and torch.equal(one.values, other.values)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in policy.named_parameters() if p.requires_grad
    }
    with pytest.raises(ValueError, match="already holds an adapter"):
        _lora_policy(tmp_path, critic)


def test_a_real_model(material: Path) -> None:
    policy = ValueHeadLM.from_pretrained(material / "models" / "stories260K")
    ids, prompts, responses = _rows()
    got = policy.evaluate(ids, prompts, responses, temperature=1.0).logprobs
    with torch.no_grad():
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            logp = torch.log_softmax(policy.lm(torch.tensor([prompt + response])).logits[0], -1)
            expected = logp[len(prompt) - 1 : -1].gather(-1, torch.tensor(response)[:, None]).squeeze(-1)
            assert torch.allclose(got[row, : len(response)], expected, atol=TOLERANCE)
