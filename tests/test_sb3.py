"""The adapter of stable-baselines3: the interface, the reward, the buffer."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.vec_env import VecMonitor

import textenv
from agents.adapters import sb3_bridge
from agents.adapters.sb3_bridge.buffers import EpisodeRolloutBuffer
from agents.adapters.sb3_bridge.env import TextVecEnv
from tests import env_fixtures
from tests.agent_fixtures import even_share, make_env
from tests.sb3_fixtures import STOCK, Recording, columns, float64_logprobs, make_model
from textenv.kl import AdaptiveKL

MODES = ("SameStep", "Disabled")


# ---------------------------------------------------------------------------------------------------- the interface


def test_its_checker_passes_on_the_single_environment() -> None:
    from stable_baselines3.common.env_checker import check_env

    check_env(gym.make("RLHF-Text-v0", **env_fixtures.options()), warn=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("end", ["terminate", "truncate"])
def test_steps_are_those_of_single_environments(mode: str, end: str) -> None:
    """Rewards, ends, infos and terminal observations against N environments that know nothing of batches."""
    options: dict[str, Any] = env_fixtures.options(length_end=end)
    venv = TextVecEnv(textenv.TextVectorEnv(3, autoreset_mode=mode, **options))
    singles = [gym.make("RLHF-Text-v0", **options) for _ in range(3)]
    venv.seed(5)
    observation = venv.reset()
    begun = [env.reset(seed=5 + i)[0] for i, env in enumerate(singles)]
    rng, seen = np.random.default_rng(0), {"terminated": 0, "truncated": 0}
    for _ in range(14):
        for row in range(3):
            assert all((observation[key][row] == begun[row][key]).all() for key in observation)
        actions = rng.integers(0, env_fixtures.VOCAB, 3)
        actions[rng.random(3) < 0.2] = env_fixtures.EOS
        observation, rewards, dones, infos = venv.step(actions)
        for row, env in enumerate(singles):
            begun[row], reward, terminated, truncated, info = env.step(int(actions[row]))
            assert rewards[row] == pytest.approx(float(reward), abs=1e-5) and dones[row] == (terminated or truncated)
            assert infos[row]["ref_logprob"] == pytest.approx(float(info["ref_logprob"]), abs=1e-4)
            assert infos[row]["finish_reason"] == info["finish_reason"]
            assert ("terminal_observation" in infos[row]) == bool(dones[row])
            if dones[row]:
                last = infos[row]["terminal_observation"]
                assert all((last[key] == begun[row][key]).all() for key in last)
                assert infos[row]["TimeLimit.truncated"] is truncated
                seen["truncated" if truncated else "terminated"] += 1
                begun[row] = env.reset()[0]
    assert seen["terminated"] and (seen["truncated"] > 0) == (end == "truncate")


def test_options_reach_the_environment_at_the_next_reset() -> None:
    venv = TextVecEnv(make_env(num_envs=2))
    venv.set_options([{"prompt_index": 3}, {"prompt_index": 0}])
    assert venv.reset()["input_ids"][:, :4].tolist() == [[11, 12, 13, 14], [5, 6, 7, 0]]
    venv.set_options([{"prompt_index": 3}, {}])
    with pytest.raises(ValueError, match="options"):
        venv.reset()


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (lambda: make_env(autoreset_mode="NextStep"), "NEXT_STEP"),
        (lambda: make_env(obs_type="torch"), "obs_type"),
        (lambda: gym.make("RLHF-Text-v0", **env_fixtures.options()), r"gym\.make_vec .*, got TextEnv"),
        (lambda: gym.make_vec("CartPole-v1", 2), "make_vec"),
    ],
)
def test_what_it_cannot_step_is_refused(made: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        TextVecEnv(made())


def test_attributes_and_methods_are_told_row_by_row() -> None:
    venv = TextVecEnv(make_env(num_envs=3))
    venv.reset()
    assert venv.get_attr("kl_source") == ["agent"] * 3 and not venv.has_attr("nothing")
    assert venv.has_attr("action_masks") and np.stack(venv.env_method("action_masks")).all()
    assert venv.env_is_wrapped(gym.Wrapper, [0, 2]) == [False, False]
    with pytest.raises(ValueError, match="temperature"):
        venv.set_attr("temperature", 2.0)


# ---------------------------------------------------------------------------------------------------- the reward


def expected_rewards(model: Any, record: Recording, beta: float, source: str, credit: str) -> np.ndarray:
    """`[T, N]`, from the scores and two float64 models, by a loop over each row's steps."""
    policy, task = model.policy.network.policy, model.env.unwrapped.text_envs.task
    temperature = task.options.temperature
    ours, theirs = (float64_logprobs(lm, temperature) for lm in (policy.lm, task.reference.model.module))
    actions = columns(model.rollout_buffer, "actions").astype(int)
    rewards = np.zeros(actions.shape)
    for row in range(actions.shape[1]):
        owed, prompt = 0.0, 0
        for t, token in enumerate(actions[:, row]):
            prefix = record.prefixes[t][row]
            if len(prefix) == record.prompts[t][row]:
                owed, prompt = 0.0, len(prefix)
            kl = ours(prefix)[token] - theirs(prefix)[token]
            response = [*prefix[prompt:], int(token)]
            ended = token in task.stop_token_ids or len(response) == task.options.max_new_tokens
            score = even_share(prefix[:prompt], response) if ended else 0.0
            owed = owed + kl if credit == "sequence" else kl
            charged = owed if credit == "token" or ended else 0.0
            rewards[t, row] = score - beta * charged
    return rewards


