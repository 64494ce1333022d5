"""Adam as the native agent uses it, for Tianshou: actor and critic clipped apart, a rate that falls to 0."""

from __future__ import annotations

from typing import Any

import torch
from tianshou.algorithm.optim import LRSchedulerFactory, OptimizerFactory
from tianshou.utils.net.common import ActorCritic
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


class AdamFactory(OptimizerFactory):
    """Adam whose gradients are clipped per part.

    Tianshou clips actor and critic together, so that a large value gradient shrinks the policy's; what is left of it
    may be of the size of Adam's ε. Give the algorithm no `max_grad_norm` of its own.
    """

    def __init__(
        self, learning_rate: float, *, eps: float = 1e-5, max_grad_norm: float | None = 1.0, updates: int | None = None
    ) -> None:
        """Make such optimizers.

        Args:
            learning_rate: Adam's step size.
            eps: Adam's ε.
            max_grad_norm: Bound of the gradient's norm, of the actor and of the critic apart; None: none.
            updates: The rate falls linearly to 0 over so many updates; None: it stays.
        """
        super().__init__()
        self.learning_rate, self.eps, self.max_grad_norm = learning_rate, eps, max_grad_norm
        if updates is not None:
            self.with_lr_scheduler_factory(LinearToZero(updates))

    def create_instances(self, module: nn.Module) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
        """An optimizer of a module's parameters, and its schedule."""
        parts = (module.actor, module.critic) if isinstance(module, ActorCritic) else (module,)
        seen: set[nn.Parameter] = set()
        groups = []
        for part in parts:
            own = [p for p in part.parameters() if p.requires_grad and p not in seen]
            seen |= set(own)
            groups.append({"params": own})
        optimizer = self._create_optimizer_for_params([group for group in groups if group["params"]])
        if self.max_grad_norm is not None:
            optimizer.register_step_pre_hook(self._clip)
        schedule = self.lr_scheduler_factory
        return optimizer, None if schedule is None else schedule.create_scheduler(optimizer)

    def _create_optimizer_for_params(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=self.learning_rate, eps=self.eps)

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert self.max_grad_norm is not None
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], self.max_grad_norm)


class LinearToZero(LRSchedulerFactory):
    """The learning rate falls linearly, to 0 after so many updates, and begins again: another run learns too."""

    def __init__(self, updates: int) -> None:
        """Fall over `updates`."""
        self.updates = updates

    def create_scheduler(self, optim: torch.optim.Optimizer) -> LambdaLR:
        """For one optimizer."""
        return LambdaLR(optim, lambda update: 1.0 - (update % self.updates) / self.updates)
