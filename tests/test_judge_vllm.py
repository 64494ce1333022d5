"""Judges that are vLLM servers: the embedded reward model and storyteller, served for real (`make test-vllm`)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import textenv
from textenv.rewards import ClassifierReward
from textenv.rewards.judge import (
    Chat,
    Classify,
    ExpectedDigit,
    JudgeConfig,
    JudgeError,
    JudgeReward,
    Match,
    Pooling,
    Retries,
    Score,
)

pytestmark = [
    pytest.mark.timeout(600),  # starting a server takes a minute or two
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm` runs this"),
    pytest.mark.skipif(not textenv.embedded.REWARD.exists(), reason="the embedded models are not made yet"),
]
PROMPTS = ["Once upon a time", "The cat", "Lily and Tom"] * 5
RESPONSES = [f" was happy {i} times." for i in range(15)]


@contextmanager
def served(model: Path, *flags: str) -> Iterator[str]:
    """The URL of a server of this model, which ends with the `with`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(model), *flags]
    command += ["--served-model-name", "judge", "--dtype", "float32", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", **os.environ}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 250
        while not ready(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def ready(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (URLError, OSError):
        return False


def ask(url: str, protocol: Any, prompts: list[str], responses: list[str]) -> list[float]:
    config = JudgeConfig(url=url, protocol=protocol, batch_size=4, retries=Retries(attempts=2, first_wait=0.1))
    return JudgeReward(config)(prompts, responses)


def test_pooling_endpoints_give_the_logits_of_the_reward_model() -> None:
    classifier = ClassifierReward(textenv.embedded.REWARD)
    logits = classifier(PROMPTS, RESPONSES) - classifier.bias
    assert float(logits.std()) > 0.1
    with served(textenv.embedded.REWARD, "--runner", "pooling") as url:
        for path, protocol in (
            ("classify", Classify("judge")),
            ("pooling", Pooling("judge")),
            ("score", Score("judge")),
        ):
            scores = ask(f"{url}/{path}", protocol, PROMPTS, RESPONSES)
            assert scores == pytest.approx(logits.tolist(), abs=1e-4), path  # float32
        squashed = ask(f"{url}/classify", Classify("judge", use_activation=True), PROMPTS, RESPONSES)
        assert squashed == pytest.approx(torch.sigmoid(logits).tolist(), abs=1e-4)
        with pytest.raises(JudgeError, match=r"refused, HTTP 404 .*model `other` does not exist"):
            ask(f"{url}/classify", Classify("other"), PROMPTS, RESPONSES)
        with pytest.raises(JudgeError, match=r"refused, HTTP 400 .*context length is 256 tokens.* for prompt 'long'"):
            ask(f"{url}/classify", Classify("judge"), ["short", "long"], [" b", " b" * 400])


def test_chat_completions_have_the_shape_that_readers_read(tmp_path: Path) -> None:
    """The storyteller goes on greedily, as transformers does; and says 7, which it never would, if that is forced."""
    model = AutoModelForCausalLM.from_pretrained(textenv.embedded.STORYTELLER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(textenv.embedded.STORYTELLER)
    ids = tokenizer("Once upon a time", add_special_tokens=False, return_tensors="pt")
    story = tokenizer.decode(model.generate(**ids, max_new_tokens=3, do_sample=False)[0, ids["input_ids"].shape[1] :])
    (seven,) = tokenizer("7", add_special_tokens=False)["input_ids"]
    (tmp_path / "plain.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    with served(textenv.embedded.STORYTELLER, "--chat-template", str(tmp_path / "plain.jinja")) as url:

        def asked(reader: Match | ExpectedDigit, **settings: Any) -> list[float]:
            chat = Chat("judge", "{prompt}{response}", reader, max_tokens=3, **settings)
            return ask(f"{url}/v1/chat/completions", chat, ["Once upon"], [" a time"])

        with pytest.raises(JudgeError, match=f"expected a number where .* has it, got {story!r}"):
            asked(Match())
        with pytest.raises(JudgeError, match=f"expected a digit from 1 to 9, got {story!r}"):
            asked(ExpectedDigit())
        raised = {"logit_bias": {str(seven): 100.0}}
        assert asked(Match(r"(7)"), options=raised) == [7.0]
        assert asked(ExpectedDigit(min_mass=1e-30), options=raised) == pytest.approx([7.0])
        with pytest.raises(JudgeError, match=r"expected digits with a probability of 0\.5 together"):
            asked(ExpectedDigit(), options=raised)  # log-probs are those before the bias
