"""Settings of vLLM's engines and servers; nothing of vLLM is needed to make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agents.checks import at_least, number


@dataclass(frozen=True)
class VLLMConfig:
    """Settings of an engine.

    Raises:
        ValueError: Naming the field, what was expected and what came.
    """

    dtype: str | None = None
    """Of weights and activations; None: the policy's, but `"bfloat16"` for one in float32 on a GPU, where the agent
    computes in bfloat16, too, unless told otherwise."""
    max_model_len: int | None = None
    """Longest prompt and response together; None: the model's context."""
    max_num_seqs: int = 64
    """Most responses in work at once."""
    kv_cache_bytes: int | None = None
    """Memory for keys and values; None: on a CPU what `max_num_seqs` of the longest take, on a GPU what
    `gpu_memory_utilization` leaves."""
    gpu_memory_utilization: float = 0.4
    """Share of a GPU for the engine, keys and values included; the trainer needs the rest."""
    sleep: bool = False
    """Whether the engine leaves a GPU's memory to the trainer between rollouts (vLLM's sleep mode, level 1)."""
    multiprocess: bool = False
    """Whether the engine has a process of its own, which can die alone; the script then needs the usual
    `if __name__ == "__main__":`."""
    timeout: float = 600.0
    """Seconds after which a call of an engine in a process of its own has failed."""
    enforce_eager: bool | None = None
    """Whether nothing is compiled and no CUDA graph recorded: quick to start, slower on a GPU; None: on CPUs only."""
    more: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`, or options of `vllm serve`, `{"tensor_parallel_size": 2}` for one."""

    def __post_init__(self) -> None:
        """Check each number."""
        at_least("max_num_seqs", self.max_num_seqs, 1)
        for name in ("max_model_len", "kv_cache_bytes"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        number("gpu_memory_utilization", self.gpu_memory_utilization, high=1.0)
        number("timeout", self.timeout, above=0.0)


@dataclass(frozen=True)
class VLLMServerConfig:
    """Which servers, and how they are reached.

    Raises:
        ValueError: Naming the field, what was expected and what came.
    """

    urls: tuple[str, ...] = ()
    """Where they listen, `("http://10.0.0.2:8000",)`; rows are dealt out among them. Empty: one is started here."""
    exchange: Path | None = None
    """Folder that they and this process see, for the weights, which everybody can read there; None: one that only this
    user's processes on this machine can."""
    timeout: float = 600.0
    """Seconds after which a call has failed."""
    start_timeout: float = 300.0
    """Seconds for a server to become ready."""
    concurrency: int = 128
    """Most requests under way at once."""
    api_key: str | None = None
    """What the servers ask for, if they do."""

    def __post_init__(self) -> None:
        """Check each field."""
        at_least("concurrency", self.concurrency, 1)
        for name in ("timeout", "start_timeout"):
            number(name, getattr(self, name), above=0.0)
        odd = [url for url in self.urls if not url.startswith(("http://", "https://"))]
        if odd:
            raise ValueError(f"urls: expected http:// or https://, got {odd[0]!r}")


def check_server_engine(engine: VLLMConfig, urls: tuple[str, ...]) -> None:
    """Refuse settings of an engine that would do nothing.

    Raises:
        ValueError: Naming the field.
    """
    default = VLLMConfig()
    acting = {"max_model_len"} if urls else set(vars(default)) - {"sleep", "multiprocess", "timeout"}
    for name in vars(default).keys() - acting:
        expected, got = getattr(default, name), getattr(engine, name)
        if got != expected:
            why = "the servers that urls name run already" if urls else "a server has no such setting"
            raise ValueError(f"{name}: expected {expected!r}, because {why}, got {got!r}")
