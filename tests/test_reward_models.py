"""Rewards that models give: against unpadded forwards, sums written out, and transformers' own loss on real models."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import env_fixtures as fixtures
import pytest
import torch
from env_fixtures import BOS, EOS, PAD
from reward_fixtures import CONTEXT, save_judge, save_model, shared
from tokenizers.processors import TemplateProcessing

from textenv import Shared, TextVectorEnv
from textenv.rewards import (
    ClassifierReward,
    ImplicitReward,
    LogProbReward,
    PairClassifier,
    Pointwise,
    PreferenceReward,
    RewardContext,
    StepReward,
    TextLogProbReward,
    TokenAggregate,
    TokenClassifierReward,
    TokenFunction,
    TokenLogprobs,
    as_reward,
)
from textenv.rewards.batching import by_length
from textenv.rewards.binding import bind_reward
from textenv.rewards.tokens import Way

TOKENIZER = fixtures.tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            save = save_judge if kind == "judge" else lambda path: save_model(kind, path)
            made[kind] = save(tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


def test_batches_hold_rows_of_like_length() -> None:
    lengths = [5, 1, 9, 3, 3, 20]
    # The longest first: 20 alone though it exceeds 10, 9 alone, two of at most 5, and the rest.
    assert list(by_length(lengths, 10)) == [[5], [2], [4, 0], [1, 3]]


# Token classifiers and steps.


def test_token_values_are_the_heads_at_response_tokens(folder: Any) -> None:
    for batch_tokens in (16_384, 5):  # all in one forward, or one a row
        reward = TokenClassifierReward(folder("logit"), batch_tokens=batch_tokens)
        values = reward([[1, 5], [1]], [[6, 7, 8], [9]])
        with torch.no_grad():
            one = reward.model(input_ids=torch.tensor([[1, 5, 6, 7, 8]])).logits[0, 2:, 0]
            two = reward.model(input_ids=torch.tensor([[1, 9]])).logits[0, 1:, 0]
        torch.testing.assert_close(values[0], one, rtol=0, atol=1e-5)
        torch.testing.assert_close(values[1], two, rtol=0, atol=1e-5)


def test_a_folder_is_the_reward_that_its_model_was_saved_as(folder: Any) -> None:
    for kind, expected in (("logit", TokenClassifierReward), ("classifier", ClassifierReward)):
        task = TextVectorEnv(1, **fixtures.options(reward=str(folder(kind)))).task
        assert type(task.reward.function) is expected
        assert task.reward.per_token == (kind == "logit")


def test_with_several_labels_a_value_is_a_probability(folder: Any) -> None:
    by_name, by_number = (TokenClassifierReward(folder("labels"), label=label) for label in ("LABEL_2", 2))
    with torch.no_grad():
        logits = by_name.model(input_ids=torch.tensor([[1, 5, 6]])).logits[0, 2].tolist()
    expected = math.exp(logits[2]) / sum(map(math.exp, logits))
    for reward in (by_name, by_number):
        assert float(reward([[1, 5]], [[6]])[0]) == pytest.approx(expected, abs=1e-6)
    for label in (None, 3, "good"):
        with pytest.raises(ValueError, match=r"label: expected one of {0: 'LABEL_0', .*, got"):
            TokenClassifierReward(folder("labels"), label=label)


def test_a_model_that_looks_ahead_is_refused(folder: Any) -> None:
    with pytest.raises(
        ValueError, match="reward: expected a causal model, got BertForTokenClassification, which looks"
    ):
        TokenClassifierReward(folder("bert"))


def test_a_token_classifier_of_another_vocabulary_is_refused(folder: Any) -> None:
    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    reward = TokenClassifierReward(folder("logit"))
    with pytest.raises(
        ValueError, match="reward: expected a token classifier with the policy's vocabulary, got another"
    ):
        bind_reward(reward, RewardContext(Other()))
    assert bind_reward(reward, RewardContext()).function is reward


def test_token_classifiers_say_what_is_too_long(folder: Any) -> None:
    reward = TokenClassifierReward(folder("logit"))
    with pytest.raises(ValueError, match="expected 1 to 64 tokens, got 65 in text 1"):
        reward([[1], [1]], [[5], [5] * 64])


VALUES = TokenFunction(lambda prompt, response: [token / 4 + t + prompt[0] for t, token in enumerate(response)])


def test_a_token_function() -> None:
    assert VALUES([[1], [3]], [[4, 8], [2]]) == [[2, 4], [3.5]]


def test_steps_are_paid_where_they_end() -> None:
    reward = bind_reward(StepReward(VALUES, [5]), CONTEXT)  # 5 ends a step, and so does EOS
    answer = reward.ask([[1], [1]], [[4, 5, 8, 5, EOS], [5, 8]])
    assert [row.tolist() for row in answer.total] == [[0, 3.25, 0, 5.25, 5.5], [2.25, 0]]
    assert answer.parts["raw"][0].tolist() == [2, 3.25, 5, 5.25, 5.5]


@pytest.mark.parametrize(
    ("how", "all_tokens", "steps"),
    [("sum", 5.25, 3.25), ("mean", 1.75, 1.625), ("min", 1.25, 1.25), ("last", 2.0, 2.0), ("product", 5.0, 2.5)],
)
def test_token_values_put_together(how: Way, all_tokens: float, steps: float) -> None:
    values = TokenFunction(lambda prompt, response: [1.25, 2.0, 2.0][: len(response)])
    whole = bind_reward(TokenAggregate(values, how), CONTEXT)
    assert whole.whole([[1]], [[5, 8, EOS]]).total.tolist() == [all_tokens]
    assert whole.whole([[1]], [[5, 8, EOS]]).parts["raw"].tolist() == [5.25]
    some = bind_reward(TokenAggregate(values, how, separators=[5], none=-7), CONTEXT)
    assert some.scores([[1], [1]], [[5, 8, EOS], [8, 8]]).tolist() == [steps, -7]


def test_what_is_not_per_token_makes_no_steps() -> None:
    for make, by in ((lambda r: StepReward(r, [5]), "StepReward"), (TokenAggregate, "TokenAggregate")):
        with pytest.raises(ValueError, match=f"expected one value per token in {by}, got one number a response"):
            bind_reward(make(fixtures.IdReward()), CONTEXT)
        with pytest.raises(ValueError, match=f"expected one value per token in {by}, got also a score at the end"):
            bind_reward(make(fixtures.a_mixed_sum()), CONTEXT)
    with pytest.raises(ValueError, match="separators: expected token ids, got"):
        StepReward(VALUES, [])
    with pytest.raises(ValueError, match=r"how: expected one of 'sum', .*, got 'max'"):
        TokenAggregate(VALUES, "max")  # type: ignore[arg-type]


# Log-probs.


def logprob(seed: int, prompt: list[int], response: list[int]) -> list[float]:
    """One token at a time, in float64."""
    logits, found = fixtures.float64_logits("llama", seed), []
    for t, token in enumerate(response):
        row = logits((*prompt, *response[:t]))
        found.append(row[token] - math.log(sum(map(math.exp, row))))
    return found


PROMPTS, RESPONSES = [[1, 3, 7], [1], [1, 11]], [[5, 6, EOS], [20], [9, 9, 9, 9, 30]]


def test_a_judges_log_prob() -> None:
    each = [logprob(5, p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    mean, total = (LogProbReward(shared(5), reduce=way) for way in ("mean", "sum"))  # type: ignore[arg-type]
    assert mean(PROMPTS, RESPONSES) == pytest.approx([sum(row) / len(row) for row in each], abs=1e-5)
    assert total(PROMPTS, RESPONSES) == pytest.approx([sum(row) for row in each], abs=1e-5)
    warm = LogProbReward(TokenLogprobs(shared(5), temperature=1e6))
    assert warm([[1]], [[5]]) == pytest.approx([-math.log(fixtures.VOCAB)], abs=1e-4)


def test_a_judge_says_what_it_cannot_read() -> None:
    judge = LogProbReward(shared(5))
    for prompts, responses, message in (
        ([[1], [1]], [[5], [5, 40]], "expected ids below the model's 40, got 40"),
        ([[1]], [[5] * 32], "expected 1 to 32 tokens, got 33 in text 0"),
        ([[1], []], [[5], [5]], "expected 1 to 32 tokens, got 0 in text 1"),
        ([[1]], [[]], "expected 1 to 32 tokens, got 0 in text 0"),
    ):
        with pytest.raises(ValueError, match=message):
            judge(prompts, responses)
    with pytest.raises(ValueError, match="reduce: expected one of 'mean', 'sum', got 'max'"):
        LogProbReward(shared(5), reduce="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature: expected a number > 0, got 0"):
        TokenLogprobs(shared(5), temperature=0)


def test_a_judge_of_text_reads_what_was_written(folder: Any) -> None:
    judge = bind_reward(TextLogProbReward(folder("judge"), reduce="sum"), CONTEXT)
    # The tokenizer adds nothing: "ax by" is 3, 7, and " cz" after it is 11.
    scores = judge.scores([[1, 3, 7], [1, 3, 7]], [[11, 11], [11, EOS]])
    expected = [sum(logprob(5, [3, 7], [11, 11])), sum(logprob(5, [3, 7], [11, EOS]))]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_response_without_text_is_worth_its_end(folder: Any) -> None:
    judge = bind_reward(TextLogProbReward(folder("judge")), CONTEXT)
    # Only a stop; only specials, cut at the length; a prompt without text, which the judge's BOS begins.
    scores = judge.scores([[1, 3], [1, 3], [1]], [[EOS], [0, 0], [EOS]])
    end = logprob(5, [3], [EOS])[0]
    assert scores.tolist() == pytest.approx([end, end, logprob(5, [1], [EOS])[0]], abs=1e-5)


@pytest.mark.parametrize(("template", "begin"), [("<s> $A </s>", [BOS]), ("$A </s>", []), ("<s> $A </s> <pad>", [BOS])])
def test_what_a_tokenizer_puts_after_every_text_is_not_scored(template: str, begin: list[int], tmp_path: Path) -> None:
    fixtures.tiny_llama(5).save_pretrained(tmp_path)
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS), ("<pad>", PAD)]
    )
    tokenizer.save_pretrained(tmp_path)
    reward = TextLogProbReward(tmp_path, reduce="sum")
    assert reward.tokenizer("ax")["input_ids"][-1] != 3  # it does put something there
    judge = bind_reward(reward, CONTEXT)
    # Cut at the length; ended; ended at once; a prompt without text.
    scores = judge.scores([[1, 3, 7], [1, 3, 7], [1, 3], [1]], [[11, 11], [11, EOS], [EOS], [7, EOS]])
    cases = [([3, 7], [11, 11]), ([3, 7], [11, EOS]), ([3], [EOS]), ([], [7, EOS])]
    expected = [sum(logprob(5, [*begin, *prompt] or [BOS], response)) for prompt, response in cases]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_judge_of_text_needs_an_end(folder: Any, tmp_path: Path) -> None:
    fixtures.tiny_llama(5).save_pretrained(tmp_path)
    tokenizer = type(TOKENIZER)(tokenizer_object=TOKENIZER.backend_tokenizer, pad_token="<pad>")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reward: expected a judge whose tokenizer has an EOS token"):
        TextLogProbReward(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: expected one, because the reward is given text, got None"):
        bind_reward(TextLogProbReward(folder("judge")), RewardContext())


def test_implicit_rewards() -> None:
    pairs = [(logprob(5, p, r), logprob(6, p, r)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    terms = [[0.3 * (a - b) for a, b in zip(*pair, strict=True)] for pair in pairs]
    whole = ImplicitReward(shared(5), shared(6), beta=0.3)(PROMPTS, RESPONSES)
    assert whole == pytest.approx([sum(row) for row in terms], abs=1e-5)
    dense = ImplicitReward(shared(5), shared(6), beta=0.3, per_token=True)(PROMPTS, RESPONSES)
    for row, expected in zip(dense, terms, strict=True):
        assert row.tolist() == pytest.approx(expected, abs=1e-5)
    assert ImplicitReward(shared(5), shared(5))(PROMPTS, RESPONSES) == [0, 0, 0]
    with pytest.raises(ValueError, match="beta: expected a number > 0, got 0"):
        ImplicitReward(shared(5), shared(6), beta=0)
    with pytest.raises(ValueError, match="reference: expected 40 logits, as the policy, got 44"):
        ImplicitReward(shared(5), Shared(fixtures.tiny_llama(6, 44)))


def test_a_judge_agrees_with_the_loss_of_transformers(material: Path) -> None:
    """`labels` of −100 leave the prompt out of the loss, which is the mean of −log p over the response."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_folder = material / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    stories = (material / "data" / "tinystories_sample.txt").read_text("utf8").split("\n")
    rows = [tokenizer(story)["input_ids"][:56] for story in stories[:400] if len(story) > 250][:12]
    prompts, responses = [row[:8] for row in rows], [row[8 : 20 + 3 * i] for i, row in enumerate(rows)]
    assert len(rows) == 12 and len({len(response) for response in responses}) > 5
    scores = LogProbReward(model_folder)(prompts, responses)
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        labels = torch.tensor([[-100] * len(prompt) + response])
        with torch.no_grad():
            loss = float(model(input_ids=torch.tensor([prompt + response]), labels=labels).loss)
        assert score == pytest.approx(-loss, abs=1e-4)
    assert -3 < sum(scores) / 12 < -0.8  # −1.28 on its own samples


