"""Which judge, how it is asked, and how long one waits for it."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from textenv.rewards.judge.protocols import JudgeProtocol, Plain


class JudgeError(ConnectionError):
    """A judge gave no score: it refused, or the retries are spent. What it had scored before is kept."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds after which one attempt has failed."""

    connect: float = 10.0
    """To be connected."""
    read: float = 60.0
    """Between two pieces of the reply, the first included."""
    total: float = 120.0
    """For the whole attempt, however steadily the pieces come."""

    def __post_init__(self) -> None:
        """Check each field."""
        for name in ("connect", "read", "total"):
            _positive(name, getattr(self, name))


@dataclass(frozen=True)
class Retries:
    """What a request may cost before it has failed; the pause before attempt k + 1 is drawn from [w/2, w].

    w = min(`longest_wait`, `first_wait`·2^(k−1)). A server's `Retry-After` is waited for if it is longer.
    """

    attempts: int = 8
    """Most attempts, the first included."""
    seconds: float = 300.0
    """No attempt begins later than this after the first one began."""
    first_wait: float = 0.5
    """Seconds before the second attempt."""
    longest_wait: float = 30.0
    """Seconds that pauses grow to."""

    def __post_init__(self) -> None:
        """Check each field."""
        _count("attempts", self.attempts)
        for name in ("seconds", "first_wait", "longest_wait"):
            _positive(name, getattr(self, name))

    def pause(self, attempts: int, asked: float, draw: float) -> float:
        """Seconds to wait after so many attempts.

        Args:
            attempts: Done already, at least 1.
            asked: What the server's `Retry-After` asks for, 0 if nothing.
            draw: Uniform in [0, 1).

        >>> Retries(first_wait=1.0, longest_wait=3.0).pause(2, 0.0, 0.5)
        1.5
        """
        # 2^64 is beyond any pause; unbounded, the power would overflow.
        longest = min(self.longest_wait, self.first_wait * 2.0 ** min(attempts - 1, 64))
        return max(asked, longest * (0.5 + 0.5 * draw))


@dataclass(frozen=True)
class JudgeConfig:
    """A judge. Its key is read from the environment when it is needed, and is in no field."""

    url: str
    """Where requests are posted to, whole: `"http://localhost:8000/classify"`."""
    protocol: JudgeProtocol = field(default_factory=Plain)
    """What is posted and how the reply is read: `Chat`, `Classify`, `Score`, `Pooling`, `Plain`, or your own."""
    batch_size: int = 32
    """Most responses in a request, for protocols that take several."""
    concurrency: int = 16
    """Most requests under way at once."""
    timeouts: Timeouts = field(default_factory=Timeouts)
    """Of an attempt."""
    retries: Retries = field(default_factory=Retries)
    """Of a request."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key, sent as a bearer token; None: no key is sent."""
    cache_path: Path | None = None
    """File of scores that survives the process; None: they are kept in memory."""
    cache_size: int = 200_000
    """Most scores in memory, some 30 MB."""
    version: str = ""
    """Part of the cache's key, as `url` and `protocol` are: change it when another model answers at the same place."""

    def __post_init__(self) -> None:
        """Check each field."""
        _check_url(self.url)
        for name in ("batch_size", "concurrency", "cache_size"):
            _count(name, getattr(self, name))
        if not dataclasses.is_dataclass(self.protocol) or isinstance(self.protocol, type):
            raise ValueError(f"protocol: expected a dataclass such as Plain(), got {self.protocol!r}")
        for name, kind in (("timeouts", Timeouts), ("retries", Retries)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}: expected {kind.__name__}(...), got {getattr(self, name)!r}")
        if self.cache_path is not None:
            object.__setattr__(self, "cache_path", Path(self.cache_path))

    def api_key(self) -> str | None:
        """The key, read now.

        Raises:
            ValueError: If there is to be one and the variable is unset or nothing that a header can hold.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key and key.isascii() and key.isprintable()):
            wanted = f"the environment variable {self.api_key_env} to hold a key"
            raise ValueError(f"api_key_env: expected {wanted}, got {'another text' if key else 'nothing'}")
        return key


def _check_url(url: Any) -> None:
    """The message names no part of a URL that holds a password."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, AttributeError, TypeError):
        good, parts = False, None
    if parts is not None and (parts.username is not None or parts.password is not None):
        raise ValueError("url: expected no user or password in it (api_key_env names a key), got one")
    if not good:
        raise ValueError(f"url: expected http://... or https://..., got {url!r}")


def _count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")
