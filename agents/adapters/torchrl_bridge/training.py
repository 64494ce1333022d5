"""Training: actor and critic, loss and advantages, and the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium.vector import VectorEnv
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from agents.adapters.checks import check_learner, text_vector_env
from agents.adapters.torchrl_bridge.env import make_env
from agents.policy import ValueHeadLM
from agents.prefix import PrefixNetwork
from agents.returns import discounted_returns
from agents.value_scale import first_value_scale, update_value_scale
from textenv.task import Task


class _Reader(nn.Module):
    """A `PrefixNetwork` on batches of any number of dimensions."""

    def __init__(self, network: PrefixNetwork, read: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self._read = network, read

    def forward(self, input_ids: Tensor, attention_mask: Tensor, action_mask: Tensor | None = None) -> Tensor:
        ids, mask = (x.reshape(-1, x.shape[-1]) for x in (input_ids, attention_mask))
        # GymWrapper under SAME_STEP gives zeros for the state after an end; nobody acts there and nothing is worth it.
        mask = mask.index_fill(1, torch.zeros(1, dtype=torch.int64, device=mask.device), 1)
        answer = self._read(self.network, self.network.states(ids, mask)).reshape(*input_ids.shape[:-1], -1)
        return answer if action_mask is None else answer.masked_fill(action_mask == 0, -torch.inf)


def actor_critic(network: PrefixNetwork, *, masked: bool = False) -> tuple[ProbabilisticActor, ValueOperator]:
    """The actor and the critic that TorchRL's collectors, losses and value estimators take.

    The actor writes `action` and `action_log_prob`; its logits are under `_logits`, which collectors do not store. With
    a shared trunk a loss that asks the one and then the other pays one forward.

    Args:
        network: Both of them.
        masked: Whether to renormalise the law over what `action_mask` allows: needed if the environment has a
            constraint.
    """
    keys: Any = ["input_ids", "attention_mask"]
    actor_keys: Any = [*keys, "action_mask"] if masked else keys
    dist_keys: Any = {"logits": "_logits"}
    actor = ProbabilisticActor(
        TensorDictModule(_Reader(network, PrefixNetwork.logits), in_keys=actor_keys, out_keys=["_logits"]),
        in_keys=dist_keys,
        out_keys=["action"],
        distribution_class=torch.distributions.Categorical,
        distribution_kwargs={"validate_args": False},
        return_log_prob=True,
        log_prob_key="action_log_prob",
    )
    return actor, ValueOperator(_Reader(network, PrefixNetwork.values), in_keys=keys)


@dataclass(frozen=True)
class Settings:
    """Settings of `train`.

    Raises:
        ValueError: Naming the field, what was expected and what came.
    """

    steps: int | None = None
    """Steps of each row in a rollout; None: `max_new_tokens`."""
    epochs: int = 2
    """Passes over each rollout."""
    minibatches: int = 4
    """Optimizer steps of an epoch; under `by_row` no more than there are rows."""
    by_row: bool = True
    """A minibatch is whole rows of the rollout, which costs much less than shuffled transitions; False: those."""
    learning_rate: float = 2e-4
    """Adam's step size; falls to 0 over the run."""
    gae_lambda: float = 0.98
    """λ; γ is 1."""
    clip_eps: float = 0.2
    """Half-width of the trust region."""
    value_coef: float = 1.0
    """Weight of the value loss in units of the returns' variance."""
    value_stats_decay: float = 0.9
    """Memory of the returns' moments, per rollout."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 1.0
    """Bound of the gradient's norm."""
    cache: bool = True
    """Whether acting keeps keys and values."""
    share: bool = True
    """Whether learning forwards an episode once."""
    seed: int = 0
    """Of prompts, tokens and minibatches."""

    def __post_init__(self) -> None:
        """Check the counts."""
        for name in ("steps", "epochs", "minibatches"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")


def make_loss(actor: ProbabilisticActor, critic: ValueOperator, settings: Settings) -> tuple[ClipPPOLoss, GAE]:
    """TorchRL's PPO loss and advantages with the settings that suit text: γ = 1, whole-rollout normalisation."""
    loss = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=settings.clip_eps,
        entropy_bonus=settings.entropy_coef != 0,
        entropy_coeff=settings.entropy_coef,
        critic_coeff=settings.value_coef,
        loss_critic_type="l2",
        functional=False,
    )
    # vmap cannot look into the cache; the loop that takes its place makes one call for the states and one for the next.
    advantages = GAE(gamma=1.0, lmbda=settings.gae_lambda, value_network=critic, average_gae=True, deactivate_vmap=True)
    return loss, advantages


