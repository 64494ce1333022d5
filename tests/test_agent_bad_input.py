"""Bad input to the agents: each is a ValueError that names the argument, what was expected and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agents import PPO, PPOConfig, ValueHeadLM, evaluate
from tests.agent_fixtures import make_agent, make_env, make_policy, small_config
from tests.conftest import make_llama

INTEGERS = {
    "batch_episodes": 1,
    "epochs": 1,
    "minibatches": 1,
    "microbatch_episodes": 1,
    "schedule_updates": 1,
    "warmup_updates": 0,
    "critic_warmup_updates": 0,
    "eval_every": 0,
    "seed": 0,
}
"""Field -> the least that is allowed."""
NUMBERS = [
    "learning_rate",
    "critic_learning_rate",
    "adam_eps",
    "max_grad_norm",
    "clip_eps",
    "clip_eps_high",
    "value_clip_eps",
    "value_coef",
    "trunk_value_coef",
    "entropy_coef",
    "score_clip",
    "max_update_kl",
    "mismatch_alarm",
]
FRACTIONS = ["gamma", "gae_lambda", "value_stats_decay"]
FLAGS = ["whiten_advantages", "whiten_rewards", "correction_drop"]

CONFIG: list[tuple[str, Any, str]] = [
    *((name, value, f"an integer >= {low}") for name, low in INTEGERS.items() for value in (low - 1, 1.5, True, "3")),
    *((n, v, "a finite number >= 0") for n in NUMBERS for v in (-0.1, float("nan"), float("inf"), "1", True)),
    *((n, v, "a finite number >= 0 and <= 1.0") for n in FRACTIONS for v in (-0.1, 1.1, float("nan"), None)),
    *((name, value, "True or False") for name in FLAGS for value in (1, None, "yes")),
    *(("dual_clip", value, "a number > 1") for value in (1.0, 0.5, -2, "2", float("nan"))),
    *(("correction_cap", value, "a number > 0") for value in (0.0, -2, "2", None, float("inf"))),
    ("correction", "tokens", "one of token, sequence, none"),
    ("old_logprobs", "both", "one of forward, sampler"),
    ("bf16", 1, "True, False or None"),
    ("lr_schedule", "exponential", "one of constant, linear, cosine"),
    ("minibatches", 65, "at most batch_episodes=64"),
]


@pytest.mark.parametrize(("field", "value", "expected"), CONFIG)
def test_config(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{field}: expected {expected}, got {value!r}")):
        PPOConfig(**{field: value})


def test_every_field_is_checked() -> None:
    assert {field for field, _, _ in CONFIG} == set(PPOConfig.__dataclass_fields__)


Case = tuple[Callable[[Path], Any], str]
CASES: dict[str, Case] = {
    "PPO: policy of another vocabulary": (
        lambda _: PPO(make_policy(make_llama(vocab_size=70)), make_env()),
        r"policy: expected the reference's vocabulary of 64, got 70",
    ),
    "PPO: kl_source='reference'": (
        lambda _: PPO(make_policy(), make_env(kl_source="reference")),
        r"kl_source: expected 'agent' or 'policy', got 'reference'",
    ),
    "PPO: eval_every without prompts": (
        lambda _: PPO(make_policy(), make_env(), small_config(eval_every=2)),
        r"eval_prompts: expected held-out prompts, because eval_every is set, got none",
    ),
    "PPO: empty eval_prompts": (
        lambda _: PPO(make_policy(), make_env(), small_config(eval_every=2), eval_prompts=[]),
        r"eval_prompts: expected held-out prompts",
    ),
    "PPO: an eval prompt that is too long": (
        lambda _: PPO(make_policy(), make_env(), eval_prompts=[[5] * 9]),
        r"prompts: at 0: expected at most max_prompt_tokens=4 tokens, got 9",
    ),
    "PPO: text without a tokenizer": (
        lambda _: PPO(make_policy(), make_env(), eval_prompts=["hello"]),
        r"tokenizer: expected one",
    ),
    "learn: negative": (lambda _: make_agent().learn(-1), r"iterations: expected an integer >= 0, got -1"),
    "learn: no integer": (lambda _: make_agent().learn(1.5), r"iterations: expected an integer >= 0, got 1.5"),  # type: ignore[arg-type]
    "collect: an empty prompt": (lambda _: make_agent().collect([[]]), r"prompts: at 0: expected at least one token"),
    "collect: an unknown id": (lambda _: make_agent().collect([[64]]), r"prompts: at 0: expected ids in \[0, 64\)"),
    "collect: no prompts": (lambda _: make_agent().collect([]), r"prompts: expected at least one, got none"),
    "evaluate: no prompts": (lambda _: make_agent().evaluate(), r"prompts: expected some"),
    "evaluate: an empty list": (lambda _: evaluate(make_policy(), make_env(), []), r"prompts: expected at least one"),
    "evaluate: policy of another vocabulary": (
        lambda _: evaluate(make_policy(make_llama(vocab_size=70)), make_env(), [[5]]),
        r"policy: expected the environment's vocabulary of 64, got 70",
    ),
    "load: no folder": (
        lambda folder: PPO.load(folder / "nowhere", make_env()),
        r"folder: expected a checkpoint with trainer.json, got '.*nowhere'",
    ),
    "load: a model, but no checkpoint": (
        lambda folder: [make_llama().save_pretrained(folder), PPO.load(folder, make_env())],
        r"folder: expected a checkpoint with trainer.json",
    ),
    "save: a folder of other things": (
        lambda folder: [make_llama().save_pretrained(folder), make_agent().save(folder)],
        r"folder: expected a checkpoint, which is replaced, or nothing at all",
    ),
    "ValueHeadLM: no folder": (
        lambda folder: ValueHeadLM.from_pretrained(folder / "nowhere"),
        r"source must be a model folder or a hub name; there is no folder '.*nowhere'",
    ),
    "ValueHeadLM: an unknown critic": (
        lambda folder: [make_llama().save_pretrained(folder), ValueHeadLM.from_pretrained(folder, critic="/no/critic")],
        r"critic must be a model folder",
    ),
    "ValueHeadLM: no language model": (lambda _: ValueHeadLM(make_llama().model), r"lm|no output embedding"),
    "reward: raises": (
        lambda _: make_agent(score=lambda p, r: 1 / 0).collect(),
        r"reward: raised ZeroDivisionError: .* for prompt \[.*\] and response \[.*\]",
    ),
    "reward: NaN": (lambda _: make_agent(score=lambda p, r: float("nan")).collect(), r"reward: expected finite scores"),
}


@pytest.mark.parametrize("name", CASES)
def test_agents(name: str, tmp_path: Path) -> None:
    act, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        act(tmp_path)


def test_a_reward_that_fails_leaves_the_weights() -> None:
    from tests.agent_fixtures import identical, weights

    calls = [0]

    def score(prompt: Any, response: Any) -> float:
        calls[0] += 1
        if calls[0] > 8:
            raise RuntimeError("server down")
        return 0.5 * len(response)

    agent = make_agent(score=score)
    agent.learn(1)
    before = weights(agent.policy)
    with pytest.raises(ValueError, match="server down"):
        agent.learn(1)
    assert identical(before, weights(agent.policy))
    assert agent.updates == 1
