"""An engine that fails: started again once, then a clear error, and nothing that is half right passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from agents.mismatch import SamplerMismatch
from agents.sampling import TransformersSampler, fingerprint, named_weights
from agents.sampling.engine import Drawn, EngineSampler, Request, RequestRefused, SamplerFailure, check_prefixes
from agents.sampling.sync import checksum
from tests.agent_fixtures import identical, make_agent, small_config, weights
from tests.conftest import make_llama

Spoil = Callable[[list[Drawn]], list[Drawn]]


class FakeEngine:
    """Draws with a copy of the model, row by row, as often as it is well."""

    def __init__(
        self, fails: Sequence[str] = (), spoil: Spoil = list, error: type[Exception] = ConnectionError
    ) -> None:
        self.error = error
        self.model, self.label = make_llama(), "none"
        self.fails, self.spoil, self.closed = list(fails), spoil, False

    def maybe(self, work: str) -> None:
        if work in self.fails:
            self.fails.remove(work)
            raise self.error(f"{work} broke")

    def load(self, weights: Mapping[str, torch.Tensor], label: str) -> Mapping[str, int]:
        self.maybe("load")
        for name, tensor in weights.items():
            self.model.get_parameter(name).data.copy_(tensor)
        self.label = label
        return {name: checksum(tensor) for name, tensor in weights.items()}

    def draw(self, requests: Sequence[Request]) -> list[Drawn]:
        self.maybe("draw")
        drawn = []
        for one in requests:
            options = {"max_new_tokens": one.max_new_tokens, "stop_token_ids": one.stop_token_ids}
            found = TransformersSampler(self.model).sample(
                [one.prompt], **options, temperature=one.temperature, seed=one.seed, greedy=one.greedy
            )
            drawn.append(Drawn(found.responses[0], found.logprobs[0], self.label))
        return self.spoil(drawn)

    def close(self) -> None:
        self.maybe("close")
        self.closed = True


def sampler_of(model: Any, *plans: dict[str, Any]) -> tuple[EngineSampler, list[FakeEngine]]:
    """A sampler whose first engines are as planned, and what engines were started."""
    made: list[FakeEngine] = []

    def start() -> FakeEngine:
        made.append(FakeEngine(**(plans[len(made)] if len(made) < len(plans) else {})))
        return made[-1]

    return EngineSampler(model, start), made


ASKED: dict[str, Any] = {"max_new_tokens": 6, "stop_token_ids": [1, 20], "temperature": 0.7, "seed": 3}
PROMPTS = [[5, 6], [7], [5, 6]]


def test_an_engine_that_dies_is_started_again_with_the_weights() -> None:
    model = make_llama()
    well, _ = sampler_of(model)
    expected = well.sample(PROMPTS, **ASKED)
    sampler, made = sampler_of(model, {"fails": ["draw", "close"]})
    assert sampler.sample(PROMPTS, **ASKED) == expected
    assert len(made) == 2 and expected.fingerprint == fingerprint(named_weights(model), 0)
    sampler.push(named_weights(model), 4)
    samples = sampler.sample(PROMPTS, **ASKED)
    assert len(made) == 2 and samples.responses == expected.responses
    assert samples.fingerprint is not None and samples.fingerprint.version == 4


def test_an_engine_that_takes_no_weights_is_started_again() -> None:
    model = make_llama()
    sampler, made = sampler_of(model, {"fails": ["load"]})
    assert len(made) == 2 and made[0].closed
    assert sampler.sample(PROMPTS, **ASKED).fingerprint == fingerprint(named_weights(model), 0)


def test_one_that_dies_twice_ends_it_and_the_next_call_may_try_again() -> None:
    broken = {"fails": ["draw"]}
    sampler, made = sampler_of(make_llama(), broken, broken)
    with pytest.raises(SamplerFailure, match=r"could not draw \(ConnectionError: draw broke\), was started again"):
        sampler.sample(PROMPTS, **ASKED)
    assert len(made) == 2
    sampler.sample(PROMPTS, **ASKED)


def shorter(drawn: list[Drawn]) -> list[Drawn]:
    return [replace(drawn[0], tokens=drawn[0].tokens[:1], logprobs=drawn[0].logprobs[:1]), *drawn[1:]]


SPOILS: dict[str, tuple[Spoil, str]] = {
    "one response less": (lambda drawn: drawn[1:], "expected 3 responses, got 2"),
    "fewer tokens": (shorter, "expected 6 tokens or a stop token, each with its log-prob .*, got 1 tokens"),
    "no tokens": (lambda d: [replace(d[0], tokens=[], logprobs=[]), *d[1:]], "got 0 tokens"),
    "no log-probs": (lambda d: [replace(d[0], logprobs=d[0].logprobs[1:]), *d[1:]], "5 log-probs"),
    "NaN": (lambda d: [replace(d[0], logprobs=[float("nan")] * 6), *d[1:]], "expected finite log-probs"),
    "goes on after a stop": (lambda d: [replace(d[0], tokens=[1, 9, 9, 9, 9, 9]), *d[1:]], "first stop token"),
    "two versions": (
        lambda d: [replace(d[0], label="7"), *d[1:]],
        "of the weights 0-[0-9a-f]{16}, got some of 7",
    ),
    "an old cache": (lambda d: [replace(one, cached_tokens=1) for one in d], "1 tokens of prompt 0 came from a prefix"),
}


@pytest.mark.parametrize("name", SPOILS)
def test_what_is_half_right_does_not_pass(name: str) -> None:
    spoil, message = SPOILS[name]
    sampler, made = sampler_of(make_llama(), {"spoil": spoil}, {"spoil": spoil})
    with pytest.raises(SamplerFailure, match=message):
        sampler.sample(PROMPTS, **{**ASKED, "stop_token_ids": [1], "seed": 8})
    assert len(made) == 2
    sampler.sample(PROMPTS, **ASKED)


# How an engine may fail.


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError])
def test_a_failure_of_any_kind_is_mended(error: type[Exception]) -> None:
    """Answers that cannot be read are ValueErrors, too."""
    sampler, made = sampler_of(make_llama())
    expected = sampler.sample(PROMPTS, **ASKED)
    made[0].fails, made[0].error = ["draw"], error
    assert sampler.sample(PROMPTS, **ASKED) == expected and len(made) == 2


@pytest.mark.parametrize("error", [ValueError, ConnectionError])
def test_an_engine_that_took_no_weights_is_never_drawn_from(error: type[Exception]) -> None:
    sampler, made = sampler_of(make_llama(), {}, {"fails": ["load"], "error": error})
    expected = sampler.sample(PROMPTS, **ASKED)
    made[0].fails = ["draw"]
    with pytest.raises(SamplerFailure, match=rf"draw broke\), was .* \({error.__name__}: load broke\)"):
        sampler.sample(PROMPTS, **ASKED)
    assert sampler.sample(PROMPTS, **ASKED) == expected
    assert [engine.closed for engine in made] == [True, True, False]


def test_a_request_that_is_refused_is_no_failure() -> None:
    sampler, made = sampler_of(make_llama(), {"fails": ["draw"], "error": RequestRefused})
    with pytest.raises(RequestRefused, match="draw broke"):
        sampler.sample(PROMPTS, **ASKED)
    assert len(made) == 1 and not made[0].closed
    sampler.sample(PROMPTS, **ASKED)
    assert len(made) == 1


def test_a_sampler_that_cannot_be_made_leaves_no_engine() -> None:
    made: list[FakeEngine] = []

    def start() -> FakeEngine:
        made.append(FakeEngine(fails=["load"]))
        return made[-1]

    with pytest.raises(SamplerFailure, match="could not load weights"):
        EngineSampler(make_llama(), start)
    assert [engine.closed for engine in made] == [True, True]


def test_an_interrupt_while_it_is_made_leaves_no_engine() -> None:
    made: list[FakeEngine] = []

    def start() -> FakeEngine:
        made.append(FakeEngine(fails=["load"], error=KeyboardInterrupt))  # type: ignore[arg-type]
        return made[-1]

    with pytest.raises(KeyboardInterrupt):
        EngineSampler(make_llama(), start)
    assert [engine.closed for engine in made] == [True]


def test_weights_that_another_run_gave_to_the_engine_are_noticed() -> None:
    """Two runs at the same update, of the same weights even: whose load was last is not known."""
    model = make_llama()
    sampler, made = sampler_of(model)
    expected = sampler.sample(PROMPTS, **ASKED)
    other = EngineSampler(model, lambda: made[0])
    assert other.sample(PROMPTS, **ASKED) == expected
    assert sampler.sample(PROMPTS, **ASKED) == expected and len(made) == 2


# Prefix caches.

ONES, LONGER = [1] * 10, [1] * 40


def asked(prompt: list[int]) -> Request:
    return Request(prompt, 0, 40, [], 1.0, False)


def answer(response: list[int], cached: int, cache: int = 0) -> Drawn:
    return Drawn(response, [0.0] * len(response), "0", cached, cache)


ALLOWED = {
    "nothing found": [(ONES, [1], 0, 0), (ONES, [1], 0, 0)],
    "computed as a prompt": [(LONGER, [5], 0, 0), (ONES, [5], 10, 0)],
    "computed as a response": [(ONES, [1] * 30, 0, 0), (LONGER, [5], 16, 0)],
    "computed in part by each": [(ONES, [5], 0, 0), ([1] * 20, [5], 10, 0), (LONGER, [5], 20, 0)],
    "of its own cache each": [(ONES, [5], 0, 0), (ONES, [5], 10, 0), (ONES, [5], 0, 1), (ONES, [5], 10, 1)],
}
REFUSED = {
    "by nobody": [(ONES, [5], 10, 0), (ONES, [5], 10, 0)],
    "by a response that went elsewhere": [(ONES, [2] * 30, 0, 0), (LONGER, [5], 16, 0)],
    "in another cache": [(ONES, [5], 0, 0), (ONES, [5], 10, 1)],
    "more than there is": [(ONES, [5], 11, 0)],
}


@pytest.mark.parametrize("rows", ALLOWED.values(), ids=list(ALLOWED))
def test_what_the_batch_itself_computed_may_be_found(rows: list[Any]) -> None:
    check_prefixes([asked(prompt) for prompt, *_ in rows], [answer(*rest) for _, *rest in rows])


@pytest.mark.parametrize("rows", REFUSED.values(), ids=list(REFUSED))
def test_what_nobody_of_the_batch_computed_is_of_earlier_weights(rows: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="came from a prefix cache of earlier weights"):
        check_prefixes([asked(prompt) for prompt, *_ in rows], [answer(*rest) for _, *rest in rows])


def test_prompts_of_one_batch_may_share_a_cache_and_later_batches_may_use_it() -> None:
    def cached(counts: list[int]) -> Spoil:
        return lambda drawn: [replace(one, cached_tokens=n) for one, n in zip(drawn, counts, strict=True)]

    sampler, made = sampler_of(make_llama(), {"spoil": cached([0, 0, 2])})
    sampler.sample(PROMPTS, **ASKED)
    made[0].spoil = cached([2, 1, 2])
    sampler.sample(PROMPTS, **ASKED)
    assert len(made) == 1
    sampler.push(named_weights(make_llama()), 1)
    made[0].spoil = cached([2, 0, 2])
    sampler.sample([], **ASKED)  # no batch, so the next one is still the first
    sampler.sample(PROMPTS, **ASKED)
    assert len(made) == 2  # it found what it cannot have computed


# Within a run.


def test_a_run_goes_on_when_an_engine_dies_within_a_rollout() -> None:
    whole, broken = (make_agent(small_config(), temperature=0.7) for _ in range(2))
    whole.sampler, _ = sampler_of(whole.policy)
    whole.learn(3)
    broken.sampler, made = sampler_of(broken.policy)
    broken.learn(1)
    made[0].fails = ["draw"]
    broken.learn(2)
    assert len(made) == 2
    for (name, tensor), (_, other) in zip(named_weights(whole.policy), named_weights(broken.policy), strict=True):
        assert torch.equal(tensor, other), name


def test_a_failure_leaves_agent_and_checkpoint_as_they_were(tmp_path: Any) -> None:
    agent = make_agent(small_config(), temperature=0.7)
    agent.sampler, made = sampler_of(agent.policy, {}, {"fails": ["draw"]})
    agent.learn(1)
    agent.save(tmp_path / "run")
    before, place = fingerprint(named_weights(agent.policy), 0), (agent.prompts.state_dict(), agent.collections)
    made[0].fails = ["draw"]
    with pytest.raises(SamplerFailure, match="the last checkpoint is whole"):
        agent.learn(1)
    assert fingerprint(named_weights(agent.policy), 0) == before and agent.updates == 1
    assert (agent.prompts.state_dict(), agent.collections) == place
    resumed = type(agent).load(tmp_path / "run", agent.envs)
    assert fingerprint(named_weights(resumed.policy), 0) == before
    resumed.sampler, _ = sampler_of(resumed.policy)
    agent.learn(1)  # another engine is started, and the rollout is the one that failed
    resumed.learn(1)
    assert fingerprint(named_weights(agent.policy), 0) == fingerprint(named_weights(resumed.policy), 0) != before


def test_a_first_rollout_that_is_refused_leaves_the_critic_without_a_scale() -> None:
    agent = make_agent(small_config(mismatch_alarm=1e-9), temperature=0.7)
    agent.sampler, _ = sampler_of(
        agent.policy, {"spoil": lambda drawn: [replace(one, logprobs=[p - 0.1 for p in one.logprobs]) for one in drawn]}
    )
    before = weights(agent.policy)
    with pytest.raises(SamplerMismatch):
        agent.learn(1)
    assert identical(weights(agent.policy), before) and agent.policy.value_head.value_count == 0
    assert agent.prompts.position == agent.collections == 0


def test_greedy_responses_have_no_log_probs() -> None:
    sampler, made = sampler_of(make_llama())
    assert sampler.sample(PROMPTS, **ASKED, greedy=True).logprobs == [[], [], []]
    assert len(made) == 1


def test_a_response_that_would_not_fit_is_refused_before_anything_is_drawn() -> None:
    made: list[FakeEngine] = []
    sampler = EngineSampler(make_llama(), lambda: made.append(FakeEngine()) or made[-1], max_model_len=7)
    made[0].fails = ["draw"]
    with pytest.raises(
        ValueError, match="row 0 has 2 tokens, and with max_new_tokens 6 exceeds the model's context of 7"
    ):
        sampler.sample(PROMPTS, **ASKED)
    assert made[0].fails == ["draw"]


def test_nothing_is_drawn_of_a_closed_engine_but_by_a_new_one() -> None:
    sampler, made = sampler_of(make_llama())
    expected = sampler.sample(PROMPTS, **ASKED)
    sampler.close()
    sampler.close()
    assert made[0].closed
    assert sampler.sample(PROMPTS, **ASKED) == expected and len(made) == 2