# Preferences.


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_win_probability_over_a_stored_response() -> None:
    lengths = Pointwise(lambda prompts, responses: [len(response) / 2 for response in responses])
    reward = PreferenceReward(lengths, {"a": "four", " b ": "sixsix"})
    scores = reward(["a", "b", " a"], ["four", "two", "seven.."])
    assert scores == pytest.approx([0.5, sigmoid(-1.5), sigmoid(1.5)], abs=1e-12)
    logs = PreferenceReward(lengths, {"a": "four", "b": "sixsix"}, log=True)(["a", "b"], ["four", "two"])
    assert logs == pytest.approx([math.log(0.5), math.log(sigmoid(-1.5))], abs=1e-12)
    with pytest.raises(ValueError, match="expected a prompt that there is an opponent to, got 'c'"):
        reward(["c"], ["x"])


def test_certain_losses_have_a_finite_log() -> None:
    worst = PreferenceReward(lambda p, a, b: [-1000.0], {"a": "x"}, log=True)
    assert worst(["a"], ["y"]) == [-1000.0]


def test_a_pair_classifier_forgets_who_stood_first(folder: Any) -> None:
    classifier = ClassifierReward(folder("classifier"))
    pairs = PairClassifier(classifier, "{prompt} ax{first} by{second}")
    one, two = pairs(["cz"] * 2, [" dx", " dy"], [" dy", " dx"]).tolist()
    forward, backward = classifier([""] * 2, ["cz ax dx by dy", "cz ax dy by dx"]).tolist()
    assert one == pytest.approx((forward - backward) / 2, abs=1e-6) and abs(one) > 1e-3
    assert two == pytest.approx(-one, abs=1e-6)


