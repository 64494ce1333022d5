"""The single-file example: the numbers it collects and learns from, its imports, and that it learns."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agents.losses import clipped_surrogate, clipped_value
from agents.returns import gae
from tests.agent_fixtures import even_share, make_env
from tests.sb3_fixtures import float64_logprobs

FILE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "cleanrl_style_ppo.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cleanrl_style_ppo", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for its annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    request.getfixturevalue(request.param).save_pretrained(tmp_path)
    return str(tmp_path)


def reference(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def agent_unlike_its_reference(example: ModuleType, folder: str, temperature: float = 1.0) -> Any:
    agent = example.Agent(folder, temperature)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for parameter in agent.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return agent


def test_it_imports_nothing_of_agents() -> None:
    tree = ast.parse(FILE.read_text(encoding="utf8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    known = {"__future__", "dataclasses", "typing", "gymnasium", "numpy", "torch", "transformers", "textenv", "tyro"}
    assert names <= known


def test_a_rollout_is_what_the_models_say(example: ModuleType, folder: str) -> None:
    """Log-probs, values, rewards, ends, scores and KLs over two rollouts of 9 steps of episodes of up to 6 tokens."""
    envs = make_env(reference(folder), num_envs=5, temperature=0.8)
    agent = agent_unlike_its_reference(example, folder, 0.8)
    ours, theirs = (float64_logprobs(lm, 0.8) for lm in (agent.actor, envs.task.reference.model.module))
    collector = example.Collector(envs, seed=3)
    starts = [None] * 5
    sums = np.zeros(5)
    for number in range(2):
        torch.manual_seed(number)
        rollout = collector.collect(agent, 9)
        scores, kls = [], []
        for t, row in np.ndindex(9, 5):
            prefix = rollout.texts[rollout.row[t, row], : rollout.length[t, row]].tolist()
            if starts[row] is None:
                starts[row], sums[row] = len(prefix), 0.0
            token = int(rollout.actions[t, row])
            logprob = ours(prefix)[token]
            kl = logprob - theirs(prefix)[token]
            sums[row] += kl
            response = [*prefix[starts[row] :], token]
            ended = token in envs.task.stop_token_ids or len(response) == 6
            score = even_share(prefix[: starts[row]], response) if ended else 0.0
            value = agent(torch.tensor([prefix]), torch.tensor([0]), torch.tensor([len(prefix)]))[1]
            assert rollout.logprobs[t, row] == pytest.approx(logprob, abs=1e-4)
            assert rollout.values[t, row] == pytest.approx(float(value.detach()), abs=1e-4)
            assert rollout.rewards[t, row] == pytest.approx(score - 0.1 * kl, abs=1e-4)
            assert bool(rollout.ends[t, row]) == ended
            if ended:
                scores.append(score)
                kls.append(sums[row])
                starts[row] = None
        assert rollout.scores == pytest.approx(scores, abs=1e-5) and rollout.kls == pytest.approx(kls, abs=1e-3)
        assert len(scores) > 4


def test_losses_and_advantages_are_those_of_our_functions(example: ModuleType, folder: str) -> None:
    envs, agent = make_env(reference(folder), num_envs=5), agent_unlike_its_reference(example, folder)
    rollout = example.Collector(envs, seed=3).collect(agent, 9)
    found = example.advantages(rollout, 0.9)
    following = torch.cat([rollout.values[1:], rollout.next_value[None]])
    expected = gae(rollout.rewards.T, rollout.values.T, following.T, (1 - rollout.ends).T, 0.9).T
    assert (found - expected).abs().max() < 1e-5
    noise = 0.3 * torch.randn(rollout.logprobs.shape, generator=torch.Generator().manual_seed(0))
    rollout = rollout._replace(logprobs=rollout.logprobs + noise)
    chosen = torch.arange(0, len(rollout.texts), 2)
    policy_loss, value_loss = example.losses(agent, rollout, chosen, found, found + rollout.values, 0.2)
    inside = torch.isin(rollout.row, chosen)
    now = (rollout.logprobs - noise)[inside]
    surrogate = clipped_surrogate(now[None], rollout.logprobs[inside][None], found[inside][None], 0.2).mean()
    values = rollout.values[inside][None]
    squared = clipped_value(values, values, values + found[inside], None).mean()
    assert 0 < inside.sum() < inside.numel()
    assert (policy_loss - surrogate).abs() < 1e-5 and (value_loss / 2 - squared).abs() < 1e-5


@pytest.mark.parametrize("folder", ["tiny_llama"], indirect=True)
def test_it_learns(example: ModuleType, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    envs = make_env(reference(folder), num_envs=16, kl_coef=0.02)
    args = example.Args(iterations=20, num_steps=6, learning_rate=3e-3)
    history = example.train(example.Agent(folder), envs, args)
    first, last = (np.mean([row["objective"] for row in part]) for part in (history[:3], history[-3:]))
    assert first < 0.65 and last > first + 0.2, [round(row["objective"], 2) for row in history]
    assert len(capsys.readouterr().out.splitlines()) == 20
