"""A judge over HTTP, against real servers: what is asked, what is asked again, what is kept, and what is an error."""

from __future__ import annotations

import asyncio
import copy
import logging
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import env_fixtures as fixtures
import pytest
from judge_server import PATIENCE, Asked, JudgeServer, MortalServer, Reply

import textenv
from tests.test_docs import ROOT, run_page
from textenv.rewards import as_reward
from textenv.rewards.judge import (
    Chat,
    Classify,
    DiskCache,
    JudgeConfig,
    JudgeError,
    JudgeReward,
    MemoryCache,
    Plain,
    Retries,
    Timeouts,
)
from textenv.rewards.judge.client import retry_after

QUICK = Retries(attempts=4, seconds=20.0, first_wait=0.01, longest_wait=0.02)
FIVE = (["a", "b", "a", "c", "d"], ["x", "yy", "x", "zzz", ""])
"""Five rows, of which the first and the third are the same."""


def lengths(asked: Asked) -> Mapping[str, Any]:
    """Score: 10 times the length of the response, and 1 for the prompt b."""
    pairs = zip(asked.body["prompts"], asked.body["responses"], strict=True)
    return {"scores": [10 * len(response) + (prompt == "b") for prompt, response in pairs]}


def judge(server: JudgeServer, **changes: Any) -> JudgeReward:
    defaults: dict[str, Any] = {"url": f"{server.url}/judge", "retries": QUICK}
    return JudgeReward(JudgeConfig(**{**defaults, **changes}))


def asked_texts(server: JudgeServer) -> list[list[str]]:
    return sorted(asked.body["responses"] for asked in server.asked)


class First:
    """Bad replies to the first requests, good ones after them."""

    def __init__(self, *bad: Reply, good: Callable[[Asked], Any] = lengths) -> None:
        self.bad, self.good = bad, good

    def __call__(self, asked: Asked) -> Any:
        return self.bad[asked.number - 1] if asked.number <= len(self.bad) else self.good(asked)


# What is asked.


def test_scores_come_back_in_order_in_batches_and_each_once() -> None:
    with JudgeServer(lengths) as server:
        scores = judge(server, batch_size=3)(*FIVE)
        assert scores == [10.0, 21.0, 10.0, 30.0, 0.0]  # by hand
        assert asked_texts(server) == [[""], ["x", "yy", "zzz"]]  # four, because one came twice
        assert [asked.path for asked in server.asked] == ["/judge"] * 2
        assert "Authorization" not in server.asked[0].headers


def test_a_batch_equals_its_rows_one_by_one() -> None:
    with JudgeServer(lengths) as server:
        alone = [judge(server)([p], [r])[0] for p, r in zip(*FIVE, strict=True)]
        assert len(server.asked) == 5
        assert judge(server, batch_size=2)(*FIVE) == alone
        assert judge(server)([], []) == [] and len(server.asked) == 7


def test_prompt_and_response_are_not_run_together() -> None:
    with JudgeServer(lambda asked: {"scores": [len(p) for p in asked.body["prompts"]]}) as server:
        assert judge(server)(["ab", "a"], ["c", "bc"]) == [2.0, 1.0]


def test_as_many_requests_at_once_as_are_allowed_and_no_more() -> None:
    together, present, most, lock = threading.Barrier(3), [0], [0], threading.Lock()

    def answer(asked: Asked) -> Any:
        with lock:
            present[0] += 1
            most[0] = max(most[0], present[0])
        together.wait(PATIENCE)  # none is answered before three are here
        time.sleep(0.1)  # time for a fourth to come
        with lock:
            present[0] -= 1
        return lengths(asked)

    with JudgeServer(answer) as server:
        assert judge(server, batch_size=1, concurrency=3)(["p"] * 9, list("abcdefghi")) == [10.0] * 9
        assert most == [3] and len(server.asked) == 9


def test_it_can_be_called_within_an_event_loop() -> None:
    async def notebook(reward: JudgeReward) -> list[float]:
        return reward(["p"], ["xy"])

    with JudgeServer(lengths) as server:
        assert asyncio.run(notebook(judge(server))) == [20.0]


