"""Samplers on equal work: useful tokens a second, and what a push of new weights takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from agents.sampling import TransformersSampler
from agents.sampling.continuous_sampler import ContinuousSampler
from agents.sampling.sync import WeightSync, check_synced
from scripts.benching.models import Shape, llama
from scripts.benching.timing import Competitor, measure

ROWS, PROMPT = 32, 16
SHAPE = Shape(vocab=1000, hidden=256, layers=4)
EQUAL, RAGGED = 64, 128
STOPS = tuple(range(20))
"""Of the ragged task: a fiftieth of the vocabulary of a random model, so that lengths are geometric, 1 to 128."""

_TEXT = """## Samplers

{rows} prompts of {prompt} tokens, a random Llama of 4.7M parameters (heads 32 wide, float32); *equal*: {equal} tokens
each; *ragged*: each token ends the response with probability 1/50, at most {ragged} tokens. Tokens per second of
wall-clock time, because some samplers work in other processes; one thread each. *push*: what each rollout pays for its
proof, with new weights: reading the trainer's, giving them to a sampler that has its own, and comparing.

"""


@dataclass(frozen=True)
class SamplerTiming:
    """What was measured of one sampler on one task."""

    task: str
    """`equal` or `ragged`."""
    name: str
    """Whose."""
    tokens: tuple[int, ...]
    """Of the responses of each call."""
    wall_seconds: tuple[float, ...]
    """Of each call."""
    push_seconds: tuple[float, ...]
    """Of each push with its proof."""

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of each call."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.wall_seconds, strict=True)]


def samplers() -> dict[str, Callable[[Any], Any]]:
    """Those that can be had here, by name."""
    found: dict[str, Callable[[Any], Any]] = {"transformers": TransformersSampler, "continuous": ContinuousSampler}
    if find_spec("vllm") is None:
        return found
    from agents.sampling.vllm_config import VLLMConfig
    from agents.sampling.vllm_sampler import VLLMSampler
    from agents.sampling.vllm_server import VLLMServerSampler

    config = VLLMConfig(max_model_len=PROMPT + RAGGED, max_num_seqs=ROWS)
    found["vllm"] = lambda model: VLLMSampler(model, config)
    found["vllm process"] = lambda model: VLLMSampler(model, replace(config, multiprocess=True))
    found["vllm server"] = lambda model: VLLMServerSampler(model, engine=config)
    return found


def run(rounds: int, model: Path | None, tell: Callable[[str], None]) -> tuple[str, list[SamplerTiming]]:
    """Measure; the text of the page, and what was found."""
    lm = llama(SHAPE, context=PROMPT + RAGGED)
    made = {name: make(lm) for name, make in samplers().items()}
    try:
        found = [timing for task in ("equal", "ragged") for timing in _measured(task, made, rounds, tell)]
        pushes = {name: _pushes(sampler, lm, rounds) for name, sampler in made.items()}
    finally:
        for sampler in made.values():
            sampler.close()
    timings = [SamplerTiming(task, name, tokens, seconds, pushes[name]) for task, name, tokens, seconds in found]
    text = _TEXT.format(rows=ROWS, prompt=PROMPT, equal=EQUAL, ragged=RAGGED)
    return text + page(timings), timings


def page(timings: list[SamplerTiming]) -> str:
    """A table of each task."""
    lines = []
    for task in dict.fromkeys(timing.task for timing in timings):
        mine = [timing for timing in timings if timing.task == task]
        base = statistics.median(mine[0].speeds)
        lines += [f"| {task} | tokens/s | min–max | ÷ {mine[0].name} | push, ms |", "|---|--:|--:|--:|--:|"]
        for timing in mine:
            speeds, push = timing.speeds, 1e3 * statistics.median(timing.push_seconds)
            middle = statistics.median(speeds)
            spread = f"{min(speeds):.0f}–{max(speeds):.0f}"
            lines.append(f"| {timing.name} | {middle:.0f} | {spread} | {middle / base:.2f} | {push:.0f} |")
        lines.append("")
    return "\n".join(lines)


def _measured(
    task: str, made: dict[str, Any], rounds: int, tell: Callable[[str], None]
) -> list[tuple[str, str, tuple[int, ...], tuple[float, ...]]]:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(len(STOPS), SHAPE.vocab, (ROWS, PROMPT), generator=generator).tolist()
    tokens: dict[str, list[int]] = {name: [] for name in made}

    def work(name: str) -> Callable[[], None]:
        def sample() -> None:
            drawn = made[name].sample(
                prompts,
                max_new_tokens=EQUAL if task == "equal" else RAGGED,
                stop_token_ids=[] if task == "equal" else STOPS,
                temperature=1.0,
                seed=len(tokens[name]),
            )
            tokens[name].append(sum(len(response) for response in drawn.responses))

        return sample

    timings = measure([Competitor(name, lambda name=name: work(name)) for name in made], rounds, tell)
    return [(task, t.name, tuple(tokens[t.name][1:]), t.wall_seconds) for t in timings]  # the first was to warm up


def _pushes(sampler: Any, model: Any, rounds: int) -> tuple[float, ...]:
    """Of new weights, as an agent pushes them; `_measured` pushes none, so that it times the drawing alone."""
    seconds, sync = [], WeightSync()
    for version in range(rounds):
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        start = time.perf_counter()
        trained = sync.push(sampler, model, version + 1)
        # Of no prompt: what is left is the sampler's own share of the proof.
        drawn = sampler.sample([], max_new_tokens=1, stop_token_ids=[], temperature=1.0, seed=0)
        check_synced(trained, drawn.fingerprint)
        seconds.append(time.perf_counter() - start)
    return tuple(seconds)
