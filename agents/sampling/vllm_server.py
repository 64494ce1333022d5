"""Sampling with vLLM servers over HTTP: one that is started here, or others' on any machines that share a folder.

Needs vLLM where the servers run, and here no more than an HTTP client.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import anyio
import httpx2
from anyio.from_thread import start_blocking_portal
from torch import Tensor

from agents.policy import ValueHeadLM
from agents.sampling.engine import Drawn, EngineSampler, Request, RequestRefused
from agents.sampling.vllm_config import VLLMConfig, VLLMServerConfig, check_server_engine
from agents.sampling.vllm_terms import (
    check_version,
    engine_options,
    one_label,
    same_everywhere,
    sampling_params,
    save_description,
    weight_file,
)

_TRIES = 3
"""Of a request whose connection broke: its seed makes the answer the same."""


class VLLMServerSampler(EngineSampler):
    """Draws responses with vLLM servers; a server that is started here ends with `close`, or with this process."""

    def __init__(self, policy: Any, config: VLLMServerConfig | None = None, engine: VLLMConfig | None = None) -> None:
        """Reach or start the servers and give them the policy's weights.

        Args:
            policy: As `EngineSampler`.
            config: Which servers.
            engine: Of the server that is started here; of others' only `max_model_len`, which they have, too.

        Raises:
            ImportError: If one is to be started, and no vLLM is installed that this was written for.
            ValueError: As `EngineSampler`; or if a setting of the engine would do nothing.
        """
        config, engine = config or VLLMServerConfig(), engine or VLLMConfig()
        check_server_engine(engine, config.urls)
        model = policy.lm if isinstance(policy, ValueHeadLM) else policy
        if not config.urls:
            check_version()
        super().__init__(policy, lambda: ServerEngine(model, config, engine), max_model_len=engine.max_model_len)


class ServerEngine:
    """Servers as an `agents.sampling.engine.Engine`."""

    def __init__(self, model: Any, config: VLLMServerConfig, engine: VLLMConfig) -> None:
        """Start one if none are named, and wait until all are ready.

        Args:
            model: Of whose configuration a started one is.
            config: Which servers.
            engine: Settings of a started one.
        """
        self.config, self.server = config, None if config.urls else Server(model, engine)
        self.urls = config.urls if self.server is None else (self.server.url,)
        keys = {} if config.api_key is None else {"Authorization": f"Bearer {config.api_key}"}
        # No proxy of the environment's leads to a server of this machine.
        self._how: dict[str, Any] = {"headers": keys, "timeout": config.timeout, "trust_env": self.server is None}
        self.clients = [httpx2.Client(base_url=url, **self._how) for url in self.urls]
        try:
            for client in self.clients:
                self._wait_for(client)
        except BaseException:
            self.close()
            raise

    def load(self, weights: Mapping[str, Tensor], label: str) -> Mapping[str, int]:
        """See `Engine.load`."""
        told: list[dict[str, str]] = []
        with weight_file(weights, self.config.exchange) as path:
            for client in self.clients:
                _post(client, "/update_weight_version", {"new_version": f"loading {label}"})
                told += _post(client, "/collective_rpc", {"method": "receive_weights", "args": [str(path)]})["results"]
                if not _post(client, "/reset_prefix_cache")["success"]:
                    raise RuntimeError(f"{client.base_url}: the prefix cache could not be reset")
        checksums = same_everywhere(told, "servers and their ranks")
        for client in self.clients:
            _post(client, "/update_weight_version", {"new_version": label})
        return checksums

    def draw(self, requests: Sequence[Request]) -> list[Drawn]:
        """See `Engine.draw`."""
        asked = [{"token_ids": one.prompt, "sampling_params": sampling_params(one)} for one in requests]
        # In a thread of its own, whatever loop runs here; an interrupt cancels what is under way.
        with start_blocking_portal() as portal:
            answers = portal.call(self._ask, asked)
        pairs = enumerate(zip(requests, answers, strict=True))
        return [_drawn(one, answer, row % len(self.urls)) for row, (one, answer) in pairs]

    def close(self) -> None:
        """See `Engine.close`; servers of others go on."""
        for client in self.clients:
            client.close()
        if self.server is not None:
            self.server.close()

    async def _ask(self, asked: Sequence[Mapping[str, Any]]) -> list[Any]:
        """All at once, dealt out among the servers; the first failure ends the others."""
        answers: list[Any] = [None] * len(asked)
        room = anyio.Semaphore(self.config.concurrency)
        limits = httpx2.Limits(max_connections=self.config.concurrency)
        async with AsyncExitStack() as stack:
            made = [httpx2.AsyncClient(base_url=url, limits=limits, **self._how) for url in self.urls]
            clients = [await stack.enter_async_context(client) for client in made]

            async def ask(row: int) -> None:
                async with room:
                    answers[row] = await _answer(clients[row % len(clients)], asked[row])

            try:
                async with anyio.create_task_group() as group:
                    for row in range(len(asked)):
                        group.start_soon(ask, row)
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return answers

    def _wait_for(self, client: httpx2.Client) -> None:
        limit, last = time.monotonic() + self.config.start_timeout, "no answer"
        while True:
            try:
                answer = client.get("/health", timeout=min(10.0, self.config.timeout))
                if answer.is_success:
                    return
                last = f"status {answer.status_code}"
            except httpx2.TransportError as error:
                last = f"{type(error).__name__}: {error}"
            if self.server is not None and self.server.process.poll() is not None:
                raise ConnectionError(f"the server ended with status {self.server.process.returncode}")
            if time.monotonic() > limit:
                raise TimeoutError(f"{client.base_url} was not ready within {self.config.start_timeout:g} s ({last})")
            time.sleep(0.3)


class Server:
    """`vllm serve` in a process of this machine."""

    def __init__(self, model: Any, config: VLLMConfig) -> None:
        """Start it; it is not ready yet.

        Args:
            model: Of whose configuration it is.
            config: Of its engine.
        """
        self._folder = tempfile.TemporaryDirectory()
        save_description(model, self._folder.name)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        # -P: or the modules beside that file would stand before others of their names.
        starter = str(Path(__file__).with_name("vllm_serve.py"))
        command = [sys.executable, "-P", starter, "--model", self._folder.name]
        command += ["--host", "127.0.0.1", "--port", str(port), "--tokens-only", "--enable-prompt-tokens-details"]
        command += ["--uvicorn-log-level", "warning"]
        command += [flag for name, value in engine_options(model, config).items() for flag in _flag(name, value)]
        quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        # In its development mode alone a server takes weights.
        environment = {**quiet, **os.environ, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}
        # Its standard input ends with this process: `vllm_serve` waits for that.
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, stdin=subprocess.PIPE)

    def close(self) -> None:
        """End it and whatever it started."""
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self._signal(signal.SIGKILL)  # what it started may outlive it
        self.process.wait(20)
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._folder.cleanup()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _flag(name: str, value: Any) -> list[str]:
    """An option of the command line.

    >>> _flag("enforce_eager", False), _flag("seed", 3), _flag("rope", {"a": 1}), _flag("dtype", None)
    (['--no-enforce-eager'], ['--seed=3'], ['--rope={"a": 1}'], [])
    """
    flag = name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}={json.dumps(value) if isinstance(value, Mapping | list | tuple) else value}"]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _post(client: httpx2.Client, path: str, content: Any = None) -> Any:
    response = client.post(path, json=content)
    response.raise_for_status()
    return response.json() if response.content else None


async def _answer(client: httpx2.AsyncClient, asked: Mapping[str, Any]) -> Any:
    """What a server answers to one request; a connection that breaks is made again."""
    for left in reversed(range(_TRIES)):
        try:
            response = await client.post("/inference/v1/generate", json=asked)
            break
        except httpx2.TransportError as error:
            if isinstance(error, httpx2.TimeoutException) or not left:
                raise
    if response.status_code == 400:
        raise RequestRefused(f"{client.base_url} refuses a request: {response.text}")
    response.raise_for_status()
    return response.json()


def _drawn(request: Request, answer: Mapping[str, Any], server: int) -> Drawn:
    (choice,) = answer["choices"]
    tokens = list(choice["token_ids"])
    places = [] if request.greedy else zip(tokens, choice["logprobs"]["content"], strict=True)
    logprobs = [_logprob(token, place) for token, place in places]
    label = one_label(span["version"] for span in choice["weight_versions"] or ())
    found = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens")
    if found is None:
        raise RuntimeError("the server does not tell what it found in its cache: --enable-prompt-tokens-details does")
    return Drawn(tokens, logprobs, label, found, server)


def _logprob(token: int, place: Mapping[str, Any]) -> float:
    (found,) = {one["logprob"] for one in (place, *place["top_logprobs"]) if one["token_id"] == token}
    return found
