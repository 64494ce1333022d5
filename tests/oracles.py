"""Independent expectations: float64 loops over plain Python lists, one scalar at a time, importing nothing of ours.

They follow the papers' sums, not our recursions or our order of operations, so that agreement means something.
A masked slot is never read here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product

Row = Sequence[float]
Rows = Sequence[Row]


# Masked statistics.


def counted(x: Rows, mask: Sequence[Sequence[bool]]) -> list[float]:
    return [value for row, flags in zip(x, mask, strict=True) for value, flag in zip(row, flags, strict=True) if flag]


def mean(numbers: Row) -> float:
    return math.fsum(numbers) / len(numbers) if numbers else 0.0


def variance(numbers: Row, unbiased: bool) -> float:
    divisor = len(numbers) - unbiased
    if divisor < 1:
        return 0.0
    centre = mean(numbers)
    return math.fsum((number - centre) ** 2 for number in numbers) / divisor


def whiten(x: Rows, mask: Sequence[Sequence[bool]], shift_mean: bool, unbiased: bool) -> list[list[float]]:
    numbers = counted(x, mask)
    centre, sd = mean(numbers), math.sqrt(variance(numbers, unbiased))
    white = []
    for row, flags in zip(x, mask, strict=True):
        white.append([])
        for value, flag in zip(row, flags, strict=True):
            scaled = (value - centre) / sd if flag and sd > 0 else 0.0
            white[-1].append((scaled + (0.0 if shift_mean else centre)) if flag else 0.0)
    return white


# Returns. An episode is a list of (reward, value); how it ends is said in words, not in discounts.


def advantages_of_episode(
    rewards: Row, values: Row, gamma: float, lam: float, bootstrap: float | None = None
) -> list[float]:
    """Schulman et al. 2016, eq. 16: the sum of (γλ)^l δ, written out. `bootstrap` None is a termination."""
    length = len(rewards)
    after = [*values[1:], 0.0 if bootstrap is None else bootstrap]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(length)]
    return [math.fsum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]


def advantages_of_row(
    rewards: Row,
    values: Row,
    mask: Sequence[bool],
    endings: Sequence[str],
    bootstraps: Row,
    gamma: float,
    lam: float,
) -> list[float]:
    """One row of several episodes with holes: `endings[t]` is "", "terminated" or "truncated"; holes give 0."""
    result = [0.0] * len(rewards)
    episode: list[int] = []
    slots = [t for t in range(len(rewards)) if mask[t]]
    for t in slots:
        episode.append(t)
        if endings[t] or t == slots[-1]:
            bootstrap = bootstraps[t] if endings[t] == "truncated" else None
            parts = advantages_of_episode(
                [rewards[i] for i in episode], [values[i] for i in episode], gamma, lam, bootstrap
            )
            for i, part in zip(episode, parts, strict=True):
                result[i] = part
            episode = []
    return result


def gae_loop(rewards: Row, values: Row, next_values: Row, discounts: Row, lambdas: Row) -> list[float]:
    """The recursion, slot by slot, for discounts and λ as data."""
    result, later = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + discounts[t] * next_values[t] - values[t]
        later = delta + discounts[t] * lambdas[t] * later
        result[t] = later
    return result


def discounted_returns(rewards: Row, discounts: Row, bootstrap: float = 0.0) -> list[float]:
    """Each return as an explicit sum of rewards times products of discounts."""
    length = len(rewards)
    result = []
    for t in range(length):
        terms = [rewards[k] * math.prod(discounts[t:k]) for k in range(t, length)]
        result.append(math.fsum([*terms, bootstrap * math.prod(discounts[t:])]))
    return result


# Losses, one token at a time.


def clipped_surrogate(
    logprob: float,
    old_logprob: float,
    advantage: float,
    clip_eps: float,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
) -> float:
    ratio = math.exp(max(-20.0, min(20.0, logprob - old_logprob)))
    upper = 1 + (clip_eps if clip_eps_high is None else clip_eps_high)
    objective = min(ratio * advantage, min(max(ratio, 1 - clip_eps), upper) * advantage)
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    return -objective


def clipped_value(value: float, old_value: float, target: float, clip_eps: float | None) -> float:
    near = value if clip_eps is None else min(max(value, old_value - clip_eps), old_value + clip_eps)
    return max((value - target) ** 2, (near - target) ** 2) / 2


def aggregate(loss: Rows, mask: Sequence[Sequence[bool]], how: str, denominator: float | None = None) -> float:
    rows = [[v for v, flag in zip(row, flags, strict=True) if flag] for row, flags in zip(loss, mask, strict=True)]
    rows = [row for row in rows if row]
    parts = [v for row in rows for v in row] if how == "token" else [mean(row) for row in rows]
    return math.fsum(parts) / (denominator if denominator is not None else max(len(parts), 1))


# Distributions over a small vocabulary.


def log_softmax(logits: Row) -> list[float]:
    top = max(logits)
    norm = top + math.log(math.fsum(math.exp(logit - top) for logit in logits))
    return [logit - norm for logit in logits]


def kl(logits: Row, ref_logits: Row) -> float:
    """KL(p‖q) of two softmaxes."""
    p, q = log_softmax(logits), log_softmax(ref_logits)
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def k_estimators(logprob: float, ref_logprob: float) -> tuple[float, float, float]:
    """The estimators k1, k2 and k3 of Schulman 2020, with r = π_ref/π."""
    log_r = ref_logprob - logprob
    return -log_r, log_r**2 / 2, (math.exp(log_r) - 1) - log_r


def numerical_gradient(function: Callable[[list[float]], float], point: Row, step: float = 1e-5) -> list[float]:
    """Central differences; the error is O(step²) + O(ε / step), about 1e-10."""
    result = []
    for i in range(len(point)):
        ends = []
        for sign in (1, -1):
            moved = list(point)
            moved[i] += sign * step
            ends.append(function(moved))
        result.append((ends[0] - ends[1]) / (2 * step))
    return result


# The text MDP, enumerated.


def all_responses(vocab_size: int, max_new_tokens: int, stop: int) -> list[tuple[int, ...]]:
    """Every response: it ends with its first stop token, or at the length limit without one before."""
    responses = []
    for length in range(1, max_new_tokens + 1):
        for response in product(range(vocab_size), repeat=length):
            ended = response[-1] == stop or length == max_new_tokens
            if ended and stop not in response[:-1]:
                responses.append(response)
    return responses


def regularised_return(
    logits: Mapping[tuple[int, ...], Row],
    ref_logits: Mapping[tuple[int, ...], Row],
    scores: Mapping[tuple[int, ...], float],
    kl_coef: float,
) -> float:
    """J = Σ_y π(y) (score(y) - β Σₜ k1ₜ), from logits per prefix."""
    total = []
    for response, score in scores.items():
        logprob, kl_sum = 0.0, 0.0
        for t, token in enumerate(response):
            p = log_softmax(logits[response[:t]])[token]
            logprob += p
            kl_sum += p - log_softmax(ref_logits[response[:t]])[token]
        total.append(math.exp(logprob) * (score - kl_coef * kl_sum))
    return math.fsum(total)
