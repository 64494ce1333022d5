"""Reward models that are trained: what is trained is what is saved, and what the environment asks."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import textenv
from scripts.reward_modelling.examples import Example, Text, split
from scripts.reward_modelling.losses import Objective, comparison_loss, label_loss, objective_of
from scripts.reward_modelling.making import Recipe, make
from scripts.reward_modelling.network import encode, load_base, scores_of, standardise
from scripts.reward_modelling.report import mean_error, picture
from scripts.reward_modelling.training import FIT, RewardTrainer, collate, fit
from scripts.trainer_config import TrainerConfig, training_arguments
from tests.conftest import MAKERS, V
from textenv.rewards import ClassifierReward
from textenv.rewards.batching import padded

WORDS = [f"w{n}" for n in range(3, V)]
QUICK = replace(FIT, epochs=3, batch_examples=8, learning_rate=5e-3)


@pytest.fixture(params=["gpt2", "llama"])
def base(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A causal language model's folder, whose EOS is also its PAD; GPT-2 with its dropout."""
    model = MAKERS[request.param]()
    model.config.pad_token_id = model.config.eos_token_id
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def random_texts(count: int, seed: int = 0) -> list[Text]:
    rng = np.random.default_rng(seed)

    def some(low: int, high: int) -> list[str]:
        return rng.choice(WORDS, rng.integers(low, high)).tolist()

    return [Text(" ".join(some(1, 6)), " " + " ".join(some(1, 20))) for _ in range(count)]


