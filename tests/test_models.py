"""Loading, sharing and taking apart models."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import V, make_gpt2, make_llama
from textenv import models
from textenv.models import Shared


def _ids(rows: int = 3, columns: int = 7) -> torch.Tensor:
    return torch.randint(0, V, (rows, columns), generator=torch.Generator().manual_seed(0))


def test_a_shared_handle_survives_copies(tiny_llama: Any) -> None:
    shared = Shared(tiny_llama)
    options = copy.deepcopy({"reference": shared, "again": [shared]})
    assert options["reference"] is shared and copy.copy(shared) is shared
    assert options["reference"].module is tiny_llama
    assert torch.equal(shared(_ids()).logits, tiny_llama(_ids()).logits)
    assert Shared(lambda x, scale: x * scale)(3, scale=2) == 6


def test_within_surrounds_every_call() -> None:
    log: list[str] = []

    class Context:
        def __enter__(self) -> None:
            log.append("in")

        def __exit__(self, *_: object) -> None:
            log.append("out")

    assert Shared(lambda: log.append("call"), within=Context)() is None
    assert log == ["in", "call", "out"]


def test_load_is_frozen_and_equal(tiny_lm_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shared = models.load_causal_lm(tiny_lm_folder, argument="reference")
    assert capfd.readouterr().err == ""  # no progress bars
    assert not any(p.requires_grad for p in shared.module.parameters())  # type: ignore[attr-defined]
    assert torch.equal(shared(_ids()).logits, make_llama()(_ids()).logits)
    assert models.load_causal_lm(shared, argument="reference") is shared
    live = models.load_causal_lm(str(tiny_lm_folder), argument="policy", frozen=False, dtype=torch.bfloat16).module
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in live.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("source", ["no/such/folder", "nosuch", "nosuch/name", Path("nosuch")])
def test_a_missing_model_is_a_quick_clear_error(source: str | Path) -> None:
    start = time.monotonic()
    loaders = (models.load_causal_lm, models.load_config, models.load_tokenizer, models.load_classifier)
    for load in loaders:
        with pytest.raises(ValueError, match=r"^reference.*no (such )?folder"):
            load(source, argument="reference")
    assert time.monotonic() - start < 5  # importing the model classes is within it; the network would take 25


def test_wrong_kinds_are_refused(tiny_llama: Any, tiny_lm_folder: Path, tiny_reward_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"reference is a bare LlamaForCausalLM: wrap it in textenv\.Shared"):
        models.load_causal_lm(tiny_llama, argument="reference")
    with pytest.raises(ValueError, match=r"reference must be a folder.* got 7"):
        models.load_causal_lm(7, argument="reference")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reward must be a sequence classifier.*score"):
        models.load_classifier(_one_label(tiny_lm_folder), argument="reward")
    with pytest.raises(ValueError, match=r"reward must give one score per text.* gives 2"):
        models.load_classifier(tiny_lm_folder, argument="reward")
    with pytest.raises(ValueError, match=r"policy must be a causal language model.*lm_head"):
        models.load_causal_lm(tiny_reward_folder, argument="policy")


def _one_label(folder: Path) -> Path:
    """A copy of a language model's folder whose configuration claims one label."""
    import json
    import shutil

    target = folder.parent / "one_label"
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = make_llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"policy: cannot load"):
        models.load_causal_lm(tmp_path, argument="policy")


def test_classifier(tiny_reward_folder: Path) -> None:
    model, tokenizer = models.load_classifier(tiny_reward_folder, argument="reward")
    assert model(_ids()).logits.shape == (3, 1)
    assert tokenizer.decode([3, 4]) == "w3 w4"
    assert not any(p.requires_grad for p in model.parameters())


