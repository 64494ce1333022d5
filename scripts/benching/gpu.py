"""Rollout and update of random Llamas on one device, as fractions of what the device can do."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from agents import PPO, PPOConfig, TransformersSampler, ValueHeadLM
from scripts.benching.models import FreeScore, Shape, llama
from textenv import Shared

SHAPES = {
    "tiny": Shape(512, 64, 2, heads=8, kv_heads=8),  # to try the command without a GPU
    "0.1B": Shape(32_000, 1024, 8, heads=16, intermediate=2816),
    "0.5B": Shape(32_000, 1536, 18, heads=24, intermediate=4096),
    "1.5B": Shape(32_000, 2048, 24, heads=32, intermediate=8192),
}

_TEXT = """## Against the limits of the device

{device}: copies {bandwidth:.0f} GB/s (read and write), multiplies bfloat16 matrices at {matmul:.1f} TFLOP/s. {rows}
responses of {response} tokens to prompts of {prompt}, bfloat16 weights, PPO with a shared critic, {microbatch} episodes
a forward.

- *decode*: the time that reading all weights, keys and values once a token takes at that bandwidth, over the time
  taken;
- *eager*, *generate*: how often longer the same rollout takes without a CUDA graph, and with plain `model.generate`;
- *update*: floating-point operations of the model (forward, and twice that for backward; nothing for what is computed
  again) at that rate, over the time taken: the model FLOPs utilisation.

"""


@dataclass(frozen=True)
class Load:
    """Sizes of an iteration."""

    rows: int = 64
    """Episodes."""
    prompt: int = 256
    """Tokens of each prompt."""
    response: int = 256
    """Tokens of each response, at least 2."""
    microbatch: int = 16
    """Episodes of one forward of the update."""


@dataclass(frozen=True)
class Device:
    """What a device can do."""

    name: str
    """As it says itself."""
    bytes_per_second: float
    """Copied: read and written."""
    flops_per_second: float
    """Of a product of bfloat16 matrices."""


@dataclass(frozen=True)
class Found:
    """What was measured of one model."""

    name: str
    """Of its size."""
    shape: Shape
    """Its shape."""
    load: Load
    """Sizes of the iteration."""
    device: Device
    """What it ran on."""
    prefill_seconds: tuple[float, ...]
    """Rollouts of one token."""
    rollout_seconds: tuple[float, ...]
    """Rollouts, steps replayed from a CUDA graph."""
    eager_seconds: tuple[float, ...]
    """Rollouts without a graph."""
    generate_seconds: tuple[float, ...]
    """The same with plain `model.generate`."""
    update_seconds: tuple[float, ...]
    """Updates of one epoch."""
    tokens_per_second: float = field(init=False)
    """Of the rollout's responses."""
    decode_fraction: float = field(init=False)
    """Of the bandwidth."""
    update_fraction: float = field(init=False)
    """Of the rate of matrix products."""

    def __post_init__(self) -> None:
        """Compute what follows from the medians."""
        prefill, rollout = statistics.median(self.prefill_seconds), statistics.median(self.rollout_seconds)
        moved, counted = decode_bytes(self.shape, self.load), update_flops(self.shape, self.load)
        decode = moved / self.device.bytes_per_second / (rollout - prefill)
        update = counted / self.device.flops_per_second / statistics.median(self.update_seconds)
        object.__setattr__(self, "tokens_per_second", self.load.rows * self.load.response / rollout)
        object.__setattr__(self, "decode_fraction", decode)
        object.__setattr__(self, "update_fraction", update)


def run(
    rounds: int,
    model: Path | None,
    tell: Callable[[str], None],
    device: str = "cuda",
    sizes: Sequence[str] = ("0.1B", "0.5B", "1.5B"),
    load: Load | None = None,
) -> tuple[str, list[Found]]:
    """Measure; the text of the page, and what was found. The models are random: `model` is not read.

    Raises:
        ValueError: If a size is unknown, or the device is not there.
    """
    unknown = [name for name in sizes if name not in SHAPES]
    if unknown:
        raise ValueError(f"sizes: expected some of {', '.join(SHAPES)}, got {', '.join(unknown)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that is there, got {device} without CUDA")
    load, able = load or Load(), measure_device(device)
    tell(f"{able.name}: {able.bytes_per_second / 1e9:.1f} GB/s, {able.flops_per_second / 1e12:.2f} TFLOP/s")
    found = []
    for name in sizes:
        found.append(_measure(name, load, able, device, rounds))
        tell(f"{name}: {found[-1].tokens_per_second:.0f} tokens/s, update {found[-1].update_fraction:.2f}")
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    return page(found), found


