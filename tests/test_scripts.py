"""The command lines, run in this process on tiny models, and on the embedded ones where they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import textenv
from scripts.options import EnvFlags, heldout_prompts, make_env
from tests.agent_fixtures import identical, weights

tyro = pytest.importorskip("tyro")

ROOT = Path(__file__).resolve().parents[1]

MODELS = (textenv.embedded.STORYTELLER, textenv.embedded.REWARD)
embedded = pytest.mark.skipif(not all(path.exists() for path in MODELS), reason="no embedded models here")


def run(script: str, *arguments: object) -> None:
    """What `python scripts/<script>.py ...` does."""
    from importlib import import_module

    module, words = import_module(f"scripts.{script}"), [str(argument) for argument in arguments]
    module.main(module.parse(words))


@pytest.fixture(autouse=True)
def restored() -> Any:
    """Scripts set global states of torch, as scripts may."""
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    yield
    torch.set_grad_enabled(grad)
    torch.set_num_threads(threads)


@pytest.fixture
def world(tmp_path: Path, tiny_lm_folder: Path, tiny_reward_folder: Path) -> list[str]:
    """Flags of a tiny task: `--env.*`."""
    (tmp_path / "prompts.txt").write_text("w5 w6\nw7\nw8 w9 w10\n")
    (tmp_path / "heldout.txt").write_text("w11 w12\nw13\n")
    options = {
        "reference": tiny_lm_folder,
        "reward": tiny_reward_folder,
        "prompts": tmp_path / "prompts.txt",
        "heldout": tmp_path / "heldout.txt",
        "max-prompt-tokens": 4,
        "max-new-tokens": 5,
        "device": "cpu",
    }
    return [word for name, value in options.items() for word in (f"--env.{name}", str(value))]


def test_files_of_prompts_with_weights_columns_and_bad_rows(tmp_path: Path, world: list[str]) -> None:
    (tmp_path / "more.csv").write_text("id,prompt\n1,w3 w4\n2,\n3,w5\n")
    place = world.index("--env.prompts") + 1
    words = [*world[:place], f"{world[place]}=1", f"{tmp_path / 'more.csv'}=2.5", *world[place + 1 :]]
    flags = tyro.cli(EnvFlags, args=[word.replace("--env.", "--") for word in words])
    with pytest.raises(ValueError, match=r"prompts: .*more.csv:3: expected text, ids, messages, or an object"):
        make_env(flags)
    with pytest.warns(UserWarning, match=r"more.csv: skipped 1 of 3 rows"):
        task = make_env(replace(flags, prompt_strict=False)).unwrapped.task
    assert task.shares == ((3, 1.0), (2, 2.5))
    assert task.prompts == [[5, 6], [7], [8, 9, 10], [3, 4], [5]]
    (tmp_path / "heldout.csv").write_text("q\nw6\n")
    assert heldout_prompts(replace(flags, heldout=str(tmp_path / "heldout.csv"), prompt_column="q")) == ["w6"]


PPO_FLAGS = ["--ppo.batch-episodes", "4", "--ppo.minibatches", "2", "--ppo.epochs", "1", "--threads", "1"]

GROUPS = {
    "train_ppo": [
        "--iterations",
        "--resume",
        "--out",
        "policy options",
        "env options",
        "ppo options",
        "--ppo.gae-lambda",
    ],
    "evaluate": ["--model", "--others", "--baseline", "--second-reward", "env options", "--env.max-new-tokens"],
    "chat": ["--model", "--prompt", "--temperature", "--samples"],
}


@pytest.mark.parametrize("script", GROUPS)
def test_help_shows_every_group(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(script, "--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for words in GROUPS[script]:
        assert words in shown, words


def test_every_setting_of_ppo_is_a_flag_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    from agents import PPOConfig

    with pytest.raises(SystemExit):
        run("train_ppo", "--help")
    shown = capsys.readouterr().out
    for name in PPOConfig.__dataclass_fields__:
        flag = name.replace("_", "-")
        assert f"--ppo.{flag}" in shown or f"--ppo.no-{flag}" in shown, name
    assert "Share of the value loss" in shown


def test_every_recipe_is_an_algorithm_of_the_command_line() -> None:
    from typing import get_args

    from agents.algorithms import RECIPES
    from scripts.train_ppo import Name, chosen, parse

    assert set(get_args(Name)) == set(RECIPES)
    for name in RECIPES:
        algorithm, config = chosen(parse(["--algorithm", name, "--ppo.seed", "3"]))
        expected = RECIPES[name]()
        assert algorithm.name == name
        assert (algorithm.estimator, algorithm.objective) == (expected.estimator, expected.objective)
        assert config.seed == 3
        if name != "ppo":  # whose demo has an entropy bonus
            for setting in ("epochs", "minibatches", "batch_episodes", "learning_rate", "entropy_coef"):
                assert getattr(config, setting) == getattr(expected.defaults, setting), (name, setting)


def test_the_default_folder_is_of_the_algorithm() -> None:
    from scripts.train_ppo import parse

    assert parse([]).out == Path("runs/ppo")
    assert parse(["--algorithm", "grpo"]).out == Path("runs/grpo")
    assert parse(["--algorithm", "grpo", "--out", "elsewhere"]).out == Path("elsewhere")


@pytest.mark.parametrize("name", ["ppo", "rloo"])
def test_resuming_says_that_flags_differ_only_where_they_do(
    tmp_path: Path, world: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*world, *PPO_FLAGS, "--algorithm", name, "--ppo.schedule-updates", "3", "--out", tmp_path / "run"]
    run("train_ppo", *flags, "--iterations", 1)
    for more in ([], ["--ppo.learning-rate", "1e-3"], ["--group-size", "2"]):
        capsys.readouterr()
        run("train_ppo", *flags, *more, "--iterations", 1, "--resume")
        shown = " ".join(capsys.readouterr().out.split())
        assert ("those of the flags differ" in shown) == bool(more), more


def test_another_algorithm_trains_and_resumes(tmp_path: Path, world: list[str]) -> None:
    flags = [*world, *PPO_FLAGS, "--algorithm", "rloo", "--group-size", "2", "--ppo.schedule-updates", "3"]
    for name, iterations in (("whole", [2]), ("parts", [1, 2])):
        for number, until in enumerate(iterations):
            run("train_ppo", *flags, "--iterations", until, "--out", tmp_path / name, *(["--resume"] if number else []))
    whole, parts = (
        json.loads((tmp_path / name / "checkpoint" / "trainer.json").read_text()) for name in ("whole", "parts")
    )
    assert whole == parts
    assert whole["algorithm"]["settings"]["name"] == "rloo"
    assert whole["algorithm"]["settings"]["group_size"] == 2
    assert not (tmp_path / "whole" / "checkpoint" / "critic").exists()
    from safetensors.torch import load_file

    models = [load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("whole", "parts")]
    assert identical(*models)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ppo.clip-eps", "0.1"], "ppo.clip_eps: expected none, because rloo has no such setting, got 0.1"),
        (["--group-size", "3"], "batch_episodes: expected a multiple of group_size=3, got 4"),
        (["--group-size", "1"], "group_size: expected at least 2"),
    ],
)
def test_settings_that_would_not_act_are_refused(world: list[str], words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("train_ppo", *world, *PPO_FLAGS, "--algorithm", "rloo", *words)


def test_a_script_runs_as_a_file() -> None:
    command = [sys.executable, "scripts/chat.py", "--help"]
    # PYTHONPATH does what `pip install -e .` does, where that has not been done.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "python scripts/chat.py --model runs/ppo/policy" in done.stdout


def test_train_resume_evaluate_and_chat(tmp_path: Path, world: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from agents import ValueHeadLM

    out = tmp_path / "run"
    run("train_ppo", *world, *PPO_FLAGS, "--iterations", 2, "--out", out)
    names = {path.name for path in out.iterdir()}
    wanted = {"metrics.jsonl", "tensorboard", "samples.md", "learning_curve.png", "report.html", "policy", "checkpoint"}
    assert wanted <= names
    assert [json.loads(line)["iteration"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert list((out / "tensorboard").iterdir())
    assert (out / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "w11 w12" in (out / "samples.md").read_text()
    before = json.loads((out / "before.json").read_text())
    policy = AutoModelForCausalLM.from_pretrained(out / "policy")
    assert identical(weights(policy), weights(ValueHeadLM.from_pretrained(out / "checkpoint").lm))
    assert AutoTokenizer.from_pretrained(out / "policy")("w5")["input_ids"] == [5]

    run("train_ppo", *world, *PPO_FLAGS, "--iterations", 3, "--out", out, "--resume")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert json.loads((out / "before.json").read_text()) == before
    resumed = AutoModelForCausalLM.from_pretrained(out / "policy")
    assert not identical(weights(policy), weights(resumed))
    assert json.loads((out / "checkpoint" / "trainer.json").read_text())["updates"] == 3

    capsys.readouterr()
    run("evaluate", "--model", out / "policy", *world, "--out", tmp_path / "evaluation", "--env.kl-coef", 0)
    result = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["results"]
    assert result["reference"]["responses"] == before["responses"]  # with the same seed
    assert result["model"]["prompts"] == before["prompts"] == ["w11 w12", "w13"]
    assert result["model"]["metrics"]["kl"]["value"] > 0  # whatever β is
    assert "w11 w12" in capsys.readouterr().out

    run("chat", "--model", out / "policy", "--prompt", "w5 w6", "--samples", 2, "--max-new-tokens", 4)
    assert capsys.readouterr().out.count("w5 w6") == 2


def test_a_sampler_that_fails_ends_a_run_with_a_line_from_which_it_goes_on(
    tmp_path: Path, world: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from agents.sampling import TransformersSampler
    from agents.sampling.engine import SamplerFailure
    from scripts import train_ppo

    class Failing(TransformersSampler):
        """Fails in the third rollout; the evaluation before the first is a call, too."""

        calls = 0

        def sample(self, *args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == 4:
                raise SamplerFailure("the engine could not draw")
            return super().sample(*args, **options)

    make = train_ppo.make_sampler
    monkeypatch.setattr(train_ppo, "make_sampler", lambda name, policy, *_: Failing(policy))
    out, whole = tmp_path / "run", tmp_path / "whole"
    with pytest.raises(SystemExit, match=r"^error: the engine could not draw$"):
        run("train_ppo", *world, *PPO_FLAGS, "--iterations", 3, "--out", out)
    monkeypatch.setattr(train_ppo, "make_sampler", make)
    run("train_ppo", *world, *PPO_FLAGS, "--iterations", 3, "--out", out, "--resume")
    run("train_ppo", *world, *PPO_FLAGS, "--iterations", 3, "--out", whole)
    rows = [json.loads((folder / "after.json").read_text()) for folder in (out, whole)]
    assert rows[0] == rows[1]


def test_a_judge_that_dies_ends_a_run_with_a_line_from_which_it_goes_on(
    tmp_path: Path, world: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from textenv.rewards import ClassifierReward
    from textenv.rewards.judge import JudgeError

    scored, calls = ClassifierReward.__call__, []

    def dying(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise JudgeError("reward: http://judge: no score after 8 of 8 attempts")
        return scored(self, *args)

    out, whole = tmp_path / "run", tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(ClassifierReward, "__call__", dying)
        with pytest.raises(SystemExit, match=r"^error: reward: http://judge: no score after 8 of 8 attempts$"):
            run("train_ppo", *world, *PPO_FLAGS, "--iterations", 3, "--out", out)
    run("train_ppo", *world, *PPO_FLAGS, "--iterations", 3, "--out", out, "--resume")
    run("train_ppo", *world, *PPO_FLAGS, "--iterations", 3, "--out", whole)
    rows = [json.loads((folder / "after.json").read_text()) for folder in (out, whole)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_lora_trains_and_resumes_with_its_optimizer(tmp_path: Path, world: list[str], critic: str) -> None:
    pytest.importorskip("peft")
    flags = [*world, *PPO_FLAGS, "--policy.lora-rank", "2", "--policy.critic", critic, "--ppo.schedule-updates", "3"]
    for name, iterations in (("whole", [2]), ("parts", [1, 2])):
        for number, until in enumerate(iterations):
            resume = ["--resume"] if number else []
            run("train_ppo", *flags, "--iterations", until, "--out", tmp_path / name, *resume)
    whole, parts = (
        json.loads((tmp_path / name / "checkpoint" / "trainer.json").read_text()) for name in ("whole", "parts")
    )
    assert whole == parts
    assert whole["updates"] == 2
    from safetensors.torch import load_file

    adapters = [load_file(tmp_path / name / "policy/adapter/adapter_model.safetensors") for name in ("whole", "parts")]
    assert identical(*adapters)


def test_chat_reads_an_adapter(tmp_path: Path, tiny_lm_folder: Path, tiny_tokenizer: Any, capsys: Any) -> None:
    peft = pytest.importorskip("peft")
    from agents import ValueHeadLM

    policy = ValueHeadLM.from_pretrained(
        tiny_lm_folder, lora=peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_alpha=64)
    )
    policy.save_pretrained(tmp_path / "policy", tiny_tokenizer)
    outputs = []
    for model in (tiny_lm_folder, tmp_path / "policy"):
        run("chat", "--model", model, "--prompt", "w5 w6")
        outputs.append(capsys.readouterr().out)
    assert outputs[0] != outputs[1]


def test_chat_asks_until_the_input_ends(
    tiny_lm_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    lines = iter(["w5 w6", "w7"])

    def answer(self: Console, *_: object) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(Console, "input", answer)
    run("chat", "--model", tiny_lm_folder, "--max-new-tokens", 3)
    shown = capsys.readouterr().out
    assert "w5 w6" in shown
    assert "w7" in shown


def test_resuming_without_a_checkpoint_says_so(tmp_path: Path, world: list[str]) -> None:
    message = rf"^resume: expected a checkpoint in {tmp_path / 'none'}, got none; leave out --resume to begin there"
    with pytest.raises(ValueError, match=message):
        run("train_ppo", *world, *PPO_FLAGS, "--iterations", 1, "--out", tmp_path / "none", "--resume")


def test_resuming_finds_the_checkpoint_that_was_being_replaced(tmp_path: Path, world: list[str]) -> None:
    flags = [*world, *PPO_FLAGS, "--out", tmp_path]
    run("train_ppo", *flags, "--iterations", 1)
    (tmp_path / "checkpoint").rename(tmp_path / ".checkpoint.previous")  # as a crash between two renames leaves it
    run("train_ppo", *flags, "--iterations", 2, "--resume")
    assert json.loads((tmp_path / "checkpoint" / "trainer.json").read_text())["updates"] == 2


@embedded
def test_the_embedded_default_trains(tmp_path: Path) -> None:
    (tmp_path / "heldout.txt").write_text("\n".join(textenv.embedded.HELDOUT.read_text().splitlines()[:4]))
    flags = ["--env.heldout", tmp_path / "heldout.txt", "--env.max-new-tokens", 6, "--env.device", "cpu"]
    run("train_ppo", *flags, *PPO_FLAGS, "--iterations", 1, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "report.html").exists()
    run("chat", "--model", tmp_path / "run" / "policy", "--prompt", "Once upon a time", "--max-new-tokens", 4)
