"""The pipeline: which stages run, go on, or are made anew; and that the scripts know the flags they are given."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro

from agents.checkpoint import read as read_checkpoint
from scripts import evaluate, pipeline, train_ppo, train_reward, train_sft
from scripts.pipeline import Flags, main, stages

NAMES = ["sft", "reward", "ppo", "evaluation"]


class Runner:
    """In place of `subprocess.run`: leaves a checkpoint behind where the stage has them, and fails where it is to."""

    def __init__(self, flags: Flags) -> None:
        self.flags, self.failing, self.refusing, self.ran = flags, "", "", []

    def __call__(self, command: Sequence[str]) -> Any:
        script, resumed = Path(command[1]).name, command[-1] == "--resume"
        stage = next(stage for stage in stages(self.flags) if stage.command[0] == script)
        self.ran.append(stage.name + (" resumed" if resumed else ""))
        folder = self.flags.out / stage.name
        assert resumed == any(
            (folder / name).exists() for name in ("checkpoint", "checkpoints", ".checkpoint.previous")
        )
        if stage.name == self.refusing:
            return subprocess.CompletedProcess(command, 2)
        (folder / "metrics.jsonl").touch()
        if stage.checkpoint is not None:
            stage.checkpoint.mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, int(stage.name == self.failing))

    def again(self, failing: str = "") -> list[str]:
        self.ran, self.failing = [], failing
        if failing:
            with pytest.raises(ValueError, match=f"^{failing}: expected exit status 0, got 1"):
                main(self.flags)
        else:
            main(self.flags)
        return self.ran


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    found = Runner(Flags(out=tmp_path / "out"))
    monkeypatch.setattr(pipeline.subprocess, "run", found)
    return found


def test_all_stages_run_once(runner: Runner) -> None:
    assert runner.again() == NAMES
    assert runner.again() == []


def test_an_interrupted_stage_goes_on_where_it_can(runner: Runner) -> None:
    assert runner.again(failing="ppo") == ["sft", "reward", "ppo"]
    assert runner.again() == ["ppo resumed", "evaluation"]
    assert runner.again() == []


def replacing(folder: Path) -> None:
    """Leave what a kill between the two renames of a checkpoint's replacement leaves."""
    (folder / "checkpoint" / "trainer.json").write_text('{"format": 2}')
    (folder / "checkpoint").rename(folder / ".checkpoint.previous")


def test_one_killed_while_it_replaced_its_checkpoint_goes_on(runner: Runner) -> None:
    runner.again(failing="ppo")
    replacing(runner.flags.out / "ppo")
    ppo = next(stage for stage in stages(runner.flags) if stage.name == "ppo")
    assert read_checkpoint(runner.flags.out / "ppo" / "checkpoint").folder in [
        path.resolve() for path in ppo.checkpoints
    ]
    assert runner.again() == ["ppo resumed", "evaluation"]


def test_a_checkpoint_that_was_being_replaced_is_forgotten_too(runner: Runner) -> None:
    runner.again(failing="ppo")
    replacing(runner.flags.out / "ppo")
    shutil.rmtree(runner.flags.out / "reward")
    assert runner.again() == ["reward", "ppo", "evaluation"]
    assert not (runner.flags.out / "ppo" / ".checkpoint.previous").exists()


def test_one_without_checkpoints_begins_anew(runner: Runner) -> None:
    assert runner.again(failing="evaluation") == NAMES
    assert runner.again() == ["evaluation"]


def test_what_was_made_of_an_older_result_is_made_anew(runner: Runner) -> None:
    runner.again()
    shutil.rmtree(runner.flags.out / "reward")
    assert runner.again(failing="reward") == ["reward"]
    assert runner.again() == [
        "reward resumed",
        "ppo",
        "evaluation",
    ]  # PPO from its beginning: its checkpoint was of the older


