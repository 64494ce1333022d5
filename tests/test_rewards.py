"""What reward functions are given, how their answers are checked, and the sequence classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import env_fixtures as fixtures
import numpy as np
import pytest
import torch
from env_fixtures import BOS, EOS, PAD
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from textenv.rewards import ClassifierReward, as_reward
from textenv.rewards.base import TextDecoder

TOKENIZER = fixtures.tiny_tokenizer()


def reward(function: Any, stops: tuple[int, ...] = (EOS,)) -> Any:
    return as_reward(function, tokenizer=TOKENIZER, stop_token_ids=stops)


class Listener:
    """Keeps what it was given."""

    def __init__(self, wants_ids: bool = False) -> None:
        self.wants_ids = wants_ids

    def __call__(self, prompts: Any, responses: Any) -> list[float]:
        self.heard = prompts, responses
        return [0.0] * len(responses)


def test_text_has_no_special_and_no_stop_tokens() -> None:
    listener = Listener()
    # ▁ax = 3, f = 20; a stop token that is no special token, 9, is cut at the end and only there.
    reward(listener, stops=(EOS, 9)).scores([[BOS, 3], [BOS, 3], [PAD]], [[20, EOS], [9, 20, 9], [3, 20]])
    assert listener.heard == (["ax", "ax", ""], ["f", f"{fixtures.PIECES[9]}f".replace("▁", " "), "axf"])


def test_the_leading_space_survives() -> None:
    assert TOKENIZER.decode([3]) == "ax"  # alone it is lost
    assert TextDecoder(TOKENIZER, frozenset())([[20]], [[3]]) == (["f"], [" ax"])


def test_a_letter_of_bytes_on_both_sides() -> None:
    class Bytes:
        """é is two tokens; half of it decodes to the replacement character."""

        def batch_decode(self, rows: Any, **_: Any) -> list[str]:
            return [bytes(row).decode("utf8", errors="replace") for row in rows]

    prompt, response = list("aé".encode())[:2], [*list("é".encode())[1:], ord("b")]
    assert TextDecoder(Bytes(), frozenset())([prompt], [response]) == (["a\ufffd"], ["éb"])
    assert TextDecoder(Bytes(), frozenset())([list(b"ab")], [list(b"c")]) == (["ab"], ["c"])


def test_ids_are_given_whole_and_as_copies() -> None:
    listener = Listener(wants_ids=True)
    prompts, responses = [[BOS, 3]], [[20, EOS]]
    reward(listener).scores(prompts, responses)
    assert listener.heard == (prompts, responses)
    listener.heard[1][0].append(99)
    assert responses == [[20, EOS]]


@pytest.mark.parametrize(
    "answers", [[1, 2.5], (1, 2.5), np.array([1, 2.5]), torch.tensor([1, 2.5]), [np.float32(1), torch.tensor(2.5)]]
)
def test_scores_of_any_make(answers: Any) -> None:
    scores = reward(lambda prompts, responses: answers).scores([[3], [3]], [[4], [5]])
    assert scores.dtype == np.float32 and scores.tolist() == [1, 2.5]


def test_dense_values() -> None:
    values = reward(fixtures.DenseReward()).ask([[3], [3]], [[4, 5], [6]]).total
    assert [value.shape for value in values] == [(2,), (1,)]


def raises_on_f(prompts: Any, responses: Any) -> list[float]:
    if any("f" in response for response in responses):
        raise KeyError("f")
    return [0.0] * len(responses)


def raises_on_two(prompts: Any, responses: Any) -> list[float]:
    if len(responses) > 1:
        raise RuntimeError("too many")
    return [0.0]


class Dense:
    wants_ids = per_token = True

    def __call__(self, prompts: Any, responses: Any) -> Any:
        return [[0.0]] * len(responses)


BAD_ANSWERS: list[tuple[Any, str]] = [
    (lambda p, r: [1.0], "reward: expected 2 scores, one a response, got 1$"),
    (lambda p, r: [1.0] * 3, "reward: expected 2 scores, one a response, got 3$"),
    (lambda p, r: 1.0, "reward: expected 2 scores, one a response, got 1.0$"),
    (lambda p, r: None, "reward: expected 2 scores, one a response, got None$"),
    (lambda p, r: [0.0, float("nan")], "reward: expected finite scores, got nan for prompt 'ax' and response 'f'"),
    (
        lambda p, r: torch.tensor([0.0, -torch.inf]),
        "expected finite scores, got .*inf.* for prompt 'ax' and response 'f'",
    ),
    (lambda p, r: [0.0, "high"], "reward: expected one number a response .*, got 'high' for prompt 'ax'"),
    (lambda p, r: [0.0, [1.0, 2.0]], r"reward: expected one number a response .*per_token = True\), got \[1.0, 2.0\]"),
    (raises_on_f, "reward: raised KeyError: 'f' for prompt 'ax' and response 'f'"),
    (raises_on_two, "reward: raised RuntimeError: too many for 2 responses together, the first being prompt ''"),
    (Dense(), r"reward: expected 2 values, one per token, got \[0.0\] for prompt \[3\] and response \[20, 2\]"),
]


@pytest.mark.parametrize(("function", "message"), BAD_ANSWERS, ids=[message[8:60] for _, message in BAD_ANSWERS])
def test_bad_answers_name_prompt_and_response(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward(function).scores([[BOS], [3]], [[5], [20, EOS]])


class DenseText:
    per_token = True

    def __call__(self, prompts: Any, responses: Any) -> Any: ...


def test_bad_functions() -> None:
    with pytest.raises(ValueError, match=r"reward: expected a folder, a hub name or a callable .*, got 5"):
        reward(5)
    with pytest.raises(ValueError, match="reward: expected wants_ids = True with per_token = True"):
        reward(DenseText())
    with pytest.raises(ValueError, match="tokenizer: expected one, because the reward is given text, got None"):
        as_reward(raises_on_f, tokenizer=None, stop_token_ids=())
    assert as_reward(fixtures.IdReward(), tokenizer=None, stop_token_ids=()).decoder is None


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PAD = EOS = 0, as in GPT-2: what transformers' own pooling gets wrong."""
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    size: dict[str, Any] = {"vocab_size": fixtures.VOCAB, "num_labels": 1, "pad_token_id": 0, "eos_token_id": 0}
    if request.param == "llama":
        config: Any = LlamaConfig(
            **size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.3,
        )
        model: Any = LlamaForSequenceClassification(config)
    else:
        config = GPT2Config(**size, n_embd=32, n_layer=2, n_head=4, n_positions=12, initializer_range=0.3)
        model = GPT2ForSequenceClassification(config)
    model.config.reward_bias = 0.75
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def alone(scorer: ClassifierReward, ids: list[int]) -> float:
    """The model's own forward on one unpadded row: its pooling has nothing to get wrong if the last id is not PAD."""
    with torch.no_grad():
        backbone = getattr(scorer.model, scorer.model.base_model_prefix)
        hidden = backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return float(hidden @ scorer.model.score.weight[0]) + 0.75


