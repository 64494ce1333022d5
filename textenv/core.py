"""The batched core: N rows of one task. It validates, draws prompts, acts and pays; both environments stand on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from textenv import dynamics, kl
from textenv.reference import ReferenceStepper
from textenv.task import Task
from textenv.types import FinishReason

PART_KEYS = ("score", "kl", "missing_eos")


class TextCore:
    """N rows of one task.

    After `reset` or `step`, `state`, `rewards` and `info()` describe every row. Rows that neither began nor acted keep
    what they had.
    """

    def __init__(self, task: Task, rows: int) -> None:
        """N rows, none of them started."""
        self.task, self.rows = task, rows
        device, steps = task.device, task.options.max_new_tokens
        self.state = dynamics.empty(rows, task.columns, device=device, pad_token_id=task.pad_token_id)
        self.started = np.zeros(rows, dtype=bool)
        self.prompt_index = np.full(rows, -1, dtype=np.int64)
        self._floats = {
            key: torch.zeros(rows, device=device)
            for key in ("score", "ref_logprob", "kl", *(f"reward_parts/{part}" for part in PART_KEYS))
        }
        self.history = {
            key: torch.zeros(rows, steps, device=device) for key in ("reward", "kl", "logprob", "ref_logprob", "dense")
        }
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
        indices, prompts = self._choose(rows, rngs, options or {})
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
        for tensor in (*self._floats.values(), *self.history.values()):
            tensor[where] = 0.0
        if self._stepper is None and self.task.reference is not None and self.task.options.kl_credit == "token":
            self._stepper = ReferenceStepper(self.task.reference, self.rows, self.task.columns)
        if self._stepper is not None:
            self._stepper.begin(where, ids[:, :width], lengths)

    def _choose(
        self, rows: np.ndarray, rngs: Sequence[np.random.Generator], options: Mapping[str, Any]
    ) -> tuple[list[int], list[list[int]]]:
        unknown = set(options) - {"prompt_index", "prompt"}
        if unknown or len(options) > 1:
            raise ValueError(f"options: expected 'prompt_index' or 'prompt', got {sorted(map(str, options))}")
        if "prompt" in options:
            prompts = self.task.tokenize(_per_row_prompts(options["prompt"], rows, self.rows))
            return [-1] * len(rows), prompts
        count = len(self.task.prompts)
        if "prompt_index" in options:
            indices = _per_row_indices(options["prompt_index"], rows, self.rows, count)
        else:
            indices = [int(rngs[row].integers(count)) for row in rows]
        return indices, [self.task.prompts[index] for index in indices]

    # ------------------------------------------------------------------------------------------------- acting

    @property
    def running(self) -> np.ndarray:
        """`[N]` bool: rows in the middle of an episode."""
        return self.started & (self.state.finish_reasons == FinishReason.NONE).cpu().numpy()

    def check_actions(self, actions: Any) -> Tensor:
        """One action a row, as a tensor on the device.

        Raises:
            gymnasium.error.InvalidAction: If the shape, the type or a value is not that of `Discrete(V)`.
        """
        vocab_size = self.task.vocab_size
        tensor = actions if isinstance(actions, Tensor) else torch.as_tensor(np.asarray(actions))
        if tensor.shape != (self.rows,) or tensor.is_floating_point() or tensor.dtype in (torch.bool, torch.complex64):
            raise gym.error.InvalidAction(
                f"actions: expected {self.rows} integers in [0, {vocab_size}), got shape {tuple(tensor.shape)} of {tensor.dtype}"
            )
        tensor = tensor.to(self.task.device, torch.int64)
        if ((tensor < 0) | (tensor >= vocab_size)).any():
            raise gym.error.InvalidAction(f"actions: expected ids in [0, {vocab_size}), got {tensor.tolist()}")
        return tensor

    @torch.no_grad()
    def step(self, actions: Tensor, rows: np.ndarray) -> None:
        """Append one token to some rows, all of them running, and pay for it.

        Args:
            actions: `[N]`, checked; those of other rows are ignored.
            rows: `[r]` int64, ascending.
        """
        where = torch.as_tensor(rows, device=self.task.device)
        acting = actions[where]
        steps = self.state.response_lengths[where]
        self._record_logprobs(acting, where, steps)
        self.state = dynamics.append(
            self.state,
            acting,
            where,
            stop_token_ids=self.task.stop_tensor,
            max_new_tokens=self.task.options.max_new_tokens,
        )
        self._pay(where, steps)

    def _record_logprobs(self, actions: Tensor, rows: Tensor, steps: Tensor) -> None:
        """log π and log π_ref of the tokens about to be appended, where they are known now."""
        state = self.state
        if self._stepper is not None:
            last = state.ids[rows, state.lengths[rows] - 1]
            everyone = len(rows) == self.rows
            self.history["ref_logprob"][rows, steps] = self._stepper.step(last, actions, None if everyone else rows)
        if self._knows_kl:
            asked = self.task.policy_logprobs(state.ids[rows], state.lengths[rows], actions)
            self.history["logprob"][rows, steps] = asked

    @property
    def _knows_kl(self) -> bool:
        return self.task.kl_source == "policy" and self.task.reference is not None

    def _pay(self, rows: Tensor, steps: Tensor) -> None:
        reasons = self.state.finish_reasons[rows]
        ended = reasons != FinishReason.NONE
        terminated, _ = dynamics.endings(reasons, length_end=self.task.options.length_end)
        self._score_sequences(rows[ended])
        dense, score = self._score(rows, steps, terminated)
        penalty = -self.task.options.missing_eos_penalty * (reasons == FinishReason.LENGTH).float()
        charges, kls = self._kl(rows, steps, ended)
        floats = self._floats
        floats["score"][rows] = score
        floats["ref_logprob"][rows] = self.history["ref_logprob"][rows, steps] * self._ref_is_due(ended)
        floats["kl"][rows] = kls
        # With dense rewards the score is the sum of what the tokens were paid, so it is not paid again.
        paid = dense if self.task.reward.per_token else score
        for part, amount in zip(PART_KEYS, (paid, charges, penalty), strict=True):
            floats[f"reward_parts/{part}"][rows] = amount
        self.history["reward"][rows, steps] = paid + charges + penalty
        self.history["kl"][rows, steps] = kls

    def _ref_is_due(self, ended: Tensor) -> Tensor:
        """Under `kl_credit="sequence"` the reference has spoken only once the response is whole."""
        return ended.float() if self.task.options.kl_credit == "sequence" else torch.ones_like(ended, dtype=torch.float32)

    def _score_sequences(self, rows: Tensor) -> None:
        """`kl_credit="sequence"`: one forward of the reference for the responses that just ended."""
        if self.task.reference is None or self._stepper is not None or not len(rows):
            return
        state = self.state
        ref = self.task.reference.logprobs(state.ids[rows], state.prompt_lengths[rows], state.response_lengths[rows])
        self.history["ref_logprob"][rows, : ref.shape[1]] = ref

    def _score(self, rows: Tensor, steps: Tensor, terminated: Tensor) -> tuple[Tensor, Tensor]:
        """What the reward function pays now: `(dense, score)`, `[r]` each; score is 0 until it is due."""
        reward, device = self.task.reward, self.task.device
        score = torch.zeros(len(rows), device=device)
        if reward.per_token:
            values = reward.token_values(*self.texts(rows))
            dense = torch.tensor([float(value[-1]) for value in values], device=device)
            self.history["dense"][rows, steps] = dense
            return dense, torch.where(terminated, self.history["dense"][rows].sum(1), score)
        due = rows[terminated]
        if len(due):
            score[terminated] = torch.as_tensor(reward.scores(*self.texts(due)), device=device)
        return torch.zeros_like(score), score

    def _kl(self, rows: Tensor, steps: Tensor, ended: Tensor) -> tuple[Tensor, Tensor]:
        """What the environment charges now, and the k1 it knows of this token: `[r]` each."""
        zeros = torch.zeros(len(rows), device=self.task.device)
        if self.task.reference is None:
            return zeros, zeros
        ref, logprobs = self.history["ref_logprob"][rows], self.history["logprob"][rows]
        charges = kl.token_charges(logprobs, ref, kl_coef=self.task.kl_coef, kl_source=self.task.kl_source)
        known = (logprobs - ref).gather(1, steps[:, None])[:, 0] if self._knows_kl else zeros
        if self.task.options.kl_credit == "sequence":
            # Rows that go on have no reference log-probs yet; those past the end are 0 in both histories.
            return torch.where(ended, charges.sum(1), zeros), torch.where(ended, known, zeros)
        return charges.gather(1, steps[:, None])[:, 0], known

    # ------------------------------------------------------------------------------------------------- telling

    def texts(self, rows: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and responses so far, as id lists."""
        ids = self.state.ids[rows].tolist()
        cuts = zip(self.state.prompt_lengths[rows].tolist(), self.state.lengths[rows].tolist(), strict=True)
        pairs = [(row[:start], row[start:end]) for row, (start, end) in zip(ids, cuts, strict=True)]
        return [prompt for prompt, _ in pairs], [response for _, response in pairs]

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
        return torch.stack([self._floats[f"reward_parts/{part}"] for part in PART_KEYS]).sum(0)

    def endings(self) -> tuple[Tensor, Tensor]:
        """`(terminated, truncated)`, `[N]` bool."""
        return dynamics.endings(self.state.finish_reasons, length_end=self.task.options.length_end)

    def info(self) -> dict[str, Tensor]:
        """Fresh tensors of every row, the same keys always."""
        device, ended = self.task.device, self.state.finish_reasons != FinishReason.NONE
        acted = self.state.response_lengths > 0
        if self.task.options.kl_credit == "sequence":
            acted = ended
        info = {key: value.clone() for key, value in self._floats.items()}
        info["kl_known"] = (acted & self._knows_kl).to(torch.int8)
        info["finish_reason"] = self.state.finish_reasons.clone()
        info["response_length"] = self.state.response_lengths
        info["prompt_index"] = torch.as_tensor(self.prompt_index.copy(), device=device)
        if self.task.options.kl_credit == "sequence":
            info["ref_logprobs"] = self.history["ref_logprob"].clone()
        return info

    def info_texts(self) -> dict[str, list[str]]:
        """`prompt_text` and `response_text` of every row, with `info_text=True`."""
        if not self.task.options.info_text:
            return {}
        decode = self.task.text_decoder
        prompts, responses = decode(*self.texts(torch.arange(self.rows, device=self.task.device)))
        return {"prompt_text": prompts, "response_text": responses}


def _per_row_prompts(prompt: Any, rows: np.ndarray, count: int) -> list[Any]:
    """One prompt for all, or one for each of the N rows."""
    one = isinstance(prompt, str) or len(prompt) == 0 or isinstance(prompt[0], int | np.integer)
    if one:
        return [prompt] * len(rows)
    if len(prompt) != count:
        raise ValueError(f"options['prompt']: expected one prompt or a list of {count}, got {len(prompt)}")
    return [prompt[row] for row in rows]


def _per_row_indices(index: Any, rows: np.ndarray, count: int, prompts: int) -> list[int]:
    array = np.asarray(index)
    if not np.issubdtype(array.dtype, np.integer) or array.shape not in ((), (count,)):
        raise ValueError(f"options['prompt_index']: expected an integer or {count} of them, got {index!r}")
    chosen = np.broadcast_to(array, (count,))[rows]
    if (chosen < 0).any() or (chosen >= prompts).any():
        raise ValueError(f"options['prompt_index']: expected indices in [0, {prompts}), got {index!r}")
    return chosen.tolist()
