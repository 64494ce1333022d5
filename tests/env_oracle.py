"""The MDP in plain Python and float64, written from the contract and importing nothing of the library.

`Oracle` says what one episode pays, token by token; `rows` says what a vector environment shows in each autoreset mode.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Logits = Callable[[tuple[int, ...]], Sequence[float]]
NONE, STOP, LENGTH = 0, 1, 2


@dataclass
class Oracle:
    """One MDP: options as plain values, models as functions of a prefix."""

    ref_logits: Logits
    policy_logits: Logits | None
    score: Callable[[list[int], list[int]], Any]
    """Of prompt and whole response; a list of values, one a token, if `dense`."""
    dense: bool
    stops: tuple[int, ...]
    max_new_tokens: int
    columns: int
    pad: int
    kl_coef: float
    kl_source: str
    kl_credit: str
    length_end: str
    missing_eos_penalty: float
    temperature: float
    has_reference: bool = True
    terms: Sequence[tuple[str, float, bool, Callable[[list[int], list[int]], Any]]] = ()
    """Instead of `score`: the named parts that it is the weighted sum of, each dense or not."""

    def logprob(self, logits: Logits, prefix: Sequence[int], token: int) -> float:
        scaled = [x / self.temperature for x in logits(tuple(prefix))]
        top = max(scaled)
        return scaled[token] - top - math.log(sum(math.exp(x - top) for x in scaled))

    def begin(self, prompt: Sequence[int], index: int) -> Step:
        return Step(observation=self._observation(prompt, []), info=self._info(index))

    def episode(self, prompt: Sequence[int], index: int, actions: Sequence[int]) -> list[Step]:
        """Every step of an episode that takes these actions, as far as it goes."""
        steps, refs, logps = [], [], []
        for t, action in enumerate(actions):
            response = list(actions[: t + 1])
            prefix = [*prompt, *actions[:t]]
            if self.has_reference:
                refs.append(self.logprob(self.ref_logits, prefix, action))
                if self.kl_source == "policy":
                    assert self.policy_logits is not None
                    logps.append(self.logprob(self.policy_logits, prefix, action))
            reason = STOP if action in self.stops else LENGTH if t + 1 == self.max_new_tokens else NONE
            steps.append(self._step(list(prompt), index, response, refs, logps, reason))
            if reason != NONE:
                break
        return steps

    def _step(self, prompt, index, response, refs, logps, reason) -> Step:
        ended = reason != NONE
        terminated = reason == STOP or (reason == LENGTH and self.length_end == "terminate")
        penalty = self.missing_eos_penalty if reason == LENGTH else 0.0
        info = self._info(index)
        paid = 0.0
        for name, weight, dense, score in self.terms or [("", 1.0, self.dense, self.score)]:
            if not (dense or terminated):
                continue
            values = score(prompt, response) if dense else [score(prompt, response)]
            paid += weight * values[-1]
            info["score"] += weight * math.fsum(values) if terminated else 0.0
            if name:
                info[f"reward_parts/{name}"] = values[-1]
        charges = self._charges(refs, logps)
        if self.kl_credit == "token":
            charge = charges[-1] if charges else 0.0
        else:
            charge = math.fsum(charges) if ended else 0.0
        if refs and (self.kl_credit == "token" or ended):
            info["ref_logprob"] = refs[-1]
            if logps:
                info["kl"], info["kl_known"] = logps[-1] - refs[-1], 1
            if self.kl_credit == "sequence":
                info["ref_logprobs"] = refs + [0.0] * (self.max_new_tokens - len(refs))
        info |= {"finish_reason": reason, "response_length": len(response)}
        info |= {"reward_parts/score": paid, "reward_parts/kl": charge, "reward_parts/missing_eos": -penalty}
        return Step(
            observation=self._observation(prompt, response),
            info=info,
            reward=paid + charge - penalty,
            terminated=terminated,
            truncated=ended and not terminated,
        )

    def _charges(self, refs, logps) -> list[float]:
        if self.kl_source == "policy":
            return [-self.kl_coef * (p - r) for p, r in zip(logps, refs, strict=True)]
        if self.kl_source == "reference":
            return [self.kl_coef * r for r in refs]
        return []

    def _observation(self, prompt, response) -> dict[str, list[int]]:
        text = [*prompt, *response]
        rest = self.columns - len(text)
        return {
            "input_ids": text + [self.pad] * rest,
            "attention_mask": [1] * len(text) + [0] * rest,
            "prompt_length": [len(prompt)],
        }

    def _info(self, index: int) -> dict[str, Any]:
        info: dict[str, Any] = dict.fromkeys(
            ("score", "ref_logprob", "kl", "reward_parts/score", "reward_parts/kl", "reward_parts/missing_eos"), 0.0
        )
        info |= {f"reward_parts/{name}": 0.0 for name, *_ in self.terms}
        info |= {"kl_known": 0, "finish_reason": NONE, "response_length": 0, "prompt_index": index}
        if self.kl_credit == "sequence":
            info["ref_logprobs"] = [0.0] * self.max_new_tokens
        return info


@dataclass
class Step:
    """What reset or step says of one row."""

    observation: dict[str, list[int]]
    info: dict[str, Any]
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    final: Step | None = None
    """What the episode ended with, where a new one began in the same step."""
    begun: bool = False
    """`DISABLED`: the row was reset after this step and shows `after`."""
    after: Step | None = None


@dataclass
class Row:
    """One row of a vector environment: it plays its actions and begins anew by itself."""

    oracle: Oracle
    prompts: Sequence[Sequence[int]]
    draws: Callable[[], int]
    mode: str
    taken: list[int] = field(default_factory=list)
    index: int = -1
    resting: bool = False

    def reset(self) -> Step:
        self.index, self.taken, self.resting = self.draws(), [], False
        return self.oracle.begin(self.prompts[self.index], self.index)

    def step(self, action: int) -> Step:
        if self.resting:
            return self.reset()
        self.taken.append(action)
        step = self.oracle.episode(self.prompts[self.index], self.index, self.taken)[-1]
        if not (step.terminated or step.truncated):
            return step
        if self.mode == "NextStep":
            self.resting = True
        elif self.mode == "SameStep":
            new = self.reset()
            return Step(new.observation, new.info, step.reward, step.terminated, step.truncated, final=step)
        else:
            step.begun, step.after = True, self.reset()
        return step


def decode(pieces: Sequence[str], specials: Sequence[int], ids: Sequence[int]) -> str:
    """SentencePiece's way: ▁ is a space, and the first one of a text is dropped."""
    text = "".join(pieces[i] for i in ids if i not in specials).replace("▁", " ")
    return text[1:] if text.startswith(" ") else text


