"""Servers over HTTP: what is sent, what is refused, what is tried again, and what is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.sampling import fingerprint, named_weights, vllm_server, vllm_terms
from agents.sampling.engine import RequestRefused, SamplerFailure
from agents.sampling.vllm_config import VLLMConfig, VLLMServerConfig
from agents.sampling.vllm_server import VLLMServerSampler
from scripts.samplers import make_sampler
from tests.agent_fixtures import make_agent, small_config
from tests.conftest import make_llama
from tests.server_fixtures import FakeServer, Servers
from tests.test_engine_sampler import sampler_of

ASKED: dict[str, Any] = {"max_new_tokens": 6, "stop_token_ids": [1, 20], "temperature": 0.7, "seed": 3}
PROMPTS = [[5, 6], [7], [5, 6], [8, 9, 10]]
GENERATE, HEALTH = "/inference/v1/generate", "/health"


@pytest.fixture
def servers() -> Iterator[Servers]:
    with Servers() as found:
        yield found


@pytest.fixture
def server(servers: Servers) -> FakeServer:
    return servers.start()


def sampler_at(*servers: FakeServer, model: Any = None, **options: Any) -> VLLMServerSampler:
    urls = tuple(server.url for server in servers)
    return VLLMServerSampler(model or make_llama(), VLLMServerConfig(urls=urls, timeout=5.0, **options))


def test_two_servers_draw_as_one_engine_would(servers: Servers) -> None:
    first, second = servers.start(), servers.start()
    model = make_llama()
    sampler = sampler_at(first, second, model=model, api_key="secret")
    expected, _ = sampler_of(model)
    assert sampler.sample(PROMPTS, **ASKED) == expected.sample(PROMPTS, **ASKED)
    assert [server.asked[GENERATE] for server in (first, second)] == [2, 2]
    assert all(headers["Authorization"] == "Bearer secret" for headers in first.headers + second.headers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    sampler.push(named_weights(model), 4)
    expected.push(named_weights(model), 4)
    samples = sampler.sample(PROMPTS, **ASKED)
    assert samples == expected.sample(PROMPTS, **ASKED) and samples.fingerprint == fingerprint(named_weights(model), 4)


def test_an_agent_learns_from_servers(server: FakeServer) -> None:
    agent, twin = (make_agent(small_config(), temperature=0.7) for _ in range(2))
    agent.sampler = make_sampler("vllm-server", agent.policy, VLLMConfig(), VLLMServerConfig(urls=(server.url,)), 12)
    twin.sampler, _ = sampler_of(twin.policy)
    agent.learn(2)
    twin.learn(2)
    assert fingerprint(named_weights(agent.policy), 0) == fingerprint(named_weights(twin.policy), 0)
    with pytest.raises(ValueError, match="exceeds the model's context of 12"):
        agent.sampler.sample([[5] * 7], **ASKED)


def test_greedy_responses_cost_no_log_probs(server: FakeServer) -> None:
    sampler = sampler_at(server)
    assert sampler.sample(PROMPTS, **ASKED, greedy=True).logprobs == [[], [], [], []]


def test_a_temperature_that_vllm_would_raise_is_refused(server: FakeServer) -> None:
    sampler = sampler_at(server)
    with pytest.raises(RequestRefused, match=r"temperature: expected at least 0\.01, .*, got 0\.005"):
        sampler.sample(PROMPTS, **{**ASKED, "temperature": 0.005})
    assert server.asked[GENERATE] == 0 and server.asked[HEALTH] == 1
    sampler.sample(PROMPTS, **{**ASKED, "temperature": 0.005}, greedy=True)


# Failures.


@pytest.mark.parametrize(
    ("faults", "starts"),
    [
        (["reset"], 1),
        (["reset", "reset"], 1),
        (["reset"] * 3, 2),
        (["500"], 2),
        (["garbage"], 2),
        (["empty"], 2),
    ],
)
def test_what_is_tried_again(server: FakeServer, faults: list[str], starts: int) -> None:
    """A broken connection is made again; for anything else the weights are pushed anew."""
    sampler = sampler_at(server)
    expected = sampler.sample(PROMPTS[:1], **ASKED)
    server.faults = list(faults)
    assert sampler.sample(PROMPTS[:1], **ASKED) == expected
    assert not server.faults and server.asked[HEALTH] == starts


def test_a_request_that_a_server_refuses_is_the_askers_fault(server: FakeServer) -> None:
    sampler = sampler_at(server)
    server.faults = ["400"]
    with pytest.raises(RequestRefused, match=r"refuses a request: .*no such thing"):
        sampler.sample(PROMPTS, **ASKED)
    assert server.asked[HEALTH] == 1
    sampler.sample(PROMPTS, **ASKED)


def test_a_server_that_does_not_answer_in_time(server: FakeServer) -> None:
    sampler = VLLMServerSampler(make_llama(), VLLMServerConfig(urls=(server.url,), timeout=0.5))
    server.faults = ["hang"] * 2
    start = time.monotonic()
    with pytest.raises(SamplerFailure, match="could not draw \\(ReadTimeout"):
        sampler.sample(PROMPTS[:1], **ASKED)
    assert time.monotonic() - start < 10


def test_the_first_failure_ends_the_others(server: FakeServer) -> None:
    sampler = VLLMServerSampler(make_llama(), VLLMServerConfig(urls=(server.url,), timeout=60.0))
    server.faults = ["400", "hang", "hang", "hang"]
    start = time.monotonic()
    with pytest.raises(RequestRefused):
        sampler.sample(PROMPTS, **ASKED)
    assert time.monotonic() - start < 10


def test_an_interrupt_ends_what_is_under_way(server: FakeServer) -> None:
    sampler = VLLMServerSampler(make_llama(), VLLMServerConfig(urls=(server.url,), timeout=60.0))
    server.faults = ["hang"] * 4
    threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(PROMPTS, **ASKED)
    assert time.monotonic() - start < 10


def test_no_more_requests_are_under_way_than_allowed(server: FakeServer) -> None:
    sampler = sampler_at(server, concurrency=3)
    server.slow = 0.05
    sampler.sample([[5]] * 12, **ASKED)
    assert server.busiest == 3


def test_caches_are_looked_at_server_by_server(servers: Servers) -> None:
    """The prompt that the first computed excuses nothing that the second found."""
    first, second = servers.start(), servers.start()
    second.cached = 1
    with pytest.raises(SamplerFailure, match="1 tokens of prompt 1 came from a prefix cache of earlier weights"):
        sampler_at(first, second).sample([[5, 6]] * 2, **ASKED)


def test_a_server_that_does_not_tell_of_its_cache_is_refused(server: FakeServer) -> None:
    sampler = sampler_at(server)
    server.faults = ["untold"] * 8
    with pytest.raises(SamplerFailure, match="does not tell what it found in its cache: --enable-prompt-tokens"):
        sampler.sample(PROMPTS, **ASKED)


@pytest.mark.parametrize("where", ["servers", "ranks"])
def test_servers_and_ranks_must_have_got_the_same(servers: Servers, where: str) -> None:
    first, second = servers.start(), servers.start()
    first.ranks, second.ranks = ([0], [1]) if where == "servers" else ([0, 0], [0, 1])
    with pytest.raises(SamplerFailure, match="the servers and their ranks did not all get the same weights"):
        sampler_at(first, second)


def test_two_runs_on_one_server_notice_each_other(server: FakeServer) -> None:
    model = make_llama()
    one, two = (sampler_at(server, model=model) for _ in range(2))
    expected, pushes = one.sample(PROMPTS, **ASKED), server.asked["/collective_rpc"]
    assert pushes == 3  # what the second had pushed is pushed over
    assert two.sample(PROMPTS, **ASKED) == expected and server.asked["/collective_rpc"] == 4


# Reaching them.


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_server_that_is_not_there_is_told_with_what_happened() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(SamplerFailure, match=r"was not ready within 0\.1 s \(ConnectError: .*refused"):
        VLLMServerSampler(make_llama(), VLLMServerConfig(urls=(url,), start_timeout=0.1))


class OwnServer:
    """Stands for the process of a server that is started here."""

    def __init__(self, server: FakeServer) -> None:
        self.url, self.closed, self.process = server.url, False, self
        self.status: int | None = None

    def poll(self) -> int | None:
        return self.status

    @property
    def returncode(self) -> int | None:
        return self.status

    def close(self) -> None:
        self.closed = True


def own(monkeypatch: pytest.MonkeyPatch, make: Callable[[], OwnServer]) -> list[OwnServer]:
    started: list[OwnServer] = []
    monkeypatch.setattr(vllm_server, "check_version", lambda: None)
    monkeypatch.setattr(vllm_server, "Server", lambda model, config: started.append(make()) or started[-1])
    return started


def test_no_proxy_leads_to_a_server_of_this_machine(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    started = own(monkeypatch, lambda: OwnServer(server))
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    sampler = VLLMServerSampler(make_llama(), VLLMServerConfig(start_timeout=1.0))
    sampler.sample(PROMPTS, **ASKED)
    sampler.close()
    assert [one.closed for one in started] == [True]


def test_a_server_that_ends_while_it_starts_is_no_wait(monkeypatch: pytest.MonkeyPatch, server: FakeServer) -> None:
    def ended() -> OwnServer:
        made = OwnServer(server)
        made.url, made.status = f"http://127.0.0.1:{free_port()}", 3
        return made

    started = own(monkeypatch, ended)
    with pytest.raises(SamplerFailure, match="the server ended with status 3"):
        VLLMServerSampler(make_llama())
    assert [one.closed for one in started] == [True, True]


# Weights in a file.


def test_in_an_exchange_everybody_can_read_and_nothing_stays(server: FakeServer, tmp_path: Path) -> None:
    sampler_at(server, exchange=tmp_path)
    assert server.modes == [0o755, 0o644] and not list(tmp_path.iterdir())
    sampler_at(server)
    assert server.modes[2] == 0o700


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no such place")
def test_memory_that_is_too_small_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"a": torch.zeros(1000)}
    for free, inside in ((4401, True), (4399, False)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(vllm_terms.shutil, "disk_usage", lambda place, usage=usage: usage)
        with vllm_terms.weight_file(weights) as path:
            assert path.is_relative_to("/dev/shm") == inside


# Settings.


@pytest.mark.parametrize(
    ("engine", "urls", "message"),
    [
        ({"sleep": True}, (), "sleep: expected False, because a server has no such setting, got True"),
        ({"multiprocess": True}, (), "multiprocess: expected False"),
        ({"timeout": 5.0}, (), "timeout: expected 600.0"),
        ({"dtype": "bfloat16"}, ("http://a",), "dtype: expected None, because the servers that urls name run already"),
        ({"more": {"a": 1}}, ("http://a",), "more: expected {}"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(engine: Any, urls: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLLMServerSampler(make_llama(), VLLMServerConfig(urls=urls), VLLMConfig(**engine))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VLLMServerConfig(urls=("10.0.0.2:8000",)), "urls: expected http:// or https://, got '10.0.0.2:8000'"),
        (lambda: VLLMServerConfig(concurrency=0), "concurrency: expected an integer >= 1"),
        (lambda: VLLMServerConfig(start_timeout=0), "start_timeout: expected a number > 0"),
        (lambda: VLLMConfig(max_num_seqs=0), "max_num_seqs: expected an integer >= 1"),
        (lambda: VLLMConfig(max_model_len=0), "max_model_len: expected an integer >= 1"),
        (lambda: VLLMConfig(gpu_memory_utilization=1.5), "gpu_memory_utilization: expected a finite number"),
        (lambda: VLLMConfig(timeout=0), "timeout: expected a number > 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_options_of_a_server_that_is_started() -> None:
    config = VLLMConfig(more={"enable_prefix_caching": False, "seed": 3})
    options = vllm_terms.engine_options(make_llama(), config)
    flags = [flag for name, value in options.items() for flag in vllm_server._flag(name, value)]
    assert {"--enforce-eager", "--no-enable-sleep-mode", "--no-enable-prefix-caching", "--seed=3"} <= set(flags)
    assert "--dtype=float32" in flags and not any("None" in flag for flag in flags)


def test_an_engine_on_a_gpu_computes_as_the_trainer_does_and_compiles() -> None:
    class OnGPU:
        config = make_llama().config

        def __init__(self, dtype: torch.dtype) -> None:
            self.weight: Any = type("Weight", (), {"dtype": dtype, "device": torch.device("cuda")})

        def parameters(self) -> Iterator[Any]:
            return iter([self.weight])

    for dtype, expected in ((torch.float32, "bfloat16"), (torch.float16, "float16")):
        options = vllm_terms.engine_options(OnGPU(dtype), VLLMConfig())
        assert options["dtype"] == expected and options["enforce_eager"] is False
        assert options["kv_cache_memory_bytes"] is None
    assert vllm_terms.engine_options(OnGPU(torch.float32), VLLMConfig(dtype="float32"))["dtype"] == "float32"


# The process.

ENTRY = """
import os, signal, subprocess, sys, time
def main():
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
    child.stdout.readline()
    open(os.environ["TOLD"] + ".new", "w").write(f"{os.getpid()} {child.pid}")
    os.rename(os.environ["TOLD"] + ".new", os.environ["TOLD"])
    time.sleep(60)
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a server of another make, which ignores what ends it as long as it can, tells its processes."""
    place = tmp_path / "vllm" / "entrypoints" / "launchers" / "api_server"
    place.mkdir(parents=True)
    (place / "entry.py").write_text(ENTRY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    return tmp_path / "told"


def processes(told: Path) -> list[int]:
    limit = time.monotonic() + 30
    while not told.exists() and time.monotonic() < limit:
        time.sleep(0.02)
    return [int(number) for number in told.read_text().split()]


def alive(pid: int) -> bool:
    """Whether it runs; one that has ended and that nobody asks for any more does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int]) -> bool:
    limit = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < limit:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_closing_a_server_ends_what_it_started_too(told: Path) -> None:
    server = vllm_server.Server(make_llama(), VLLMConfig())
    pids = processes(told)
    assert len(pids) == 2 and all(map(alive, pids))
    server.close()
    assert gone(pids)
    server.close()  # once more does no harm


def test_a_server_ends_with_the_process_that_started_it(told: Path, tmp_path: Path) -> None:
    script = (
        "import time\nfrom agents.sampling import vllm_server\nfrom agents.sampling.vllm_config import VLLMConfig\n"
        "from tests.conftest import make_llama\n"
        "server = vllm_server.Server(make_llama(), VLLMConfig())\ntime.sleep(60)\n"
    )
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, str(tmp_path)])
    parent = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, cwd=root)
    pids = processes(told)
    assert len(pids) == 2 and all(map(alive, pids))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(pids)


def test_a_run_that_cannot_begin_leaves_no_server(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import scripts.train_ppo as train_ppo

    made: list[VLLMServerSampler] = []
    monkeypatch.setattr(train_ppo, "make_sampler", lambda *_: made.append(sampler_at(server)) or made[0])
    monkeypatch.setattr(train_ppo, "Agent", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_ppo.build(train_ppo.Flags())
    assert len(made) == 1 and made[0]._engine is None
