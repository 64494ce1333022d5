"""Fine-tuning: the loss by an oracle, what changes speed only, resuming, adapters, and what is written."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

import textenv
from agents import ValueHeadLM
from scripts.finetuning.batches import flattened, heldout_loss, isolates, padded
from scripts.finetuning.examples import Example
from scripts.finetuning.training import SFTConfig, autocast, collator, finetune, split
from scripts.trainer_config import begin
from tests.agent_fixtures import identical, weights
from tests.conftest import make_gpt2, make_llama

pytest.importorskip("accelerate")

HIDDEN = -100
ROWS = [([5, 6, 7, 8, 1], 2), ([9, 10, 1], 1), ([11, 12, 13, 14, 15, 16, 1], 5), ([17, 20, 18, 1], 0)]
EXAMPLES = [Example(ids, [HIDDEN] * start + ids[start:]) for ids, start in ROWS]
COUNTS = [3, 2, 2, 3]  # of the last row, too, the first token has nothing before it


class Kept:
    """A tracker that keeps rows, and stops a run at a step if asked."""

    def __init__(self, stop: int = 10**9) -> None:
        self.rows: list[dict[str, float]] = []
        self.stop = stop

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self.rows.append({"iteration": iteration, **metrics})
        if iteration >= self.stop:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Nothing is open."""


def settings(**changes: Any) -> SFTConfig:
    defaults: dict[str, Any] = {
        "epochs": 2,
        "batch_examples": 4,
        "learning_rate": 1e-2,
        "log_every": 1,
        "schedule": "linear",
        "warmup_frac": 0.1,
    }
    return SFTConfig(**{**defaults, **changes})


def trained(folder: Path, model: Any, examples: Any = EXAMPLES, heldout: Any = (), **changes: Any) -> Any:
    return finetune(model, examples, heldout, settings(**changes), folder, Kept()).model


