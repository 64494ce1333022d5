"""The batched core: N rows of one task. It validates, draws prompts, acts and pays; both environments stand on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

import textenv.dynamics as dynamics
from textenv.candidates import TopK
from textenv.constraints.rows import AllowedRows
from textenv.dynamics import TokenState
from textenv.payments import Answers, Payments
from textenv.row_reference import RowReference
from textenv.starting import choose_prompts
from textenv.task import Task
from textenv.types import FinishReason

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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
        self.reference = RowReference(task, rows)
        self.allowed = AllowedRows(task.constraint, rows)
        self.mask_in_obs = False

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
        moved = self.allowed.begin(where, prompts)
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
        self.reference.begin(where, ids[:, :width], lengths, moved.allowed)
        self.allowed.commit(moved)

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
        if self.reference.top_k is not None:
            raise ValueError("attach: expected no TopKActions, whose learner does not choose by this law, got one")
        if self.task.kl_source != "policy" and (self.running & (self.state.response_lengths > 0).cpu().numpy()).any():
            raise ValueError("attach: expected no response under way, got one; attach before or right after reset()")
        self.task.attach(policy)

    def offer(self, k: int, always: Sequence[int]) -> None:
        """Show the k most probable tokens of the reference in observations; every row must then be reset.

        Raises:
            ValueError: Without a reference, if the environment asks a policy, or if candidates are offered already.
        """
        if self.reference.top_k is not None:
            raise ValueError(f"k: expected one TopKActions, got a second, with k={k}")
        if self.task.reference is None:
            raise ValueError("kl_coef: expected > 0 or a controller, for the reference gives the candidates, got 0")
        if self.task.kl_source == "policy":
            raise ValueError(
                "kl_source: expected 'agent' or 'reference', because the learner's law is over k tokens and the "
                "environment would ask for one over all, got 'policy'"
            )
        self.reference.offer(TopK.of(k, always, self.task.vocab_size))
        self.started[:] = False

    def constrain(self, constraint: Any) -> None:
        """Allow only what this allows; every row must then be reset.

        Raises:
            ValueError: If it is no constraint, does not fit, or there is one already.
        """
        self.task.constrain(constraint)
        self.allowed = AllowedRows(self.task.constraint, self.rows)
        self.started[:] = False

    def show_mask(self) -> None:
        """Put `action_mask` into observations.

        Raises:
            ValueError: Without a constraint.
        """
        if self.task.constraint is None:
            raise ValueError("constraint: expected one, whose mask the observation would show, got None")
        self.mask_in_obs = True

    def chosen(self, indices: Any) -> Tensor:
        """`[N]`: the tokens of indices into the candidates; of rows that do not act, token 0.

        Raises:
            gymnasium.error.InvalidAction: If shape, type or a value is not that of `Discrete(k)`.
        """
        offered, running = self.reference.offered, torch.as_tensor(self.running, device=self.task.device)
        if offered is None:
            return torch.zeros(self.rows, dtype=torch.int64, device=self.task.device)
        k = offered.ids.shape[1]
        expected = f"actions: expected {self.rows} indices in [0, {k}), one a row"
        where = _integers(indices, self.rows, expected, running, k)
        return torch.where(running, offered.ids.gather(1, where[:, None])[:, 0], 0)

    def check_actions(self, actions: Any) -> Tensor:
        """One action a row, as a tensor on the device.

        Raises:
            gymnasium.error.InvalidAction: If the shape, the type or a value is not that of `Discrete(V)`.
        """
        expected = f"actions: expected {self.rows} integers in [0, {self.task.vocab_size}), one a row"
        return _integers(actions, self.rows, expected, None, self.task.vocab_size).to(self.task.device)

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
        self.allowed.check(acting, where)
        after = dynamics.append(
            self.state,
            acting,
            where,
            stop_token_ids=self.task.stop_tensor,
            max_new_tokens=self.task.options.max_new_tokens,
        )
        reasons = after.finish_reasons[where]
        state = self.state
        now = self.allowed.now(where)
        moved = self.allowed.after(where, acting, after, length_end=self.task.options.length_end)
        logprobs = None
        if self.knows_kl:
            logprobs = self.task.policy_logprobs(state.ids[where], state.lengths[where], acting, now)
        earned, score = self._score(after, where, reasons)
        # The reference comes last: its cache moves.
        spoken = self.reference.speak(state, after, acting, where, (now, moved.allowed))
        self.state = after
        self.allowed.commit(moved)
        self.payments.pay(where, steps, reasons, Answers(earned, score, logprobs, spoken))

    @property
    def knows_kl(self) -> bool:
        """Whether the environment asks a live policy for log π."""
        return self.task.kl_source == "policy" and self.task.reference is not None

    def _score(self, after: TokenState, rows: Tensor, reasons: Tensor) -> tuple[Tensor, Tensor]:
        """What the reward function pays now, and the score, which is 0 until it is due: `[r]` each."""
        reward, device = self.task.reward, self.task.device
        terminated, _ = dynamics.endings(reasons, length_end=self.task.options.length_end)
        score = torch.zeros(len(rows), device=device)
        if reward.per_token:
            values = reward.token_values(*after.id_lists(rows))
            earned = torch.tensor([float(value[-1]) for value in values], device=device)
            return earned, torch.where(terminated, self.payments.earned_before(rows) + earned, score)
        due = rows[terminated]
        if len(due):
            score[terminated] = torch.as_tensor(reward.scores(*after.id_lists(due)), device=device)
        return score, score

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
        if self.reference.offered is not None:
            observation["candidates"] = self.reference.offered.ids.clone()
            observation["candidate_logprobs"] = self.reference.offered.logprobs.clone()
        if self.mask_in_obs:
            observation["action_mask"] = self.action_mask().to(torch.int8)
        return observation

    @property
    def action_count(self) -> int:
        """A: V, or k where candidates are offered."""
        return self.task.vocab_size if self.reference.top_k is None else self.reference.top_k.k

    def action_mask(self) -> Tensor:
        """`[N, A]` bool, fresh: which actions may be chosen now."""
        if self.reference.offered is not None:
            return self.reference.offered.distinct.clone()
        if self.allowed.table is not None and self.reference.top_k is None:
            return self.allowed.table.clone()
        return torch.ones(self.rows, self.action_count, dtype=torch.bool, device=self.task.device)

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
        if self.task.constraint is not None:
            info["action_mask"] = self.action_mask().to(torch.int8)
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


def _integers(given: Any, rows: int, expected: str, counted: Tensor | None, limit: int) -> Tensor:
    """`[N]` int64 in [0, limit); those of rows that do not count are set to 0."""
    array = given if isinstance(given, Tensor) else np.asarray(given)
    integers = array.dtype in _INTEGERS if isinstance(array, Tensor) else np.issubdtype(array.dtype, np.integer)
    if not integers or array.shape != (rows,):
        raise gym.error.InvalidAction(f"{expected}, got shape {tuple(array.shape)} of {array.dtype}")
    tensor = torch.as_tensor(array, dtype=torch.int64)
    if counted is not None:
        tensor = torch.where(counted, tensor.to(counted.device), 0)
    if ((tensor < 0) | (tensor >= limit)).any():
        raise gym.error.InvalidAction(f"{expected}, got {tensor.tolist()}")
    return tensor
