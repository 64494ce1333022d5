"""Reward models that are named by their folder, alone and anywhere in a combination of rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import env_fixtures as fixtures
import numpy as np
import pytest
import torch
from env_fixtures import EOS
from reward_fixtures import CONTEXT, save_model

from textenv import TextVectorEnv
from textenv.rewards import (
    Affine,
    ClassifierReward,
    Clip,
    Ensemble,
    LengthPenalty,
    Pointwise,
    RunningNormalization,
    StepReward,
    TokenAggregate,
    TokenClassifierReward,
    WeightedSum,
    WordsReward,
    as_reward,
)
from textenv.rewards.binding import bind_reward

PROMPTS, RESPONSES = [[1, 3, 7], [1, 11], [1, 12]], [[7, 3, EOS], [5, 4], [9, 5, 7, EOS]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: save_model(kind, tmp_path_factory.mktemp(kind)) for kind in ("classifier", "logit")}
    words = tmp_path_factory.mktemp("words")
    WordsReward(("ax", "by"), np.array([1.0, 2.0]), np.array([0.5, -1.5]), bias=0.25).save(words)
    return made | {"words": words}


def tree(classifier: Any, words: Any, tokens: Any) -> WeightedSum:
    return WeightedSum(
        {
            "help": (Affine(Ensemble({"model": classifier, "words": words}, 0.5), 2.0), 1.0),
            "steps": (StepReward(tokens, [5]), 0.5),
            "least": (TokenAggregate(tokens, "min"), -1.0),
            "plain": (classifier, 0.25),
        }
    )


def test_folders_are_loaded_wherever_they_stand(folders: dict[str, Path]) -> None:
    classifier, words, tokens = folders["classifier"], folders["words"], folders["logit"]
    named = bind_reward(tree(str(classifier), words, str(tokens)), CONTEXT)
    loaded = bind_reward(
        tree(ClassifierReward(classifier), WordsReward.load(words), TokenClassifierReward(tokens)), CONTEXT
    )
    ours, theirs = named.whole(PROMPTS, RESPONSES), loaded.whole(PROMPTS, RESPONSES)
    assert ours.total.tolist() == theirs.total.tolist() and len(set(ours.total.tolist())) == 3
    assert {name: part.tolist() for name, part in ours.parts.items()} == {
        name: part.tolist() for name, part in theirs.parts.items()
    }
    # And by hand from the members, for the second response: "az ay" has none of the words.
    (score,) = ClassifierReward(classifier)(["cz"], [" az ay"]).tolist()
    assert float(ours.parts["help"][1]) == pytest.approx(2 * ((score + 0.25) / 2 - 0.5 * abs(score - 0.25) / 2))


def models_of(reward: Any) -> list[torch.nn.Module]:
    own = [reward.function.model] if hasattr(reward.function, "model") else []
    children = getattr(reward.function, "children", {}).values()
    return [*own, *(model for child in children for model in models_of(child))]


def test_they_run_where_the_environment_runs_and_in_its_type(folders: dict[str, Path]) -> None:
    given = tree(folders["classifier"], folders["words"], folders["logit"])
    reward = TextVectorEnv(1, **fixtures.options(reward=given, dtype="bfloat16")).task.reward
    found = [*models_of(reward), *models_of(reward.outcome)]
    assert [next(model.parameters()).dtype for model in found] == [torch.bfloat16] * 4
    # On `meta` nothing can be computed, but a model can be put there on any machine.
    nested = Clip(LengthPenalty(str(folders["classifier"]), 0.1), -1, 1)
    bound = as_reward(nested, tokenizer=fixtures.tiny_tokenizer(), stop_token_ids=[EOS], device="meta")
    assert [next(model.parameters()).device.type for model in models_of(bound)] == ["meta"]


@pytest.mark.parametrize("name", ["/no/such/folder", "empty"])
def test_an_error_says_where_in_a_combination_a_folder_stands(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    source = str(tmp_path) if name == "empty" else name
    given = WeightedSum({"a": (folders["words"], 1.0), "help": (RunningNormalization(Affine(source)), 1.0)})
    with pytest.raises(ValueError, match=r"^reward 'raw' of reward 'raw' of reward 'help'\W.*" + source):
        bind_reward(given, CONTEXT)
    with pytest.raises(ValueError, match=r"^reward\W.*" + source):
        bind_reward(source, CONTEXT)


def test_what_is_in_a_folder_is_named_by_its_place_too(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text("{")
    for source, message in (
        (save_model("bert", tmp_path / "bert"), "expected a causal model, got BertForTokenClassification"),
        (tmp_path, r"expected a folder with words\.json and words\.safetensors"),
        (folders["logit"], "expected one number a response in Clip, got one value per token"),
    ):
        with pytest.raises(ValueError, match=f"^reward 'raw' of reward 'a': {message}"):
            bind_reward(WeightedSum({"a": (Clip(source, 0, 1), 1.0)}), CONTEXT)


def test_what_is_asked_in_text_alone_does_not_take_a_folder(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"reward: expected a reward of text \(load_reward reads a folder\), got"):
        Pointwise(str(folders["words"]))  # type: ignore[arg-type]


def test_scores_in_the_environment(folders: dict[str, Path]) -> None:
    env = TextVectorEnv(2, **fixtures.options(reward=WeightedSum({"words": (str(folders["words"]), 2.0)})))
    record = env.replay([[1], [1]], [[7, EOS], [5, EOS]])  # " by", which is all there is, and no word of the two
    assert record.scores.tolist() == pytest.approx([2 * (0.25 - 1.5), 2 * 0.25])