def test_braces_in_a_response_fill_in_nothing() -> None:
    class Reader:
        def __call__(self, prompts: Any, responses: Any) -> torch.Tensor:
            self.read = responses
            return torch.zeros(len(responses))

    reader: Any = Reader()
    PairClassifier(reader)(["{second}"], ["{prompt} {x}"], ["}{"])
    assert reader.read[0] == "{second}\n\nA: {prompt} {x}\n\nB: }{"
    assert reader.read[1] == "{second}\n\nA: }{\n\nB: {prompt} {x}"


def test_bad_preferences(folder: Any) -> None:
    for make, message in (
        (lambda: PairClassifier(ClassifierReward(folder("classifier")), "{prompt}"), r"template: expected \{first\}, "),
        (lambda: Pointwise(fixtures.IdReward()), "reward: expected a plain reward of text, got one with wants_ids"),
        (
            lambda: Pointwise(TextLogProbReward(folder("judge"))),
            "reward: expected a plain reward of text, got one with bind",
        ),  # type: ignore[arg-type]
        (lambda: PreferenceReward(3, {"a": "b"}), "comparison: expected a callable"),  # type: ignore[arg-type]
        (lambda: PreferenceReward(lambda p, a, b: [], {}), "opponents: expected responses by prompt, got {}"),
        (lambda: PreferenceReward(lambda p, a, b: [], {"a": "b"})(["a"], ["c"]), "expected 1 logits of the comparison"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_the_environment_shows_which_prompt_has_no_opponent() -> None:
    reward = PreferenceReward(Pointwise(fixtures.LetterReward()), {"ax": "by"})
    bound = as_reward(reward, tokenizer=TOKENIZER, stop_token_ids=[EOS])
    with pytest.raises(ValueError, match="expected a prompt that there is an opponent to, got 'by' for prompt 'by'"):
        bound.scores([[1, 3], [1, 7]], [[5], [5]])


def test_a_normalised_reward_model_says_its_own_probabilities(tmp_path: Path) -> None:
    plain, scaled = (save_model("classifier", tmp_path / name) for name in ("plain", "scaled"))
    config = json.loads((scaled / "config.json").read_text())
    (scaled / "config.json").write_text(json.dumps(config | {"reward_scale": 3.0}))
    texts = ["ax"], [" by"], [" cz"]
    one, three = (Pointwise(ClassifierReward(folder))(*texts)[0] for folder in (plain, scaled))
    assert abs(one) > 1e-3 and three == pytest.approx(3 * one, rel=1e-5)
    assert Pointwise(ClassifierReward(scaled), scale=0.5)(*texts)[0] == pytest.approx(0.5 * one, rel=1e-5)