def test_widths_and_lengths(tiny_lm: Any, tiny_lm_folder: Path, tiny_tokenizer: Any) -> None:
    assert models.logit_width(tiny_lm) == models.logit_width(tiny_lm.config) == models.logit_width(Shared(tiny_lm)) == V
    assert models.context_length(tiny_lm.config) == 128
    assert models.load_config(tiny_lm_folder, argument="policy").vocab_size == V
    assert models.load_config(Shared(tiny_lm), argument="policy") is tiny_lm.config
    models.check_tokenizer_fits(tiny_tokenizer, V)
    models.check_tokenizer_fits(tiny_tokenizer, V + 8)
    with pytest.raises(ValueError, match=f"logit width {V - 1}; it has id {V - 1}"):
        models.check_tokenizer_fits(tiny_tokenizer, V - 1)
    with pytest.raises(ValueError, match="policy must share a Hugging Face model"):
        models.load_config(Shared(lambda: None), argument="policy")


def test_the_live_width_wins_over_the_configuration(tiny_llama: Any) -> None:
    tiny_llama.resize_token_embeddings(V + 8, mean_resizing=False)
    tiny_llama.config.vocab_size = V
    assert models.logit_width(tiny_llama) == V + 8


def test_head_of_hidden_is_the_forward(tiny_lm: Any) -> None:
    got = models.output_head(tiny_lm)(models.hidden_states(tiny_lm, _ids()))
    assert torch.allclose(got, tiny_lm(_ids()).logits, atol=1e-5)
    models.check_head(tiny_lm, argument="policy")


def test_families_that_scale_or_cap_their_logits() -> None:
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
    )

    size = {
        "vocab_size": V,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.5,
        "pad_token_id": 0,
    }
    cases = [
        Gemma2ForCausalLM(Gemma2Config(**size, head_dim=8, final_logit_softcapping=2.0)),
        CohereForCausalLM(CohereConfig(**size, logit_scale=0.25)),
        GraniteForCausalLM(GraniteConfig(**size, logits_scaling=4.0)),
    ]
    for model in cases:
        got = models.output_head(model)(models.hidden_states(model.eval(), _ids()))
        assert torch.allclose(got, model(_ids()).logits, atol=1e-4), type(model).__name__


def test_a_family_with_another_last_step_is_refused(tiny_llama: Any) -> None:
    class Odd(type(tiny_llama)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    tiny_llama.__class__ = Odd
    with pytest.raises(ValueError, match=r"policy: the logits of Odd .* not supported"):
        models.check_head(tiny_llama, argument="policy")


def test_peft_is_unwrapped(tiny_llama: Any) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_llama, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert models.unwrap(Shared(wrapped)) is tiny_llama and models.backbone(wrapped) is tiny_llama.model


def test_dropout_is_off_in_train_mode() -> None:
    model = make_gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1).train()
    assert not torch.equal(model(_ids()).logits, model(_ids()).logits)  # the control: it was on
    models.disable_dropout(model)
    assert torch.equal(model(_ids()).logits, model(_ids()).logits) and model.training


def test_attention_dropout_that_is_a_plain_number_is_off() -> None:
    model = make_llama(attention_dropout=0.5).train()
    assert not torch.equal(model(_ids()).logits, model(_ids()).logits)
    models.disable_dropout(model)
    assert torch.equal(model(_ids()).logits, model(_ids()).logits)


def test_dropout_read_from_the_configuration_is_off() -> None:
    from transformers import FalconConfig, FalconForCausalLM

    size = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = FalconForCausalLM(FalconConfig(**size, hidden_dropout=0.3, attention_dropout=0.3)).train()
    assert not torch.equal(model(_ids()).logits, model(_ids()).logits)
    models.disable_dropout(model)
    assert torch.equal(model(_ids()).logits, model(_ids()).logits)


def test_lora_dropout_is_off(tiny_llama: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama, config).train()
    assert not torch.equal(model(_ids()).logits, model(_ids()).logits)
    models.disable_dropout(model)
    assert torch.equal(model(_ids()).logits, model(_ids()).logits)