@pytest.mark.parametrize("buffer", ["ours", "stock"])
@pytest.mark.parametrize("credit", ["token", "sequence"])
@pytest.mark.parametrize("source", ["agent", "policy"])
@pytest.mark.parametrize("mode", MODES)
def test_the_kl_is_charged_exactly_once(mode: str, source: str, credit: str, buffer: str) -> None:
    changes = {"learning_rate": 0.0, "n_steps": 15} | (STOCK if buffer == "stock" else {})
    model = make_model(changes=changes, autoreset_mode=mode, kl_credit=credit, temperature=0.8)
    if source == "policy":
        model.env.unwrapped.text_envs.attach(model.policy.network.next_logits)
    record = Recording(model.rollout_buffer)
    [row] = sb3_bridge.learn(model, 1)
    expected = expected_rewards(model, record, 0.1, source, credit)
    assert np.abs(model.rollout_buffer.rewards - expected).max() < 1e-4
    assert row["kl"] > 0.5 and row["objective"] == pytest.approx(row["score"] - 0.1 * row["kl"])


def test_the_oracle_would_see_a_missing_or_double_charge() -> None:
    model = make_model(changes={"learning_rate": 0.0, "n_steps": 15})
    record = Recording(model.rollout_buffer)
    sb3_bridge.learn(model, 1)
    for beta in (0.0, 0.2):
        assert (
            np.abs(model.rollout_buffer.rewards - expected_rewards(model, record, beta, "agent", "token")).max() > 0.01
        )


def test_a_sum_goes_on_over_rollouts_and_calls_of_learn() -> None:
    """`kl_credit="sequence"`: rollouts of 2 steps cut the episodes of up to 6 in the middle."""
    model = make_model(changes={"learning_rate": 0.0, "n_steps": 2}, kl_credit="sequence")
    record, kept = Recording(model.rollout_buffer), []
    for number in range(8):
        sb3_bridge.learn(model, 1, reset=number == 0)
        kept.append((columns(model.rollout_buffer, "actions").copy(), model.rollout_buffer.rewards.copy()))
    actions, rewards = (np.concatenate(part) for part in zip(*kept, strict=True))
    model.rollout_buffer.buffer_size, model.rollout_buffer.actions = 16, actions
    model.rollout_buffer.generator_ready = False
    assert np.abs(rewards - expected_rewards(model, record, 0.1, "agent", "sequence")).max() < 1e-4


@pytest.mark.parametrize("buffer", ["ours", "stock"])
@pytest.mark.parametrize("algorithm", [PPO, A2C, MaskablePPO])
@pytest.mark.parametrize(("callbacks", "got"), [(0, "none"), (2, "a second one")])
def test_learning_without_the_charge_or_with_two_is_refused(
    callbacks: int, got: str, algorithm: Any, buffer: str
) -> None:
    model = make_model(algorithm, STOCK if buffer == "stock" else {})
    before = model.policy.parameters_to_vector()
    with pytest.raises(ValueError, match=f"callback: expected .*TextCallback.*, got {got}"):
        model.learn(36, callback=[sb3_bridge.TextCallback() for _ in range(callbacks)])
    assert (model.policy.parameters_to_vector() == before).all()
    sb3_bridge.learn(model, 2)  # as it should be done, nothing is left of it


