"""The algorithms of stable-baselines3 on a language model: same numbers, real training, files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.vec_env import VecNormalize

from agents.adapters import sb3_bridge
from agents.losses import clipped_surrogate, clipped_value
from agents.masked import whiten
from agents.returns import gae
from tests.agent_fixtures import even_share, make_env, make_policy
from tests.conftest import make_gpt2, make_llama
from tests.sb3_fixtures import STOCK, Recording, columns, float64_logprobs, make_model
from tests.test_docs import ROOT, run_page
from textenv.wrappers import VectorTopKActions

FORBIDDEN = range(1, 64, 4)


def allowed(response: list[int]) -> np.ndarray:
    """No id of `FORBIDDEN`, and one id less at each step."""
    mask = np.ones(64, dtype=bool)
    mask[[*FORBIDDEN, 30 + len(response)]] = False
    return mask


def some_states(model: Any) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    """States of different lengths, as tensors and as lists."""
    record = Recording(model.rollout_buffer)
    sb3_bridge.learn(model, 1, reset=False)
    [batch] = model.rollout_buffer.get(None)
    states = batch.observations
    lengths = states["attention_mask"].long().sum(1)
    assert len(record.prefixes) == model.n_steps and len(set(lengths.tolist())) > 4
    return states, [row[:n].tolist() for row, n in zip(states["input_ids"], lengths, strict=True)]


# ---------------------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("algorithm", [PPO, MaskablePPO])
@pytest.mark.parametrize("critic", ["shared+", "separate+"])
def test_every_way_to_ask_the_policy_gives_the_model_s_own_numbers(algorithm: Any, critic: str) -> None:
    model = make_model(algorithm, {"learning_rate": 0.0}, critic=critic, temperature=0.7)
    states, prefixes = some_states(model)
    live = model.policy.network.policy
    law = float64_logprobs(live.lm, 0.7)
    expected = torch.from_numpy(np.stack([law(prefix) for prefix in prefixes]))
    values = torch.stack([live(torch.tensor([prefix])).values[0, -1] for prefix in prefixes]).detach()
    actions = torch.arange(len(prefixes)) % 64
    floats = {key: value.float() for key, value in states.items()}  # as the buffers of older versions give them
    for given in (states, floats):
        found, logprobs, entropy = model.policy.evaluate_actions(given, actions)
        assert (found[:, 0] - values).abs().max() < 1e-4 and found.shape == (len(prefixes), 1)
        assert (logprobs - expected[torch.arange(len(actions)), actions]).abs().max() < 1e-4
        assert (entropy + (expected.exp() * expected).sum(1)).abs().max() < 1e-4
        assert (model.policy.predict_values(given)[:, 0] - values).abs().max() < 1e-4
        assert (model.policy.get_distribution(given).distribution.logits - expected).abs().max() < 1e-4
    drawn, found, logprobs = model.policy(states, deterministic=True)
    assert torch.equal(drawn, expected.argmax(1)) and (logprobs - expected.max(1).values).abs().max() < 1e-4
    arrays = {key: value.numpy() for key, value in states.items()}
    assert (model.predict(arrays, deterministic=True)[0] == drawn.numpy()).all()
    one = {key: value[0] for key, value in arrays.items()}
    assert model.predict(one, deterministic=True)[0] == drawn[0]


def test_values_with_a_graph_reach_the_shared_trunk_once() -> None:
    """One forward serves the law and the value of a minibatch, and its gradient is that of two."""
    gradients = []
    for share in (True, False):
        model = make_model(PPO, {"learning_rate": 0.0}, how={"share": share})
        states, _ = some_states(model)
        calls: list[int] = []
        trunk = model.policy.network.policy.lm.model
        hook = trunk.register_forward_hook(
            lambda module, given, answer, calls=calls: calls.append(answer[0].shape[:2].numel())
        )
        values, logprobs, entropy = model.policy.evaluate_actions(states, states["input_ids"][:, 0])
        hook.remove()
        tokens = int(states["attention_mask"].sum())
        assert len(calls) == 1 and (calls[0] < tokens if share else calls[0] == tokens)
        (values.square().mean() + logprobs.mean() + entropy.mean()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.policy.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[1].abs().max()


@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
def test_masks_renormalise_both_laws_exactly(mode: str) -> None:
    model = make_model(
        MaskablePPO, {"n_steps": 12, "learning_rate": 0.0}, constraint=allowed, stop_token_ids=[28], autoreset_mode=mode
    )
    record = Recording(model.rollout_buffer)
    sb3_bridge.learn(model, 1)
    task = model.env.unwrapped.text_envs.task
    laws = [float64_logprobs(lm) for lm in (model.policy.network.policy.lm, task.reference.model.module)]
    actions = columns(model.rollout_buffer, "actions").astype(int)
    logprobs, rewards = columns(model.rollout_buffer, "log_probs"), model.rollout_buffer.rewards
    for t, row in np.ndindex(actions.shape):
        prefix, prompt, token = record.prefixes[t][row], record.prompts[t][row], actions[t, row]
        ours, theirs = (np.where(allowed(prefix[prompt:]), law(prefix), -np.inf) for law in laws)
        ours, theirs = (law[token] - np.logaddexp.reduce(law) for law in (ours, theirs))
        response = [*prefix[prompt:], int(token)]
        score = even_share(prefix[:prompt], response) if token == 28 or len(response) == 6 else 0.0
        assert logprobs[t, row] == pytest.approx(ours, abs=1e-4)
        assert rewards[t, row] == pytest.approx(score - 0.1 * (ours - theirs), abs=1e-4)
    [batch] = model.rollout_buffer.get(None)
    spoken = batch.observations["attention_mask"].long().sum(1) - batch.observations["prompt_length"][:, 0]
    assert torch.equal(
        batch.action_masks > 0, torch.stack([torch.from_numpy(allowed([0] * n)) for n in spoken.tolist()])
    )


def test_a_constraint_needs_the_algorithm_that_reads_masks() -> None:
    with pytest.raises(ValueError, match="algorithm: expected MaskablePPO"):
        make_model(PPO, constraint=allowed)


# ---------------------------------------------------------------------------------------------------- equality


def test_losses_and_advantages_are_those_of_our_functions() -> None:
    """On one minibatch, from PPO's own log; the ratios are not 1, because the old log-probs are moved."""
    model = make_model(
        PPO, {"learning_rate": 0.0, "n_steps": 12, "n_epochs": 1, "batch_size": 72, "gamma": 0.97, "gae_lambda": 0.9}
    )
    sb3_bridge.learn(model, 1)
    buffer = model.rollout_buffer
    rewards, values, starts, advantages, logprobs = (
        torch.from_numpy(columns(buffer, name).T.copy()).double()
        for name in ("rewards", "values", "episode_starts", "advantages", "log_probs")
    )
    last = model.policy.predict_values({k: torch.as_tensor(v) for k, v in model._last_obs.items()}).detach().double()
    goes_on = 1 - torch.cat([starts[:, 1:], torch.from_numpy(model._last_episode_starts)[:, None].double()], 1)
    following = torch.cat([values[:, 1:], last], 1)
    ours = gae(rewards, values, following, 0.97 * goes_on, 0.9)
    assert (ours - advantages).abs().max() < 1e-5
    moved = torch.from_numpy(np.random.default_rng(0).normal(0, 0.3, buffer.log_probs.shape)).float()
    old = torch.from_numpy(buffer.log_probs.copy()) + moved
    buffer.log_probs = old.numpy()
    model.train()
    told = {key.split("/")[1]: value for key, value in model.logger.name_to_value.items()}
    [batch] = buffer.get(None)  # another order than the one learnt from: means do not care
    found, now, entropy = model.policy.evaluate_actions(batch.observations, batch.actions.long().flatten())
    everything = torch.ones_like(now, dtype=torch.bool)
    white = whiten(batch.advantages, everything)
    surrogate = clipped_surrogate(now[None], batch.old_log_prob[None], white[None], 0.2).mean()
    squared = clipped_value(found.T, found.T, batch.returns[None], None).mean()
    assert 0.05 < told["clip_fraction"] < 0.95
    assert told["policy_gradient_loss"] == pytest.approx(float(surrogate.detach()), abs=1e-5)
    assert told["value_loss"] / 2 == pytest.approx(float(squared.detach()), abs=1e-5)
    assert -told["entropy_loss"] == pytest.approx(float(entropy.detach().mean()), abs=1e-5)
    assert logprobs.shape == (6, 12)