def alone(folder: Path, texts: list[Text], tokenizer: Any) -> list[float]:
    """Each text through the public forward of transformers, unpadded, the bias of the configuration added."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    model.config.pad_token_id = None
    with torch.no_grad():
        rows = [torch.tensor([tokenizer(text.prompt + text.response)["input_ids"]]) for text in texts]
        return [float(model(input_ids=row).logits) + model.config.reward_bias for row in rows]


def test_what_is_trained_is_what_is_saved_and_asked(base: Path, tmp_path: Path) -> None:
    scorer, tokenizer = load_base(base, seed=0)
    # Ends that equal EOS and PAD count; "w1" and "2 w7" are one text, of which the first word is "w12".
    texts = [*random_texts(30), Text("w5", " <s> w6 <s>"), Text("", "<pad>"), Text("w1", "2 w7")]
    ids = encode(tokenizer, texts, None)
    rows = [ids[text] for text in texts]
    assert [len(row) for row in rows] == [len((text.prompt + text.response).split()) for text in texts]
    trained = scorer.train()(*padded(rows, torch.device("cpu")))  # as in training: packed, ragged, dropout off
    assert trained.requires_grad
    objective = Objective(comparison_loss, unit=2.0, centre=0.5)
    raw = objective.unit * trained.detach().double() + objective.centre
    back = standardise(scorer, rows[:20], objective)
    scorer.classifier.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    reward = ClassifierReward(tmp_path / "saved")
    asked = reward([t.prompt for t in texts], [t.response for t in texts]).double()
    torch.testing.assert_close(back["scale"] * asked + back["offset"], raw, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        asked, torch.tensor(alone(tmp_path / "saved", texts, tokenizer)).double(), rtol=0, atol=2e-5
    )
    assert [float(asked[:20].mean()), float(asked[:20].std(correction=0))] == pytest.approx([0.0, 1.0], abs=1e-5)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {name: config[f"reward_{name}"] for name in back} == back


def test_dropout_is_off_while_training(base: Path) -> None:
    scorer, _ = load_base(base, seed=0)
    scorer.train()
    batch = padded([[3, 4, 5], [6, 7]], torch.device("cpu"))
    assert torch.equal(scorer(*batch), scorer(*batch))


def test_the_head_is_drawn_with_the_variance_of_the_width(base: Path) -> None:
    heads = [load_base(base, seed=seed)[0].classifier.score.weight for seed in (0, 0, *range(1, 20))]
    assert torch.equal(heads[0], heads[1])
    everything = torch.cat([head.flatten() for head in heads[1:]])
    # 20 heads of width 32: the sample deviation of 640 numbers has a standard error of 2.8 %.
    assert float(everything.detach().std()) == pytest.approx(1 / math.sqrt(33), rel=0.08)


def test_a_reward_model_goes_on_from_its_head(tiny_reward_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_reward_folder, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps(config | {"reward_bias": 3.0}))
    scorer, _ = load_base(tmp_path / "old", seed=0)
    expected = load_file(tmp_path / "old" / "model.safetensors")["score.weight"]
    assert torch.equal(scorer.classifier.score.weight, expected)
    assert scorer.classifier.config.reward_bias == 0.0


def test_what_cannot_be_a_reward_model_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    size: dict[str, Any] = {
        "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32
    }  # fmt: skip
    cases = {
        "bert": (BertForSequenceClassification(BertConfig(**size, num_labels=1)), "linear head named score, got Bert"),
        "three": (LlamaForSequenceClassification(LlamaConfig(**size, num_labels=3)), "classifier with one score, got"),
    }
    for name, (model, message) in cases.items():
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"model: expected .*{message}"):
            load_base(tmp_path / name, seed=0)
    with pytest.raises(ValueError, match="model must be a model folder or a hub name; there is no folder"):
        load_base(tmp_path / "nowhere", seed=0)


def test_the_loss_of_a_batch_is_the_mean_of_its_examples_one_by_one(base: Path, tmp_path: Path) -> None:
    scorer, tokenizer = load_base(base, seed=0)
    texts = random_texts(12)
    ids = encode(tokenizer, texts, None)
    examples = [Example((texts[2 * n], texts[2 * n + 1]), target=0.1 * n) for n in range(6)]
    items = [([ids[text] for text in example.texts], example.target) for example in examples]
    objective = Objective(comparison_loss)
    arguments = _arguments(tmp_path)
    trainer = RewardTrainer(objective, scorer, arguments, items, print)
    found = trainer.compute_loss(scorer, collate(items)).item()
    scores = [scorer(*padded([ids[text]], torch.device("cpu"))).item() for text in texts]
    hand = [math.log(1 + math.exp(-(scores[2 * n] - scores[2 * n + 1] - 0.1 * n))) for n in range(6)]
    assert found == pytest.approx(sum(hand) / 6, abs=1e-6)
    labels = RewardTrainer(Objective(label_loss, centre=0.7), scorer, arguments, items, print)
    batch = collate([([ids[texts[0]]], 1.0), ([ids[texts[1]]], 0.0)])
    hand = [math.log(1 + math.exp(-(scores[0] + 0.7))), math.log(1 + math.exp(scores[1] + 0.7))]
    assert labels.compute_loss(scorer, batch).item() == pytest.approx(sum(hand) / 2, abs=1e-6)


def _arguments(folder: Path) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True)


def weights_after(base: Path, folder: Path, config: TrainerConfig, seed: int = 0) -> torch.Tensor:
    return trained(base, folder, config, seed)[0]


def trained(
    base: Path, folder: Path, config: TrainerConfig, seed: int = 0, count: int = 16
) -> tuple[torch.Tensor, list[float]]:
    """Weights and losses."""
    scorer, tokenizer = load_base(base, seed=0)
    texts = random_texts(32)
    examples = [Example((texts[2 * n], texts[2 * n + 1])) for n in range(count)]
    objective = objective_of("pairs", examples)
    ids = encode(tokenizer, texts, None)
    told: list[str] = []
    figures = fit(
        scorer, objective, examples, ids, config, seed=seed, folder=folder, tell=told.append
    )  # fmt: skip
    assert figures["steps"] == config.epochs * -(-count // config.batch_examples)
    assert len(figures["losses"]) == len(told) > 0
    return torch.cat([p.detach().flatten() for p in scorer.parameters()]), [loss for _, loss in figures["losses"]]


def test_a_seed_is_a_training_and_accumulation_changes_nothing(tiny_lm_folder: Path, tmp_path: Path) -> None:
    config = replace(FIT, epochs=1, batch_examples=8, learning_rate=1e-3, weight_decay=0.0)
    whole = weights_after(tiny_lm_folder, tmp_path, config)
    assert torch.equal(weights_after(tiny_lm_folder, tmp_path, config), whole)
    assert not torch.equal(weights_after(tiny_lm_folder, tmp_path, config, seed=1), whole)
    for count in (16, 11):  # of 11, the second step has three: a microbatch of two and one of one
        whole, losses = trained(tiny_lm_folder, tmp_path, config, count=count)
        parts, same = trained(tiny_lm_folder, tmp_path, replace(config, microbatch_examples=2), count=count)
        assert same == pytest.approx(losses, abs=1e-4)
        # Adam's first steps go by the gradient's sign, so that rounding shows where a gradient is nearly zero.
        assert float((parts - whole).abs().mean()) < 1e-6


def test_resuming_equals_an_uninterrupted_run_bit_for_bit(tiny_lm_folder: Path, tmp_path: Path) -> None:
    texts = random_texts(32)
    examples = [Example((texts[2 * n], texts[2 * n + 1])) for n in range(16)]
    config = replace(FIT, epochs=3, batch_examples=4, learning_rate=1e-3, save_every=3)

    def run(folder: Path, tell: Any, resume: bool = False) -> tuple[torch.Tensor, dict[str, Any]]:
        scorer, tokenizer = load_base(tiny_lm_folder, seed=0)
        ids = encode(tokenizer, texts, None)
        objective = objective_of("pairs", examples)
        figures = fit(scorer, objective, examples, ids, config, seed=0, folder=folder, tell=tell, resume=resume)
        return torch.cat([p.detach().flatten() for p in scorer.parameters()]), figures

    def stop(line: str) -> None:
        if line.startswith("step 8 "):  # in the second epoch, after a checkpoint
            raise KeyboardInterrupt

    whole, figures = run(tmp_path / "whole", str)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", stop)
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["checkpoint-6"]
    told: list[str] = []
    resumed, again = run(tmp_path / "part", told.append, resume=True)
    assert told[0].startswith("step 7 of 12") and again["steps"] == 12
    assert torch.equal(resumed, whole) and again["losses"] == figures["losses"]
    assert torch.equal(run(tmp_path / "none", str, resume=True)[0], whole)  # without a checkpoint: from the start


def test_one_process_trains_on_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    class Four(TrainingArguments):
        """As on a machine of four GPUs, of whose number the Trainer wraps a model into DataParallel."""

        @property
        def _setup_devices(self) -> torch.device:
            self._n_gpu = 4
            return torch.device("cpu")

    monkeypatch.setattr("scripts.trainer_config.TrainingArguments", Four)
    assert Four(output_dir=str(tmp_path)).n_gpu == 4
    assert training_arguments(FIT, tmp_path, torch.device("cpu"), seed=0, log_every=1, own={}).n_gpu == 1


def test_half_precision_is_of_the_products_alone(tiny_lm_folder: Path, tmp_path: Path) -> None:
    config = replace(FIT, epochs=1, batch_examples=8, learning_rate=1e-3)
    whole = weights_after(tiny_lm_folder, tmp_path, config)
    half = weights_after(tiny_lm_folder, tmp_path, replace(config, bf16=True))
    assert half.dtype == torch.float32
    # Two steps of Adam of at most 1e-3 each; most weights go the same way.
    assert 0 < float((half - whole).abs().mean()) < 5e-4


def rows_of(task: str, count: int = 120) -> list[dict[str, Any]]:
    """A response with more w5 than w6 is better; by how much is the rating."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count):

        def response(value: int) -> str:
            words = ["w5"] * max(value, 0) + ["w6"] * max(-value, 0)
            filler = rng.choice(WORDS[10:], 4 - abs(value)).tolist()
            return " " + " ".join(rng.permutation(words + filler).tolist())

        value = int(rng.choice([-3, -2, -1, 1, 2, 3]))
        row: dict[str, Any] = {"prompt": f"w{number % 40 + 20} w9"}
        if task == "pairs":
            row |= {"chosen": response(abs(value)), "rejected": response(-abs(value)), "margin": None}
        elif task == "labels":
            row |= {"response": response(value), "label": float(value > 0)}
        else:
            row |= {"response": response(value), "rating": 10.0 * value + 50}
        rows.append(row)
    return rows


