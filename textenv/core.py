"""The batched core: N rows of one task. It validates, draws prompts, acts and pays; both environments stand on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import textenv.dynamics as dynamics
from textenv.actions import Actions
from textenv.dynamics import TokenState
from textenv.payments import Answers, Payments
from textenv.starting import choose_prompts
from textenv.task import Task
from textenv.types import FinishReason


class TextCore:
    """N rows of one task.

    After `reset` or `step`, `state`, `rewards` and `info()` describe every row. Rows that neither began nor acted keep
    what they had, and so do all rows if either raises.
    """

    def __init__(self, task: Task, rows: int) -> None:
        """N rows, none of them started."""
        self.task, self.rows = task, rows
        self.state = dynamics.empty(rows, task.columns, device=task.device, pad_token_id=task.pad_token_id)
        self.started = np.zeros(rows, dtype=bool)
        self.prompt_index = np.full(rows, -1, dtype=np.int64)
        self.payments = Payments(task, rows)
        self.actions = Actions(task, rows)

    # ------------------------------------------------------------------------------------------------- starting

    def reset(self, rows: np.ndarray, rngs: Sequence[np.random.Generator], options: Mapping[str, Any] | None) -> None:
        """Begin an episode in some rows.

        Args:
            rows: `[r]` int64, ascending.
            rngs: One generator for each of the N rows; a row draws its prompt from its own.
            options: `prompt_index` (an int, or one for each of the N rows) or `prompt` (text or ids, or a list of N).

        Raises:
            ValueError: For an unknown option or an impossible prompt, or if the constraint allows nothing there.
        """
        indices, prompts = choose_prompts(self.task, rows, rngs, options or {})
        device = self.task.device
        where = torch.as_tensor(rows, device=device)
        moved = self.actions.allowed.begin(where, prompts)
        width = max(map(len, prompts))
        padded = np.full((len(rows), self.task.columns), self.task.pad_token_id, dtype=np.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        ids = torch.as_tensor(padded, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.state = dynamics.begin(self.state, where, ids, lengths)
        self.prompt_index[rows] = indices
        self.started[rows] = True
        self.payments.begin(where)
        self.actions.reference.begin(where, ids[:, :width], lengths, moved.allowed)
        self.actions.allowed.commit(moved)

    # ------------------------------------------------------------------------------------------------- acting

    @property
    def running(self) -> np.ndarray:
        """`[N]` bool: rows in the middle of an episode."""
        return self.started & (self.state.finish_reasons == FinishReason.NONE).cpu().numpy()

    def attach(self, policy: Callable[..., Tensor]) -> None:
        """Ask this live policy for log π from now on.

        Raises:
            ValueError: If it would begin in the middle of a response, whose earlier tokens nobody asked it about; if
                candidates are offered.
        """
        if self.actions.reference.top_k is not None:
            raise ValueError("attach: expected no TopKActions, whose learner does not choose by this law, got one")
        if self.task.kl_source != "policy" and (self.running & (self.state.response_lengths > 0).cpu().numpy()).any():
            raise ValueError("attach: expected no response under way, got one; attach before or right after reset()")
        self.task.attach(policy)

    def forget(self) -> None:
        """Want every row to be reset before the next step: what may be chosen has changed."""
        self.started[:] = False

    def check_actions(self, actions: Any) -> Tensor:
        """One token a row, as a tensor on the device; see `Actions.check`."""
        return self.actions.check(actions)

    def chosen(self, indices: Any) -> Tensor:
        """The tokens of indices into the candidates; see `Actions.chosen`."""
        return self.actions.chosen(indices, self.running)

    @torch.no_grad()
    def step(self, actions: Tensor, rows: np.ndarray) -> None:
        """Append one token to some rows, all of them running, and pay for it.

        Policy, reward function and reference are asked about the state that comes, and it becomes the state when all of
        them have answered: a step that raises has not happened.

        Args:
            actions: `[N]`, checked; those of other rows are ignored.
            rows: `[r]` int64, ascending.

        Raises:
            gymnasium.error.InvalidAction: If the constraint does not allow an action.
            ValueError: If it allows nothing in the state that comes.
        """
        if not len(rows):
            return
        where = torch.as_tensor(rows, device=self.task.device)
        acting, steps = actions[where], self.state.response_lengths[where]
        allowed = self.actions.allowed
        allowed.check(acting, where)
        after = dynamics.append(
            self.state,
            acting,
            where,
            stop_token_ids=self.task.stop_tensor,
            max_new_tokens=self.task.options.max_new_tokens,
        )
        reasons = after.finish_reasons[where]
        state = self.state
        now = allowed.now(where)
        moved = allowed.after(where, acting, after, length_end=self.task.options.length_end)
        logprobs = None
        if self.knows_kl:
            logprobs = self.task.policy_logprobs(state.ids[where], state.lengths[where], acting, now)
        earned, score, parts = self._score(after, where, reasons)
        # The reference comes last: its cache moves.
        spoken = self.actions.reference.speak(state, after, acting, where, (now, moved.allowed))
        self.state = after
        allowed.commit(moved)
        self.payments.pay(where, steps, reasons, Answers(earned, score, parts, logprobs, spoken))

    @property
    def knows_kl(self) -> bool:
        """Whether the environment asks a live policy for log π."""
        return self.task.kl_source == "policy" and self.task.reference is not None

    def _score(self, after: TokenState, rows: Tensor, reasons: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the reward function pays now, the score, which is 0 until it is due, and the parts: `[r]` each."""
        reward, device = self.task.reward, self.task.device
        terminated, _ = dynamics.endings(reasons, length_end=self.task.options.length_end)
        earned = torch.zeros(len(rows), device=device)
        parts = {name: torch.zeros(len(rows), device=device) for name in reward.names}
        asked = torch.ones_like(terminated) if reward.per_token else terminated
        if bool(asked.any()):
            paid = reward.pay(*after.id_lists(rows[asked]), terminated[asked].tolist())
            for told, values in ((earned, paid.total), *((parts[name], paid.parts[name]) for name in parts)):
                told[asked] = torch.tensor([float(value[-1]) for value in values], device=device)
        score = torch.where(terminated, self.payments.earned_before(rows) + earned, torch.zeros_like(earned))
        return earned, score, parts

    # ------------------------------------------------------------------------------------------------- telling

    def texts(self, rows: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and responses so far, as id lists."""
        return self.state.id_lists(rows)

    def observation(self) -> dict[str, Tensor]:
        """Fresh tensors of every row: `input_ids [N, L]`, `attention_mask [N, L]`, `prompt_length [N, 1]`."""
        state = self.state
        mask = torch.arange(self.task.columns, device=self.task.device) < state.lengths[:, None]
        observation = {
            "input_ids": state.ids.clone(),
            "attention_mask": mask.to(torch.int8),
            "prompt_length": state.prompt_lengths[:, None].clone(),
        }
        return observation | self.actions.observation()

    @property
    def rewards(self) -> Tensor:
        """`[N]` float32: the reward of each row's last step."""
        return self.payments.rewards

    def endings(self) -> tuple[Tensor, Tensor]:
        """`(terminated, truncated)`, `[N]` bool."""
        return dynamics.endings(self.state.finish_reasons, length_end=self.task.options.length_end)

    def info(self) -> dict[str, Tensor]:
        """Fresh tensors of every row, the same keys always."""
        state, sequence = self.state, self.task.options.kl_credit == "sequence"
        spoken = state.finish_reasons != FinishReason.NONE if sequence else state.response_lengths > 0
        info = {key: value.clone() for key, value in self.payments.latest.items()}
        info["kl_known"] = (spoken & self.knows_kl).to(torch.int8)
        info["finish_reason"] = state.finish_reasons.clone()
        info["response_length"] = state.response_lengths
        info["prompt_index"] = torch.tensor(self.prompt_index, device=self.task.device)
        info |= self.actions.info()
        if sequence:
            info["ref_logprobs"] = self.payments.history["ref_logprob"].clone()
        return info

    def info_texts(self) -> dict[str, list[str]]:
        """`prompt_text` and `response_text` of every row, with `info_text=True`."""
        if not self.task.options.info_text:
            return {}
        decode = self.task.text_decoder
        prompts, responses = decode(*self.texts(torch.arange(self.rows, device=self.task.device)))
        return {"prompt_text": prompts, "response_text": responses}
