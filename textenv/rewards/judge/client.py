"""The requests themselves: many at once, each with its time-outs and retries."""

from __future__ import annotations

import json
import logging
import math
import random
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any

import anyio
import httpx2
from anyio.from_thread import start_blocking_portal
from tenacity import AsyncRetrying, RetryCallState, RetryError, retry_if_exception_type, stop_after_attempt
from tenacity.stop import stop_before_delay

from textenv.rewards.judge.config import JudgeConfig, JudgeError
from textenv.rewards.judge.protocols import JudgeProtocol, UnusableReply

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """What one request asks for."""

    prompts: Sequence[str]
    """Their prompts."""
    responses: Sequence[str]
    """The responses."""
    rows: Sequence[int]
    """Where they stand in the call."""


class AttemptFailed(Exception):
    """An attempt that may be repeated."""

    def __init__(self, message: str, *, asked: float = 0.0, row: int | None = None) -> None:
        """Say why.

        Args:
            message: The cause.
            asked: Seconds that the server asks to be left alone for.
            row: Which response of the request it is about; None: all of them.
        """
        super().__init__(message)
        self.asked, self.row = asked, row


class Refused(Exception):
    """An answer that another attempt would not change."""

    def __init__(self, message: str, *, of_content: bool) -> None:
        """Say why.

        Args:
            message: The server's words.
            of_content: Whether it may be about one of the responses, one that is too long for instance.
        """
        super().__init__(message)
        self.of_content = of_content


class Abandoned(Exception):
    """Another request has failed for good."""


Keep = Callable[[Chunk, Sequence[float]], None]
"""Takes the scores of a request as soon as they are there."""


def ask(config: JudgeConfig, chunks: Sequence[Chunk], keep: Keep) -> None:
    """Ask for all chunks and hand over the scores of each as they come.

    An event loop of its own in another thread: a total time-out is only one if an attempt can be cancelled, and the
    caller may have a loop already, a notebook for one. An interrupt of the caller cancels what is under way.

    Raises:
        JudgeError: If a chunk cannot be scored. Then no further attempt begins, and those under way are waited for.
    """
    with start_blocking_portal() as portal:
        portal.call(_ask_all, config, chunks, keep)


async def _ask_all(config: JudgeConfig, chunks: Sequence[Chunk], keep: Keep) -> None:
    failed, scored = anyio.Event(), 0
    failures: list[Exception] = []
    slots = anyio.CapacityLimiter(config.concurrency)
    key = config.api_key()

    def kept(chunk: Chunk, scores: Sequence[float]) -> None:
        nonlocal scored
        keep(chunk, scores)
        scored += len(scores)

    async def work(client: httpx2.AsyncClient, chunk: Chunk) -> None:
        async with slots:
            try:
                await _ask_one(client, config, key, chunk, failed, kept)
            except Exception as error:  # an error of the task group would come wrapped, and cancel the others
                failures.append(error)
                failed.set()

    async with _client(config, key) as client, anyio.create_task_group() as tasks:
        for chunk in chunks:
            tasks.start_soon(work, client, chunk)
    if failures:
        first = failures[0]
        if isinstance(first, JudgeError):
            total = sum(len(chunk.rows) for chunk in chunks)
            raise JudgeError(f"{first}; {scored} of {total} asked for were scored and are kept") from first.__cause__
        raise first


def _client(config: JudgeConfig, key: str | None) -> httpx2.AsyncClient:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    # The slots alone bound how many there are: a connection that is waited for would count as a slow judge.
    timeout = httpx2.Timeout(config.timeouts.read, connect=config.timeouts.connect, pool=None)
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=config.concurrency)
    return httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits, verify=_certificates())


@cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes 30 ms, and an environment that is stepped asks once an episode."""
    return httpx2.create_ssl_context()


async def _ask_one(
    client: httpx2.AsyncClient, config: JudgeConfig, key: str | None, chunk: Chunk, failed: anyio.Event, keep: Keep
) -> None:
    """Ask for a chunk, with retries; for each response alone if they are refused together."""
    if failed.is_set():
        raise Abandoned
    retries, began = config.retries, anyio.current_time()
    jitter = random.Random()  # its own: the global state is the caller's

    def wait(state: RetryCallState) -> float:
        return retries.pause(state.attempt_number, _failure(state).asked, jitter.random())

    def tell(state: RetryCallState) -> None:
        again = f"again in {state.upcoming_sleep:.1f} s"
        _log.warning("%s: attempt %d failed (%s), %s", where(config.url), state.attempt_number, _failure(state), again)

    async def pause(seconds: float) -> None:
        with anyio.move_on_after(seconds):
            await failed.wait()
            raise Abandoned

    retrying = AsyncRetrying(
        sleep=pause,
        wait=wait,
        stop=stop_after_attempt(retries.attempts) | stop_before_delay(retries.seconds),
        retry=retry_if_exception_type(AttemptFailed),
        before_sleep=tell,
    )
    try:
        keep(chunk, await retrying(_attempt, client, config, key, chunk))
    except RetryError as error:
        last = error.last_attempt
        cause = last.exception()
        assert isinstance(cause, AttemptFailed)
        seconds = anyio.current_time() - began
        spent = f"no score after {last.attempt_number} of {retries.attempts} attempts in {seconds:.1f} s"
        raise JudgeError(
            f"reward: {where(config.url)}: {spent}, at last: {cause}; {_which(chunk, cause.row)}"
        ) from cause
    except Refused as error:
        if error.of_content and len(chunk.rows) > 1:
            _log.warning(
                "%s: refused %d responses together, each is asked for alone", where(config.url), len(chunk.rows)
            )
            for one in _alone(chunk):
                await _ask_one(client, config, key, one, failed, keep)
            return
        raise JudgeError(f"reward: {where(config.url)}: refused, {error}; {_which(chunk, None)}") from error


def _alone(chunk: Chunk) -> list[Chunk]:
    return [Chunk([p], [r], [row]) for p, r, row in zip(chunk.prompts, chunk.responses, chunk.rows, strict=True)]


def _failure(state: RetryCallState) -> AttemptFailed:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, AttemptFailed)
    return error


async def _attempt(client: httpx2.AsyncClient, config: JudgeConfig, key: str | None, chunk: Chunk) -> list[float]:
    body = config.protocol.request(chunk.prompts, chunk.responses)
    try:
        with anyio.fail_after(config.timeouts.total):
            reply = await client.post(config.url, json=body)
    except TimeoutError as error:
        raise AttemptFailed(f"no whole reply within {config.timeouts.total:g} s") from error
    except httpx2.RequestError as error:
        raise AttemptFailed(f"{type(error).__name__}: {error}".removesuffix(": ")) from error
    content = reply.content if key is None else reply.content.replace(key.encode(), b"***")
    text = content.decode("utf8", errors="replace")
    if reply.is_success:
        try:
            return read_scores(config.protocol, text, len(chunk.rows))
        except UnusableReply as error:
            raise AttemptFailed(f"unusable reply: {error}", row=error.row) from error
    status = f"HTTP {reply.status_code} {reply.reason_phrase}: {_short(text)}"
    if not is_passing(reply.status_code):
        raise Refused(status, of_content=reply.status_code in (400, 413, 422))
    asked = retry_after(reply.headers.get("Retry-After"), datetime.now(UTC))
    raise AttemptFailed(f"{status}, Retry-After {asked:g} s" if asked else status, asked=asked)


def read_scores(protocol: JudgeProtocol, text: str, count: int) -> list[float]:
    """As many finite scores as were asked for, from the body of a reply.

    Raises:
        UnusableReply: If there is anything else in it.
    """
    try:
        values = list(protocol.scores(json.loads(text), count))
    except UnusableReply:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UnusableReply(f"malformed, {_short(text)} ({type(error).__name__}: {error})") from error
    if len(values) != count:
        raise UnusableReply(f"expected {count} scores, got {len(values)}")
    return [_finite(value, row) for row, value in enumerate(values)]


def _finite(value: Any, row: int) -> float:
    try:
        score = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # JSON's integers have no bound
        score = math.inf
    if not math.isfinite(score):
        raise UnusableReply(f"expected a finite score, got {repr(value)[:100]}", row)
    return score


def is_passing(status: int) -> bool:
    """Whether a later attempt may fare better: time-outs, too many requests, and a server's own errors.

    But 501: it says that the server cannot do this at all, as vLLM does when it serves another kind of model.

    >>> [status for status in (301, 400, 401, 404, 408, 422, 425, 429, 500, 501, 503) if is_passing(status)]
    [408, 425, 429, 500, 503]
    """
    return status in (408, 425, 429) or (status >= 500 and status != 501)


def retry_after(header: str | None, now: datetime) -> float:
    """Seconds that a `Retry-After` asks for: a number, or a date (RFC 9110, section 10.2.3); 0 if it asks nothing.

    >>> [retry_after(header, datetime.now(UTC)) for header in ("120", "-1", "soon", None)]
    [120.0, 0.0, 0.0, 0.0]
    """
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - now).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def where(url: str) -> str:
    """A URL without its query, which may hold what is nobody's business."""
    return url.split("?", 1)[0]


def _which(chunk: Chunk, row: int | None) -> str:
    """Name the response, or the first of several."""
    several = f"{len(chunk.rows)} responses together, the first being " if row is None and len(chunk.rows) > 1 else ""
    prompt, response = chunk.prompts[row or 0], chunk.responses[row or 0]
    return f"for {several}prompt {_short(prompt)} and response {_short(response)}"


def _short(text: str) -> str:
    return repr(text) if len(text) <= 300 else f"{text[:300]!r}…"