def test_the_weight_of_the_value_loss_is_that_of_normalised_values() -> None:
    model = make_model(critic="shared", changes={"learning_rate": 1e-9})
    sb3_bridge.learn(model, 1)
    head = model.policy.network.policy.value_head
    assert model.vf_coef == pytest.approx(0.5 / float(head.value_std) ** 2) and float(head.value_std) != 1.0
    # A critic that knows nothing foresees the mean of the first returns.
    assert np.ptp(model.rollout_buffer.values) == 0 and model.rollout_buffer.values.flat[0] != 0
    untouched = make_model(critic="shared")
    untouched.learn(36, callback=sb3_bridge.TextCallback(value_coef=None))
    assert untouched.vf_coef == 0.5 and float(untouched.policy.network.policy.value_head.value_count) == 0


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_cache_and_sharing_change_nothing(algorithm: Any) -> None:
    found = []
    for on in (True, False):
        model = make_model(algorithm, {"n_steps": 12, "learning_rate": 1e-3}, how={"cache": on, "share": on})
        history = sb3_bridge.learn(model, 2)
        found.append((history, model.policy.parameters_to_vector()))
    for a, b in zip(*(history for history, _ in found), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert np.abs(found[0][1] - found[1][1]).max() < 1e-4


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("algorithm", "stock"), [(PPO, False), (PPO, True), (A2C, False), (MaskablePPO, False)])
def test_it_learns(algorithm: Any, stock: bool) -> None:
    """The share of even ids and the objective rise from a half; far less KL is paid than is earned."""
    changes = {"learning_rate": 1e-2 if algorithm is A2C else 3e-3} | (STOCK if stock else {})
    model = make_model(algorithm, changes, lm=make_llama(), critic="shared", num_envs=24, kl_coef=0.02)
    history = sb3_bridge.learn(model, 24)
    first, last = (np.mean([row["objective"] for row in part]) for part in (history[:3], history[-3:]))
    assert first < 0.65 and last > first + 0.2, [round(row["objective"], 2) for row in history]