def train(
    policy: ValueHeadLM,
    envs: VectorEnv,
    iterations: int,
    settings: Settings | None = None,
    callback: Callable[[int, dict[str, float]], Any] | None = None,
) -> list[dict[str, float]]:
    """PPO of TorchRL's parts: its collector, its `GAE`, its `ClipPPOLoss`.

    Args:
        policy: What learns.
        envs: As in `make_env`.
        iterations: Rollouts of `steps` × N tokens.
        settings: None: the defaults.
        callback: `(iteration, metrics)`.

    Returns:
        One dictionary a rollout, over the episodes that ended in it: NaN where none did. Without a reference (β = 0)
        `kl` is NaN and `objective` is the score.

    Raises:
        ValueError: If the environment or the policy does not fit, or `iterations` is below 1.
    """
    settings = settings or Settings()
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations: expected an integer >= 1, got {iterations!r}")
    task = text_vector_env(envs).task
    check_learner(policy, task, envs.single_action_space)
    env = make_env(envs)
    network = PrefixNetwork(policy, temperature=task.options.temperature, cache=settings.cache, share=settings.share)
    actor, critic = actor_critic(network, masked=task.constraint is not None)
    loss, advantages = make_loss(actor, critic, settings)
    learning = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=settings.learning_rate, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / iterations)
    env.set_seed(settings.seed)
    torch.manual_seed(settings.seed)
    frames = (settings.steps or task.options.max_new_tokens) * int(env.batch_size[0])
    history = []
    collector = Collector(
        env, actor, frames_per_batch=frames, total_frames=frames * iterations, auto_register_policy_transforms=False
    )
    for data in collector:
        metrics = _metrics(data, task)
        if task.reference is not None and metrics["episodes"]:
            task.controller.update(metrics["kl"], int(metrics["episodes"]))
        _estimate(policy, data, advantages, settings)
        loss.critic_coeff = torch.tensor(settings.value_coef / (2 * float(policy.value_head.value_std) ** 2))
        for minibatch in _minibatches(data, settings):
            found = loss(minibatch)
            optimizer.zero_grad()
            torch.stack([value for key, value in found.items() if key.startswith("loss_")]).sum().backward()
            nn.utils.clip_grad_norm_(learning, settings.max_grad_norm)
            optimizer.step()
        schedule.step()
        history.append(metrics)
        if callback is not None:
            callback(len(history), metrics)
    return history


def _estimate(policy: ValueHeadLM, data: TensorDictBase, advantages: GAE, settings: Settings) -> None:
    """Advantages and value targets of a rollout `[N, T]`; the critic's scale follows the targets."""
    head, reward = policy.value_head, data.get(("next", "reward"))[..., 0]
    everything = torch.ones_like(reward, dtype=torch.bool)
    if head.value_count == 0:
        goes_on = (~data.get(("next", "done"))[..., 0]).float()
        first_value_scale(head, discounted_returns(reward, goes_on), everything)
    advantages(data)
    update_value_scale(head, data.get("value_target")[..., 0], everything, settings.value_stats_decay)


def _minibatches(data: TensorDictBase, settings: Settings) -> Iterator[TensorDictBase]:
    items = data if settings.by_row else data.reshape(-1)
    for _ in range(settings.epochs):
        for chosen in torch.randperm(len(items)).tensor_split(min(settings.minibatches, len(items))):
            yield items[chosen]


def _metrics(data: TensorDictBase, task: Task) -> dict[str, float]:
    """Means over the episodes that ended in a rollout."""
    after = data.get("next")
    done = after.get("done")[..., 0]
    count = int(done.sum())

    def mean(key: str) -> float:
        return float(after.get(key).reshape(done.shape)[done].double().mean()) if count else math.nan

    score, divergence = mean("score"), mean("episode_kl") if task.reference is not None else math.nan
    return {
        "score": score,
        "kl": divergence,
        "objective": score if task.reference is None else score - task.kl_coef * divergence,
        "kl_coef": task.kl_coef,
        "response_length": mean("response_length"),
        "episodes": count,
    }
