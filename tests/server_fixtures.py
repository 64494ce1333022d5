"""A server that answers as vLLM's does, over real sockets, and can be told how to fail."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from agents.sampling import TransformersSampler
from agents.sampling.sync import checksum
from tests.conftest import make_llama


class FakeServer:
    """Draws with a model of its own; `faults` are what happens to the next requests for responses, one each."""

    def __init__(self) -> None:
        self.model, self.label, self.lock = make_llama(), "default", threading.Lock()
        self.faults: list[str] = []
        self.asked: Counter[str] = Counter()
        self.headers: list[Any] = []
        self.modes: list[int] = []
        self.ranks, self.cached, self.slow = [0], 0, 0.0
        self.busy = self.busiest = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self, {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server.answer(self, json.loads(body or b"null"))

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # askers that have gone
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, handler: Any, content: Any) -> None:
        self.asked[handler.path] += 1
        self.headers.append(handler.headers)
        status, found = 200, {}
        if handler.path == "/collective_rpc":
            found = {"results": self.load(Path(content["args"][0]))}
        elif handler.path == "/reset_prefix_cache":
            found = {"success": True}
        elif handler.path == "/update_weight_version":
            self.label = content["new_version"]
        elif handler.path == "/inference/v1/generate":
            with self.lock:
                self.busy, fault = self.busy + 1, self.faults.pop(0) if self.faults else ""
                self.busiest = max(self.busy, self.busiest)
            time.sleep(self.slow)
            try:
                status, found = self.generate(handler, content, fault)
            finally:
                with self.lock:
                    self.busy -= 1
        if found is None:
            return
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def load(self, path: Path) -> list[dict[str, str]]:
        weights = load_file(path)
        self.modes += [path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777]
        for name, tensor in weights.items():
            self.model.get_parameter(name).data.copy_(tensor)
        return [{name: str(checksum(tensor) + rank) for name, tensor in weights.items()} for rank in self.ranks]

    def generate(self, handler: Any, content: Any, fault: str) -> tuple[int, Any]:
        if fault == "reset":
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
            return 0, None
        if fault == "hang":
            time.sleep(20)
        if fault in ("400", "500"):
            return int(fault), {"error": "no such thing"}
        if fault == "garbage":
            return 200, b"<html>"
        found = self.respond(content["token_ids"], content["sampling_params"])
        if fault == "untold":
            found["usage"] = {}
        if fault == "empty":
            found["choices"] = []
        return 200, found

    def respond(self, prompt: list[int], asked: dict[str, Any]) -> dict[str, Any]:
        greedy = asked["temperature"] == 0
        with self.lock:
            samples = TransformersSampler(self.model).sample(
                [prompt],
                max_new_tokens=asked["max_tokens"],
                stop_token_ids=asked["stop_token_ids"],
                temperature=asked["temperature"] or 1.0,
                seed=asked["seed"] or 0,
                greedy=greedy,
            )
        ids = samples.responses[0]
        told = [
            {"token_id": token, "logprob": logprob, "top_logprobs": []}
            for token, logprob in zip(ids, samples.logprobs[0] or [0.0] * len(ids), strict=True)
        ]
        choice = {
            "token_ids": ids,
            "logprobs": None if asked["logprobs"] is None else {"content": told},
            "weight_versions": [{"version": self.label, "start": 0, "end": len(ids)}],
        }
        return {"choices": [choice], "usage": {"prompt_tokens_details": {"cached_tokens": self.cached}}}


class Servers(ExitStack):
    """As many as are asked for, ended together."""

    def start(self) -> FakeServer:
        server = FakeServer()
        self.callback(server.close)
        return server
