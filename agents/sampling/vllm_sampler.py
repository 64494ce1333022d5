"""Sampling with vLLM, in this process or in one of its own. Needs the extra `vllm`.

Tokens in, tokens out: no text, no sampling defaults of a model's folder, no end but the stop tokens asked for.
"""

from __future__ import annotations

import gc
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from agents.policy import ValueHeadLM
from agents.sampling.engine import Drawn, EngineSampler, Request, RequestRefused
from agents.sampling.random_states import kept_random_states
from agents.sampling.vllm_config import VLLMConfig
from agents.sampling.vllm_terms import (
    check_version,
    engine_options,
    one_label,
    same_everywhere,
    sampling_params,
    save_description,
    weight_file,
)


class VLLMSampler(EngineSampler):
    """Draws responses with a vLLM engine; global random states are after each call what they were before."""

    def __init__(self, policy: Any, config: VLLMConfig | None = None) -> None:
        """Start the engine and give it the policy's weights.

        Args:
            policy: As `EngineSampler`.
            config: Of the engine.

        Raises:
            ImportError: If vLLM is not installed, or in a version that this was not written for.
            ValueError: As `EngineSampler`; or if the engine would share this process with somebody's torch.distributed.
        """
        check_version()
        config = config or VLLMConfig()
        if not config.multiprocess:
            _check_alone()
        model = policy.lm if isinstance(policy, ValueHeadLM) else policy
        super().__init__(policy, lambda: VLLMEngine(model, config), max_model_len=config.max_model_len)


class VLLMEngine:
    """`vllm.LLM` as an `agents.sampling.engine.Engine`."""

    def __init__(self, model: Any, config: VLLMConfig) -> None:
        """Start it, without weights.

        Args:
            model: Of whose configuration it is.
            config: Its settings.
        """
        self.config = config
        with kept_random_states(), _environment(config.multiprocess), tempfile.TemporaryDirectory() as folder:
            from vllm import LLM, envs  # pyright: ignore[reportMissingImports]

            envs.disable_envs_cache()  # an earlier engine's settings
            save_description(model, folder)
            self.llm: Any = LLM(model=folder, **engine_options(model, config))

    def load(self, weights: Mapping[str, Tensor], label: str) -> Mapping[str, int]:
        """See `Engine.load`."""
        with kept_random_states():
            told = self._watched(lambda: self._load(weights, label))
        return same_everywhere(told, "engine's ranks")

    def reset(self) -> None:
        """Forget keys and values of prompts."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset")

    def draw(self, requests: Sequence[Request]) -> list[Drawn]:
        """See `Engine.draw`."""
        with kept_random_states():
            outputs = self._watched(lambda: self._generate(requests))
        return [_drawn(request, output) for request, output in zip(requests, outputs, strict=True)]

    def close(self) -> None:
        """See `Engine.close`."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()

    def _load(self, weights: Mapping[str, Tensor], label: str) -> list[dict[str, str]]:
        self._wake("weights")  # room for keys and values may not be there until those of the trainer are gone
        self.llm.update_weight_version(f"loading {label}")
        told = self._send(weights)
        self._wake("kv_cache")
        self.reset()
        self.llm.update_weight_version(label)
        return told

    def _generate(self, requests: Sequence[Request]) -> list[Any]:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.exceptions import VLLMClientError  # pyright: ignore[reportMissingImports]

        asked = [sampling_params(request) for request in requests]
        self._wake("weights", "kv_cache")
        try:
            outputs = self.llm.generate(
                [{"prompt_token_ids": request.prompt} for request in requests],
                [SamplingParams(**params) for params in asked],
                use_tqdm=False,
            )
        except VLLMClientError as error:
            raise RequestRefused(f"vLLM refuses a request: {error}") from error
        if self.config.sleep:
            self.llm.sleep(level=1)
        return outputs

    def _watched(self, work: Callable[[], Any]) -> Any:
        """Do it; but where the engine is a process, do not wait for one that has ended, nor for ever.

        vLLM waits for the answer of an engine that was killed.
        """
        if not self.config.multiprocess:
            return work()
        answers: queue.Queue[tuple[bool, Any]] = queue.Queue()

        def answer() -> None:
            try:
                answers.put((True, work()))
            except Exception as error:
                answers.put((False, error))

        threading.Thread(target=answer, daemon=True).start()
        limit = time.monotonic() + self.config.timeout
        while True:
            with suppress(queue.Empty):
                well, found = answers.get(timeout=0.2)
                if well:
                    return found
                raise found
            if not all(process.is_alive() for process in self._processes):
                raise ConnectionError("the engine's process has ended")
            if time.monotonic() > limit:
                raise TimeoutError(f"the engine has not answered for {self.config.timeout:g} s")

    @property
    def _processes(self) -> list[Any]:
        return self.llm.llm_engine.engine_core.resources.engine_manager.processes

    def _send(self, weights: Mapping[str, Tensor]) -> list[dict[str, str]]:
        if not self.config.multiprocess:
            return self.llm.collective_rpc("receive_weights", kwargs={"weights": iter(weights.items())})
        with weight_file(weights) as path:
            return self.llm.collective_rpc("receive_weights", kwargs={"path": str(path)})

    def _wake(self, *what: str) -> None:
        if self.config.sleep and self.llm.llm_engine.is_sleeping():
            self.llm.wake_up(tags=list(what))


def _drawn(request: Request, output: Any) -> Drawn:
    (one,) = output.outputs
    tokens = list(one.token_ids)
    places = [] if request.greedy else zip(tokens, one.logprobs, strict=True)
    label = one_label(span.version for span in one.weight_versions or ())
    return Drawn(tokens, [place[token].logprob for token, place in places], label, int(output.num_cached_tokens))


def _check_alone() -> None:
    """An engine in this process takes torch.distributed as it finds it, and ends it when it ends."""
    from vllm.distributed.parallel_state import (  # pyright: ignore[reportMissingImports]
        model_parallel_is_initialized,
    )

    if torch.distributed.is_available() and torch.distributed.is_initialized() and not model_parallel_is_initialized():
        raise ValueError("multiprocess: expected True, because this process uses torch.distributed, got False")


@contextmanager
def _environment(multiprocess: bool) -> Iterator[None]:
    """What vLLM reads when it starts, and what it sets in this process taken back."""
    before, set_num_threads = dict(os.environ), torch.set_num_threads
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(multiprocess))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of all that was switched off on purpose
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads  # on a CPU it puts one there that does nothing
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
