"""What training leaves beside a policy, and what evaluations and chats make of it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

tyro = pytest.importorskip("tyro")

from scripts import chat, evaluate, train_ppo  # noqa: E402
from scripts.options import EnvFlags  # noqa: E402
from scripts.trained import FILE, TrainedWith, runs_joined, shown  # noqa: E402
from tests.test_evaluate_script import REWARDS  # noqa: E402
from tests.test_scripts import restored  # noqa: E402, F401 - of grad mode, which a chat turns off

PPO = ["--ppo.batch-episodes", "4", "--ppo.minibatches", "2", "--ppo.epochs", "1", "--threads", "1"]


def words(*given: object) -> list[str]:
    return [str(word) for word in given]


@pytest.fixture
def task(tmp_path: Path, tiny_lm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of training whose every setting is another than the default; paths are relative."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "prompts.txt").write_text("w5 w6\nw7\nw8 w9 w10\n")
    (tmp_path / "heldout.csv").write_text("q\nw11 w12\nw13\n")
    (tmp_path / "prompts.csv").write_text("q\nw5 w6\nw7\nw8 w9 w10\n")
    shutil.copytree(tiny_lm_folder, tmp_path / "start")
    flags = ["--policy.model", "start", "--env.reward", "my_rewards:length", "--env.prompts", "prompts.csv"]
    flags += ["--env.heldout", "heldout.csv", "--env.prompt-column", "q", "--env.max-new-tokens", 5]
    flags += ["--env.stop-token-ids", 1, 7, "--env.temperature", 0.5, "--env.device", "cpu"]
    return words(*flags, *PPO)


def evaluated(capsys: pytest.CaptureFixture[str], *given: object) -> tuple[dict[str, Any], str]:
    """The results of `scripts/evaluate.py`, and what it prints."""
    capsys.readouterr()
    trust = "--env.trust-remote-code"  # the reward is code
    evaluate.main(evaluate.parse(words(*given, "--out", "evaluation", "--env.device", "cpu", trust)))
    return json.loads(Path("evaluation/evaluation.json").read_text()), " ".join(capsys.readouterr().out.split())


def test_an_evaluation_without_flags_asks_as_training_did(
    tmp_path: Path, task: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_ppo.main(train_ppo.parse([*task, "--iterations", "1", "--out", "run"]))
    shutil.copytree("run/policy", "elsewhere/copied")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    found, told = evaluated(capsys, "--model", tmp_path / "elsewhere" / "copied")
    before = json.loads((tmp_path / "run" / "before.json").read_text())
    assert found["results"]["reference"]["responses"] == before["responses"]
    assert found["results"]["reference"]["scores"] == before["scores"]
    settings = found["settings"]
    assert settings["env.reference"] == str(tmp_path / "start") and settings["env.stop_token_ids"] == "(1, 7)"
    assert "was trained: reference" in told and "reward my_rewards:length" in told and "temperature 0.5" in told
    assert "measured alike" not in told
    found, told = evaluated(capsys, "--model", tmp_path / "run/policy", "--env.temperature", "1.0")
    assert found["settings"]["env.temperature"] == "1.0"  # given, though it is the default
    assert found["settings"]["env.max_new_tokens"] == "5"
    assert "max_new_tokens 5" in told and "model was trained with temperature 0.5; all are measured alike" in told


def test_code_that_a_folder_names_is_not_run_unless_it_is_named_here(task: list[str]) -> None:
    train_ppo.main(train_ppo.parse([*task, "--iterations", "1", "--out", "run"]))
    with pytest.raises(ValueError, match=r"^env.reward: expected --env.reward my_rewards:length or another, because"):
        evaluate.parse(["--model", "run/policy"])
    for given in (["--env.reward", "my_rewards:length"], ["--env.trust-remote-code"]):
        assert evaluate.parse(["--model", "run/policy", *given]).env.reward == "my_rewards:length"
    assert evaluate.parse(["--model", "run/policy", "--env.reward", "other"]).env.reward == "other"


def test_others_of_other_settings_are_told(tmp_path: Path, task: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for name, more in (("one", []), ("two", ["--env.max-new-tokens", "3", "--env.kl-coef", "0.5"])):
        train_ppo.main(train_ppo.parse([*task, "--iterations", "1", "--out", name, *more]))
    found, told = evaluated(capsys, "--model", "one/policy", "--others", "two/policy")
    assert told.count("measured alike") == 1
    assert " policy was trained with max_new_tokens 3; all are measured alike" in told
    assert max(found["results"]["policy"]["lengths"]) == 5


def test_a_policy_without_the_file_is_evaluated_by_the_flags(
    tmp_path: Path, tiny_lm_folder: Path, task: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.parse(["--model", str(tiny_lm_folder)]).env == EnvFlags()
    assert chat.parse(["--model", str(tiny_lm_folder)]) == chat.Flags(model=str(tiny_lm_folder))
    assert chat.parse([]) == chat.Flags()
    given = ["--env.reference", "start", "--env.heldout", "prompts.txt", "--env.reward", "my_rewards:length"]
    _, told = evaluated(capsys, "--model", tiny_lm_folder, *given)
    assert "was trained" not in told


def test_lora_policies_know_their_base(tmp_path: Path, task: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    train_ppo.main(train_ppo.parse([*task, "--policy.lora-rank", "2", "--iterations", "1", "--out", "run"]))
    found, _ = evaluated(capsys, "--model", "run/policy")
    before, after = (json.loads(Path(f"run/{name}.json").read_text()) for name in ("before", "after"))
    assert found["settings"]["env.reference"] == str(tmp_path / "start")
    assert found["results"]["reference"]["responses"] == before["responses"]
    assert found["results"]["model"]["prompts"] == after["prompts"]
    shutil.copytree("run", "bare")
    capsys.readouterr()
    for out, more in (("run", ["--policy.lora-rank", "2"]), ("bare", [])):
        again = ["--out", out, "--iterations", "2", "--resume", "--env.reward", "my_rewards:length", *more, *PPO]
        train_ppo.main(train_ppo.parse(again))
    assert "So far" not in capsys.readouterr().out
    assert Path("run/after.json").read_text() == Path("bare/after.json").read_text()


def test_kept_policies_are_a_line_of_the_frontier(
    tmp_path: Path, task: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "policies" / "000009").mkdir(parents=True)  # of an earlier run
    flags = [*task, "--out", "run", "--keep-every", "2", "--save-every", "1", "--ppo.eval-every", "1"]
    train_ppo.main(train_ppo.parse([*flags, "--iterations", "3"]))
    train_ppo.main(train_ppo.parse([*flags, "--iterations", "5", "--resume"]))
    policies = sorted(Path("run/policies").iterdir())
    assert [path.name for path in policies] == ["000002", "000004"]
    for folder, updates in (("policies/000002", 2), ("policies/000004", 4), ("policy", 5), ("checkpoint", 5)):
        trained = TrainedWith.load(f"run/{folder}")
        assert trained is not None and (trained.updates, trained.run) == (updates, str(tmp_path / "run"))
    best, state = TrainedWith.load("run/best"), json.loads(Path("run/best/trainer.json").read_text())
    assert best is not None and best.updates == state["updates"]

    joined: list[Any] = []
    written = evaluate.write_evaluation
    monkeypatch.setattr(
        evaluate, "write_evaluation", lambda *a, lines, **o: joined.append(lines) or written(*a, lines=lines, **o)
    )
    evaluated(capsys, "--model", "run/policy", "--others", *reversed(policies), "unlike=start")
    evaluated(capsys, "--model", "run/policy", "--others", policies[0], "--baseline", "start")
    assert joined == [[["reference", "000002", "000004", "model"]], [["000002", "model"]]]


def test_the_last_policy_is_not_kept_twice(tmp_path: Path, task: list[str]) -> None:
    train_ppo.main(train_ppo.parse([*task, "--out", "run", "--keep-every", "1", "--iterations", "2"]))
    assert [path.name for path in Path("run/policies").iterdir()] == ["000001"]


def test_a_run_goes_on_in_its_own_environment(
    tmp_path: Path, tiny_lm_folder: Path, task: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def go(*given: str) -> str:
        capsys.readouterr()
        train_ppo.main(train_ppo.parse([*given, *PPO, "--ppo.schedule-updates", "2"]))
        return " ".join(capsys.readouterr().out.split())

    more = [
        "--env.kl-coef",
        "0.5",
        "--env.missing-eos-penalty",
        "0.25",
        "--env.prompts",
        "prompts.csv=2",
        "heldout.csv",
    ]
    for out in ("run", "whole"):
        go(*task, *more, "--iterations", "1" if out == "run" else "2", "--out", out)
    again = ["--out", "run", "--iterations", "2", "--resume", "--env.device", "cpu"]
    with pytest.raises(ValueError, match=r"^env.reward: expected --env.reward my_rewards:length or another, because"):
        train_ppo.parse(again)
    again += ["--env.reward", "my_rewards:length"]
    told = go(*again)
    assert "So far" not in told and "ignored" not in told and "has no" not in told
    for name in ("checkpoint/trainer.json", "after.json"):
        assert Path("run", name).read_text() == Path("whole", name).read_text(), name
    whole, run = (json.loads(Path(out, "policy", FILE).read_text()) for out in ("whole", "run"))
    assert run | {"run": whole["run"]} == whole
    start = str(tmp_path / "start")
    assert (run["model"], run["env"]["reference"], run["env"]["kl_coef"]) == (start, start, 0.5)
    assert run["env"]["prompts"] == [f"{tmp_path}/prompts.csv=2.0", f"{tmp_path}/heldout.csv=1.0"]

    told = go(*again, "--env.temperature", "1.0")
    assert "So far the run had temperature 0.5; from here on it has temperature 1.0." in told
    assert json.loads(Path("run/policy", FILE).read_text())["env"]["temperature"] == 1.0
    Path("run/checkpoint", FILE).unlink()
    assert f"The checkpoint has no {FILE}: model and environment are those of the flags." in go(*again, *task, *more)


def test_the_best_policy_is_of_this_run_and_says_its_own_update(task: list[str]) -> None:
    flags = [*task, "--out", "run", "--ppo.eval-every", "1"]
    Path("run/best").mkdir(parents=True)
    Path("run/best/trainer.json").write_text("{}")  # of an earlier run, without what it was trained with
    train_ppo.main(train_ppo.parse([*task, "--out", "run", "--iterations", "1"]))
    assert not Path("run/best").exists()
    train_ppo.main(train_ppo.parse([*flags, "--iterations", "1"]))
    state = json.loads(Path("run/checkpoint/trainer.json").read_text()) | {"best_objective": 1e9}
    Path("run/checkpoint/trainer.json").write_text(json.dumps(state))  # or a later update may be the best
    Path("run/best", FILE).unlink()  # as a run leaves it that is killed between the two
    train_ppo.main(train_ppo.parse([*flags, "--iterations", "2", "--resume"]))
    best = TrainedWith.load("run/best")
    assert best is not None and best.updates == 1


def trained(run: str, updates: int, *, model: str | None = None, **env: Any) -> TrainedWith:
    return TrainedWith.of(replace(EnvFlags(), **env), model, run=Path(run), updates=updates)


def test_only_policies_of_one_run_are_joined() -> None:
    policies = {
        "reference": None,
        "late": trained("/a", 20, reference="hub/x"),
        "other": trained("/b", 10, model="hub/z", reference="hub/x"),
        "early": trained("/a", 5, reference="hub/x"),
        "model": None,
    }
    env = EnvFlags(reference="hub/x")
    assert runs_joined(policies, env, "reference") == [["reference", "early", "late"], ["other"]]
    assert runs_joined(policies, env, None) == [["early", "late"], ["other"]]
    assert runs_joined(policies, EnvFlags(reference="hub/y"), "reference") == [["early", "late"], ["other"]]


def test_the_reference_is_what_was_the_reference(task: list[str], tmp_path: Path) -> None:
    class Done:
        updates = 7

    def of(*given: str) -> TrainedWith:
        return train_ppo.trained(train_ppo.parse(list(given)), Done())  # type: ignore[arg-type]

    assert (of().env["reference"], of().from_reference) == (None, True)
    assert of("--policy.model", "start", "--env.reference", str(tmp_path / "start")).from_reference
    both = of("--policy.model", "start", "--env.reference", "hub/x")
    assert (both.env["reference"], both.from_reference, both.updates) == ("hub/x", False, 7)
    lora = of("--policy.model", "start", "--env.reference", "hub/x", "--policy.lora-rank", "2")
    assert (lora.env["reference"], lora.from_reference) == (str(tmp_path / "start"), True)
    assert of("--env.reference", "hub/x").from_reference


def test_the_file_trusts_nobody_and_comes_back(tmp_path: Path) -> None:
    given = EnvFlags(stop_token_ids=(1, 7), temperature=0.5, trust_remote_code=True, reward="a:b", kl_coef=3.0)
    saved = TrainedWith.of(given, None, run=tmp_path, updates=3)
    saved.save(tmp_path)
    assert TrainedWith.load(tmp_path) == saved
    untrusted = replace(given, trust_remote_code=False, reward=None)
    assert saved.flags() == untrusted
    assert saved.with_code(replace(untrusted, trust_remote_code=True)) == given
    assert shown(saved.kept(given)) == "reward a:b, stop_token_ids (1, 7), temperature 0.5"
    text = (tmp_path / FILE).read_text()
    assert "trust_remote_code" not in text
    message = rf"^model: expected a {FILE} of format 2, got another in {re.escape(str(tmp_path))}"
    broken = {text.replace('"format": 2', '"format": 1'), text.replace('"temperature"', '"heat"'), "[]", "{", "{}"}
    for other in (*broken, text.replace('"env": {', '"env": {"more": 1,'), text.replace('"updates"', '"steps"')):
        (tmp_path / FILE).write_text(other)
        with pytest.raises(ValueError, match=message):
            TrainedWith.load(tmp_path)
    assert TrainedWith.load("some/hub-name") is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run", ["a"]),
        ("run", None),
        ("model", 1),
        ("updates", "3"),
        ("updates", True),
        ("updates", 3.0),
        ("from_reference", 1),
        ("reward", ["a:b"]),
        ("temperature", "hot"),
        ("temperature", False),
        ("max_new_tokens", None),
        ("max_new_tokens", 5.5),
        ("stop_token_ids", "12"),
        ("stop_token_ids", [1, "2"]),
        ("stop_token_ids", 1),
        ("prompts", "prompts.txt"),
        ("prompt_overflow", "right"),
        ("chat_template", "yes"),
        ("dtype", None),
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    TrainedWith.of(EnvFlags(), None, run=tmp_path, updates=3).save(tmp_path)
    saved = json.loads((tmp_path / FILE).read_text())
    (saved if name in saved else saved["env"])[name] = value
    (tmp_path / FILE).write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=rf"^model: expected a {FILE} .*\({name}: expected .*, got .*\)$"):
        TrainedWith.load(tmp_path)


def test_whole_numbers_are_numbers(tmp_path: Path) -> None:
    TrainedWith.of(EnvFlags(), None, run=tmp_path, updates=3).save(tmp_path)
    saved = json.loads((tmp_path / FILE).read_text())
    saved["env"] |= {"temperature": 2, "kl_target": 6, "stop_token_ids": []}
    (tmp_path / FILE).write_text(json.dumps(saved))
    loaded = TrainedWith.load(tmp_path)
    assert loaded is not None
    assert loaded.flags() == EnvFlags(temperature=2.0, kl_target=6.0, stop_token_ids=())


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"format": 2, "env": ' * 50_000, '{"format": 2, "env": {"\\u001b[2J": 1}}']
)
def test_a_file_made_to_break_is_one_line_that_a_terminal_can_show(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"^model: expected a {FILE}") as refused:
        TrainedWith.load(tmp_path)
    assert "\x1b" not in str(refused.value)


def test_what_a_file_says_is_shown_and_not_obeyed(
    tmp_path: Path, tiny_lm_folder: Path, task: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_lm_folder, tmp_path / "policy")
    strange = "start\x1b[2J"  # a folder that is there
    shutil.copytree(tiny_lm_folder, tmp_path / strange)
    env = EnvFlags(reference=strange, reward="my_rewards:length", heldout="prompts.txt")
    TrainedWith.of(env, None, run=tmp_path, updates=3).save(tmp_path / "policy")
    _, told = evaluated(capsys, "--model", "policy")
    assert "\x1b[2J" not in told and "start\\x1b[2J" in told.replace(" ", "")


def test_a_chat_samples_as_training_did(
    tmp_path: Path, tiny_lm_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_lm_folder, tmp_path / "policy")
    env = EnvFlags(max_new_tokens=4, temperature=0.25, stop_token_ids=(2, 3), chat_template=True)
    TrainedWith.of(env, None, run=tmp_path, updates=3).save(tmp_path / "policy")
    flags = chat.parse(["--model", str(tmp_path / "policy"), "--temperature", "1.0"])
    assert (flags.max_new_tokens, flags.temperature, flags.stop_token_ids) == (4, 1.0, (2, 3))
    assert flags.chat_template
    chat.main(replace(flags, chat_template=False, prompt="w5 w6"))
    shown = capsys.readouterr().out
    assert "as it was trained: max_new_tokens 4, stop_token_ids (2, 3)\n" in shown and "w5 w6" in shown