@pytest.mark.parametrize("kind", ["lm", "words"])
@pytest.mark.parametrize("task", ["pairs", "ranked", "ratings", "labels"])
def test_every_task_is_learnt_by_either_kind(task: Any, kind: Any, tiny_lm_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(task=task, kind=kind, fit=replace(QUICK, epochs=4), rounds=3, min_gap=15.0)
    training, heldout = split(rows_of(task), 0.25, 0)
    told: list[str] = []
    report = make(training, heldout, recipe, tmp_path, base=tiny_lm_folder, tell=told.append)
    assert report["heldout"]["accuracy"]["value"] > 0.85
    assert report["data"]["heldout"]["rows"] == len(heldout)
    if task == "ratings":  # raw outputs are ratings, from 20 to 80
        assert report["heldout"]["correlation"] > 0.8 and report["heldout"]["rmse"] < 15
    json.dumps(report)
    picture(report).savefig(tmp_path / "picture.png")
    env: Any = gym.make(
        "RLHF-Text-v0", reference=str(tiny_lm_folder), reward=str(tmp_path / "model"), prompts=["w20 w9"], kl_coef=0.0,
        max_new_tokens=4,
    )  # fmt: skip
    prompt = env.unwrapped.task.prompts[0]
    good, bad = env.unwrapped.replay([prompt] * 2, [[5, 12, 5, 14], [6, 12, 6, 14]]).scores
    assert good > bad + 0.5


def test_a_training_on_turned_labels_learns_the_opposite(tiny_lm_folder: Path, tmp_path: Path) -> None:
    training, heldout = split(rows_of("pairs"), 0.25, 0)
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in training]
    report = make(turned, heldout, Recipe(fit=QUICK), tmp_path, base=tiny_lm_folder, tell=str)
    assert report["heldout"]["accuracy"]["value"] < 0.15