def page(found: Sequence[Found]) -> str:
    """What is said of it."""
    device = found[0].device
    text = _TEXT.format(
        device=device.name,
        bandwidth=device.bytes_per_second / 1e9,
        matmul=device.flops_per_second / 1e12,
        **vars(found[0].load),
    )
    head = "| model | rollout s | tokens/s | decode | eager | generate | update s | update |\n|---" + "|--:" * 7 + "|\n"
    lines = []
    for row in found:
        rollout, update = statistics.median(row.rollout_seconds), statistics.median(row.update_seconds)
        eager, generate = (statistics.median(s) / rollout for s in (row.eager_seconds, row.generate_seconds))
        lines.append(
            f"| {row.name} | {rollout:.2f} | {row.tokens_per_second:.0f} | {row.decode_fraction:.0%} "
            f"| {eager:.2f} × | {generate:.2f} × | {update:.2f} | {row.update_fraction:.0%} |\n"
        )
    return text + head + "".join(lines)


def decode_bytes(shape: Shape, load: Load, width: int = 2) -> float:
    """Bytes read by all steps of a rollout but the first, which the prompts' forward gives; `width` bytes a number."""
    lengths = range(load.prompt + 1, load.prompt + load.response)
    return sum(shape.decode_bytes(load.rows, length, width) for length in lengths)


def update_flops(shape: Shape, load: Load) -> float:
    """Operations of one epoch's forwards and backwards; the last token of a row is never read."""
    return 3 * shape.forward_flops(load.rows, load.prompt + load.response - 1, load.response)


class Clock:
    """Seconds of work on a device: by CUDA events, or by the wall clock of a CPU."""

    def __init__(self, device: str) -> None:
        """`device`: as PyTorch names it."""
        self._cuda = device.startswith("cuda")

    def seconds(self, work: Callable[[], object]) -> float:
        """Do the work, and wait until the device has done it."""
        if not self._cuda:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000


def measure_device(device: str) -> Device:
    """Copy, and multiply matrices; the best of several times counts."""
    cuda, clock = device.startswith("cuda"), Clock(device)
    # Far more than the caches hold; a product large enough to be limited by arithmetic.
    count, size = (2**30, 8192) if cuda else (2**27, 1024)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    copy = min(clock.seconds(lambda: target.copy_(source)) for _ in range(5))
    product = min(clock.seconds(lambda: a @ b) for _ in range(10))
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    return Device(name, 2 * count / copy, 2 * size**3 / product)


def _measure(name: str, load: Load, able: Device, device: str, rounds: int) -> Found:
    shape = SHAPES[name]
    model = llama(shape, context=load.prompt + load.response, dtype=torch.bfloat16, device=device)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(shape.vocab, (load.rows, load.prompt), generator=generator)
    agent = _agent(model, prompts.tolist(), load)
    rollout = agent.collect()
    works = {
        "prefill_seconds": partial(_sample, agent.policy, prompts.tolist(), 1),
        "rollout_seconds": partial(_sample, agent.policy, prompts.tolist(), load.response),
        "eager_seconds": partial(_sample, agent.policy, prompts.tolist(), load.response, cuda_graph=False),
        "generate_seconds": partial(_generate, model, prompts.to(device), load.response),
        "update_seconds": lambda: agent.update(rollout),
    }
    clock, seconds = Clock(device), {key: [] for key in works}
    for number in range(rounds + 1):
        for key, work in works.items():
            taken = clock.seconds(work)
            if number:  # the first time warms up
                seconds[key].append(taken)
    return Found(name, shape, load, able, **{key: tuple(values) for key, values in seconds.items()})


def _agent(model: Any, prompts: list[list[int]], load: Load) -> PPO:
    envs = gym.make_vec(
        "RLHF-Text-v0",
        num_envs=1,
        reference=Shared(model),  # asked for its vocabulary alone, at this kl_coef
        reward=FreeScore(),
        prompts=prompts,
        max_new_tokens=load.response,
        stop_token_ids=[],
        kl_coef=0.0,
        device=str(model.device),
    )
    config = PPOConfig(
        batch_episodes=load.rows,
        epochs=1,
        minibatches=1,
        microbatch_episodes=min(load.rows, load.microbatch),
        lr_schedule="constant",
    )
    return PPO(ValueHeadLM(model), envs, config)


def _sample(policy: ValueHeadLM, prompts: list[list[int]], tokens: int, cuda_graph: bool = True) -> None:
    sampler = TransformersSampler(policy, cuda_graph=cuda_graph)
    sampler.sample(prompts, max_new_tokens=tokens, stop_token_ids=[], temperature=1.0, seed=0)


@torch.no_grad()
def _generate(model: Any, prompts: Tensor, tokens: int) -> None:
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=0,
    )