def test_a_mistyped_flag_does_not_keep_a_folder(runner: Runner) -> None:
    runner.flags, runner.refusing = replace(runner.flags, model=Path("mistyped")), "sft"
    with pytest.raises(ValueError, match=r"^sft: expected exit status 0, got 2"):
        main(runner.flags)
    runner.flags, runner.refusing = Flags(out=runner.flags.out), ""
    assert runner.again() == NAMES


@pytest.mark.parametrize(
    ("name", "rerun"),
    [
        ("model", NAMES),
        ("tales", NAMES),
        ("preferences", NAMES[1:]),
        ("prompts", NAMES[2:]),
        ("heldout", NAMES[2:]),
        ("second", NAMES[3:]),
    ],
)
def test_what_is_made_of_changed_data_is_made_anew(runner: Runner, tmp_path: Path, name: str, rerun: list[str]) -> None:
    data = tmp_path / "data"
    for folder in ("model", "second"):
        (data / folder).mkdir(parents=True)
        (data / folder / "weights").write_text("1")
    for file in ("tales", "preferences", "prompts", "heldout"):
        (data / file).write_text("1")
    paths = {file: data / file for file in ("model", "tales", "preferences", "prompts", "heldout")}
    runner.flags = replace(runner.flags, **paths, second_reward=f"another={data / 'second'}")
    assert runner.again() == NAMES
    changed = data / name / "weights" if (data / name).is_dir() else data / name
    changed.touch()  # another time, the same content
    assert runner.again() == []
    changed.write_text("2")
    assert runner.again() == rerun and runner.again() == []


def test_changed_data_do_not_go_on_from_the_checkpoint(runner: Runner, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One day")
    runner.flags = replace(runner.flags, prompts=prompts)
    runner.again(failing="ppo")
    prompts.write_text("Once upon a time")
    assert runner.again() == ["ppo", "evaluation"]


def test_threads_are_no_setting(runner: Runner) -> None:
    runner.again(failing="ppo")
    runner.flags = replace(runner.flags, threads=2)
    assert runner.again() == ["ppo resumed", "evaluation"]


def test_other_settings_are_refused(runner: Runner) -> None:
    runner.again()
    other = Flags(out=runner.flags.out, kl_coef=0.3)
    with pytest.raises(ValueError, match=r"^out: expected a folder of the same settings, got .* ppo was made with"):
        main(other)


def test_the_scripts_know_these_flags(tmp_path: Path) -> None:
    known = {"sft": train_sft.Flags, "reward": train_reward.Flags, "evaluation": evaluate.Flags}
    flags = Flags(out=tmp_path, iterations=7, kl_coef=0.25, seed=3)
    by_name = {stage.name: list(stage.command[1:]) for stage in stages(flags)}
    assert list(by_name) == NAMES
    for name, kind in known.items():
        tyro.cli(kind, args=by_name[name])
    ppo = train_ppo.parse(by_name["ppo"])
    assert (ppo.iterations, ppo.env.kl_coef, ppo.ppo.seed) == (7, 0.25, 3)
    sft = tyro.cli(train_sft.Flags, args=by_name["sft"])
    assert ppo.policy.model == f"{sft.out}/model"
    reward = tyro.cli(train_reward.Flags, args=by_name["reward"])
    assert ppo.env.reward == f"{reward.out}/model" and reward.recipe.model == f"{sft.out}/model"


@pytest.mark.slow
def test_the_whole_way(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, source, count in (
        ("tales", Flags.tales, 64),
        ("preferences", Flags.preferences, 64),
        ("prompts", Flags.prompts, 32),
        ("heldout", Flags.heldout, 8),
    ):
        lines = source.read_text(encoding="utf8").splitlines()[:count]
        (data / f"{name}{source.suffix}").write_text("\n".join(lines) + "\n", encoding="utf8")
    main(
        Flags(
            tales=data / "tales.jsonl",
            preferences=data / "preferences.jsonl",
            prompts=data / "prompts.txt",
            heldout=data / "heldout.txt",
            iterations=2,
            out=tmp_path / "out",
        )
    )
    assert "<table" in (tmp_path / "out" / "evaluation" / "report.html").read_text(encoding="utf8")