def test_one_step_a_rollout_owes_its_charge_too() -> None:
    model = make_model(changes={"n_steps": 1, "batch_size": 6, "n_epochs": 1})
    sb3_bridge.learn(model, 3)
    with pytest.raises(ValueError, match=r"callback: .*got none"):
        model.learn(36)


def test_evaluation_and_calls_by_hand_owe_nothing() -> None:
    model = make_model()
    observation = model.env.reset()
    for _ in range(3):
        observation = model.env.step(model.predict(observation)[0])[0]
    states = {key: torch.from_numpy(value) for key, value in observation.items()}
    for _ in range(2):
        model.policy(states)
    model.policy.set_training_mode(False)
    with torch.no_grad():
        model.policy(states)
    sb3_bridge.learn(model, 1)


def test_no_reference_owes_no_charge() -> None:
    model = make_model(kl_coef=0.0)
    model.learn(36)
    [row] = sb3_bridge.learn(model, 1)
    assert np.isnan(row["kl"]) and row["objective"] == row["score"] > 0 and row["kl_coef"] == 0


def test_every_rollout_has_its_row() -> None:
    """Episodes of exactly 6 tokens, rollouts of 2: two of three see no end."""
    controller = AdaptiveKL(0.1, target=1e-3, horizon=100.0)
    model = make_model(changes={"n_steps": 2, "learning_rate": 0.0}, stop_token_ids=[], kl_coef=controller)
    history = sb3_bridge.learn(model, 6)
    assert [row["episodes"] for row in history] == [0, 0, 6, 0, 0, 6]
    assert [row["timesteps"] for row in history] == [12, 24, 36, 48, 60, 72]
    for row in history:
        for key in ("score", "kl", "objective", "response_length"):
            assert np.isnan(row[key]) == (row["episodes"] == 0)
    assert controller.value == pytest.approx(0.1 * 1.012**2)  # moved by the rollouts that saw an end


def test_beta_moves_once_a_rollout() -> None:
    controller = AdaptiveKL(0.1, target=1e-3, horizon=100.0)
    model = make_model(kl_coef=controller)
    history = sb3_bridge.learn(model, 3)
    expected = 0.1
    for row in history:
        assert row["kl_coef"] == pytest.approx(expected)
        expected *= 1 + 0.2 * row["episodes"] / 100  # far above the target: the error is at its bound
    assert controller.value == pytest.approx(expected)


def test_truncation_is_bootstrapped_and_charged() -> None:
    """What is cut pays V of the state after the cut, and not the score."""
    model = make_model(changes={"learning_rate": 0.0, "n_steps": 6}, length_end="truncate", stop_token_ids=[])
    record, values = Recording(model.rollout_buffer), []
    inner = model.env.unwrapped.step_wait

    def step_wait() -> Any:
        answer = inner()
        values.extend(info.get("terminal_observation") for info in answer[3] if "terminal_observation" in info)
        return answer

    model.env.unwrapped.step_wait = step_wait
    model.learn(36, callback=sb3_bridge.TextCallback(value_coef=None))
    expected = expected_rewards(model, record, 0.1, "agent", "token")
    last = {key: torch.as_tensor(np.stack([value[key] for value in values])) for key in values[0]}
    bootstrap = model.policy.predict_values(last).detach().numpy()[:, 0]
    scores = [even_share(row[: int(n)], row[int(n) :]) for row, n in _rows(values)]
    expected[-1] += bootstrap - scores
    assert np.abs(bootstrap).min() > 1e-3 and np.abs(model.rollout_buffer.rewards - expected).max() < 1e-4


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_a_new_critic_foresees_the_mean_of_what_is_cut_too(gamma: float) -> None:
    """V = μ everywhere, after the cut as well: δ_t = r_t + (γ − 1)μ, at the last token too."""
    changes = {"learning_rate": 0.0, "n_steps": 6, "gamma": gamma, "gae_lambda": 0.9}
    model = make_model(changes=changes, critic="shared", length_end="truncate", stop_token_ids=[])
    record = Recording(model.rollout_buffer)
    sb3_bridge.learn(model, 1)
    paid = expected_rewards(model, record, 0.1, "agent", "token")
    actions = columns(model.rollout_buffer, "actions").astype(int)
    for row in range(6):  # what is cut has no score
        prompt = record.prefixes[0][row]
        paid[-1, row] -= even_share(prompt, actions[:, row].tolist())
    mean = float(model.rollout_buffer.values.flat[0])
    advantage, found = np.zeros(6), columns(model.rollout_buffer, "advantages")
    for t in reversed(range(6)):
        advantage = paid[t] + (gamma - 1) * mean + gamma * 0.9 * advantage
        assert np.abs(found[t] - advantage).max() < 1e-4
    assert abs(mean) > 0.01