def texts(pieces, specials, stops, prompt, response) -> tuple[str, str]:
    """What a reward function of strings is given."""
    body = response[:-1] if response and response[-1] in stops else response
    start = decode(pieces, specials, prompt)
    return start, decode(pieces, specials, [*prompt, *body])[len(start) :]


def legal(case: dict[str, Any]) -> bool:
    cut = case["length_end"] == "truncate"
    return not (cut and (case["kl_credit"] == "sequence" or case["missing_eos_penalty"]))


def generate(seed: int, vocab: int) -> dict[str, Any]:
    """One case: options and prompts as plain values, drawn until they are legal."""
    rng = random.Random(seed)
    while True:
        case = {
            "model": rng.choice(["llama", "gpt2"]),
            "kl_source": rng.choice(["agent", "policy", "reference"]),
            "kl_credit": rng.choice(["token", "sequence"]),
            "length_end": rng.choice(["terminate", "terminate", "truncate"]),
            "missing_eos_penalty": rng.choice([0.0, 0.7]),
            "temperature": rng.choice([1.0, 0.7, 1.6]),
            "kl_coef": rng.choice([0.0, 0.3, 1.7, "controller"]),
            "reward": rng.choice(["text", "ids", "dense", "sum", "mixed"]),
            # None at all, EOS, BOS, PAD (id 0), or several with one that is no special token.
            "stop_token_ids": rng.choice([(), (2,), (1,), (0,), (2, 9)]),
            "max_new_tokens": rng.choice([1, 2, 4, 5]),
            "num_envs": rng.choice([1, 2, 3]),
            "seed": rng.randrange(1000),
        }
        if legal(case):
            break
    # Prompts begin with BOS, and some hold EOS, PAD or a stop token inside.
    case["prompts"] = [
        [1, *(rng.choice([0, 2, 9, *range(3, vocab)]) for _ in range(rng.randrange(5)))]
        for _ in range(rng.choice([1, 3]))
    ]
    stops = case["stop_token_ids"]
    case["actions"] = [
        [rng.choice(stops) if stops and rng.random() < 0.3 else rng.randrange(vocab) for _ in range(case["num_envs"])]
        for _ in range(2 * case["max_new_tokens"] + 1)
    ]
    return case