# ---------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("algorithm", [PPO, MaskablePPO])
@pytest.mark.parametrize("kind", ["shared", "separate", "lora"])
def test_a_saved_model_goes_on(kind: str, algorithm: Any, tmp_path: Path) -> None:
    if kind == "lora":
        peft = pytest.importorskip("peft")
        lm = peft.get_peft_model(make_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model = make_model(algorithm, lm=lm, critic="shared")
    else:
        lm = make_llama()
        lm.model.embed_tokens.requires_grad_(False)
        model = make_model(algorithm, lm=lm, critic=kind)
    sb3_bridge.learn(model, 2)
    model.save(tmp_path / "model.zip")
    again = algorithm.load(tmp_path / "model.zip", env=model.env)
    mine, other = (m.policy.state_dict() for m in (model, again))
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    assert again.policy.network.policy is not model.policy.network.policy
    flags = [[(n, p.requires_grad) for n, p in m.policy.named_parameters()] for m in (model, again)]
    assert flags[0] == flags[1]
    states, _ = some_states(again)
    assert again.num_timesteps > model.num_timesteps
    model.policy.load_state_dict(again.policy.state_dict())
    for a, b in zip(
        *(m.policy.evaluate_actions(states, states["input_ids"][:, 0]) for m in (model, again)), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_settings_in_a_file_hold_no_weights() -> None:
    """Only what the policy is made of: a model twice as wide has a pickle hardly larger."""
    sizes = []
    for width in (32, 256):
        policy = make_policy(make_llama(hidden_size=width, intermediate_size=2 * width), "separate")
        sizes.append(len(pickle.dumps(sb3_bridge.LivePolicy(policy))))
    assert sizes[1] < 1.1 * sizes[0] < 20_000


def test_the_policy_alone_can_be_saved(tmp_path: Path) -> None:
    model = make_model()
    states, _ = some_states(model)
    model.policy.save(str(tmp_path / "policy.pt"))
    again = sb3_bridge.TextPolicy.load(str(tmp_path / "policy.pt"), device="cpu")
    expected, found = (policy.predict_values(states) for policy in (model.policy, again))
    assert torch.allclose(expected, found, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- misuse


def test_what_cannot_learn_is_refused() -> None:
    policy = make_policy()
    with pytest.raises(ValueError, match=r"kl_source: .*'reference'"):
        sb3_bridge.make(PPO, policy, make_env(num_envs=2, kl_source="reference"))
    with pytest.raises(ValueError, match=r"algorithm: .*DQN"):
        sb3_bridge.settings(DQN, policy, make_env(num_envs=2))  # type: ignore[arg-type]
    other = make_policy(make_llama(vocab_size=72))
    with pytest.raises(ValueError, match="policy: expected the reference's vocabulary of 64, got 72"):
        sb3_bridge.make(PPO, other, make_env(num_envs=2))
    with pytest.raises(ValueError, match=r"envs: expected the actions to be the tokens, .*, got Discrete\(8\)"):
        sb3_bridge.make(PPO, policy, VectorTopKActions(make_env(num_envs=2), k=8))
    with pytest.raises(ValueError, match=r"max_new_tokens: .*the policy's context of 8, got 4 \+ 6"):
        sb3_bridge.make(PPO, make_policy(make_gpt2(n_positions=8)), make_env(num_envs=2))
    with pytest.raises(ValueError, match="policy: expected a ValueHeadLM"):
        sb3_bridge.make(PPO, make_llama(), make_env(num_envs=2))
    settings = sb3_bridge.settings(PPO, policy, make_env(num_envs=2))
    with pytest.raises(ValueError, match=r"lm: .*vocabulary"):
        PPO(**settings | {"policy_kwargs": {"lm": sb3_bridge.LivePolicy(other)}})
    settings = sb3_bridge.settings(PPO, policy, make_env(num_envs=2, temperature=0.5))
    settings["policy_kwargs"] |= {"temperature": 1.0}
    with pytest.raises(ValueError, match=r"temperature: expected the environment's 0\.5"):
        sb3_bridge.learn(PPO(**settings), 1)
    settings["policy_kwargs"] |= {"temperature": 0.5}
    normalized = VecNormalize(settings["env"], norm_obs=False)
    with pytest.raises(ValueError, match="VecNormalize"):
        sb3_bridge.learn(PPO(**settings | {"env": normalized}), 1)


# ---------------------------------------------------------------------------------------------------- the page


@pytest.mark.slow
def test_the_page_runs() -> None:
    run_page(ROOT / "docs" / "sb3.md")
