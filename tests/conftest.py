"""Shared fixtures: tiny random models of three families, a tokenizer, saved folders, real models if any."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

V = 64
"""Logit width of every tiny model."""

_SIZE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 1,
    # Wide, so that laws are far from uniform and a wrong position or mask shows.
    "initializer_range": 0.3,
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests run beside each other; models this small gain nothing from threads."""
    torch.set_num_threads(1)


def make_llama(**changes: Any) -> Any:
    """A random two-layer Llama: rotary positions, four heads over two key/value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {**_SIZE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128, **changes}
    return _build(LlamaForCausalLM, LlamaConfig(**options))


def make_gpt2(**changes: Any) -> Any:
    """A random two-layer GPT-2: absolute positions, tied embeddings, dropout 0.1 as GPT-2 has."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return _build(GPT2LMHeadModel, GPT2Config(**{**_SIZE, "n_positions": 128, **changes}))


def make_qwen2(**changes: Any) -> Any:
    """A random two-layer Qwen2: biases in attention, layer types in the configuration."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    options = {**_SIZE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128, **changes}
    return _build(Qwen2ForCausalLM, Qwen2Config(**options))


def _build(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).eval()


MAKERS = {"llama": make_llama, "gpt2": make_gpt2, "qwen2": make_qwen2}


@pytest.fixture
def tiny_llama() -> Any:
    """A fresh tiny Llama."""
    return make_llama()


@pytest.fixture
def tiny_gpt2() -> Any:
    """A fresh tiny GPT-2."""
    return make_gpt2()


@pytest.fixture
def tiny_qwen2() -> Any:
    """A fresh tiny Qwen2."""
    return make_qwen2()


@pytest.fixture(params=sorted(MAKERS))
def tiny_lm(request: pytest.FixtureRequest) -> Any:
    """Each of the three tiny models in turn."""
    return MAKERS[request.param]()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """One word per id: `<pad>` 0, `<s>` 1 (begin and end), `<unk>` 2, then `w3` to `w63`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "<unk>", *(f"w{i}" for i in range(3, V))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="<s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tiny_lm_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A tiny Llama and its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("tiny_lm")
    make_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reward_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A tiny one-score Llama classifier and its tokenizer, saved; not the language model's weights."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("tiny_reward")
    options = {**_SIZE, "intermediate_size": 40, "num_key_value_heads": 4, "num_labels": 1, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForSequenceClassification(LlamaConfig(**options)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def material() -> Path:
    """The folder of real models and texts (`TEXTENV_MATERIAL`, or `shared/material` beside the repository)."""
    folder = Path(os.environ.get("TEXTENV_MATERIAL", Path(__file__).parents[2] / "shared" / "material"))
    if not (folder / "models" / "stories260K").is_dir():
        pytest.skip("no real models here; set TEXTENV_MATERIAL to their folder")
    return folder
