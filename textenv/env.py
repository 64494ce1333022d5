"""The single environment."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from textenv.candidates import LOWEST
from textenv.core import TextCore
from textenv.options import EnvOptions
from textenv.rendering import render_row
from textenv.task import Task
from textenv.tasked import Tasked


def observation_space(core: TextCore) -> spaces.Dict:
    """The observation of one row: fixed shapes, right-padded, prompt first."""
    columns, top = core.task.columns, core.task.vocab_size - 1
    parts: dict[str, spaces.Space] = {
        "input_ids": spaces.Box(0, top, (columns,), np.int64),
        "attention_mask": spaces.Box(0, 1, (columns,), np.int8),
        "prompt_length": spaces.Box(0, columns, (1,), np.int64),
    }
    actions = core.actions
    if actions.reference.top_k is not None:
        k = actions.count
        parts["candidates"] = spaces.Box(0, top, (k,), np.int64)
        parts["candidate_logprobs"] = spaces.Box(LOWEST, 0.0, (k,), np.float32)
    if actions.mask_in_obs:
        parts["action_mask"] = spaces.Box(0, 1, (actions.count,), np.int8)
    return spaces.Dict(parts)


def _one_action(action: Any) -> np.ndarray:
    array = np.asarray(action)
    if array.shape != ():
        raise gym.error.InvalidAction(f"action: expected one token id, got shape {array.shape}")
    return array.reshape(1)


class TextEnv(Tasked, gym.Env[dict[str, np.ndarray], int]):
    """Reinforcement learning on text, one token a step.

    ## Description

    A prompt x starts an episode. The state is the prompt with the text so far, s_t = x ⊕ y_<t; the action is the next
    token; the transition appends it. The reward is the score of the finished response minus a KL penalty to a frozen
    reference model, the form in which language models are trained from human feedback (Ziegler et al. 2019).

    ## Action Space

    `Discrete(V)`: one token id. V is the width of the reference's logits, which may exceed the tokenizer's length.

    With `constraint`, only the tokens A(s) that it allows may be chosen; any other is an `InvalidAction`. π and π_ref
    are then both softmax over A(s). `info["action_mask"]` and the method `action_masks()` tell A(s).
    `textenv.wrappers.TopKActions` makes the action an index into the k most probable tokens.

    ## Observation Space

    A `Dict`; L = max_prompt_tokens + max_new_tokens. Rows are right-padded with the prompt first, so a step writes one
    cell and earlier positions never move.

    | key | space | meaning |
    |---|---|---|
    | `input_ids` | `Box(0, V − 1, (L,), int64)` | prompt, then response, then padding |
    | `attention_mask` | `Box(0, 1, (L,), int8)` | 1 at the tokens of prompt and response |
    | `prompt_length` | `Box(0, L, (1,), int64)` | tokens of the prompt |

    ## Rewards

    r_t = score(x, y)·[t is last] (or dense token rewards) − β·k_t − missing_eos_penalty·[ended at the length], with
    k_t = log π(a_t|s_t) − log π_ref(a_t|s_t), both at `temperature`. The discount is 1. The environment does not own
    the policy, so `kl_source` says who knows log π:

    - `agent` (default): `step` pays the score part; `ref_logprob` is in info, and the collecting side charges −β·k_t
      (`textenv.kl.charge`). For `agents.PPO` and every adapter.
    - `policy` (default with `policy=` or after `attach`): `step` pays the full reward; the live policy is asked at each
      step. For off-the-shelf algorithms.
    - `reference`: `step` pays the score part + β·log π_ref. For maximum-entropy algorithms, whose own entropy completes
      the KL.

    With `kl_credit="sequence"` the KL's sum is paid with the score: the same return, and the reference costs one
    batched forward per episode; `ref_logprob` is then 0 until the last step, whose info carries all `ref_logprobs`.

    ## Starting State

    A prompt drawn with `np_random` from `prompts`, of a mixture from a source drawn by its weight;
    `reset(options={"prompt_index": i})` or `{"prompt": text, ids or messages}` chooses.

    ## Episode End

    Terminated: a stop token was chosen (`FinishReason.STOP`, also as the last token allowed), or `max_new_tokens` were
    chosen (`LENGTH`): the score is paid, so nothing follows. Stop tokens are looked for in the response only.

    Truncated: at `LENGTH` with `length_end="truncate"`: no score is paid, only what is the token's own (its KL and its
    dense reward), and the agent bootstraps.

    ## Information

    The same keys in `reset` and `step`, NumPy scalars: `score`, `ref_logprob`, `kl`, `kl_known` (0: `kl` is unknown and
    0.0), `finish_reason`, `response_length`, `prompt_index` (−1 for a prompt of your own), `reward_parts/score`,
    `reward_parts/kl`, `reward_parts/missing_eos` (they sum to the reward) and a `reward_parts/…` for each part that the
    reward function tells (`part_names`: what it pays now, before weights); with `kl_credit="sequence"` also
    `ref_logprobs`; with `constraint` also `action_mask`, int8 `(V,)`; with `info_text=True` also `prompt_text` and
    `response_text`.

    ## Arguments

    Those of `textenv.options.EnvOptions`, and `render_mode` (`ansi` or `human`). Without arguments the embedded
    storyteller, reward model and openings are used, offline.

    ## Version History

    - v0: first version.
    """

    metadata = {"render_modes": ["ansi", "human"], "render_fps": 4}  # noqa: RUF012 - Gymnasium's form

    def __init__(self, *, render_mode: str | None = None, **options: Any) -> None:
        """Load the task.

        Args:
            render_mode: None, `ansi` or `human`.
            **options: The fields of `EnvOptions`.

        Raises:
            ValueError: For a bad argument; it names the argument, what was expected and what came.
        """
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode: expected None, 'ansi' or 'human', got {render_mode!r}")
        self.render_mode = render_mode
        self._core = TextCore(Task(EnvOptions.of(options)), rows=1)
        self._describe()
        self.action_space: Any = spaces.Discrete(self.task.vocab_size)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; `options` may choose the prompt."""
        core = self.core
        super().reset(seed=seed)
        core.reset(np.array([0]), [self.np_random], options)
        self._show()
        return self._observation(), self._info()

    def step(self, action: int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Append one token.

        Raises:
            gymnasium.error.ResetNeeded: Before `reset` and on a finished episode.
            gymnasium.error.InvalidAction: If the action is not in `Discrete(V)`.
        """
        core = self.core
        if not core.running[0]:
            raise gym.error.ResetNeeded("The episode has ended or has not begun: call reset() before step().")
        core.step(core.check_actions(_one_action(action)), np.array([0]))
        self._show()
        terminated, truncated = core.endings()
        return self._observation(), float(core.rewards[0]), bool(terminated[0]), bool(truncated[0]), self._info()

    def render(self) -> str | None:
        """The text so far, and what each token cost and earned."""
        if self.render_mode is None:
            gym.logger.warn("render() was called without a render_mode; pass render_mode='ansi' or 'human' to make().")
            return None
        if self.render_mode == "human":
            return None
        return render_row(self.core, 0)

    def action_masks(self) -> np.ndarray:
        """`[V]` bool: which tokens may be chosen now; what `MaskablePPO` of sb3-contrib asks."""
        return self.core.actions.mask()[0].cpu().numpy()

    def close(self) -> None:
        """Free the models."""
        self._core = None

    def _describe(self) -> None:
        self.observation_space: Any = observation_space(self.core)

    def _show(self) -> None:
        if self.render_mode == "human":
            print(render_row(self.core, 0), end="\n\n")

    def _observation(self) -> dict[str, np.ndarray]:
        return {key: value[0].cpu().numpy().copy() for key, value in self.core.observation().items()}

    def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = {
            key: value[0].cpu().numpy()[()] if value.ndim == 1 else value[0].cpu().numpy().copy()
            for key, value in self.core.info().items()
        }
        return info | {key: texts[0] for key, texts in self.core.info_texts().items()}
