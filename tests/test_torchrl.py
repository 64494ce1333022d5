"""The adapter of TorchRL: its wrapper's specs, the reward, the modules, real training."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.losses import clipped_surrogate, clipped_value
from agents.masked import whiten
from agents.prefix import PrefixNetwork
from agents.returns import gae
from tests import env_fixtures
from tests.agent_fixtures import even_share, make_env, make_policy
from tests.conftest import make_gpt2, make_llama
from tests.sb3_fixtures import float64_logprobs
from tests.test_docs import ROOT, run_page
from textenv.kl import AdaptiveKL
from textenv.packing import Packing, packed_hidden
from textenv.wrappers import VectorTopKActions

with warnings.catch_warnings():
    # torchrl 0.14 deprecates a base class of its own collectors while they are imported.
    warnings.filterwarnings("ignore", message="Creating .* which inherits from WeightUpdaterBase", append=False)
    from torchrl.collectors import Collector
    from torchrl.envs import GymWrapper, check_env_specs

    from agents.adapters import torchrl_bridge

MODES = ("Disabled", "SameStep")


def policy_unlike_its_reference(critic: str = "shared+") -> Any:
    policy = make_policy(None, critic)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for parameter in policy.lm.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


def collect(envs: Any, policy: Any, steps: int = 15, batches: int = 1, **how: bool) -> Any:
    """`[N, T]`, with the collector of the library."""
    env, task = torchrl_bridge.make_env(envs), envs.unwrapped.task
    network = PrefixNetwork(policy, temperature=task.options.temperature, **how)
    actor, _ = torchrl_bridge.actor_critic(network, masked=task.constraint is not None)
    env.set_seed(1)
    torch.manual_seed(0)
    frames = steps * envs.num_envs
    collector = Collector(
        env, actor, frames_per_batch=frames, total_frames=frames * batches, auto_register_policy_transforms=False
    )
    return torch.cat([data.clone() for data in collector], dim=1)


# ---------------------------------------------------------------------------------------------------- the wrapper


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("credit", ["token", "sequence"])
def test_the_specs_of_its_wrapper_hold(mode: str, credit: str) -> None:
    env = GymWrapper(make_env(num_envs=3, autoreset_mode=mode, kl_credit=credit), categorical_action_encoding=True)
    check_env_specs(env)
    env.rollout(20, break_when_any_done=False)


def test_it_refuses_next_step_and_so_do_we() -> None:
    envs = make_env(num_envs=2, autoreset_mode="NextStep")
    with pytest.raises(RuntimeError, match="autoreset_mode"):
        GymWrapper(envs)
    with pytest.raises(ValueError, match="NEXT_STEP"):
        torchrl_bridge.make_env(envs)


def test_what_it_cannot_learn_from_is_refused() -> None:
    with pytest.raises(ValueError, match="obs_type"):
        torchrl_bridge.make_env(make_env(num_envs=2, obs_type="torch"))
    with pytest.raises(ValueError, match=r"kl_source: .*'reference'"):
        torchrl_bridge.make_env(make_env(num_envs=2, kl_source="reference"))
    with pytest.raises(ValueError, match="DISABLED with length_end"):
        torchrl_bridge.make_env(make_env(num_envs=2, length_end="truncate"))
    with pytest.raises(ValueError, match="DISABLED with a constraint"):
        torchrl_bridge.make_env(make_env(num_envs=2, constraint=lambda response: [20]))
    with pytest.raises(ValueError, match="make_vec"):
        torchrl_bridge.make_env(GymWrapper)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"envs: expected gym\.make_vec .*, got TextEnv"):
        torchrl_bridge.make_env(gym.make("RLHF-Text-v0", **env_fixtures.options()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epochs"):
        torchrl_bridge.Settings(epochs=0)


def test_a_policy_that_does_not_fit_is_refused() -> None:
    envs = make_env(num_envs=2, autoreset_mode="Disabled")
    with pytest.raises(ValueError, match="policy: expected the reference's vocabulary of 64, got 72"):
        torchrl_bridge.train(make_policy(make_llama(vocab_size=72)), envs, 1)
    with pytest.raises(ValueError, match=r"envs: expected the actions to be the tokens, .*64.*, got Discrete\(8\)"):
        torchrl_bridge.train(make_policy(), VectorTopKActions(envs, k=8), 1)
    with pytest.raises(ValueError, match=r"max_new_tokens: .*the policy's context of 8, got 4 \+ 6"):
        torchrl_bridge.train(make_policy(make_gpt2(n_positions=8)), envs, 1)
    for count in (0, True):
        with pytest.raises(ValueError, match="iterations: expected an integer >= 1"):
            torchrl_bridge.train(make_policy(), envs, count)


def test_without_a_reference_there_is_no_kl() -> None:
    envs = make_env(num_envs=4, autoreset_mode="Disabled", kl_coef=0.0)
    [row] = torchrl_bridge.train(make_policy(), envs, 1)
    assert np.isnan(row["kl"]) and row["objective"] == row["score"] > 0 and row["kl_coef"] == 0


def test_a_policy_that_tells_no_log_prob_is_refused() -> None:
    env = torchrl_bridge.make_env(make_env(num_envs=2, autoreset_mode="Disabled"))
    with pytest.raises(ValueError, match="action_log_prob"):
        env.rollout(2)


# ---------------------------------------------------------------------------------------------------- the reward


def expected_rewards(data: Any, policy: Any, task: Any, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """`[N, T]` rewards and KLs of the episodes so far, from the scores and two float64 models."""
    ours, theirs = (float64_logprobs(lm, task.options.temperature) for lm in (policy.lm, task.reference.model.module))
    rewards, sums = np.zeros(data.shape), np.zeros(data.shape)
    for row, t in np.ndindex(*data.shape):
        step = data[row, t]
        length, prompt = int(step["attention_mask"].sum()), int(step["prompt_length"])
        prefix, token = step["input_ids"][:length].tolist(), int(step["action"])
        laws = [law(prefix) for law in (ours, theirs)]
        if task.constraint is not None:
            laws = [np.where(step["action_mask"].numpy(), law, -np.inf) for law in laws]
            laws = [law - np.logaddexp.reduce(law) for law in laws]
        kl = laws[0][token] - laws[1][token]
        sums[row, t] = kl + (0.0 if length == prompt else sums[row, t - 1])
        response = [*prefix[prompt:], token]
        ended = token in task.stop_token_ids or len(response) == task.options.max_new_tokens
        scored = (ended and task.options.length_end == "terminate") or token in task.stop_token_ids
        score = even_share(prefix[:prompt], response) if scored else 0.0
        charged = kl if task.options.kl_credit == "token" else sums[row, t] * ended
        rewards[row, t] = score - beta * charged
    return rewards, sums


@pytest.mark.parametrize("credit", ["token", "sequence"])
@pytest.mark.parametrize("source", ["agent", "policy"])
@pytest.mark.parametrize("mode", MODES)
def test_the_kl_is_charged_exactly_once(mode: str, source: str, credit: str) -> None:
    """Over three batches of five steps, which cut the episodes."""
    envs = make_env(num_envs=6, autoreset_mode=mode, kl_credit=credit, temperature=0.8)
    policy = policy_unlike_its_reference()
    if source == "policy":
        envs.attach(policy.next_logits)
    data = collect(envs, policy, steps=5, batches=3)
    rewards, sums = expected_rewards(data, policy, envs.task, 0.1)
    assert np.abs(data["next", "reward"][..., 0].numpy() - rewards).max() < 1e-4
    for beta in (0.0, 0.2):  # the oracle would see a missing and a double charge
        wrong, _ = expected_rewards(data, policy, envs.task, beta)
        assert np.abs(data["next", "reward"][..., 0].numpy() - wrong).max() > 0.01
    done = data["next", "done"][..., 0].numpy()
    found = data["next", "episode_kl"][..., 0].numpy()
    assert done.sum() > 10 and np.abs(found[done] - sums[done]).max() < 1e-4


def test_truncation_is_charged_and_keeps_its_last_state() -> None:
    envs = make_env(num_envs=4, autoreset_mode="Disabled", length_end="truncate", stop_token_ids=[])
    policy = policy_unlike_its_reference()
    data = collect(envs, policy, steps=12)
    rewards, _ = expected_rewards(data, policy, envs.task, 0.1)
    assert np.abs(data["next", "reward"][..., 0].numpy() - rewards).max() < 1e-4
    cut = data["next", "truncated"][..., 0]
    assert cut.sum() == 8 and not data["next", "terminated"].any()
    longer = data["next", "attention_mask"].long().sum(-1) - data["attention_mask"].long().sum(-1)
    assert (longer == 1).all()


def test_masks_renormalise_both_laws() -> None:
    def constraint(response: list[int]) -> np.ndarray:
        mask = np.ones(64, dtype=bool)
        mask[[*range(1, 64, 4), 30 + len(response)]] = False
        return mask

    envs = make_env(num_envs=6, autoreset_mode="Disabled", constraint=constraint, stop_token_ids=[28])
    policy = policy_unlike_its_reference()
    data = collect(envs, policy)
    rewards, _ = expected_rewards(data, policy, envs.task, 0.1)
    assert np.abs(data["next", "reward"][..., 0].numpy() - rewards).max() < 1e-4
    assert data["action_mask"].gather(-1, data["action"][..., None]).all()


# ---------------------------------------------------------------------------------------------------- the modules


@pytest.mark.parametrize("critic", ["shared+", "separate+"])
def test_the_modules_give_the_model_s_own_numbers(critic: str) -> None:
    envs, policy = make_env(num_envs=4, autoreset_mode="Disabled"), policy_unlike_its_reference(critic)
    data = collect(envs, policy, steps=8)
    assert "_logits" not in data
    actor, critic_module = torchrl_bridge.actor_critic(PrefixNetwork(policy))
    law, values = actor.get_dist(data), critic_module(data.clone(False))["state_value"]
    assert values.shape == (4, 8, 1) and law.logits.shape == (4, 8, 64)
    exact = float64_logprobs(policy.lm)
    for row, t in np.ndindex(4, 8):
        length = int(data[row, t]["attention_mask"].sum())
        prefix = data[row, t]["input_ids"][:length].tolist()
        assert np.abs(law.logits[row, t].detach().numpy() - exact(prefix)).max() < 1e-4
        value = policy(torch.tensor([prefix])).values[0, -1]
        assert (values[row, t] - value).detach().abs() < 1e-4
        token = int(data[row, t]["action"])
        assert float(data[row, t]["action_log_prob"]) == pytest.approx(exact(prefix)[token], abs=1e-4)


@pytest.mark.parametrize(("critic", "forwards"), [("shared+", 1), ("separate+", 1)])
def test_the_loss_forwards_each_trunk_once(critic: str, forwards: int) -> None:
    policy = policy_unlike_its_reference(critic)
    data = collect(make_env(num_envs=4, autoreset_mode="Disabled"), policy, steps=8)
    network = PrefixNetwork(policy)
    loss, advantages = torchrl_bridge.make_loss(*torchrl_bridge.actor_critic(network), torchrl_bridge.Settings())
    advantages(data)
    calls: list[int] = []
    # The first ragged batch makes sure that the model can leave padding out.
    packed_hidden(policy.lm.model, torch.ones(2, 3, dtype=torch.int64), Packing.of(torch.tensor([1, 3])))
    policy.lm.model.register_forward_hook(lambda module, given, answer: calls.append(answer[0].shape[:2].numel()))
    loss(data)
    assert len(calls) == forwards and calls[0] < int(data["attention_mask"].sum()) / 2


def test_losses_and_advantages_are_those_of_our_functions() -> None:
    policy = policy_unlike_its_reference()
    data = collect(make_env(num_envs=6, autoreset_mode="Disabled"), policy)
    settings = torchrl_bridge.Settings(gae_lambda=0.9, entropy_coef=0.5)
    loss, advantages = torchrl_bridge.make_loss(*torchrl_bridge.actor_critic(PrefixNetwork(policy)), settings)
    advantages(data)
    rewards, values, following, found = (
        data[key][..., 0] for key in (("next", "reward"), "state_value", ("next", "state_value"), "advantage")
    )
    goes_on = 1 - data["next", "done"][..., 0].float()
    assert goes_on.min() == 0
    ours = gae(rewards, values, following, goes_on, 0.9)
    everything = torch.ones_like(ours, dtype=torch.bool)
    assert (ours + values - data["value_target"][..., 0]).abs().max() < 1e-5
    assert (whiten(ours, everything) - found).abs().max() < 1e-5
    data["action_log_prob"] += 0.3 * torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    data["value_target"] += 1.0
    told = loss(data)
    law = loss.actor_network.get_dist(data)
    now = law.log_prob(data["action"])
    surrogate = clipped_surrogate(now, data["action_log_prob"], found, 0.2).mean()
    squared = clipped_value(values, values, data["value_target"][..., 0], None).mean()
    assert 0.05 < told["clip_fraction"] < 0.95
    assert (told["loss_objective"] - surrogate).abs() < 1e-5
    assert (told["loss_critic"] / 2 - squared).abs() < 1e-5
    assert (told["loss_entropy"] + 0.5 * law.entropy().mean()).abs() < 1e-5


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("mode", "by_row"), [("Disabled", True), ("SameStep", False)])
def test_it_learns(mode: str, by_row: bool) -> None:
    controller = AdaptiveKL(0.02, target=1e6, horizon=1e9)
    envs = make_env(num_envs=16, autoreset_mode=mode, kl_coef=controller)
    settings = torchrl_bridge.Settings(learning_rate=3e-3, by_row=by_row)
    history = torchrl_bridge.train(make_policy(), envs, 20, settings)
    first, last = (np.mean([row["objective"] for row in part]) for part in (history[:3], history[-3:]))
    assert first < 0.65 and last > first + 0.2, [round(row["objective"], 2) for row in history]
    beta = 0.02  # which moves once a rollout, hardly
    for row in history:
        assert row["kl_coef"] == pytest.approx(beta, rel=1e-12)
        assert row["objective"] == pytest.approx(row["score"] - beta * row["kl"])
        beta *= 1 - 0.2 * row["episodes"] / 1e9
    envs.reset()  # the library's collector has not closed what it was lent


def test_cache_and_sharing_change_nothing() -> None:
    found = []
    for on in (True, False):
        policy = policy_unlike_its_reference()
        settings = torchrl_bridge.Settings(learning_rate=1e-3, cache=on, share=on)
        history = torchrl_bridge.train(policy, make_env(num_envs=6, autoreset_mode="Disabled"), 2, settings)
        found.append((history, torch.nn.utils.parameters_to_vector(policy.parameters())))
    for a, b in zip(*(history for history, _ in found), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert (found[0][1] - found[1][1]).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------- the page


@pytest.mark.slow
def test_the_page_runs() -> None:
    run_page(ROOT / "docs" / "torchrl.md")
