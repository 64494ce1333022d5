"""Checkpoints: safetensors and JSON, written aside and renamed, so that the previous one survives a failure."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents.config import PPOConfig
from agents.policy import ValueHeadLM

if TYPE_CHECKING:
    from agents.ppo import PPO
    from agents.sampling import Sampler

STATE, OPTIMIZER = "trainer.json", "optimizer.safetensors"
FORMAT = 1


def save(agent: PPO, folder: Path) -> None:
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
            "config": asdict(agent.config),
            "updates": agent.updates,
            "collections": agent.collections,
            "schedule_updates": agent.schedule_updates,
            "best_objective": agent.best_objective if agent.best_objective > -float("inf") else None,
            "prompts": agent.prompts.state_dict(),
            "kl_controller": agent.task.controller.state_dict(),
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


def load(
    cls: type[PPO],
    folder: Path,
    envs: Any,
    sampler: Sampler | None,
    eval_prompts: Sequence[Any] | None,
    policy: ValueHeadLM | None,
) -> PPO:
    """An agent that goes on where `save` stopped; see `PPO.load`."""
    folder = folder.resolve()
    if not folder.exists() and _beside(folder, "previous").exists():
        folder = _beside(folder, "previous")
    state = _read_state(folder)
    config, task = _read_config(state["config"]), envs.unwrapped.task
    if policy is None:
        policy = ValueHeadLM.from_pretrained(folder, device=task.device, dtype=getattr(torch, state["dtype"]))
    agent = cls(policy, envs, config, sampler, eval_prompts=eval_prompts)
    agent.updates, agent.schedule_updates = state["updates"], state["schedule_updates"]
    agent.collections = state["collections"]
    if state["best_objective"] is not None:
        agent.best_objective = state["best_objective"]
    agent.prompts.load_state_dict(state["prompts"])
    task.controller.load_state_dict(state["kl_controller"])
    _load_optimizer(agent, _read_tensors(folder / OPTIMIZER), state["optimizer_steps"])
    return agent


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


def _read_config(values: dict[str, Any]) -> PPOConfig:
    try:
        return PPOConfig(**values)
    except TypeError as error:
        raise ValueError(f"folder: expected a checkpoint of this version's PPOConfig, got another ({error})") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"folder: expected a readable {path.name}, got {str(path)!r} ({error})") from error


def _parameters(agent: PPO) -> list[tuple[str, torch.nn.Parameter]]:
    """Learning parameters by name, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in agent.policy.named_parameters()}
    return [(names[id(p)], p) for group in agent.optimizer.param_groups for p in group["params"]]


def _optimizer_tensors(agent: PPO) -> tuple[dict[str, Tensor], dict[str, float]]:
    tensors, steps = {}, {}
    for name, parameter in _parameters(agent):
        for key, value in agent.optimizer.state.get(parameter, {}).items():
            if key == "step":
                steps[name] = float(value)
            else:
                tensors[f"{name}/{key}"] = value.detach().contiguous()
    return tensors, steps


def _load_optimizer(agent: PPO, tensors: Mapping[str, Tensor], steps: Mapping[str, float]) -> None:
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
