"""Bad input to the environment: the error names the argument, what was expected and what came; nothing is half-done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import env_fixtures as fixtures
import gymnasium as gym
import numpy as np
import pytest
import torch
from env_fixtures import options

from textenv import Shared, TextEnv, TextVectorEnv

ID = "RLHF-Text-v0"


def foreign_tokenizer() -> Any:
    """Knows an id that the model has no logit for."""
    import copy

    tokenizer = copy.deepcopy(fixtures.tiny_tokenizer())
    tokenizer.add_tokens(["more"])
    return tokenizer


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"reference": "no/such/folder"}, "reference.*no (such )?folder"),
    ({"reference": Path("no/such/folder")}, "reference.*no folder .?no/such/folder"),
    (
        {"reference": fixtures.tiny_llama()},
        r"reference: expected live modules to be wrapped, textenv.Shared\(...\), got LlamaForCausalLM",
    ),
    ({"reference": 5}, "reference.*got 5"),
    ({"reward": "no/such/folder"}, "reward.*no (such )?folder"),
    ({"reward": 5}, "reward: expected a folder, a hub name or a callable .*got 5"),
    (
        {"reward": torch.nn.Linear(1, 1)},
        r"reward: expected live modules to be wrapped, textenv.Shared\(...\), got Linear",
    ),
    ({"tokenizer": "no/such/folder"}, "tokenizer.*no (such )?folder"),
    ({"tokenizer": 5}, "tokenizer: expected a folder, a hub name or a tokenizer, got 5"),
    ({"tokenizer": foreign_tokenizer()}, "tokenizer.*logit width 40.*id 40"),
    (
        {"tokenizer": None, "reward": fixtures.LetterReward()},
        "tokenizer: expected one, because the reward is given text",
    ),
    ({"tokenizer": None, "prompts": ["ax"]}, "tokenizer: expected one, because prompts holds text"),
    (
        {"policy": fixtures.tiny_policy()},
        r"policy: expected live modules to be wrapped, textenv.Shared\(...\), got LastLogits",
    ),
    (
        {"policy": fixtures.tiny_policy().forward},
        r"policy: expected live modules to be wrapped, textenv.Shared\(...\), got LastLogits",
    ),
    ({"policy": 5}, "policy: expected a callable .*got 5"),
    ({"policy": Shared(fixtures.tiny_policy()), "kl_source": "agent"}, "policy: expected None under kl_source='agent'"),
    ({"policy": None, "kl_source": "policy"}, "policy: expected a callable with kl_source='policy', got None"),
    ({"prompts": []}, "prompts: expected at least one prompt, got none"),
    ({"prompts": ["ax", ""]}, "row 1: expected at least one token, got an empty prompt"),
    ({"prompts": [[1], []]}, "row 1: expected at least one token, got an empty prompt"),
    (
        {"prompts": [[1, 2, 3]], "max_prompt_tokens": 2},
        "prompts: at 0: expected at most max_prompt_tokens=2 tokens, got 3",
    ),
    ({"prompts": {"no/such.jsonl": 0}}, "prompts: expected a finite weight > 0 for 'no/such.jsonl', got 0"),
    ({"prompts": [[{"role": "user", "content": "ax"}]]}, "prompts: at 0: expected a tokenizer with a chat template"),
    ({"prompts": "no/such.jsonl"}, "prompts: no/such.jsonl: expected a readable file"),
    ({"max_new_tokens": 28}, r"max_new_tokens: .*within the reference's context of 32, got 5 \+ 28"),
    ({"max_prompt_tokens": 30}, r"max_new_tokens: .*within the reference's context of 32, got 30 \+ 4"),
    ({"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1, got 0"),
    ({"max_new_tokens": 2.5}, "max_new_tokens: expected an integer >= 1, got 2.5"),
    ({"max_prompt_tokens": -1}, "max_prompt_tokens: expected an integer >= 1, got -1"),
    ({"prompt_overflow": "right"}, "prompt_overflow: expected one of 'error', 'left', got 'right'"),
    ({"stop_token_ids": [40]}, r"stop_token_ids: expected ids in \[0, 40\), got \[40\]"),
    ({"stop_token_ids": 2}, r"stop_token_ids: expected ids in \[0, 40\), got 2"),
    ({"stop_token_ids": "</s>"}, r"stop_token_ids: expected ids in \[0, 40\), got '</s>'"),
    ({"temperature": 0}, "temperature: expected a finite number > 0, got 0"),
    ({"temperature": "hot"}, "temperature: expected a finite number > 0, got 'hot'"),
    ({"temperature": float("nan")}, "temperature: expected a finite number > 0, got nan"),
    ({"kl_coef": -0.1}, "kl_coef: expected a finite number >= 0, got -0.1"),
    ({"kl_coef": "small"}, "kl_coef: expected a number >= 0 or a controller .*got 'small'"),
    ({"kl_source": "nobody"}, "kl_source: expected one of 'agent', 'policy', 'reference', got 'nobody'"),
    ({"kl_source": ["agent"]}, r"kl_source: expected one of .*got \['agent'\]"),
    ({"kl_credit": "word"}, "kl_credit: expected one of 'token', 'sequence', got 'word'"),
    ({"length_end": "explode"}, "length_end: expected one of 'terminate', 'truncate', got 'explode'"),
    ({"length_end": "truncate", "kl_credit": "sequence"}, "kl_credit: expected 'token' with length_end='truncate'"),
    (
        {"length_end": "truncate", "missing_eos_penalty": 1.0},
        "missing_eos_penalty: expected 0 with length_end='truncate'",
    ),
    ({"missing_eos_penalty": -1.0}, "missing_eos_penalty: expected a finite number >= 0, got -1.0"),
    ({"device": "abacus"}, "device: expected a torch device .*got 'abacus'"),
    ({"dtype": "int8"}, "dtype: expected a floating-point type .*got 'int8'"),
    ({"dtype": "float99"}, "dtype: expected a floating-point type .*got 'float99'"),
    ({"render_mode": "rgb_array"}, "render_mode: expected None, 'ansi' or 'human', got 'rgb_array'"),
    (
        {"max_tokens": 3},
        r"max_tokens: expected an argument of the environment, one of reference, .*\(did you mean max_",
    ),
    ({"zzz": 3}, "zzz: expected an argument of the environment, one of reference, reward, .*trust_remote_code$"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ARGUMENTS, ids=[m[:45] for _, m in BAD_ARGUMENTS])
@pytest.mark.parametrize("kind", [TextEnv, TextVectorEnv])
def test_bad_arguments(kind: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options(**changes))


BAD_VECTOR_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"num_envs": 0}, "num_envs: expected an integer >= 1, got 0"),
    ({"num_envs": 2.0}, "num_envs: expected an integer >= 1, got 2.0"),
    ({"obs_type": "jax"}, "obs_type: expected 'numpy' or 'torch', got 'jax'"),
    ({"autoreset_mode": "Never"}, "autoreset_mode: expected one of 'NextStep', 'SameStep', 'Disabled', got 'Never'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_VECTOR_ARGUMENTS, ids=[m[:30] for _, m in BAD_VECTOR_ARGUMENTS])
def test_bad_vector_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextVectorEnv(**options(**changes))


def test_gymnasium_passes_the_error_on() -> None:
    for make in (gym.make, gym.make_vec):
        with pytest.raises(ValueError, match="kl_coef: expected a finite number >= 0, got -1"):
            make(ID, **options(kl_coef=-1))


BAD_ACTIONS = [40, -1, 2.0, True, "a", None, [3], np.array([3]), np.array([[3]])]


@pytest.mark.parametrize("action", BAD_ACTIONS, ids=repr)
def test_bad_actions_leave_the_episode_untouched(action: Any) -> None:
    env, twin = TextEnv(**options(kl_source="policy")), TextEnv(**options(kl_source="policy"))
    env.reset(seed=0), twin.reset(seed=0)
    with pytest.raises(gym.error.InvalidAction, match=r"actions?: expected"):
        env.step(action)
    assert_same_step(env.step(5), twin.step(5))


@pytest.mark.parametrize(
    "actions",
    [[5, 40], [5], [[5], [6]], 5, [5.0, 6.0], [True, False], ["a", "b"], torch.tensor([5.0, 6.0]), torch.tensor([5])],
    ids=repr,
)
def test_bad_vector_actions_leave_every_row_untouched(actions: Any) -> None:
    envs, twin = (TextVectorEnv(2, autoreset_mode="NextStep", **options()) for _ in range(2))
    for each in (envs, twin):
        each.reset(seed=0)
        each.step(np.array([2, 5]))  # row 0 rests now
    with pytest.raises(gym.error.InvalidAction, match=r"actions: expected 2 integers in \[0, 40\), one a row, got"):
        envs.step(actions)
    assert_same_step(envs.step(np.array([5, 6])), twin.step(np.array([5, 6])))


def test_steps_out_of_turn() -> None:
    env = TextEnv(**options())
    with pytest.raises(gym.error.ResetNeeded, match="call reset"):
        env.step(5)
    env.reset(seed=0)
    env.step(2)
    with pytest.raises(gym.error.ResetNeeded, match="call reset"):
        env.step(5)
    envs = TextVectorEnv(2, autoreset_mode="Disabled", **options())
    with pytest.raises(gym.error.ResetNeeded, match="call reset"):
        envs.step(np.array([5, 5]))
    envs.reset(seed=0)
    envs.step(np.array([5, 2]))
    with pytest.raises(gym.error.ResetNeeded, match=r"Rows \[1\] have ended: reset them with options={'reset_mask'"):
        envs.step(np.array([5, 5]))


BAD_RESETS: list[tuple[Any, str]] = [
    ({"prompt_indx": 1}, r"options: expected 'prompt_index' or 'prompt', got \['prompt_indx'\]"),
    ({"prompt_index": 1, "prompt": "ax"}, "options: expected 'prompt_index' or 'prompt', got"),
    ({"prompt_index": 3}, r"options\['prompt_index'\]: expected indices in \[0, 3\), got 3"),
    ({"prompt_index": -1}, r"options\['prompt_index'\]: expected indices in \[0, 3\), got -1"),
    ({"prompt_index": 1.0}, r"options\['prompt_index'\]: expected an integer or \d of them, got 1.0"),
    ({"prompt_index": [0] * 7}, r"options\['prompt_index'\]: expected an integer or \d of them"),
    ({"prompt_index": [[0], [1, 2]]}, r"options\['prompt_index'\]: expected an integer or \d of them"),
    ({"prompt": ""}, "prompts: at 0: expected at least one token, got an empty prompt"),
    ({"prompt": []}, "prompts: at 0: expected at least one token, got an empty prompt"),
    ({"prompt": 5}, r"options\['prompt'\]: expected text, ids, or a list of \d of them, got 5"),
    ({"prompt": [1] * 6}, "prompts: at 0: expected at most max_prompt_tokens=5 tokens, got 6"),
    ({"prompt": [1, 40]}, r"prompts: at 0: expected ids in \[0, 40\)"),
    ({"prompt": ["ax"] * 7}, r"options\['prompt'\]: expected one prompt or a list of \d, got 7"),
]


@pytest.mark.parametrize(("given", "message"), BAD_RESETS, ids=[str(given) for given, _ in BAD_RESETS])
def test_bad_resets_leave_the_episode_untouched(given: Any, message: str) -> None:
    env, twin = TextEnv(**options()), TextEnv(**options())
    env.reset(seed=0), twin.reset(seed=0)
    env.step(5), twin.step(5)
    with pytest.raises(ValueError, match=message):
        env.reset(options=given)
    assert_same_step(env.step(6), twin.step(6))
    with pytest.raises(ValueError, match=message):
        TextVectorEnv(2, **options()).reset(options=given)


@pytest.mark.parametrize(
    "mask", [[True, False], np.array([1, 0]), np.array([True]), np.array([False, False])], ids=repr
)
def test_bad_masks(mask: Any) -> None:
    envs = TextVectorEnv(2, autoreset_mode="Disabled", **options())
    envs.reset(seed=0)
    with pytest.raises(
        ValueError, match=r"options\['reset_mask'\]: expected a boolean array of shape \(2,\) with a True"
    ):
        envs.reset(options={"reset_mask": mask})
    with pytest.raises(ValueError, match="seed: expected an integer or 2 of them, got 3"):
        envs.reset(seed=[1, 2, 3])


class Moody:
    """A reward function that can be told to fail."""

    wants_ids = True
    mood = "good"

    def __call__(self, prompts: Any, responses: Any) -> Any:
        if self.mood == "raise":
            raise RuntimeError("no service")
        scores = [fixtures.IdReward.one(p, r) for p, r in zip(prompts, responses, strict=True)]
        return {"good": scores, "nan": [float("nan")] * len(scores), "few": scores[1:]}[self.mood]


class MoodyDense(Moody):
    per_token = True

    def __call__(self, prompts: Any, responses: Any) -> Any:
        super().__call__(prompts, responses)
        scores = fixtures.DenseReward()(prompts, responses)
        return {"good": scores, "nan": [[float("nan")] * len(s) for s in scores], "few": scores[1:]}[self.mood]


MOODS = [
    ("raise", r"reward: raised RuntimeError: no service for prompt \[1.*\] and response \[6, 2\]"),
    ("nan", r"reward: expected finite scores, got .*nan.* for prompt \[1.*\] and response \[6, 2\]"),
    ("few", r"reward: expected 1 scores, one a response, got 0"),
]


@pytest.mark.parametrize("kl_credit", ["token", "sequence"])
@pytest.mark.parametrize("make", [Moody, MoodyDense])
@pytest.mark.parametrize(("mood", "message"), MOODS)
def test_a_failing_reward_undoes_the_step(kl_credit: str, make: Any, mood: str, message: str) -> None:
    """After the error the step has not happened: it can be taken again, or another one."""
    arguments = options(kl_source="policy", kl_credit=kl_credit)
    env, twin = TextEnv(**arguments | {"reward": make()}), TextEnv(**arguments | {"reward": make()})
    env.reset(seed=0), twin.reset(seed=0)
    assert_same_step(env.step(6), twin.step(6))
    env.task.reward.function.mood = mood
    with pytest.raises(ValueError, match=message):
        env.step(2)
    env.task.reward.function.mood = "good"
    assert_same_step(env.step(7), twin.step(7))
    assert_same_step(env.step(2), twin.step(2))


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_a_failing_reward_undoes_the_step_of_every_row(mode: str) -> None:
    arguments = options(kl_source="policy", prompts=[[1, i] for i in range(3, 40)])
    envs, twin = (TextVectorEnv(2, autoreset_mode=mode, **arguments | {"reward": Moody()}) for _ in range(2))
    for each in (envs, twin):
        each.reset(seed=0)
        each.step(np.array([2, 5] if mode == "NextStep" else [5, 6]))
    envs.task.reward.function.mood = "raise"
    with pytest.raises(ValueError, match="no service"):
        envs.step(np.array([5, 2]))
    envs.task.reward.function.mood = "good"
    for actions in ([5, 2], [6, 7]):
        assert_same_step(envs.step(np.array(actions)), twin.step(np.array(actions)))
        if mode == "Disabled" and actions == [5, 2]:
            mask = {"reset_mask": np.array([False, True])}
            envs.reset(options=dict(mask)), twin.reset(options=dict(mask))


BAD_POLICIES: list[tuple[Any, str]] = [
    (
        fixtures.LastLogits(fixtures.tiny_llama(seed=3, vocab=44)),
        r"policy: expected logits of shape \(1, 40\).*got \(1, 44\)",
    ),
    (
        lambda ids, mask: fixtures.tiny_llama()(input_ids=ids, attention_mask=mask),
        "policy: expected logits.*got CausalLM",
    ),
    (lambda ids, mask: torch.zeros(*ids.shape, 40), r"policy: expected logits of shape \(1, 40\).*got \(1, \d, 40\)"),
    (lambda ids, mask: torch.full((len(ids), 40), torch.nan), r"policy: expected finite log-probs .*got \[nan\]"),
]


@pytest.mark.parametrize(("policy", "message"), BAD_POLICIES, ids=[message[16:60] for _, message in BAD_POLICIES])
def test_a_failing_policy_undoes_the_step(policy: Any, message: str) -> None:
    env, twin = TextEnv(**options(kl_source="policy", policy=Shared(policy))), TextEnv(**options(kl_source="policy"))
    env.reset(seed=0), twin.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(5)
    env.attach(fixtures.tiny_policy())
    assert_same_step(env.step(5), twin.step(5))


def assert_same_step(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert set(one) == set(two)
        for key in one:
            assert_same_step(one[key], two[key])
    elif isinstance(one, tuple) or (isinstance(one, np.ndarray) and one.dtype == object):
        for a, b in zip(one, two, strict=True):
            assert_same_step(a, b)
    elif one is None:
        assert two is None
    else:
        assert np.allclose(one, two, rtol=0, atol=1e-6)