def test_texts_that_do_not_fit_are_dropped_and_told(tiny_lm_folder: Path, tmp_path: Path) -> None:
    training, heldout = split(rows_of("pairs", 40), 0.25, 0)
    training[0] = training[0] | {"chosen": " w5" * 200}
    told: list[str] = []
    recipe = Recipe(fit=replace(FIT, epochs=1))
    report = make(training, heldout, recipe, tmp_path, base=tiny_lm_folder, tell=told.append)
    assert f"training: dropped 1 of {len(training)} examples, longer than 128 tokens" in told
    assert report["data"]["training"] == {"rows": len(training), "ties": 0, "examples": len(training) - 1}
    with pytest.raises(ValueError, match="training: expected at least one example, got none of 1 rows"):
        make(training[:1], heldout, recipe, tmp_path, base=tiny_lm_folder, tell=str)
    ties = [row | {"rejected": row["chosen"]} for row in heldout]
    with pytest.raises(ValueError, match=f"heldout: expected at least one example, got none of {len(ties)} rows"):
        make(training, ties, recipe, tmp_path, base=tiny_lm_folder, tell=str)


@pytest.mark.parametrize("kind", ["lm", "words"])
def test_ratings_that_cannot_be_compared_are_refused_before_training(
    kind: Any, tiny_lm_folder: Path, tmp_path: Path
) -> None:
    rows = [row | {"rating": (row["rating"] - 20) / 60} for row in rows_of("ratings", 40)]
    training, heldout = split(rows, 0.25, 0)
    spread = np.std([row["rating"] for row in heldout])
    told: list[str] = []
    message = f"min_gap: expected ratings more than 1.0 apart, got none among 10 from 0 to 1; set it .* {spread:.2g}"
    with pytest.raises(ValueError, match=message):
        make(training, heldout, Recipe(task="ratings", kind=kind), tmp_path, base=tiny_lm_folder, tell=told.append)
    assert not told and not list(tmp_path.iterdir())
    recipe = Recipe(task="ratings", kind=kind, fit=QUICK, min_gap=float(f"{spread:.2g}"))
    assert make(training, heldout, recipe, tmp_path, base=tiny_lm_folder, tell=str)["heldout"]["accuracy"]["count"] > 0


def test_scores_are_normalised_on_the_reference(tiny_lm_folder: Path, tmp_path: Path) -> None:
    training, heldout = split(rows_of("pairs", 40), 0.25, 0)
    reference = random_texts(40, seed=5)
    for kind in ("lm", "words"):
        recipe = Recipe(kind=kind, fit=replace(FIT, epochs=1))
        texts = reference if kind == "lm" else [Text("", f"{'w5 ' * n} w6") for n in range(9)]
        make(training, heldout, recipe, tmp_path / kind, base=tiny_lm_folder, reference=texts, tell=str)
        folder = tmp_path / kind / "model"
        loaded = ClassifierReward(folder) if kind == "lm" else textenv.rewards.WordsReward.load(folder)
        scores = np.array([float(score) for score in loaded([t.prompt for t in texts], [t.response for t in texts])])
        assert [scores.mean(), scores.std()] == pytest.approx([0.0, 1.0], abs=1e-5)


