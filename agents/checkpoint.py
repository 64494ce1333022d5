"""Checkpoints: safetensors and JSON, written aside and renamed, so that the previous one survives a failure."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents.algorithms import description
from agents.algorithms.base import Algorithm
from agents.config import PPOConfig, TrainConfig
from agents.policy import ValueHeadLM

if TYPE_CHECKING:
    from agents.agent import Agent

STATE, OPTIMIZER = "trainer.json", "optimizer.safetensors"
FORMAT = 2


def save(agent: Agent, folder: Path) -> None:
    """Write everything that `load` needs.

    Raises:
        ValueError: If `folder` holds something else than a checkpoint, which would be lost.
        OSError: If it cannot be written; what `folder` held before is untouched.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder / STATE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder: expected a checkpoint, which is replaced, or nothing at all, got {str(folder)!r}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside, previous = _beside(folder, "writing"), _beside(folder, "previous")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        agent.policy.save_pretrained(aside, agent.task.tokenizer)
        tensors, steps = _optimizer_tensors(agent)
        save_file(tensors, aside / OPTIMIZER)
        state = {
            "format": FORMAT,
            "dtype": str(next(agent.policy.lm.parameters()).dtype).removeprefix("torch."),
            "config_of": "PPO" if isinstance(agent.config, PPOConfig) else "any",
            "config": asdict(agent.config),
            "algorithm": description.describe(agent.algorithm),
            "memory": dict(agent.memory),
            "updates": agent.updates,
            "collections": agent.collections,
            "schedule_updates": agent.schedule_updates,
            "best_objective": agent.best_objective if agent.best_objective > -float("inf") else None,
            "prompts": agent.prompts.state_dict(),
            "kl_controller": agent.task.controller.state_dict(),
            "reward": agent.task.reward.state_dict(),
            "optimizer_steps": steps,
        }
        (aside / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf8")
        _sync(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    # A folder cannot be replaced in one step; between these two renames `load` finds the previous one by its name.
    # Without a folder, what has that name may be the only whole checkpoint: it goes when the new one is in place.
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    aside.rename(folder)
    _sync_folder(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


@dataclass(frozen=True)
class Saved:
    """A checkpoint, read as far as its state; nothing is loaded yet."""

    folder: Path
    """Where it lies."""
    state: Mapping[str, Any]
    """What `save` wrote beside the tensors."""

    def name(self) -> str:
        """What its algorithm is called."""
        return description.name_of(self.state["algorithm"])

    def config(self) -> TrainConfig:
        """The settings of the loop.

        Raises:
            ValueError: If they are another version's.
        """
        values, kind = self.state["config"], PPOConfig if self.state["config_of"] == "PPO" else TrainConfig
        try:
            return kind(**values)
        except TypeError as error:
            wanted = f"this version's {kind.__name__}"
            raise ValueError(f"folder: expected a checkpoint of {wanted}, got another ({error})") from error

    def algorithm(self, given: Algorithm | None) -> Algorithm:
        """The algorithm, made again, or the one given if it is the same.

        Raises:
            ValueError: If it holds something that only its author can make again and none is given, or if the one that
                is given is another.
        """
        if given is None:
            return replace(description.make(self.state["algorithm"]), defaults=self.config().loop)
        description.check_same(given, self.state["algorithm"])
        return given

    def policy(self, envs: Any) -> ValueHeadLM:
        """The policy, on the environment's device.

        Raises:
            ValueError: If it cannot be loaded.
        """
        dtype = getattr(torch, self.state["dtype"])
        return ValueHeadLM.from_pretrained(self.folder, device=envs.unwrapped.task.device, dtype=dtype)

    def restore(self, agent: Agent) -> None:
        """Put an agent that was just made where the saved one was.

        Raises:
            ValueError: If the agent is another.
        """
        state = self.state
        description.check_same(agent.algorithm, state["algorithm"])
        agent.updates, agent.schedule_updates = state["updates"], state["schedule_updates"]
        agent.collections, agent.memory = state["collections"], dict(state["memory"])
        if state["best_objective"] is not None:
            agent.best_objective = state["best_objective"]
        agent.prompts.load_state_dict(state["prompts"])
        agent.task.controller.load_state_dict(state["kl_controller"])
        agent.task.reward.load_state_dict(state.get("reward", {}))
        _load_optimizer(agent, _read_tensors(self.folder / OPTIMIZER), state["optimizer_steps"])


def read(folder: Path) -> Saved:
    """What `save` wrote.

    Raises:
        ValueError: If there is no checkpoint, or one of another format.
    """
    folder = folder.resolve()
    if not folder.exists() and _beside(folder, "previous").exists():
        folder = _beside(folder, "previous")
    return Saved(folder, _read_state(folder))


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"folder: expected a checkpoint with {STATE}, got {str(folder)!r} ({error})") from error
    if state.get("format") != FORMAT:
        got = f"{state.get('format')!r} in {str(folder)!r}"
        raise ValueError(f"folder: expected a checkpoint of format {FORMAT}, got {got}")
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"folder: expected a readable {path.name}, got {str(path)!r} ({error})") from error


def _parameters(agent: Agent) -> list[tuple[str, torch.nn.Parameter]]:
    """Learning parameters by name, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in agent.policy.named_parameters()}
    return [(names[id(p)], p) for group in agent.optimizer.param_groups for p in group["params"]]


def _optimizer_tensors(agent: Agent) -> tuple[dict[str, Tensor], dict[str, float]]:
    tensors, steps = {}, {}
    for name, parameter in _parameters(agent):
        for key, value in agent.optimizer.state.get(parameter, {}).items():
            if key == "step":
                steps[name] = float(value)
            else:
                tensors[f"{name}/{key}"] = value.detach().contiguous()
    return tensors, steps


def _load_optimizer(agent: Agent, tensors: Mapping[str, Tensor], steps: Mapping[str, float]) -> None:
    parameters = dict(_parameters(agent))
    unknown = sorted(steps.keys() - parameters.keys())
    if unknown:
        raise ValueError(f"folder: expected a checkpoint of this model, got one with {unknown[0]}, which it has not")
    for name in steps:
        parameter = parameters[name]
        moments = {key: tensors.get(f"{name}/{key}") for key in ("exp_avg", "exp_avg_sq")}
        for key, moment in moments.items():
            if moment is None or moment.shape != parameter.shape:
                got = None if moment is None else tuple(moment.shape)
                raise ValueError(f"folder: expected {key} of shape {tuple(parameter.shape)} for {name}, got {got}")
        agent.optimizer.state[parameter] = {
            "step": torch.tensor(steps[name], device=parameter.device),
            **{key: moment.to(parameter.device) for key, moment in moments.items() if moment is not None},
        }


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
