"""A real HTTP server in a thread, whose answers a test scripts; and one in a process that dies."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

PATIENCE = 20.0
"""Seconds after which a server that waits for anything goes on; no test should come near."""


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    number: int
    """Counted from 1."""
    path: str
    """With its query."""
    body: Any
    """Parsed JSON."""
    headers: Mapping[str, str]
    """As they were sent."""


@dataclass(frozen=True)
class Reply:
    """What is sent back, and how."""

    content: Any = None
    """Bytes, or what becomes JSON."""
    status: int = 200
    """Of the reply."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Besides the length."""
    silent: float = 0.0
    """Seconds before the first byte."""
    drip: float = 0.0
    """Seconds before each byte that drips."""
    dripping: Literal["head", "body"] = "body"
    """Where the dripping begins."""
    cut: int | None = None
    """After so many bytes of the body the connection is closed; −1: before the status line."""

    def payload(self) -> bytes:
        """The body."""
        return self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()


class JudgeServer:
    """Listens on a free port of this machine for as long as the `with` lasts."""

    def __init__(self, answer: Callable[[Asked], Reply | Mapping[str, Any]]) -> None:
        self.answer, self.lock, self.ended = answer, threading.Lock(), threading.Event()
        self.asked: list[Asked] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.handle(self)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Say nothing of clients that gave up; other errors are seen by the client as a broken connection."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End it: nothing listens any more."""
        if not self.ended.is_set():
            self.ended.set()
            self.server.shutdown()
            self.server.server_close()
            self.thread.join(PATIENCE)

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            asked = Asked(len(self.asked) + 1, handler.path, body, dict(handler.headers))
            self.asked.append(asked)
        reply = self.answer(asked)
        reply = reply if isinstance(reply, Reply) else Reply(reply)
        self.ended.wait(reply.silent)
        if reply.cut == -1:
            handler.close_connection = True
            return
        payload = reply.payload()
        headers = {"Content-Length": str(len(payload)), **reply.headers}
        lines = [f"HTTP/1.1 {reply.status} Told", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        head, sent = "\r\n".join(lines).encode(), payload[: reply.cut]
        handler.close_connection = reply.cut is not None
        at_once, slowly = (head + sent, b"") if not reply.drip else (head, sent)
        if reply.drip and reply.dripping == "head":
            at_once, slowly = b"", head + sent
        handler.wfile.write(at_once)
        for byte in slowly:
            self.ended.wait(reply.drip)
            handler.wfile.write(bytes([byte]))


MORTAL = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    lives = int(sys.argv[2])

    def do_POST(self):
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["responses"]
        payload = json.dumps({"scores": [len(text) for text in texts]}).encode()
        Handler.lives -= 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if Handler.lives == 0:
            self.wfile.write(payload[:3])
            self.wfile.flush()
            os._exit(9)
        self.wfile.write(payload)

    def log_message(self, *_):
        pass

server = HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


class MortalServer:
    """A plain judge (score: length of the response) in a process that dies within its `lives`-th reply."""

    def __init__(self, lives: int = 0, port: int = 0) -> None:
        command = [sys.executable, "-S", "-c", MORTAL, str(port), str(lives)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """End it, dead or not."""
        self.process.kill()
        self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()