def test_an_interrupt_does_not_wait_for_the_judge() -> None:
    main = threading.main_thread().ident
    if main != threading.get_ident():
        pytest.skip("signals go to the main thread")

    def answer(asked: Asked) -> Reply:
        signal.pthread_kill(main, signal.SIGINT)
        return Reply({}, silent=PATIENCE)

    with JudgeServer(answer) as server:
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            judge(server)(["p"], ["x"])
        assert time.monotonic() - began < 5


def test_threads_that_share_a_judge_ask_once() -> None:
    with JudgeServer(lambda asked: Reply(lengths(asked), silent=0.1)) as server:
        reward, scores = judge(server), []
        threads = [threading.Thread(target=lambda: scores.append(reward(["p"], ["xy"]))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert scores == [[20.0]] * 3 and len(server.asked) == 1


# What is asked again.

PASSING: dict[str, Reply] = {
    **{str(status): Reply({"error": "busy"}, status) for status in (408, 425, 429, 500, 502, 503, 504)},
    "closed": Reply(cut=-1),
    "half a body": Reply({"scores": [10]}, cut=5),
    "no JSON": Reply(b"<html>busy</html>"),
    "half JSON": Reply(b'{"scores": [1'),
    "deep JSON": Reply(b"[" * 100_000),
    "not UTF-8": Reply(b"\xff\xfe\x00"),
    "another shape": Reply({"score": [10]}),
    "a list": Reply([10]),
    "too few": Reply({"scores": []}),
    "too many": Reply({"scores": [1, 2]}),
    "no number": Reply({"scores": ["10"]}),
    "null": Reply({"scores": [None]}),
    "true": Reply({"scores": [True]}),
    "NaN": Reply(b'{"scores": [NaN]}'),
    "infinite": Reply(b'{"scores": [1e999]}'),
    "huge": Reply(b'{"scores": [1' + b"0" * 400 + b"]}"),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_asked_again(name: str) -> None:
    with JudgeServer(First(PASSING[name], PASSING[name])) as server:
        assert judge(server)(["p"], ["x"]) == [10.0]
        assert len(server.asked) == 3
        assert server.asked[0].body == server.asked[2].body


def test_silence_is_a_failed_attempt() -> None:
    with JudgeServer(First(Reply({}, silent=PATIENCE))) as server:
        assert judge(server, timeouts=Timeouts(read=0.5))(["p"], ["x"]) == [10.0]
        assert len(server.asked) == 2


@pytest.mark.parametrize("dripping", ["body", "head"])
def test_a_steady_trickle_is_a_failed_attempt(dripping: Any) -> None:
    """Each byte is in time, and the whole takes too long."""
    with JudgeServer(First(Reply({"scores": [99]}, drip=0.1, dripping=dripping))) as server:
        began = time.monotonic()
        assert judge(server, timeouts=Timeouts(read=10.0, total=1.0))(["p"], ["x"]) == [10.0]
        assert len(server.asked) == 2 and time.monotonic() - began < 5


def test_a_server_that_dies_within_a_reply_and_comes_back() -> None:
    first = MortalServer(lives=3)
    again: list[MortalServer] = []

    def revive() -> None:
        first.process.wait(PATIENCE)
        again.append(MortalServer(port=first.port))

    nurse = threading.Thread(target=revive)
    nurse.start()
    try:
        retries = Retries(attempts=100, seconds=PATIENCE, first_wait=0.02, longest_wait=0.1)
        reward = JudgeReward(JudgeConfig(url=first.url, retries=retries, batch_size=1, concurrency=2))
        texts = ["x" * n for n in range(8)]
        assert reward(["p"] * 8, texts) == [float(n) for n in range(8)]
        assert first.process.returncode == 9
    finally:
        nurse.join(PATIENCE)
        for server in (first, *again):
            server.close()


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(form: str) -> None:
    times: list[float] = []

    def answer(asked: Asked) -> Any:
        times.append(time.monotonic())
        # A date has whole seconds: two seconds ahead is at least one.
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        header = {"Retry-After": "1" if form == "seconds" else date}
        return lengths(asked) if asked.number > 1 else Reply({}, 503, header)

    with JudgeServer(answer) as server:
        assert judge(server)(["p"], ["x"]) == [10.0]
        assert 0.9 < times[1] - times[0] < 5  # its own wait would be 0.02 s at most


def test_dates_of_retry_after() -> None:
    now = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
    assert retry_after("Sun, 01 Mar 2026 12:01:30 GMT", now) == 90.0
    assert retry_after("Sun, 01 Mar 2026 11:00:00 GMT", now) == 0.0
    assert retry_after("inf", now) == retry_after("nan", now) == 0.0


def test_pauses_double_up_to_the_longest() -> None:
    retries = Retries(first_wait=1.0, longest_wait=5.0)
    assert [retries.pause(k, 0.0, 0.0) for k in (1, 2, 3, 4, 10_000)] == [0.5, 1.0, 2.0, 2.5, 2.5]
    assert [retries.pause(k, 0.0, 1.0) for k in (1, 2, 3, 4)] == [1.0, 2.0, 4.0, 5.0]
    assert retries.pause(1, 7.0, 0.5) == 7.0 and retries.pause(4, 0.1, 1.0) == 5.0


def test_no_global_random_state_moves() -> None:
    before = random.getstate()
    with JudgeServer(First(Reply({}, 503))) as server:
        judge(server)(["p"], ["x"])
    assert random.getstate() == before


def test_each_retry_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with JudgeServer(First(Reply({"error": "warming up"}, 503))) as server, caplog.at_level(logging.WARNING):
        judge(server)(["p"], ["x"])
        (record,) = [r for r in caplog.records if r.name == "textenv.rewards.judge.client"]
        assert f"{server.url}/judge: attempt 1 failed (HTTP 503" in record.message and "warming up" in record.message


# What is an error.


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422, 501])
def test_a_refusal_is_told_at_once_with_the_servers_words(status: int) -> None:
    with JudgeServer(lambda asked: Reply({"error": {"message": "no such model: m"}}, status)) as server:
        with pytest.raises(JudgeError) as caught:
            judge(server)(["p"], ["x"])
        assert len(server.asked) == 1
        assert f"reward: {server.url}/judge: refused, HTTP {status}" in str(caught.value)
        assert "no such model: m" in str(caught.value) and "for prompt 'p' and response 'x'" in str(caught.value)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_response_that_is_refused_is_found_among_others(status: int) -> None:
    def answer(asked: Asked) -> Any:
        if "xxx" in asked.body["responses"]:
            return Reply({"error": "too long"}, status)
        return lengths(asked)

    with JudgeServer(answer) as server:
        reward = judge(server)
        with pytest.raises(JudgeError, match=r"too long.* for prompt 'p' and response 'xxx'; 2 of 4 asked for were sc"):
            reward(["p"] * 4, ["", "x", "xxx", "xx"])
        assert [len(asked.body["responses"]) for asked in server.asked] == [4, 1, 1, 1]
        assert reward(["p", "p"], ["", "x"]) == [0.0, 10.0] and len(server.asked) == 4  # those before it are kept


def test_a_failure_elsewhere_ends_asking_one_by_one() -> None:
    alone = threading.Event()

    def answer(asked: Asked) -> Any:
        if asked.body["responses"] == ["bad"]:
            alone.wait(PATIENCE)
            return Reply({}, 401)
        if len(asked.body["responses"]) > 1:
            return Reply({}, 413)
        alone.set()
        return Reply(lengths(asked), silent=0.5)  # longer than the refusal takes

    with JudgeServer(answer) as server:
        reward = judge(server, batch_size=2)
        with pytest.raises(JudgeError, match=r"refused, HTTP 401.*; 1 of 3 asked for were scored and are kept"):
            reward(["p"] * 3, ["x", "xx", "bad"])
        assert asked_texts(server) == [["bad"], ["x"], ["x", "xx"]]


def test_a_server_of_smaller_batches_is_asked_one_by_one() -> None:
    def answer(asked: Asked) -> Any:
        return lengths(asked) if len(asked.body["responses"]) == 1 else Reply({"error": "one at a time"}, 413)

    with JudgeServer(answer) as server:
        assert judge(server)(*FIVE) == [10.0, 21.0, 10.0, 30.0, 0.0]
        assert len(server.asked) == 1 + 4


def test_a_refusal_of_the_caller_is_not_tried_row_by_row() -> None:
    with JudgeServer(lambda asked: Reply({}, 401)) as server:
        with pytest.raises(JudgeError, match="for 4 responses together, the first being prompt 'a' and response 'x'"):
            judge(server)(*FIVE)
        assert len(server.asked) == 1


def test_spent_retries_name_place_attempts_cause_and_response() -> None:
    with JudgeServer(lambda asked: {"scores": [1.0, None, 2.0]}) as server:
        with pytest.raises(JudgeError) as caught:
            judge(server)(["p", "q", "r"], ["x", "y", "z"])
        assert len(server.asked) == QUICK.attempts
        message = str(caught.value)
        assert f"reward: {server.url}/judge: no score after 4 of 4 attempts in " in message
        assert "at last: unusable reply: expected a finite score, got None; for prompt 'q' and response 'y'" in message
        assert message.endswith("; 0 of 3 asked for were scored and are kept")


def test_nobody_listens() -> None:
    server = JudgeServer(lengths)
    server.server.server_close()
    with pytest.raises(
        JudgeError, match=r"after 4 of 4 attempts .* ConnectError: .* for 2 responses together, the first"
    ):
        judge(server)(["p", "q"], ["x", "y"])
    assert issubclass(JudgeError, ConnectionError)


def test_the_budget_in_seconds_ends_it() -> None:
    with JudgeServer(lambda asked: Reply({}, 503)) as server:
        began = time.monotonic()
        with pytest.raises(JudgeError, match=r"no score after [2-9] of 1000 attempts in [0-9.]+ s"):
            judge(server, retries=Retries(attempts=1000, seconds=0.5, first_wait=0.1, longest_wait=0.2))(["p"], ["x"])
        assert time.monotonic() - began < 5


def test_a_retry_after_beyond_the_budget_is_not_waited_for() -> None:
    with JudgeServer(lambda asked: Reply({}, 429, {"Retry-After": "3600"})) as server:
        with pytest.raises(JudgeError, match=r"no score after 1 of 4 attempts .*HTTP 429 .*Retry-After 3600 s"):
            judge(server)(["p"], ["x"])
        assert len(server.asked) == 1


def test_a_failure_ends_the_waits_of_the_others() -> None:
    both = threading.Barrier(2)

    def answer(asked: Asked) -> Any:
        both.wait(PATIENCE)
        if asked.body["responses"] == ["busy"]:
            return Reply({}, 503, {"Retry-After": "15"})
        return Reply({}, 401, silent=0.2)

    with JudgeServer(answer) as server:
        began = time.monotonic()
        with pytest.raises(JudgeError, match="refused, HTTP 401"):
            judge(server, batch_size=1)(["p", "p", "p"][:2], ["busy", "refused"])
        assert time.monotonic() - began < 5 and len(server.asked) == 2


def test_requests_under_way_are_waited_for_and_kept() -> None:
    both = threading.Barrier(2)

    def answer(asked: Asked) -> Any:
        if len(server.asked) <= 2:
            both.wait(PATIENCE)
        return Reply(lengths(asked), silent=0.3) if asked.body["responses"] == ["xx"] else Reply({}, 401)

    with JudgeServer(answer) as server:
        reward = judge(server, batch_size=1)
        with pytest.raises(JudgeError, match="1 of 2 asked for were scored and are kept"):
            reward(["p", "p"], ["xx", "refused"])
        assert reward(["p"], ["xx"]) == [20.0] and len(server.asked) == 2


def test_what_was_scored_before_a_failure_is_not_asked_again() -> None:
    healthy = threading.Event()

    def answer(asked: Asked) -> Any:
        return lengths(asked) if asked.number < 3 or healthy.is_set() else Reply({}, 500)

    with JudgeServer(answer) as server:
        reward = judge(server, batch_size=1, concurrency=1)
        with pytest.raises(JudgeError, match="2 of 4 asked for were scored and are kept"):
            reward(["p"] * 4, ["", "x", "xx", "xxx"])
        assert len(server.asked) == 2 + QUICK.attempts
        healthy.set()
        assert reward(["p"] * 4, ["", "x", "xx", "xxx"]) == [0.0, 10.0, 20.0, 30.0]
        assert len(server.asked) == 2 + QUICK.attempts + 2


def test_a_dead_judge_costs_one_budget_through_the_environments_reward() -> None:
    """The checks around a reward ask row by row who was guilty; of a dead server nobody is."""
    with JudgeServer(lambda asked: Reply({}, 503)) as server:
        reward = as_reward(judge(server), tokenizer=fixtures.tiny_tokenizer(), stop_token_ids=(fixtures.EOS,))
        with pytest.raises(JudgeError, match="for 3 responses together"):
            reward.scores([[3], [3], [3]], [[4], [5], [6]])
        assert len(server.asked) == QUICK.attempts


def test_a_bug_in_a_protocol_is_not_the_servers() -> None:
    with JudgeServer(lengths) as server:
        with pytest.raises(ZeroDivisionError):
            judge(server, protocol=Buggy())(["p"], ["x"])
        assert server.asked == []


def test_another_protocols_reply_is_malformed() -> None:
    malformed = pytest.raises(JudgeError, match=r"malformed, .*scores.*KeyError: 'choices'")
    with JudgeServer(lambda asked: {"scores": [1.0]}) as server, malformed:
        judge(server, protocol=Chat("m", "{response}"), batch_size=7)(["p"], ["x"])


class Buggy(Plain):
    """Cannot make a request."""

    def request(self, prompts: Any, responses: Any) -> Any:
        raise ZeroDivisionError


# What is kept.


def drawn(asked: Asked) -> Mapping[str, Any]:
    """Another score each time."""
    return {"scores": [asked.number + row / 10 for row, _ in enumerate(asked.body["responses"])]}


def test_a_judge_that_draws_its_scores_is_pure() -> None:
    with JudgeServer(drawn) as server:
        reward = judge(server)
        assert reward(["p", "q"], ["x", "y"]) == [1.0, 1.1]
        assert reward(["q", "p", "r"], ["y", "x", "z"]) == [1.1, 1.0, 2.0]
        assert copy.deepcopy(reward) is reward  # Gymnasium copies arguments; the scores stay one store


def test_scores_in_a_file_outlive_the_judge(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "scores.sqlite"
    with JudgeServer(drawn) as server:
        config = judge(server, cache_path=path).config
        assert JudgeReward(config)(["p", "q"], ["x", "y"]) == [1.0, 1.1]
        assert JudgeReward(config)(["q"], ["y"]) == [1.1]
        assert pickle.loads(pickle.dumps(JudgeReward(config)))(["p"], ["x"]) == [1.0]
        assert len(server.asked) == 1
    assert JudgeReward(config)(["p"], ["x"]) == [1.0]  # nobody listens


@pytest.mark.parametrize(
    "change",
    [{"version": "2"}, {"protocol": Classify("m")}, {"url": "http://127.0.0.1:1/other"}],
    ids=lambda change: next(iter(change)),
)
def test_another_judge_has_other_scores(tmp_path: Path, change: dict[str, Any]) -> None:
    config = JudgeConfig(url="http://127.0.0.1:1/judge", cache_path=tmp_path / "scores")
    keys = {JudgeReward(replace(config, **c)).key("p", "x") for c in ({}, change)}
    assert len(keys) == 2
    same = replace(config, batch_size=1, concurrency=1, retries=QUICK, timeouts=Timeouts(), cache_size=5)
    assert JudgeReward(same).key("p", "x") in keys  # how often it is asked is not what it is asked


def test_parts_of_a_chat_are_part_of_the_key() -> None:
    def key(**changes: Any) -> bytes:
        return JudgeReward(JudgeConfig(url="http://h/", protocol=Chat("m", "{response}", **changes))).key("p", "x")

    assert len({key(), key(temperature=1.0), key(system="s"), key(options={"seed": 1}), key(options={"seed": 2})}) == 5


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_whoever_comes_first_decides(tmp_path: Path, kind: str) -> None:
    cache = MemoryCache(10) if kind == "memory" else DiskCache(tmp_path / "scores")
    assert cache.put({b"a": 1.0, b"b": 0.1 + 0.2}) == {b"a": 1.0, b"b": 0.1 + 0.2}  # all digits
    assert cache.put({b"a": 5.0, b"c": 3.0}) == {b"a": 1.0, b"c": 3.0}
    assert cache.get([b"a", b"x"]) == {b"a": 1.0}


def test_two_runs_that_share_a_file_agree(tmp_path: Path) -> None:
    """The other run scores the same text while ours is asking."""
    path = tmp_path / "scores"
    with JudgeServer(lambda asked: other(asked)) as server:
        reward = judge(server, cache_path=path)

        def other(asked: Asked) -> Any:
            DiskCache(path).put({reward.key("p", "x"): 7.0})
            return {"scores": [3.0]}

        assert reward(["p"], ["x"]) == [7.0]


def test_memory_is_bounded_and_a_call_beyond_it_is_whole() -> None:
    with JudgeServer(lengths) as server:
        reward = judge(server, cache_size=2, batch_size=1, concurrency=1)
        assert reward(["p"] * 4, ["", "x", "xx", "xxx"]) == [0.0, 10.0, 20.0, 30.0]
        assert reward(["p"] * 2, ["xx", "xxx"]) == [20.0, 30.0] and len(server.asked) == 4
        assert reward(["p"], [""]) == [0.0] and len(server.asked) == 5


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("not a database " * 100)
    with pytest.raises(ValueError, match=r"cache_path: expected a file of scores, got .*notes"):
        JudgeReward(JudgeConfig(url="http://h/", cache_path=tmp_path / "notes"))
    assert "not a database" in (tmp_path / "notes").read_text()


# The page.


def test_the_page_runs() -> None:
    if not textenv.embedded.STORYTELLER.exists():
        pytest.skip("the embedded models are not made yet")
    run_page(ROOT / "docs" / "judge.md")


# Keys.


def test_the_key_is_sent_and_is_nowhere_else(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    secret = "sk-very-secret-5309"
    monkeypatch.setenv("MY_JUDGE_KEY", secret)

    def answer(asked: Asked) -> Any:  # a server that shows what it was sent
        if asked.number == 1:
            return Reply({"scores": [f"you said {secret}"]})
        return Reply({"error": f"key {secret} is locked"}, 403)

    with JudgeServer(answer) as server, caplog.at_level(logging.DEBUG):
        reward = judge(server, api_key_env="MY_JUDGE_KEY", url=f"{server.url}/judge?code=also-secret")
        with pytest.raises(JudgeError, match=r"key \*\*\* is locked") as caught:
            reward(["p"], ["x"])
        assert server.asked[0].headers["Authorization"] == f"Bearer {secret}"
        assert server.asked[0].path == "/judge?code=also-secret"
    assert secret.encode() not in pickle.dumps(reward)
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("textenv")]
    assert len(ours) == 1 and "also-secret" not in ours[0] + str(caught.value)
    for told in (repr(reward), str(caught.value), str(caught.value.__cause__), str(vars(reward)), caplog.text):
        assert secret not in told


@pytest.mark.parametrize("key", [None, "", "  ", "line\nbreak", "schlüssel"])
def test_a_key_that_is_not_there_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    monkeypatch.delenv("MY_JUDGE_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("MY_JUDGE_KEY", key)
    with pytest.raises(ValueError, match="api_key_env: expected the environment variable MY_JUDGE_KEY") as caught:
        JudgeReward(JudgeConfig(url="http://h/", api_key_env="MY_JUDGE_KEY"))
    assert not key or not key.strip() or key not in str(caught.value)


# Settings.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "localhost:8000"}, "url: expected http://"),
        ({"url": "ftp://h/"}, "url: expected http://"),
        ({"url": "http:///path"}, "url: expected http://"),
        ({"url": "http://h:port/"}, "url: expected http://"),
        ({"url": None}, "url: expected http://"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"concurrency": True}, "concurrency: expected an integer >= 1, got True"),
        ({"cache_size": 1.5}, "cache_size: expected an integer >= 1, got 1.5"),
        ({"protocol": "chat"}, "protocol: expected a dataclass"),
        ({"protocol": Plain}, "protocol: expected a dataclass"),
        ({"timeouts": 5}, r"timeouts: expected Timeouts\(...\), got 5"),
        ({"retries": 5}, r"retries: expected Retries\(...\), got 5"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JudgeConfig(**{"url": "http://h/", **changes})


def test_a_password_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="url: expected no user or password") as caught:
        JudgeConfig(url="https://me:hunter2@h/")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), True, "5"])
def test_bad_times(value: Any) -> None:
    for kind, name in ((Timeouts, "connect"), (Timeouts, "read"), (Timeouts, "total"), (Retries, "seconds")):
        with pytest.raises(ValueError, match=f"{name}: expected a finite number > 0"):
            kind(**{name: value})
    with pytest.raises(ValueError, match="attempts: expected an integer >= 1"):
        Retries(attempts=0)


def test_the_extra_is_named_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from textenv.rewards.judge import reward

    monkeypatch.setattr(reward.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'textenv\[judge\]'"):
        JudgeReward(JudgeConfig(url="http://h/"))