def oracle_losses(model: Any, examples: list[Example]) -> list[list[float]]:
    """−log p of each learnt token, of one row alone at a time, in float64."""
    double = copy.deepcopy(model).double().eval()
    losses = []
    for example in examples:
        with torch.no_grad():
            laws = double(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        pairs = list(zip(laws[:-1], example.labels[1:], strict=True))
        losses.append([-float(law[label]) for law, label in pairs if label != HIDDEN])
    return losses


def test_the_counts_of_learnt_tokens() -> None:
    assert [example.learnt for example in EXAMPLES] == COUNTS


@pytest.mark.parametrize("collate", [padded, flattened])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_heldout_loss_is_the_mean_over_tokens(tiny_lm: Any, collate: Any, size: int) -> None:
    expected = oracle_losses(tiny_lm, EXAMPLES)
    assert list(map(len, expected)) == COUNTS
    loss = heldout_loss(tiny_lm.train(), EXAMPLES, collate, batch_examples=size, autocast=nullcontext)
    assert loss == pytest.approx(sum(map(sum, expected)) / sum(COUNTS), abs=1e-5)
    means = sum(sum(row) / len(row) for row in expected) / len(expected)
    assert abs(loss - means) > 1e-3  # or the mean over rows would do, too
    assert tiny_lm.training


@pytest.mark.parametrize("collate", [padded, flattened])
def test_the_heldout_loss_takes_logits_of_learnt_tokens_alone(tiny_lm: Any, collate: Any) -> None:
    rows: list[int] = []
    tiny_lm.get_output_embeddings().register_forward_hook(lambda head, inputs, logits: rows.append(len(logits)))
    heldout_loss(tiny_lm, EXAMPLES, collate, batch_examples=4, autocast=nullcontext)
    assert max(rows) == sum(COUNTS) < sum(len(ids) - 1 for ids, _ in ROWS)


@pytest.mark.parametrize("collate", [padded, flattened])
def test_the_heldout_loss_is_that_of_the_whole_forward_in_half_precision(tiny_lm: Any, collate: Any) -> None:
    def half() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    ordered = sorted(EXAMPLES, key=lambda example: len(example.input_ids))  # as they are batched
    batch = collate([example.features for example in ordered])
    labels = batch.pop("labels")[:, 1:].flatten()
    with torch.no_grad(), half():
        logits = tiny_lm(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
    assert logits.dtype == torch.bfloat16
    expected = torch.nn.functional.cross_entropy(logits.float(), labels)
    loss = heldout_loss(tiny_lm, EXAMPLES, collate, batch_examples=4, autocast=half)
    assert loss == pytest.approx(float(expected), abs=2e-3)
    exact = heldout_loss(tiny_lm, EXAMPLES, collate, batch_examples=4, autocast=nullcontext)
    assert loss != exact == pytest.approx(loss, abs=0.02)


def test_an_evaluation_in_training_is_in_the_same_precision(tmp_path: Path) -> None:
    model, kept = make_llama(), Kept()
    finetune(model, EXAMPLES, EXAMPLES, settings(epochs=1, bf16=True), tmp_path, kept)
    (found,) = [row["eval_loss"] for row in kept.rows if "eval_loss" in row]
    half, whole = (
        heldout_loss(model, EXAMPLES, flattened, batch_examples=4, autocast=autocast(model.device, settings(bf16=bf16)))
        for bf16 in (True, False)
    )
    assert found == half != whole


def test_packed_gradients_are_those_of_each_example_alone(tiny_lm: Any) -> None:
    def gradient(batches: list[Any]) -> list[torch.Tensor]:
        tiny_lm.zero_grad()
        for batch in batches:
            tiny_lm(**batch, use_cache=False, num_items_in_batch=torch.tensor(sum(COUNTS))).loss.backward()
        return [p.grad.clone() for p in tiny_lm.parameters() if p.grad is not None]

    features = [example.features for example in EXAMPLES]
    alone = gradient([padded([row]) for row in features])
    for batches in ([flattened(features)], [padded(features)], [flattened(features[:3]), flattened(features[3:])]):
        for found, expected in zip(gradient(batches), alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    joined = flattened(features)
    joined["position_ids"] = torch.arange(joined["input_ids"].shape[1])[None]
    leaking = gradient([joined])
    assert max(float((a - b).abs().max()) for a, b in zip(leaking, alone, strict=True)) > 1e-2


def test_what_does_not_keep_examples_apart_is_padded(tiny_lm: Any) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    for attention in ("eager", "sdpa"):
        tiny_lm.set_attn_implementation(attention)
        assert isolates(tiny_lm) and collator(tiny_lm, packing=True) is flattened
    assert collator(tiny_lm, packing=False) is padded
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))
    # It takes position_ids without a word.
    assert not isolates(mamba.train()) and mamba.training
    assert collator(mamba, packing=True) is padded


@torch.no_grad()
def close(a: Any, b: Any) -> bool:
    """The same laws; weights would not do, because what has no effect (GPT-2's key bias) moves by rounding alone."""
    ids = torch.tensor([range(3, 40)])
    return torch.allclose(a(input_ids=ids).logits, b(input_ids=ids).logits, atol=1e-3)


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_microbatches_and_packing_do_not_change_what_is_learnt(tmp_path: Path, make: Any) -> None:
    whole = trained(tmp_path / "0", make(), packing=False)
    assert not close(whole, make())
    for number, changes in enumerate(
        (
            {"packing": True},
            {"packing": False, "microbatch_examples": 2},
            {"packing": True, "microbatch_examples": 1},
            {"packing": True, "gradient_checkpointing": True},
        ),
        start=1,
    ):
        assert close(whole, trained(tmp_path / str(number), make(), **changes)), changes


def test_the_logged_loss_is_that_of_the_tokens(tmp_path: Path) -> None:
    model, kept = make_llama(), Kept()
    expected = sum(map(sum, oracle_losses(model, EXAMPLES))) / sum(COUNTS)
    result = finetune(model, EXAMPLES, EXAMPLES[:2], settings(microbatch_examples=1), tmp_path, kept)
    losses = [row["loss"] for row in kept.rows if "loss" in row]
    assert losses[0] == pytest.approx(expected, abs=1e-4)
    assert result.train_loss == pytest.approx(sum(losses) / 2, abs=1e-4)
    assert result.steps == 2 and result.tokens_per_s > 0 and result.packed
    last = [row for row in kept.rows if "eval_loss" in row][-1]
    now = oracle_losses(model, EXAMPLES[:2])
    assert last["eval_loss"] == pytest.approx(sum(map(sum, now)) / 5, abs=1e-4)
    assert last["eval_perplexity"] == pytest.approx(math.exp(last["eval_loss"]))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_resuming_equals_an_uninterrupted_run_bit_for_bit(tmp_path: Path, lora_rank: int) -> None:
    config = settings(epochs=3, batch_examples=1, save_every=4, lora_rank=lora_rank, schedule="cosine")
    whole = finetune(make_llama(), EXAMPLES, EXAMPLES[:1], config, tmp_path / "whole", Kept())
    with pytest.raises(KeyboardInterrupt):  # in the second epoch, after a checkpoint
        finetune(make_llama(), EXAMPLES, EXAMPLES[:1], config, tmp_path / "part", Kept(stop=7))
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["checkpoint-4"]
    kept = Kept()
    resumed = finetune(make_llama(), EXAMPLES, EXAMPLES[:1], config, tmp_path / "part", kept, resume=True)
    assert kept.rows[0]["iteration"] == 5 and resumed.steps == whole.steps == 12
    assert identical(weights(resumed.model), weights(whole.model))
    losses = [row["loss"] for row in kept.rows if "loss" in row]
    assert resumed.train_loss == pytest.approx(sum(losses) / 8, abs=1e-4)
    other = finetune(make_llama(), EXAMPLES, EXAMPLES[:1], config, tmp_path / "new", Kept(), resume=True)
    assert identical(weights(other.model), weights(whole.model))  # without a checkpoint: from the start


def test_adapters_are_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = trained(tmp_path, make_llama(), lora_rank=4)
    assert list(weights(model)) == list(weights(make_llama()))
    changed = [name for name, value in weights(model).items() if not torch.equal(value, weights(make_llama())[name])]
    assert changed and all("_proj" in name for name in changed)


def test_the_model_decodes_with_its_cache_again(tmp_path: Path) -> None:
    assert trained(tmp_path, make_llama()).config.use_cache is True


def test_the_split_is_by_seed_and_takes_none_twice() -> None:
    examples = [Example([i, 1], [i, 1]) for i in range(40)]
    train, held = split(examples, 0.1, seed=0)
    assert len(held) == 4 and sorted(e.input_ids[0] for e in [*train, *held]) == list(range(40))
    assert split(examples, 0.1, seed=0) == (train, held) != split(examples, 0.1, seed=1)
    assert split(examples, 0.001, seed=0)[1] and split(examples, 0, seed=0) == (examples, [])
    for frac, message in ((1.0, r"expected a share in \[0, 1\), got 1.0"), (0.99, "expected enough examples")):
        with pytest.raises(ValueError, match=f"heldout_frac: {message}"):
            split(examples[:2], frac, seed=0)


def test_a_held_out_prompt_is_not_trained_on() -> None:
    examples = [Example([1, i % 9, 7, i], [-100, -100, -100, i]) for i in range(60)]
    train, held = split(examples, 0.3, seed=0)
    assert len(train) + len(held) == 60 and len({e.prompt for e in held}) == 3
    assert not {e.prompt for e in train} & {e.prompt for e in held}
    alone = [Example([1, i], [-100, i]) for i in range(10)]  # after BOS alone
    assert len(split(alone, 0.2, seed=0)[1]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: expected a number > 0, got 0"),
        ({"learning_rate": math.nan}, "learning_rate: expected a number > 0, got nan"),
        ({"lora_rank": -1}, "lora_rank: expected an integer >= 0, got -1"),
        ({"warmup_frac": 1.0}, r"warmup_frac: expected a share in \[0, 1\), got 1.0"),
        ({"microbatch_examples": 3}, "microbatch_examples: expected a divisor of batch_examples, 4, got 3"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


# ------------------------------------------------------------------------------------------------------- the script

tyro = pytest.importorskip("tyro")


def run(*arguments: object) -> None:
    from scripts import train_sft

    train_sft.main(tyro.cli(train_sft.Flags, args=[str(argument) for argument in arguments]))


def test_the_script_teaches_a_response_and_its_end_and_goes_on(
    tmp_path: Path, tiny_lm_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"w{i}", "response": f" w{i + 1} w{i + 2}"} for i in range(3, 11)]
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    data.write_text("\n".join(json.dumps(row) for row in [*rows, {"prompt": "w3"}]))
    flags = ["--model", tiny_lm_folder, "--data.train", data, "--data.heldout", data, "--out", out, "--device", "cpu"]
    flags += ["--threads", 1, "--sft.batch-examples", 4, "--sft.learning-rate", 1e-2, "--sft.log-every", 1]
    run(*flags, "--sft.epochs", 20)
    shown = capsys.readouterr().out
    assert "skipped 1 of 9 rows" in shown.replace("\n", " ") and "held-out perplexity" in shown
    summary = json.loads((out / "summary.json").read_text())
    assert summary["heldout_loss_after"] < 0.1 < 2 < summary["heldout_loss_before"]
    assert {name: (one["read"], one["kept"], one["skipped"], one["cut"]) for name, one in summary["files"].items()} == {
        "train": (9, 8, 1, 0),
        "heldout": (9, 8, 1, 0),
    }
    assert summary["files"]["train"]["problems"] == [f"{data}:9: expected a value for 'response', got none"]
    steps = [json.loads(line)["iteration"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps[0] == 1 and steps[-1] == summary["steps"] == 40 and steps == sorted(steps)

    policy = ValueHeadLM.from_pretrained(out / "model")
    words: Any = gym.make(
        "RLHF-Text-v0",
        reference=str(out / "model"),
        reward=lambda prompts, responses: [float(r.split() == ["w5", "w6"]) for r in responses],
        prompts=["w4"],
        max_new_tokens=4,
    )
    observation, _ = words.reset(seed=0)
    ids, total = [], 0.0
    for _ in range(3):
        length = int(observation["attention_mask"].sum())
        logits = policy.next_logits(torch.tensor(observation["input_ids"][None, :length]), torch.ones(1, length).long())
        ids.append(int(logits.argmax()))
        observation, reward, terminated, _, _ = words.step(ids[-1])
        total += reward
    assert ids == [5, 6, 1] and terminated and total == 1.0

    before = (out / "model" / "model.safetensors").read_bytes()
    run(*flags, "--sft.epochs", 20, "--resume")
    assert (out / "model" / "model.safetensors").read_bytes() == before
    again = [json.loads(line)["iteration"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert again == sorted(again) and again[-1] == 40
    assert json.loads((out / "summary.json").read_text())["heldout_loss_after"] == summary["heldout_loss_after"]


@pytest.mark.skipif(not textenv.embedded.STORYTELLER.exists(), reason="no embedded models here")
def test_the_script_needs_no_more_than_a_few_lines_of_text(tmp_path: Path) -> None:
    data = tmp_path / "stories.txt"
    data.write_text("".join(f"Once upon a time, {name} had a red hat.\n" for name in ("Tom", "Sue", "Ben", "Ann")))
    flags = ["--data.train", data, "--data.heldout-frac", 0.25, "--sft.batch-examples", 1, "--sft.epochs", 2]
    run(*flags, "--out", tmp_path / "out", "--device", "cpu", "--threads", 1)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["packed"]
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"]


def test_a_checkpoint_that_a_killed_run_left_unfinished_is_passed_over(tmp_path: Path) -> None:
    from scripts.trainer_config import last_checkpoint

    assert last_checkpoint(tmp_path / "none") is None
    for number in (5, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-10" / "model.safetensors").write_text("half")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    assert not (tmp_path / "checkpoint-10").exists()


# Runs.


def test_a_run_is_not_resumed_with_other_settings(tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    from scripts import train_sft

    folder = tmp_path / "checkpoints"
    flags = train_sft.Flags(data=train_sft.DataFlags(train="tales.jsonl"), sft=SFTConfig(epochs=2.0))
    begin(folder, flags, resume=True)  # nothing is there: begins
    (folder / "checkpoint-3").mkdir()
    begin(folder, replace(flags, threads=3, device="cuda", out=Path("moved")), resume=True)
    for other, told in (
        (replace(flags, sft=SFTConfig(epochs=3.0)), r"{'sft.epochs': 2.0}, got {'sft.epochs': 3.0}"),
        (replace(flags, data=train_sft.DataFlags(train="other")), r"{'data.train': 'tales.jsonl'}, got"),
    ):
        with pytest.raises(ValueError, match=f"^resume: expected the settings that the run was begun with, {told}"):
            begin(folder, other, resume=True)
    assert (folder / "checkpoint-3").is_dir()
    begin(folder, replace(flags, sft=SFTConfig(epochs=3.0)), resume=False)
    assert not (folder / "checkpoint-3").exists()
    begin(folder, replace(flags, sft=SFTConfig(epochs=3.0)), resume=True)
