"""The batched core: N rows of one task. It validates, draws prompts, acts and pays; both environments stand on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

import textenv.dynamics as dynamics
from textenv.dynamics import TokenState
from textenv.payments import Answers, Payments
from textenv.reference import ReferenceStepper
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
        self._stepper: ReferenceStepper | None = None

    # ------------------------------------------------------------------------------------------------- starting

    def reset(self, rows: np.ndarray, rngs: Sequence[np.random.Generator], options: Mapping[str, Any] | None) -> None:
        """Begin an episode in some rows.

        Args:
            rows: `[r]` int64, ascending.
            rngs: One generator for each of the N rows; a row draws its prompt from its own.
            options: `prompt_index` (an int, or one for each of the N rows) or `prompt` (text or ids, or a list of N).

        Raises:
            ValueError: For an unknown option or an impossible prompt.
        """
        indices, prompts = _choose(self.task, rows, rngs, options or {})
        device = self.task.device
        width = max(map(len, prompts))
        padded = np.full((len(rows), self.task.columns), self.task.pad_token_id, dtype=np.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        where = torch.as_tensor(rows, device=device)
        ids = torch.as_tensor(padded, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.state = dynamics.begin(self.state, where, ids, lengths)
        self.prompt_index[rows] = indices
        self.started[rows] = True
        self.payments.begin(where)
        if self._stepper is None and self.task.reference is not None and self.task.options.kl_credit == "token":
            self._stepper = ReferenceStepper(self.task.reference, self.rows, self.task.columns)
        if self._stepper is not None:
            self._stepper.begin(where, ids[:, :width], lengths)

    # ------------------------------------------------------------------------------------------------- acting

    @property
    def running(self) -> np.ndarray:
        """`[N]` bool: rows in the middle of an episode."""
        return self.started & (self.state.finish_reasons == FinishReason.NONE).cpu().numpy()

    def attach(self, policy: Callable[..., Tensor]) -> None:
        """Ask this live policy for log π from now on.

        Raises:
            ValueError: If it would begin in the middle of a response, whose earlier tokens nobody asked it about.
        """
        if self.task.kl_source != "policy" and (self.running & (self.state.response_lengths > 0).cpu().numpy()).any():
            raise ValueError("attach: expected no response under way, got one; attach before or right after reset()")
        self.task.attach(policy)

    def check_actions(self, actions: Any) -> Tensor:
        """One action a row, as a tensor on the device.

        Raises:
            gymnasium.error.InvalidAction: If the shape, the type or a value is not that of `Discrete(V)`.
        """
        array = actions if isinstance(actions, Tensor) else np.asarray(actions)
        integers = array.dtype in _INTEGERS if isinstance(array, Tensor) else np.issubdtype(array.dtype, np.integer)
        expected = f"actions: expected {self.rows} integers in [0, {self.task.vocab_size}), one a row"
        if not integers or array.shape != (self.rows,):
            raise gym.error.InvalidAction(f"{expected}, got shape {tuple(array.shape)} of {array.dtype}")
        tensor = torch.as_tensor(array, dtype=torch.int64, device=self.task.device)
        if ((tensor < 0) | (tensor >= self.task.vocab_size)).any():
            raise gym.error.InvalidAction(f"{expected}, got {tensor.tolist()}")
        return tensor

    @torch.no_grad()
    def step(self, actions: Tensor, rows: np.ndarray) -> None:
        """Append one token to some rows, all of them running, and pay for it.

        Policy, reward function and reference are asked about the state that comes, and it becomes the state when all of
        them have answered: a step that raises has not happened.

        Args:
            actions: `[N]`, checked; those of other rows are ignored.
            rows: `[r]` int64, ascending.
        """
        if not len(rows):
            return
        where = torch.as_tensor(rows, device=self.task.device)
        acting, steps = actions[where], self.state.response_lengths[where]
        after = dynamics.append(
            self.state,
            acting,
            where,
            stop_token_ids=self.task.stop_tensor,
            max_new_tokens=self.task.options.max_new_tokens,
        )
        reasons = after.finish_reasons[where]
        state = self.state
        logprobs = None
        if self.knows_kl:
            logprobs = self.task.policy_logprobs(state.ids[where], state.lengths[where], acting)
        earned, score = self._score(after, where, reasons)
        # The reference comes last: its cache moves.
        answers = Answers(earned, score, logprobs, self._ask_reference(after, acting, where, reasons))
        self.state = after
        self.payments.pay(where, steps, reasons, answers)

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
            values = reward.token_values(*_texts(after, rows))
            earned = torch.tensor([float(value[-1]) for value in values], device=device)
            return earned, torch.where(terminated, self.payments.earned_before(rows) + earned, score)
        due = rows[terminated]
        if len(due):
            score[terminated] = torch.as_tensor(reward.scores(*_texts(after, due)), device=device)
        return score, score

    def _ask_reference(self, after: TokenState, actions: Tensor, rows: Tensor, reasons: Tensor) -> Tensor | None:
        """`[r, 1]`: log π_ref of this token; `kl_credit="sequence"`: `[r, T]`, of the responses that end now."""
        if self.task.reference is None:
            return None
        if self._stepper is not None:
            last = self.state.ids[rows, self.state.lengths[rows] - 1]
            return self._stepper.step(last, actions, None if len(rows) == self.rows else rows)[:, None]
        ended = reasons != FinishReason.NONE
        due = rows[ended]
        if not len(due):
            return None
        spoken = self.task.reference.logprobs(after.ids[due], after.prompt_lengths[due], after.response_lengths[due])
        answers = spoken.new_zeros(len(rows), spoken.shape[1])
        answers[ended] = spoken
        return answers

    # ------------------------------------------------------------------------------------------------- telling

    def texts(self, rows: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and responses so far, as id lists."""
        return _texts(self.state, rows)

    def observation(self) -> dict[str, Tensor]:
        """Fresh tensors of every row: `input_ids [N, L]`, `attention_mask [N, L]`, `prompt_length [N, 1]`."""
        state = self.state
        mask = torch.arange(self.task.columns, device=self.task.device) < state.lengths[:, None]
        return {
            "input_ids": state.ids.clone(),
            "attention_mask": mask.to(torch.int8),
            "prompt_length": state.prompt_lengths[:, None].clone(),
        }

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