def test_scores_without_a_spread_are_refused(tiny_lm_folder: Path) -> None:
    scorer, _ = load_base(tiny_lm_folder, seed=0)
    with pytest.raises(ValueError, match="reference: expected texts whose scores differ, got 2 scores of"):
        standardise(scorer, [[3, 4], [3, 4]], Objective(comparison_loss))
    assert scores_of(scorer, []).shape == (0,)


@pytest.mark.parametrize(
    ("settings", "changes", "name"),
    [
        (TrainerConfig, {"epochs": 0}, "epochs"),
        (TrainerConfig, {"batch_examples": 0}, "batch_examples"),
        (TrainerConfig, {"batch_examples": 8, "microbatch_examples": 3}, "microbatch_examples"),
        (TrainerConfig, {"learning_rate": 0.0}, "learning_rate"),
        (TrainerConfig, {"max_grad_norm": math.nan}, "max_grad_norm"),
        (TrainerConfig, {"warmup_frac": 1.0}, "warmup_frac"),
        (TrainerConfig, {"weight_decay": -1.0}, "weight_decay"),
        (TrainerConfig, {"weight_decay": math.nan}, "weight_decay"),
        (TrainerConfig, {"save_every": -1}, "save_every"),
        (Recipe, {"rounds": 0}, "rounds"),
        (Recipe, {"heldout_rounds": 0}, "heldout_rounds"),
        (Recipe, {"min_gap": -1.0}, "min_gap"),
        (Recipe, {"kind": "words", "model": "x"}, "model"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Any, changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        settings(**changes)


def test_the_script_writes_a_model_and_its_report(
    tiny_lm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tyro = pytest.importorskip("tyro")
    from scripts import train_reward

    rows = [{"q": row.pop("prompt"), **row} for row in rows_of("pairs", 60)]
    rows.append({"q": "w5", "chosen": "w6", "rejected": "w6"})
    (tmp_path / "pairs.jsonl").write_text("\n".join([*map(json.dumps, rows), "no json"]))
    out = tmp_path / "out"
    words = ["--data", tmp_path / "pairs.jsonl", "--columns.prompt", "q", "--out", out, "--device", "cpu",
             "--recipe.model", tiny_lm_folder, "--recipe.fit.learning-rate", "5e-3"]  # fmt: skip
    train_reward.main(tyro.cli(train_reward.Flags, args=[str(word) for word in words]))
    shown = " ".join(capsys.readouterr().out.split())
    assert "skipped 1 of 62 rows" in shown and "1 ties dropped" in shown and "held-out accuracy" in shown
    report = json.loads((out / "report.json").read_text())
    assert sum(report["data"][side]["rows"] for side in ("training", "heldout")) == 61
    counts = report["files"]["data"]
    assert (counts["read"], counts["kept"], counts["skipped"]) == (62, 61, 1) and ":62: expected" in counts["problems"][
        0
    ]
    assert (out / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert len(ClassifierReward(out / "model")(["w9"], [" w5"])) == 1
    strict = tyro.cli(train_reward.Flags, args=[str(word) for word in [*words, "--strict"]])
    with pytest.raises(ValueError, match=r"pairs\.jsonl:62: expected JSON"):
        train_reward.main(strict)


def test_mean_and_standard_error_by_hand() -> None:
    assert mean_error([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(14 / 2 / 3)))


def test_the_benchmark_keeps_sentences_and_prompts_apart(material: Path) -> None:
    from scripts.benchmark_reward_models import answers, films, lexicon, sides

    assert len(films(material)) == 10_605 and len(answers(material)) == 1_100
    for task, key in (("films", "response"), ("answers", "prompt")):
        training, heldout = sides(task, material, 0, False)
        assert not {row[key] for row in training} & {row[key] for row in heldout}
        assert len(heldout) == pytest.approx(0.2 * (len(training) + len(heldout)), rel=0.05)
        again, chosen_on = sides(task, material, 0, True)  # settings are chosen without the held-out rows
        assert len(again) + len(chosen_on) == len(training)
    share = lexicon(material, 0, False)["accuracy"]
    assert share["count"] >= 2000
    assert share["value"] == pytest.approx(0.696, abs=3 * share["standard_error"])  # of all sentences: 69.6 %
