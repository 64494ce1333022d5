"""Tiny models, a tiny tokenizer and small reward functions for the tests of the environment; made once a session."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<s>", "</s>")
PIECES = [*SPECIAL, *(f"▁{a}{b}" for a in "abcd" for b in "xyz"), *"abcdefghijklmnopqrstuvwxy"]
VOCAB = len(PIECES)  # 40
CONTEXT = 32


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces with SentencePiece's ▁: decoding drops the first space of a text."""
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT
    )


@cache
def tiny_llama(seed: int = 0, vocab: int = VOCAB) -> LlamaForCausalLM:
    """Two layers, grouped heads; weights wide enough that a wrong position shows in the first digit."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.25,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return _made(LlamaForCausalLM, config, seed)


@cache
def tiny_gpt2(seed: int = 0, vocab: int = VOCAB) -> GPT2LMHeadModel:
    """Two layers with absolute positions: what RoPE forgives, this does not."""
    config = GPT2Config(
        vocab_size=vocab,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=0.25,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return _made(GPT2LMHeadModel, config, seed)


def _made(factory, config, seed: int):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory(config).eval().requires_grad_(False)


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


class LastLogits(nn.Module):
    """A live policy in the form that the environment asks: `(input_ids, attention_mask) -> logits [B, V]`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.asked = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.asked += 1
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits[torch.arange(len(logits)), attention_mask.sum(1) - 1]


@cache
def tiny_policy(kind: str = "llama") -> LastLogits:
    """Not the reference: other weights, so that the KL is not 0."""
    return LastLogits(MODELS[kind](seed=7))


@cache
def float64_logits(kind: str, seed: int = 0):
    """`logits(prefix) -> list[float]` by one full forward of a float64 copy, unbatched and unpadded."""
    model = copy.deepcopy(MODELS[kind](seed=seed)).double()

    @cache
    def logits(prefix: tuple[int, ...]) -> list[float]:
        with torch.no_grad():
            return model(input_ids=torch.tensor([prefix])).logits[0, -1].tolist()

    return logits


class LetterReward:
    """Of text: depends on every character and on where it stands."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [self.one(p, r) for p, r in zip(prompts, responses, strict=True)]

    @staticmethod
    def one(prompt: str, response: str) -> float:
        value = sum(ord(c) * (i + 1) for i, c in enumerate(prompt)) % 11
        return value / 4 + sum(ord(c) * (i + 2) for i, c in enumerate(response)) % 13 / 3 - 1


class IdReward:
    """Of ids, the stop token included."""

    wants_ids = True

    def __call__(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[float]:
        return [self.one(p, r) for p, r in zip(prompts, responses, strict=True)]

    @staticmethod
    def one(prompt: Sequence[int], response: Sequence[int]) -> float:
        return sum(t * (i + 1) for i, t in enumerate([*prompt, *response])) % 17 / 5 - 1.5


class DenseReward:
    """One value per token, each of what stands up to it."""

    wants_ids = True
    per_token = True

    def __call__(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[list[float]]:
        return [self.one(p, r) for p, r in zip(prompts, responses, strict=True)]

    @staticmethod
    def one(prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        return [IdReward.one(prompt, response[: t + 1]) / 2 for t in range(len(response))]


def a_sum():
    """Of text and of ids, with a part below a part."""
    from textenv.rewards import Clip, WeightedSum

    return WeightedSum({"letters": (LetterReward(), 0.5), "ids": (Clip(IdReward(), -1.0, 0.5), -2.0)})


def a_mixed_sum():
    """Of tokens and of whole responses."""
    from textenv.rewards import WeightedSum

    inner = WeightedSum({"tokens": (DenseReward(), 1.0), "letters": (LetterReward(), 1.0)})
    return WeightedSum({"both": (inner, 0.5), "ids": (IdReward(), 1.5), "dense": (DenseReward(), -1.0)})


REWARDS = {"text": LetterReward, "ids": IdReward, "dense": DenseReward, "sum": a_sum, "mixed": a_mixed_sum}
PROMPTS = [[BOS, 5, 20], [BOS, 30], [BOS, 7, 8, 21, 22]]


def options(**changes):
    """Arguments of a small environment that needs no file."""
    from textenv import Shared

    given = {
        "reference": Shared(tiny_llama()),
        "tokenizer": tiny_tokenizer(),
        "reward": IdReward(),
        "prompts": [list(p) for p in PROMPTS],
        "max_new_tokens": 4,
        "kl_coef": 0.3,
    }
    given |= changes
    if given.get("kl_source") == "policy":
        given.setdefault("policy", Shared(tiny_policy()))
    return given
