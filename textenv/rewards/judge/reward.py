"""A judge served over HTTP as a reward function: what is known is looked up, the rest is asked for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import threading
from collections.abc import Sequence
from typing import Any

from textenv.rewards.judge.cache import DiskCache, MemoryCache, ScoreCache
from textenv.rewards.judge.config import JudgeConfig


class JudgeReward:
    """Scores of a server, each asked for once.

    The same prompt and response get the same score for as long as the cache keeps it, so a judge that draws its answers
    is a pure reward too. What cannot be scored within the retries is a `JudgeError`, never a number; what was scored
    until then is kept. A deep copy is the judge itself; a pickle holds its configuration, and neither key nor scores.
    """

    def __init__(self, config: JudgeConfig) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            config: Which judge.

        Raises:
            ImportError: If the extra `judge` is not installed.
            ValueError: If the key is not in the environment, or the cache's file is something else.
        """
        for name in ("anyio", "httpx2", "tenacity"):
            if importlib.util.find_spec(name) is None:
                raise ImportError(f"{name}: expected it for a judge; pip install 'textenv[judge]'")
        config.api_key()
        self.config = config
        self.cache: ScoreCache = (
            MemoryCache(config.cache_size) if config.cache_path is None else DiskCache(config.cache_path)
        )
        # Two threads that share the judge must not ask for the same thing twice.
        self._lock = threading.Lock()

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Scores, one a response.

        Raises:
            JudgeError: If one cannot be had; naming where, after how many attempts, why, and for which response.
        """
        from textenv.rewards.judge.client import Chunk, ask

        keys = [self.key(p, r) for p, r in zip(prompts, responses, strict=True)]
        with self._lock:
            known = self.cache.get(set(keys))
            missing = {key: row for row, key in reversed(list(enumerate(keys))) if key not in known}
            size = self.config.batch_size if self.config.protocol.batched else 1
            rows = sorted(missing.values())
            chunks = [
                Chunk([prompts[row] for row in some], [responses[row] for row in some], some)
                for some in (rows[start : start + size] for start in range(0, len(rows), size))
            ]

            def keep(chunk: Chunk, scores: Sequence[float]) -> None:
                """At once, so that what is paid for outlives a failure of the next."""
                known.update(self.cache.put({keys[row]: s for row, s in zip(chunk.rows, scores, strict=True)}))

            if chunks:
                ask(self.config, chunks, keep)
        return [known[key] for key in keys]

    def key(self, prompt: str, response: str) -> bytes:
        """What the score is kept under: a hash of both texts and of who is asked in which way."""
        asked = [self.config.url, self.config.version, repr(self.config.protocol), prompt, response]
        return hashlib.sha256(json.dumps(asked).encode("ascii")).digest()

    def __deepcopy__(self, memo: dict[int, Any]) -> JudgeReward:
        """Return the judge itself: Gymnasium deep-copies an environment's arguments, and the scores are one store."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Made again from the configuration."""
        return JudgeReward, (self.config,)

    def __repr__(self) -> str:
        """Name the judge."""
        return f"JudgeReward({self.config!r})"
