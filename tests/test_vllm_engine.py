"""The engine's calls of vLLM, in their order, where vLLM is a stand-in that notes them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from agents.sampling.engine import Request, RequestRefused
from agents.sampling.sync import checksum
from agents.sampling.vllm_config import VLLMConfig
from tests.conftest import make_llama

REQUEST = Request([5, 6], 1, 2, [], 0.7, False)
WEIGHTS = {"a": torch.arange(3.0)}


class ClientError(Exception):
    """As vLLM's, which is no ValueError."""


class FakeLLM:
    """Notes what it is asked, and sleeps as vLLM does."""

    def __init__(self, **options: Any) -> None:
        self.options, self.calls, self.awake, self.label = options, list[str](), {"weights", "kv_cache"}, "default"
        self.ranks, self.refuses, self.work = 1, False, lambda: None
        core = SimpleNamespace(resources=SimpleNamespace(engine_manager=SimpleNamespace(processes=[self])))
        self.llm_engine = SimpleNamespace(is_sleeping=lambda: len(self.awake) < 2, engine_core=core)
        self.lives = True
        torch.set_num_threads = lambda count: None

    def is_alive(self) -> bool:
        return self.lives

    def sleep(self, level: int) -> None:
        self.awake.clear()
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.awake |= set(tags)
        self.calls.append(f"wake {' '.join(tags)}")

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> list[dict[str, str]]:
        assert "weights" in self.awake
        self.calls.append(method)
        told = {name: checksum(tensor) for name, tensor in kwargs.get("weights", WEIGHTS.items())}
        return [{name: str(number + rank) for name, number in told.items()} for rank in range(self.ranks)]

    def reset_prefix_cache(self) -> bool:
        assert "kv_cache" in self.awake
        self.calls.append("reset")
        return True

    def update_weight_version(self, label: str) -> None:
        self.label = label
        self.calls.append(f"label {label}")

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        assert self.awake == {"weights", "kv_cache"}
        self.calls.append("generate")
        self.work()
        if self.refuses:
            raise ClientError("too long")
        return [self.output(asked) for asked in params]

    def output(self, asked: Any) -> Any:
        tokens = [7] * asked.max_tokens
        told = None if asked.logprobs is None else [{7: SimpleNamespace(logprob=-0.5)} for _ in tokens]
        span = SimpleNamespace(version=self.label)
        one = SimpleNamespace(token_ids=tokens, logprobs=told, weight_versions=[span])
        return SimpleNamespace(outputs=[one], num_cached_tokens=0)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes engines of the stand-in."""
    vllm, exceptions = ModuleType("vllm"), ModuleType("vllm.exceptions")
    for name, value in {
        "LLM": FakeLLM,
        "SamplingParams": SimpleNamespace,
        "envs": SimpleNamespace(disable_envs_cache=lambda: None),
    }.items():
        setattr(vllm, name, value)
    exceptions.VLLMClientError = ClientError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.exceptions", exceptions)
    from agents.sampling.vllm_sampler import VLLMEngine

    return lambda **settings: VLLMEngine(make_llama(), VLLMConfig(**settings))


def test_weights_are_labelled_when_all_of_them_are_in(start: Callable[..., Any]) -> None:
    engine = start()
    assert engine.load(WEIGHTS, "3-abc") == {"a": checksum(WEIGHTS["a"])}
    assert engine.llm.calls == ["label loading 3-abc", "receive_weights", "reset", "label 3-abc"]
    assert engine.draw([REQUEST])[0].label == "3-abc"


def test_ranks_must_tell_the_same(start: Callable[..., Any]) -> None:
    engine = start()
    engine.llm.ranks = 2
    with pytest.raises(RuntimeError, match="the engine's ranks did not all get the same weights"):
        engine.load(WEIGHTS, "0")


def test_a_sleeping_engine_gets_weights_before_room_for_keys_and_values(start: Callable[..., Any]) -> None:
    engine = start(sleep=True)
    engine.load(WEIGHTS, "0")
    engine.draw([REQUEST])
    assert engine.llm.calls[-2:] == ["generate", "sleep 1"]
    del engine.llm.calls[:]
    engine.load(WEIGHTS, "1")
    assert engine.llm.calls == [
        "wake weights",
        "label loading 1",
        "receive_weights",
        "wake kv_cache",
        "reset",
        "label 1",
    ]
    engine.draw([REQUEST])
    engine.draw([REQUEST])  # the same weights: an evaluation, and the rollout after it
    assert engine.llm.calls[6:] == ["generate", "sleep 1", "wake weights kv_cache", "generate", "sleep 1"]


def test_what_vllm_refuses_is_a_refusal(start: Callable[..., Any]) -> None:
    engine = start()
    engine.llm.refuses = True
    with pytest.raises(RequestRefused, match="vLLM refuses a request: too long"):
        engine.draw([REQUEST])


def test_greedy_rows_ask_for_no_log_probs(start: Callable[..., Any]) -> None:
    engine = start()
    greedy = Request([5, 6], 1, 2, [], 0.7, True)
    assert [one.logprobs for one in engine.draw([REQUEST, greedy])] == [[-0.5, -0.5], []]


def test_setting_threads_works_as_before(start: Callable[..., Any]) -> None:
    before = torch.set_num_threads
    start()
    assert torch.set_num_threads is before


@pytest.mark.parametrize(("fault", "error"), [("ends", ConnectionError), ("hangs", TimeoutError)])
def test_a_process_that_ends_or_hangs_is_not_waited_for(start: Callable[..., Any], fault: str, error: type) -> None:
    engine = start(multiprocess=True, timeout=0.3 if fault == "hangs" else 60.0)

    def work() -> None:
        engine.llm.lives = fault != "ends"
        time.sleep(5)

    engine.llm.work = work
    begin = time.monotonic()
    with pytest.raises(error, match="has ended" if fault == "ends" else r"has not answered for 0\.3 s"):
        engine.draw([REQUEST])
    assert time.monotonic() - begin < 4