def _rows(observations: list[dict[str, np.ndarray]]) -> list[tuple[list[int], int]]:
    return [(o["input_ids"][: o["attention_mask"].sum()].tolist(), o["prompt_length"][0]) for o in observations]


def test_the_monitor_keeps_telling_the_score() -> None:
    model = make_model()
    history = sb3_bridge.learn(model, 3)
    told = [info["r"] for info in model.ep_info_buffer]
    assert isinstance(model.env, VecMonitor) and len(told) == sum(row["episodes"] for row in history)
    total = sum(row["score"] * row["episodes"] for row in history)
    assert sum(told) == pytest.approx(total, rel=1e-5)


# ---------------------------------------------------------------------------------------------------- the buffer


def run_with(changes: dict[str, Any], algorithm: Any = PPO, **options: Any) -> Any:
    model = make_model(algorithm, {"learning_rate": 0.0, "n_steps": 15} | changes, **options)
    sb3_bridge.learn(model, 1)
    return model


@pytest.mark.parametrize("algorithm", [PPO, MaskablePPO])
def test_the_buffer_gives_what_the_library_s_own_gives(algorithm: Any) -> None:
    ours = run_with({}, algorithm, how={"by_episode": False}).rollout_buffer
    stock = run_with(STOCK, algorithm).rollout_buffer
    assert not isinstance(stock, EpisodeRolloutBuffer) and isinstance(ours, EpisodeRolloutBuffer)
    for size in (32, None):
        np.random.seed(0)
        first = list(ours.get(size))
        np.random.seed(0)
        second = list(stock.get(size))
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            for key in b.observations:
                assert a.observations[key].dtype == b.observations[key].dtype
                assert torch.equal(a.observations[key], b.observations[key])
            for x, y in zip(a[1:], b[1:], strict=True):
                assert torch.equal(x.float(), y.float())


def test_minibatches_by_episode_are_a_partition_into_whole_episodes() -> None:
    buffer = run_with({}).rollout_buffer
    batches = [
        (b.observations["input_ids"], b.observations["attention_mask"].sum(1), b.actions) for b in buffer.get(30)
    ]
    assert len(batches) == 3 and sum(len(batch[0]) for batch in batches) == 90
    assert all(20 <= len(batch[0]) <= 40 for batch in batches)
    everything = next(iter(buffer.get(None)))
    found = sorted(buffer.log_probs.ravel().tolist())
    assert found == sorted(everything.old_log_prob.tolist())
    owners = [set(buffer.row.T.reshape(-1)[chosen].tolist()) for chosen in buffer._episodes(3)]
    assert sum(len(owner) for owner in owners) == buffer.used == len(set().union(*owners))


def test_memory_is_that_of_the_tokens() -> None:
    """64 rows × 48 steps of texts of 1024 columns: the library keeps 9 bytes a cell for each transition."""
    space = gym.spaces.Dict(
        {
            "input_ids": gym.spaces.Box(0, 49999, (1024,), np.int64),
            "attention_mask": gym.spaces.Box(0, 1, (1024,), np.int8),
            "prompt_length": gym.spaces.Box(0, 1024, (1,), np.int64),
        }
    )
    buffer = EpisodeRolloutBuffer(48, space, gym.spaces.Discrete(50_000), n_envs=64)
    stock = 64 * 48 * (9 * 1024 + 8)
    assert buffer.nbytes < stock / 25
