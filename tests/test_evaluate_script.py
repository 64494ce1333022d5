"""`scripts/evaluate.py` on tiny models, the rewards that flags name, and the pages of the frontier's benchmark."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import make_llama

tyro = pytest.importorskip("tyro")

from scripts import benchmark_frontier, evaluate, frontier_page, options  # noqa: E402
from textenv import embedded  # noqa: E402

REWARDS = """
import textenv
from textenv.rewards.classifier import ClassifierReward


def length(prompts, responses):
    return [float(len(response.split())) for response in responses]


class Constant:
    wants_ids = True

    def __call__(self, prompts, responses):
        assert all(isinstance(token, int) for token in responses[0])
        return [2.5] * len(responses)


constant = Constant()
three = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_lm_folder: Path, tiny_tokenizer: Any) -> Path:
    """The working directory: a module of rewards, prompts, and a second model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "heldout.txt").write_text("w5 w6\nw7\nw8\n")
    other = make_llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    for name in ("runs/b1/policy", "runs/b2/policy"):
        other.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def run(folder: Path, reference: Path, *words: object) -> dict[str, Any]:
    given = ["--env.reference", reference, "--env.heldout", "heldout.txt", "--env.prompts", "heldout.txt"]
    given += ["--env.max-new-tokens", 6, "--env.device", "cpu", "--out", "out", *words]
    evaluate.main(evaluate.parse([str(word) for word in given]))
    return json.loads((folder / "out" / "evaluation.json").read_text())


def test_policies_rewards_and_responses(folder: Path, tiny_lm_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "β=1=runs/b1/policy", "--others", "runs/b1/policy", "runs/b2/policy", "--responses", 3]
    rewards = ["--env.reward", "my_rewards:length", "--second-reward", "my_rewards:constant"]
    found = run(folder, tiny_lm_folder, *words, *rewards)
    assert list(found["results"]) == ["reference", "β=1", "b1/policy", "b2/policy"]
    model = found["results"]["β=1"]
    assert model["scores"] == [float(len(text.split())) for text in model["responses"]]
    assert model["second_scores"] == [2.5] * 9 and model["per_prompt"] == 3
    assert model["metrics"]["second"]["value"] == 2.5 and model["gains"]["second_wins"]["value"] == 0.5
    assert found["results"]["reference"]["metrics"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert model["metrics"]["kl"]["value"] > 0.1
    # One model under three names: each draws by its own seed.
    assert len({tuple(result["responses"]) for result in found["results"].values()}) == 4
    assert found["settings"]["second_reward"] == "my_rewards:constant"
    assert "β=1 is not over-optimised" in capsys.readouterr().out
    assert sorted(path.name for path in (folder / "out").iterdir())[-1] == "report.html"


def test_distinct_and_a_model_as_second_reward(folder: Path, tiny_lm_folder: Path, tiny_reward_folder: Path) -> None:
    base = ["--model", "runs/b1/policy", "--env.reward", "my_rewards:length", "--baseline", "start=runs/b2/policy"]
    found = run(folder, tiny_lm_folder, *base, "--second-reward", "distinct-2")
    model = found["results"]["model"]
    assert found["baseline"] == "start" and found["second_reward"] == "distinct-2"
    assert model["second_scores"] is None
    assert model["metrics"]["second"] == model["metrics"]["distinct_2"]
    by_model = run(folder, tiny_lm_folder, *base, "--second-reward", tiny_reward_folder)["results"]["model"]
    assert len(set(by_model["second_scores"])) > 1
    assert by_model["responses"] == model["responses"]


def test_a_cut_response_is_scored_all_the_same(folder: Path, tiny_lm_folder: Path) -> None:
    words = ["--model", "runs/b1/policy", "--env.reward", "my_rewards:constant", "--env.length-end", "truncate"]
    assert run(folder, tiny_lm_folder, *words)["results"]["model"]["scores"] == [2.5] * 3


def test_training_takes_a_named_reward(folder: Path, tiny_lm_folder: Path) -> None:
    flags = options.EnvFlags(reference=str(tiny_lm_folder), reward="my_rewards:constant", prompts=("heldout.txt",))
    task = options.make_env(flags).unwrapped.task
    assert task.reward.scores([[5]], [[6, 7]]).tolist() == [2.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "my_reward:length",
            r"^env.reward: expected a module:attribute that is there, got 'my_reward:length' \(No mod",
        ),
        ("my_rewards:width", r"^env.reward: expected a module:attribute that is there, got 'my_rewards:width' .*width"),
        ("my_rewards:three", r"^env.reward: expected a function or a reward, got 3 from 'my_rewards:three'"),
        ("my_rewards:Constant", r"^env.reward: expected a function or a reward, got the class Constant from"),
    ],
)
def test_a_reward_that_is_not_there(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options.named_reward(name, "env.reward")


def test_what_is_no_module_stays_a_name(folder: Path) -> None:
    (folder / "odd:name").mkdir()
    for name in (None, "a/hub-name", "odd:name", "folder"):
        assert options.named_reward(name, "env.reward") == name


def test_names_of_policies(folder: Path) -> None:
    def names(**flags: Any) -> list[str]:
        return list(evaluate.named_policies(evaluate.resolved(evaluate.Flags(**flags))))

    assert names(model="a", others=("x/b", "y/b", "c")) == ["reference", "model", "x/b", "y/b", "c"]
    assert names(model="m=a/b", others=("n=c",), baseline="d") == ["baseline", "m", "n"]
    (folder / "k=v").mkdir()
    assert evaluate.named("model", "k=v") == ("model", "k=v")
    with pytest.raises(ValueError, match=r"^others: expected a name of its own for each policy \(name=folder\), got"):
        names(model="a", others=("model=b",))


# ---------------------------------------------------------------------------------------------------- the benchmark


def test_held_out_prompts_are_never_trained_on() -> None:
    openings = [[1, i % 30, i % 7] for i in range(200)] + [[1]]
    split = benchmark_frontier.split_prompts(openings, tokens=2, usual=20)
    assert split.held_out == [[1, 9], [1, 19], [1, 29]]
    assert not any(prompt in split.held_out for prompt in split.train)
    assert len(split.train) == 200 - sum(i % 30 in (9, 19, 29) for i in range(200))
    assert len(split.usual) == 20 and split.usual[1] == [1, 10]


def row(score: float, variety: float, flag: bool | None, **more: Any) -> dict[str, Any]:
    def known(value: float) -> dict[str, float]:
        return {"value": value, "se": 0.05, "low": value - 0.1, "high": value + 0.1}

    keys = {"score": score, "gain": score + 3, "kl": 10 * score + 40, "distinct_2": variety, "kept": variety * 2}
    found = {key: known(value) for key, value in keys.items()} | {"repetition": known(0.25)}
    found |= {"over_optimised": flag, "sample": "Once | upon\x1b"}
    return {"held_out": found, "usual": found | {"over_optimised": False}, **more}


ROWS = [
    row(-3, 0.6, False, name="early279K"),
    row(-0.7, 0.05, True, beta=0.0, seed=0, iterations=120, cpu_seconds=210.4),
    row(-1.8, 0.3, False, beta=0.1, seed=0, iterations=120, cpu_seconds=220.0),
]


def test_the_benchmark_page_has_both_sets_sorted() -> None:
    page = frontier_page.benchmark_page(ROWS, benchmark_frontier.__doc__ or "")
    starts = [line.split(" |")[0] for line in page.splitlines() if line.startswith("| ")]
    assert (
        starts == ["| ", "| early279K", "| β 0.1", "| β 0"] * 2
        or starts == ["|", "| early279K", "| β 0.1", "| β 0"] * 2
    )
    assert (
        "| β 0 | −0.70 ± 0.10 | 2.30 ± 0.10 | 33.0 ± 0.1 | 0.050 ± 0.100 | 10 ± 10 % | 25 ± 10 % | **yes** | 210 |"
        in page
    )
    assert page.count("**yes**") == 1 and "120 updates of 64 responses" in page
    assert "| not known | 7 |" in frontier_page.table([row(-1.8, 0.3, None, beta=0.1, seed=0, cpu_seconds=7)])
    seeds = [*ROWS, row(-1.8, 0.3, False, beta=0.1, seed=1, iterations=120, cpu_seconds=1)]
    assert "| β 0.1, seed 1 |" in frontier_page.table(seeds)


def test_the_picture_and_the_block_of_reward_hacking() -> None:
    assert frontier_page.figure(ROWS).startswith(b"\x89PNG")
    block = frontier_page.hacking_block(ROWS)
    assert "images/frontier.png" in block and "| β 0 | Once \\| upon\\\\x1b |" in block
    assert frontier_page.hacking_block(ROWS[:1]) == frontier_page.NOT_YET


def test_the_flag_asks_for_half_of_the_judges_variety() -> None:
    from tests.evaluation_fixtures import assessment

    def corpus(name: str, score: float, words: int) -> Any:
        filler = {k: [1] * 30 for k in ("lengths", "finish_reasons", "kls", "exact_kls", "entropies", "ref_nlls")}
        texts = [f"{i % words} x" for i in range(30)]
        return assessment(
            name, [score + i / 100 for i in range(30)], None, texts, [f"p{i}" for i in range(30)], **filler
        )

    reference, judge = corpus("early", -3, 30), corpus("judge", -1, 30)
    flags = {n: benchmark_frontier.figures(corpus("ours", -2, n), reference, judge) for n in (2, 15, 30)}
    assert [found["over_optimised"] for found in flags.values()] == [True, False, False]
    assert flags[2]["kept"]["value"] == pytest.approx(2 / 30)
    assert math.isclose(flags[15]["gain"]["value"], 1.0)


def test_rows_are_appended_and_a_failed_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    assert frontier_page.read_rows(path) == []
    benchmark_frontier.write_rows(path, ROWS[:1])
    benchmark_frontier.write_rows(path, ROWS[1:])
    assert frontier_page.read_rows(path) == ROWS
    flags: Any = SimpleNamespace(iterations=1, material=tmp_path / "nothing")
    assert benchmark_frontier.run_apart(0.1, 0, flags) is None
    assert "β 0.1, seed 0: failed" in capsys.readouterr().err


def test_what_is_written_names_reference_and_reward() -> None:
    env = evaluate.resolved(evaluate.Flags(model="a")).env
    assert (env.reference, env.reward) == (str(embedded.STORYTELLER), str(embedded.REWARD))
    mine = evaluate.Flags(model="a", env=options.EnvFlags(reference="r", reward="s"))
    assert evaluate.resolved(mine) == mine
