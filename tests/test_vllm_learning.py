"""Learning from real vLLM, and what happens if the engine is not what the trainer thinks (`make test-vllm`)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from agents import PPO, PPOConfig
from agents.critic import build_critic
from agents.mismatch import SamplerMismatch
from agents.policy import ValueHeadLM
from agents.sampling import fingerprint, named_weights
from agents.sampling.engine import Request, RequestRefused
from tests.agent_fixtures import even_share, make_env
from tests.test_sampler_contract import EOS, global_states, llama, vllm_sampler, vllm_server_sampler

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of vLLM, at its import and when an engine starts
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm` runs this"),
]
# Longer than two blocks of the prefix cache, so that a stale one shows.
PROMPTS = [[5 + i] * 150 + [20 + i] * 150 for i in range(4)]


def model() -> Any:
    torch.manual_seed(0)
    lm = llama()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(1.7)
    return lm


def agent_of(sampler: Callable[[Any], Any], rate: float = 1e-6, **changes: Any) -> PPO:
    lm = model()
    env = make_env(model(), even_share, prompts=PROMPTS, stop_token_ids=[EOS], max_new_tokens=8, temperature=0.7)
    settings = {"batch_episodes": 8, "minibatches": 2, "epochs": 2, "learning_rate": rate, "seed": 3, **changes}
    policy = ValueHeadLM(lm, build_critic(lm, "shared"))
    return PPO(policy, env, PPOConfig(**settings), sampler(policy))


@pytest.fixture
def agent() -> Iterator[PPO]:
    found = agent_of(vllm_sampler)
    yield found
    found.sampler.close()


def test_it_learns_with_next_to_no_gap(agent: PPO) -> None:
    rows = agent.learn(3)
    assert max(row["sampler/kl"] for row in rows) < 1e-9 and max(row["sampler/logprob_gap"] for row in rows) < 1e-4
    rollout = agent.collect()
    assert rollout.fingerprint == fingerprint(named_weights(agent.policy.lm), 3)


def skip_the_push(sampler: Any) -> None:
    sampler.push = lambda weights, version: None


def push_a_wrong_layer(sampler: Any) -> None:
    send = sampler._engine._send

    def swapped(weights: Any) -> Any:
        name = "model.layers.{}.mlp.up_proj.weight"
        return send({**weights, name.format(1): weights[name.format(0)]})

    sampler._engine._send = swapped


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (skip_the_push, "weights of version 0, the trainer has 1: .* differ"),
        (push_a_wrong_layer, r"model\.layers\.1\.mlp\.up_proj\.weight differ"),
    ],
)
def test_a_broken_push_is_caught_within_an_iteration(agent: PPO, breakage: Any, message: str) -> None:
    agent.learn(1)
    breakage(agent.sampler)
    before = fingerprint(named_weights(agent.policy.lm), 0)
    with pytest.raises(SamplerMismatch, match=message):
        agent.learn(1)
    assert fingerprint(named_weights(agent.policy.lm), 0) == before


@pytest.mark.parametrize("broken", ["reset", "load"])
def test_a_cache_that_is_not_reset_is_caught_and_the_engine_started_again(agent: PPO, broken: str) -> None:
    agent.learn(1)
    engine: Any = agent.sampler._engine
    told = agent.sampler._loaded[1].checksums
    setattr(engine, broken, lambda *ignored: told)
    assert agent.learn(1)[0]["sampler/logprob_gap"] < 1e-4
    assert agent.sampler._engine is not engine


def test_an_engine_in_this_process_leaves_it_as_it_was() -> None:
    lm = model()
    before, set_num_threads = global_states(), torch.set_num_threads
    vllm_sampler(lm).close()
    assert global_states() == before
    assert torch.set_num_threads is set_num_threads and not torch.distributed.is_initialized()


def test_an_engine_shares_no_process_with_somebodys_distributed_training(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"multiprocess: expected True, because .* torch\.distributed"):
            vllm_sampler(model())
    finally:
        torch.distributed.destroy_process_group()


def test_weights_that_leave_some_out_are_no_load(agent: PPO) -> None:
    """vLLM itself only warns of them."""
    engine: Any = agent.sampler._engine
    named = dict(named_weights(agent.policy.lm))
    del named["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(RuntimeError, match=r"got none of model\.layers\.1\.mlp\.down_proj\.weight"):
        engine.load(named, "some")


def test_a_refused_request_leaves_the_engine_as_good_as_before(agent: PPO) -> None:
    engine: Any = agent.sampler._engine
    request = Request([5] * 3, 1, 4, [], 1.0, False)
    with pytest.raises(RequestRefused, match="vLLM refuses a request"):
        engine.draw([request, replace(request, prompt=[5] * 600)])
    assert [len(one.tokens) for one in engine.draw([request])] == [4]


def test_adapters_are_merged_into_what_is_pushed() -> None:
    from peft import LoraConfig, get_peft_model

    wanted = ["q_proj", "v_proj", "down_proj"]
    lm: Any = get_peft_model(model(), LoraConfig(r=2, target_modules=wanted, init_lora_weights=False))
    env = make_env(model(), even_share, prompts=PROMPTS, stop_token_ids=[EOS], max_new_tokens=8)
    policy = ValueHeadLM(lm, build_critic(lm, "shared"))
    settings = PPOConfig(batch_episodes=8, minibatches=2, learning_rate=1e-2)
    agent = PPO(policy, env, settings, vllm_sampler(policy))
    assert max(row["sampler/logprob_gap"] for row in agent.learn(3)) < 1e-4
    agent.sampler.close()


def test_log_probs_of_another_law_are_caught_at_once() -> None:
    agent = agent_of(lambda policy: vllm_sampler(policy, more={"logprobs_mode": "raw_logprobs"}))
    before = fingerprint(named_weights(agent.policy.lm), 0)
    with pytest.raises(SamplerMismatch, match=r"nats per token \(bounded KL\) from the trainer's"):
        agent.learn(1)
    assert fingerprint(named_weights(agent.policy.lm), 0) == before
    agent.sampler.close()


def test_bfloat16_is_corrected_and_no_alarm() -> None:
    agent = agent_of(lambda policy: vllm_sampler(policy, dtype="bfloat16"))
    rows = agent.learn(2)
    assert all(1e-7 < row["sampler/kl"] < 5e-3 for row in rows)
    assert all(row["sampler/effective_frac"] > 0.99 for row in rows)
    agent.sampler.close()


def kill_soon(pid: int, group: bool) -> None:
    """In the middle of what is asked next."""
    kill = os.killpg if group else os.kill
    threading.Timer(0.05, kill, (pid, signal.SIGKILL)).start()


@pytest.mark.parametrize("where", ["process", "server"])
def test_an_engine_that_is_killed_within_a_rollout_is_started_again(where: str) -> None:
    make = vllm_server_sampler if where == "server" else lambda policy: vllm_sampler(policy, multiprocess=True)
    agent, twin = agent_of(make, rate=1e-4), agent_of(vllm_sampler, rate=1e-4)
    agent.learn(1)
    engine: Any = agent.sampler._engine
    draw = engine.draw

    def killed(requests: Any) -> Any:
        kill_soon(engine.server.process.pid if where == "server" else engine._processes[0].pid, where == "server")
        return draw([replace(request, max_new_tokens=200, stop_token_ids=[]) for request in requests])  # takes a while

    engine.draw = killed
    agent.learn(1)
    assert agent.sampler._engine is not engine
    twin.learn(2)
    for (name, tensor), (_, other) in zip(named_weights(agent.policy), named_weights(twin.policy), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-6, msg=name)
    agent.sampler.close()
    twin.sampler.close()
