"""Checkpoints: resuming is exact, a failure while saving loses nothing, and what is no checkpoint is refused."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from agents import PPO, PPOConfig, ValueHeadLM, checkpoint
from tests.agent_fixtures import PROMPTS, identical, make_agent, make_env, make_policy, small_config, weights
from tests.conftest import make_gpt2, make_llama
from textenv import PromptMixture
from textenv.kl import AdaptiveKL

Maker = Callable[[], PPO]


def config(**changes: Any) -> PPOConfig:
    return small_config(batch_episodes=4, schedule_updates=8, warmup_updates=1, **changes)


def everything(agent: PPO) -> dict[str, Any]:
    """All that a run goes on from."""
    moments = {
        f"{name}/{key}": value.clone()
        for name, parameter in agent.policy.named_parameters()
        for key, value in agent.optimizer.state.get(parameter, {}).items()
    }
    return {
        "weights": weights(agent.policy) | moments,
        "updates": agent.updates,
        "position": agent.prompts.position,
        "beta": agent.task.kl_coef,
        "best": agent.best_objective,
        "schedule": agent.schedule_updates,
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return identical(a["weights"], b["weights"]) and all(a[key] == b[key] for key in a if key != "weights")


# Going on.


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("lm", [make_llama, make_gpt2])
@pytest.mark.parametrize("beta", ["fixed", "adaptive"])
def test_resuming_equals_an_uninterrupted_run_bit_for_bit(tmp_path: Path, critic: str, lm: Any, beta: str) -> None:
    def env() -> Any:
        return make_env(lm(), kl_coef=0.1 if beta == "fixed" else AdaptiveKL(0.1, target=0.5, horizon=20.0))

    whole = make_agent(config(), lm=lm(), critic=critic, envs=env())
    whole.learn(4)
    part = make_agent(config(), lm=lm(), critic=critic, envs=env())
    part.learn(2)
    part.save(tmp_path / "checkpoint")
    halfway = everything(part)
    resumed = PPO.load(tmp_path / "checkpoint", env())
    assert resumed.config == part.config
    assert same(halfway, everything(resumed))
    rows = resumed.learn(2)
    assert same(everything(whole), everything(resumed))
    assert [row["lr"] for row in rows] == [pytest.approx(1e-3 * f) for f in (0.75, 0.625)]
    if beta == "adaptive":
        assert whole.task.kl_coef != 0.1


def test_resuming_within_critic_warmup_is_exact(tmp_path: Path) -> None:
    whole, part = (make_agent(config(critic_warmup_updates=2), critic="separate") for _ in range(2))
    whole.learn(3)
    part.learn(1)  # the language model has no optimizer state yet
    part.save(tmp_path / "checkpoint")
    resumed = PPO.load(tmp_path / "checkpoint", make_env())
    resumed.learn(2)
    assert same(everything(whole), everything(resumed))


def test_resuming_in_a_mixture_of_prompts_is_exact(tmp_path: Path) -> None:
    def env(weight: float = 0.3) -> Any:
        return make_env(prompts=PromptMixture([(PROMPTS[:2], 0.7), (PROMPTS[2:], weight)]))

    whole, part = (make_agent(config(), envs=env()) for _ in range(2))
    whole.learn(3)
    part.learn(1)
    part.save(tmp_path / "checkpoint")
    resumed = PPO.load(tmp_path / "checkpoint", env())
    resumed.learn(2)
    assert same(everything(whole), everything(resumed))
    # 12 draws: the cycle of 7 and 3, and the first two of the next, one each.
    assert whole.prompts.state_dict() == resumed.prompts.state_dict()
    assert resumed.prompts.state_dict()["drawn"] == [8, 4]
    with pytest.raises(ValueError, match=r"prompts: expected the checkpoint's weights, \[7, 3\], got \[7, 9\]"):
        PPO.load(tmp_path / "checkpoint", env(0.9))


def test_a_new_agent_resumes_too(tmp_path: Path) -> None:
    whole = make_agent(config())
    whole.save(tmp_path / "checkpoint")
    whole.learn(1)
    resumed = PPO.load(tmp_path / "checkpoint", make_env())
    resumed.learn(1)
    assert same(everything(whole), everything(resumed))


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_resuming_lora_is_exact(tmp_path: Path, tiny_lm_folder: Path, critic: str) -> None:
    peft = pytest.importorskip("peft")

    def policy() -> ValueHeadLM:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            adapter = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear")
            return ValueHeadLM.from_pretrained(tiny_lm_folder, lora=adapter, critic=critic)

    whole = policy()
    whole_agent = PPO(whole, make_env(whole.reference()), config())
    whole_agent.learn(3)
    part = policy()
    agent = PPO(part, make_env(part.reference()), config())
    agent.learn(2)
    agent.save(tmp_path / "checkpoint")
    loaded = ValueHeadLM.from_pretrained(tmp_path / "checkpoint")
    resumed = PPO.load(tmp_path / "checkpoint", make_env(loaded.reference()), policy=loaded)
    resumed.learn(1)
    assert same(everything(whole_agent), everything(resumed))
    assert resumed.task.reference is not None
    assert resumed.task.reference.model.module is loaded.lm


def test_best_objective_and_held_out_prompts_go_on(tmp_path: Path) -> None:
    agent = PPO(make_policy(), make_env(), config(eval_every=1), eval_prompts=[[5, 6], [7]])
    agent.learn(2)
    agent.save(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="eval_prompts: expected held-out prompts"):
        PPO.load(tmp_path / "checkpoint", make_env())
    resumed = PPO.load(tmp_path / "checkpoint", make_env(), eval_prompts=[[5, 6], [7]])
    assert resumed.best_objective == agent.best_objective > -float("inf")


def test_bfloat16_weights_come_back_as_they_were(tmp_path: Path) -> None:
    agent = make_agent(config(), lm=make_llama().bfloat16(), envs=make_env())
    agent.save(tmp_path / "checkpoint")
    assert identical(weights(agent.policy), weights(PPO.load(tmp_path / "checkpoint", make_env()).policy))


# What lies in the folder.


def test_the_folder_is_a_hugging_face_folder_with_nothing_pickled(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    agent = make_agent(config(), critic="separate", envs=make_env(tokenizer=tiny_tokenizer))
    agent.learn(1)
    agent.save(tmp_path / "checkpoint")
    suffixes = {path.suffix for path in (tmp_path / "checkpoint").rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".txt", ".jinja"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert identical(weights(agent.policy.lm), weights(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint")("w5 w6")["input_ids"] == [5, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]  # nothing left beside it


def test_saving_again_replaces_the_whole_folder(tmp_path: Path) -> None:
    agent = make_agent(config(), critic="separate")
    agent.save(tmp_path / "checkpoint")
    shared = make_agent(config())
    shared.learn(1)
    shared.save(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint" / "critic").exists()
    assert PPO.load(tmp_path / "checkpoint", make_env()).updates == 1


# Failures while saving.


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fill_disk(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Let the disk be full when `where` is reached; the files before it are written."""
    place: dict[str, tuple[Any, str]] = {
        "head": (safetensors.torch, "save_file"),
        "optimizer": (checkpoint, "save_file"),
        "fsync": (os, "fsync"),
        "state": (Path, "write_text"),
    }
    owner, name = place[where]
    monkeypatch.setattr(owner, name, full)


