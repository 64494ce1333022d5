"""The least that an iteration of PPO costs with the model's own forward and backward, and nothing around them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from scripts.benching.ppo_task import EPOCHS, LEARNING_RATE, MINIBATCHES, Phases, Task
from textenv.decoders import row_decoder
from textenv.models import no_progress_bar


class FloorIteration:
    """Calling it decodes, scores and learns once, from one of some batches of responses in turn.

    Decoding draws tokens and keeps those rows alone that the batch still has; one forward of the reference for
    log-probs, one of the critic for values; then for each minibatch logits and log-probs at the response's places and
    the critic's values, the backward of their sum, and a step of fused Adam. No old log-probs, no loss, no advantages,
    no norm of a gradient, no metrics. Rows are padded to their minibatch's longest: packing could go below this.
    """

    def __init__(self, task: Task, batches: Sequence[tuple[Tensor, Tensor]], *, shared: bool) -> None:
        """Load the models.

        Args:
            task: Of which model.
            batches: Of each, ids `[B, L]`, prompts of one length and then responses, right-padded, and the lengths
                `[B]` of the responses.
            shared: Whether the critic reads the policy's trunk.
        """
        self.phases = Phases()
        self._start = task.prompt_length
        self._batches = itertools.cycle([_sorted(ids, lengths) for ids, lengths in batches])
        self._ids, self._lengths = next(self._batches)
        with no_progress_bar():
            models = [AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.float32) for _ in range(3)]
        self.policy, self._reference, critic = models
        self._critic = self.policy.base_model if shared else critic.base_model
        self._head = torch.nn.Linear(self.policy.config.hidden_size, 1)
        parts = [self.policy, self._head] if shared else [self.policy, self._head, self._critic]
        self.optimizer = torch.optim.Adam(
            [p for part in parts for p in part.parameters()], lr=LEARNING_RATE, fused=True
        )
        self.phases.watch(self, "decode", "generate")
        for name in ("reference", "values", "update"):
            self.phases.watch(self, name, name)

    def __call__(self) -> None:
        """One iteration."""
        self.decode()
        self.reference()
        self.values()
        self.update()
        self.phases.finish()
        self._ids, self._lengths = next(self._batches)

    @torch.inference_mode()
    def decode(self) -> Tensor:
        """Tokens drawn, `[T, B]`; the batch says how long each row lives."""
        count, steps = len(self._ids), int(self._lengths.max())
        alive = (self._lengths[:, None] > torch.arange(steps)).sum(0).tolist()
        drawn = torch.zeros(steps, count, dtype=torch.long)
        prompts = self._ids[:, : self._start]
        decoder = row_decoder(self.policy, count, self._start + steps)
        hidden = decoder.prefill(None, prompts, torch.full((count,), self._start))
        for step in range(steps):
            # Ten times as quick on a CPU as torch.multinomial, which draws a number for each token of the vocabulary.
            sums = self.policy.lm_head(hidden).softmax(1).cumsum(1)
            chosen = torch.searchsorted(sums, torch.rand(len(sums), 1) * sums[:, -1:])[:, 0]
            drawn[step, : len(chosen)] = chosen
            if step == steps - 1:
                break
            if alive[step + 1] <= 0.75 * len(chosen):  # copying the cache must be worth it
                decoder.keep(torch.arange(alive[step + 1]))
                chosen = chosen[: alive[step + 1]]
            hidden = decoder.advance(chosen)
        return drawn

    @torch.inference_mode()
    def reference(self) -> Tensor:
        """Log-probs of the responses' tokens, packed."""
        return self._logprobs(self._reference, self._ids, self._lengths)

    @torch.inference_mode()
    def values(self) -> Tensor:
        """Values of the states in which they were chosen, packed."""
        return self._head(self._at_actions(self._critic, self._ids, self._lengths))

    def update(self) -> None:
        """All optimizer steps."""
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(self._ids)).tensor_split(MINIBATCHES):
                ids, lengths = self._ids[rows, : self._start + int(self._lengths[rows].max())], self._lengths[rows]
                if self._critic is self.policy.base_model:
                    hidden = self._at_actions(self._critic, ids, lengths)
                    loss = self._picked(self.policy.lm_head(hidden), ids, lengths).sum() + self._head(hidden).sum()
                else:
                    values = self._head(self._at_actions(self._critic, ids, lengths))
                    loss = self._logprobs(self.policy, ids, lengths).sum() + values.sum()
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)

    def _logprobs(self, model: Any, ids: Tensor, lengths: Tensor) -> Tensor:
        return self._picked(model.lm_head(self._at_actions(model.base_model, ids, lengths)), ids, lengths)

    def _at_actions(self, trunk: torch.nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
        hidden = trunk(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        return self._pack(hidden[:, self._start - 1 :], lengths)

    def _picked(self, logits: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        return -torch.nn.functional.cross_entropy(logits, self._pack(ids[:, self._start :], lengths), reduction="none")

    def _pack(self, slots: Tensor, lengths: Tensor) -> Tensor:
        """`[B, T, …]` to `[N, …]`, the slots that are some response's."""
        flat = slots.flatten(0, 1)
        inside = (torch.arange(slots.shape[1]) < lengths[:, None]).flatten()
        return flat if bool(inside.all()) else flat.index_select(0, inside.nonzero()[:, 0])


def _sorted(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Longest first: what decoding drops is then at the end."""
    order = lengths.argsort(descending=True)
    return ids[order], lengths[order]