def _texts(state: TokenState, rows: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    ids = state.ids[rows].tolist()
    cuts = zip(state.prompt_lengths[rows].tolist(), state.lengths[rows].tolist(), strict=True)
    pairs = [(row[:start], row[start:end]) for row, (start, end) in zip(ids, cuts, strict=True)]
    return [prompt for prompt, _ in pairs], [response for _, response in pairs]


def _choose(
    task: Task, rows: np.ndarray, rngs: Sequence[np.random.Generator], options: Mapping[str, Any]
) -> tuple[list[int], list[list[int]]]:
    """A prompt for each row that begins, and its index in the task's prompts (−1: it is none of them)."""
    unknown = set(options) - {"prompt_index", "prompt"}
    if unknown or len(options) > 1:
        raise ValueError(f"options: expected 'prompt_index' or 'prompt', got {sorted(map(str, options))}")
    if "prompt" in options:
        return [-1] * len(rows), task.tokenize(_per_row_prompts(options["prompt"], rows, len(rngs)))
    count = len(task.prompts)
    if "prompt_index" in options:
        indices = _per_row_indices(options["prompt_index"], rows, len(rngs), count)
    else:
        indices = [int(rngs[row].integers(count)) for row in rows]
    return indices, [task.prompts[index] for index in indices]


def _per_row_prompts(prompt: Any, rows: np.ndarray, count: int) -> list[Any]:
    """One prompt for all, or one for each of the N rows."""
    if not isinstance(prompt, str | Sequence | np.ndarray):
        raise ValueError(f"options['prompt']: expected text, ids, or a list of {count} of them, got {prompt!r}")
    if isinstance(prompt, str) or len(prompt) == 0 or isinstance(prompt[0], int | np.integer):
        return [prompt] * len(rows)
    if len(prompt) != count:
        raise ValueError(f"options['prompt']: expected one prompt or a list of {count}, got {len(prompt)}")
    return [prompt[row] for row in rows]


def _per_row_indices(index: Any, rows: np.ndarray, count: int, prompts: int) -> list[int]:
    try:
        array = np.asarray(index)
    except ValueError:  # ragged
        array = np.empty(0)
    if not np.issubdtype(array.dtype, np.integer) or array.shape not in ((), (count,)):
        raise ValueError(f"options['prompt_index']: expected an integer or {count} of them, got {index!r}")
    chosen = np.broadcast_to(array, (count,))[rows]
    if (chosen < 0).any() or (chosen >= prompts).any():
        raise ValueError(f"options['prompt_index']: expected indices in [0, {prompts}), got {index!r}")
    return chosen.tolist()