@pytest.mark.parametrize("where", ["head", "optimizer", "fsync", "state"])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    agent = make_agent(config(), critic="separate")
    agent.learn(1)
    agent.save(tmp_path / "checkpoint")
    before = everything(agent)
    agent.learn(1)
    with monkeypatch.context() as patch:
        fill_disk(patch, where)
        with pytest.raises(OSError, match="No space left"):
            agent.save(tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]  # nor is a half one left
    assert same(before, everything(PPO.load(tmp_path / "checkpoint", make_env())))
    agent.save(tmp_path / "checkpoint")  # once there is room again
    assert same(everything(agent), everything(PPO.load(tmp_path / "checkpoint", make_env())))


class KilledError(BaseException):
    """The process ends here."""


def kill_at_rename(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real, count = Path.rename, [0]

    def rename(self: Path, target: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            raise KilledError
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent(config())
    agent.learn(1)
    agent.save(tmp_path / "checkpoint")
    before = everything(agent)
    agent.learn(1)
    with monkeypatch.context() as patch:
        kill_at_rename(patch, 2)
        with pytest.raises(KilledError):
            agent.save(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    assert same(before, everything(PPO.load(tmp_path / "checkpoint", make_env())))
    # A second kill at the same place must not cost the only whole checkpoint.
    with monkeypatch.context() as patch:
        kill_at_rename(patch, 1)
        with pytest.raises(KilledError):
            agent.save(tmp_path / "checkpoint")
    assert same(before, everything(PPO.load(tmp_path / "checkpoint", make_env())))
    agent.save(tmp_path / "checkpoint")
    assert same(everything(agent), everything(PPO.load(tmp_path / "checkpoint", make_env())))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="folder: expected a checkpoint, which is replaced, or nothing at all"):
        make_agent(config()).save(tmp_path)
    assert (tmp_path / "metrics.jsonl").exists()
    (tmp_path / "empty").mkdir()
    make_agent(config()).save(tmp_path / "empty")


# What is refused.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    agent = make_agent(config())
    agent.learn(1)
    agent.save(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_checkpoint_of_another_vocabulary_is_refused(saved: Path) -> None:
    other = make_llama(vocab_size=70)
    with pytest.raises(ValueError, match="expected the reference's vocabulary of 70, got 64"):
        PPO.load(saved, make_env(other))


def test_a_checkpoint_of_another_prompt_list_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts: expected the checkpoint's 6 prompts.*got 5"):
        PPO.load(saved, make_env(prompts=PROMPTS[:5]))


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_policy_of_another_shape_is_refused(tmp_path: Path, saved: Path, critic: str) -> None:
    if critic == "separate":  # the checkpoint knows parameters that the policy has not
        agent = make_agent(config(), critic="separate")
        agent.learn(1)
        agent.save(saved)
        policy = make_policy()
    else:
        policy = make_policy(make_llama(intermediate_size=40))
    with pytest.raises(ValueError, match="folder: expected"):
        PPO.load(saved, make_env(), policy=policy)


def edit(folder: Path, **changes: Any) -> None:
    state = json.loads((folder / "trainer.json").read_text())
    (folder / "trainer.json").write_text(json.dumps(state | changes))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "trainer.json").unlink(), "expected a checkpoint with trainer.json"),
        (lambda folder: (folder / "trainer.json").write_text("{"), "expected a checkpoint with trainer.json"),
        (lambda folder: edit(folder, format=99), "expected a checkpoint of format 2, got 99"),
        (lambda folder: (folder / "optimizer.safetensors").unlink(), "expected a readable optimizer.safetensors"),
        (
            lambda folder: (folder / "optimizer.safetensors").write_bytes(b"x" * 100),
            "expected a readable optimizer.safetensors",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "source"),
        (lambda folder: edit(folder, config={"no_such_setting": 1}), "no_such_setting"),
    ],
)
def test_a_damaged_checkpoint_is_refused(saved: Path, break_it: Callable[[Path], Any], message: str) -> None:
    break_it(saved)
    with pytest.raises(ValueError, match=message):
        PPO.load(saved, make_env())


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder: expected a checkpoint with trainer.json, got .*nowhere"):
        PPO.load(tmp_path / "nowhere", make_env())