def test_classifier_scores_each_row_as_if_alone(classifier: Path) -> None:
    scorer = ClassifierReward(classifier)
    rows = [[3, 4, 5], [9], [7, 0], [6, 5, 0, 0], [8, 3, 20, 21, 22, 4]]
    expected = [alone(scorer, row) for row in rows]
    assert scorer.score_ids(rows).tolist() == pytest.approx(expected, abs=1e-5)
    small = ClassifierReward(classifier, batch_tokens=6)  # several forwards, back in order
    assert small.score_ids(rows).tolist() == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        plain = scorer.model(input_ids=torch.tensor([[3, 4, 5]])).logits
    assert alone(scorer, [3, 4, 5]) == pytest.approx(float(plain) + 0.75, abs=1e-5)


def test_a_sampled_pad_token_counts(classifier: Path) -> None:
    scorer = ClassifierReward(classifier)
    with_pad, without = scorer.score_ids([[6, 5, 0], [6, 5]]).tolist()
    assert abs(with_pad - without) > 1e-3


def test_classifier_reads_prompt_and_response_as_one_text(classifier: Path) -> None:
    scorer = ClassifierReward(classifier)
    assert scorer(["ax"], [" by"]).tolist() == pytest.approx([alone(scorer, [3, 7])], abs=1e-5)
    assert all(not p.requires_grad for p in scorer.model.parameters())


def test_classifier_says_what_is_too_long(classifier: Path) -> None:
    scorer = ClassifierReward(classifier)
    if scorer.context > 12:
        pytest.skip("a long context")
    with pytest.raises(
        ValueError, match=r"reward: raised ValueError: expected 1 to 12 tokens, got 14 .* response ' by by"
    ):
        reward(scorer).scores([[3]], [[7] * 13])
