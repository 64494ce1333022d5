"""Proof that what samples is what trains: names, versions and checksums of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from agents.mismatch import SamplerMismatch
from agents.sampling.names import full_precision, named_weights
from agents.weights import held_weights, weights_stamp

_ROW, _SLAB = 2**12, 2**20
_MODULUS = 2**64


@dataclass(frozen=True)
class Fingerprint:
    """Which weights: equal ones have equal checksums, and others do not (but once in 2⁶⁴)."""

    version: int
    """The label they were pushed under."""
    checksums: Mapping[str, int]
    """`checksum` of each tensor, under its name in the model's own checkpoint."""


class WeightSync:
    """Keeps a sampler at the weights that train."""

    def __init__(self) -> None:
        """Nothing was pushed yet."""
        self._pushed: tuple[Any, Fingerprint] | None = None

    def push(self, sampler: Any, model: Any, version: int) -> Fingerprint:
        """Give a sampler the model's present weights, unless it was the last to get these.

        Every bit is read each time: a write into `p.data` leaves no other trace.

        Returns:
            Which these are, to be compared with what the samples say (`check_synced`).
        """
        with full_precision(model):
            found = fingerprint(named_weights(model), version)
            _latest[model] = weights_stamp(model), held_weights(model), found.checksums
        if self._pushed is None or self._pushed[0] is not sampler or self._pushed[1] != found:
            self._pushed = None  # a push that fails leaves the sampler with nobody knows what
            sampler.push(named_weights(model), version)
            self._pushed = sampler, found
        return found


_latest: WeakKeyDictionary[nn.Module, tuple[Any, list[Tensor], Mapping[str, int]]] = WeakKeyDictionary()
"""What a trainer read last of a model: its stamp then, what keeps that valid, and the checksums."""


def live_fingerprint(model: Any, version: int) -> Fingerprint:
    """As `fingerprint`, of a model that a sampler shares with its trainer: read if it changed since the trainer did.

    Changes are seen as `agents.weights.weights_stamp` sees them: not those through `p.data`, which the trainer's next
    reading finds.
    """
    with full_precision(model):
        known = _latest.get(model)
        if known is not None and known[0] == weights_stamp(model):
            return Fingerprint(version, known[2])
        return fingerprint(named_weights(model), version)


def fingerprint(weights: Iterable[tuple[str, Tensor]], version: int) -> Fingerprint:
    """Of named weights, under a version."""
    sums = {name: bit_sum(tensor) for name, tensor in weights}
    totals = list(sums.values())
    # Together: each reading waits for the device.
    read = torch.stack([total.to(totals[0].device) for total in totals]).tolist() if totals else []
    return Fingerprint(version, {name: total % _MODULUS for name, total in zip(sums, read, strict=True)})


def checksum(tensor: Tensor) -> int:
    """A number below 2⁶⁴ of a tensor's bits and their order; of another dtype or shape it may be another.

    Σ_i w_i·b_i modulo 2⁶⁴ over the elements' bits b with fixed odd w.

    >>> first, second = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    >>> checksum(first) == checksum(first.clone()), checksum(first) == checksum(second)
    (True, False)
    """
    return int(bit_sum(tensor)) % _MODULUS


@torch.no_grad()
def bit_sum(tensor: Tensor) -> Tensor:
    """The checksum as a signed number, `[]` int64 where the tensor is."""
    bits = tensor.detach().contiguous().flatten()
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = bits.view(kinds[bits.element_size()])
    inner, outer = _multipliers(tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, slab in enumerate(bits.split(_SLAB)):
        rows = torch.nn.functional.pad(slab.to(torch.int64), (0, -len(slab) % _ROW)).view(-1, _ROW)
        sums = (rows * inner).sum(1)
        total = total * 0x5DEECE66D + (sums * outer[: len(sums)]).sum() + number + len(slab)
    return total


COMPARE_EVERY = 16
"""Where `old_logprobs` spares the trainer's forward, the first rollout of a sampler and every so many after it are held
against one all the same."""


class Comparisons:
    """When a sampler's numbers are held against the trainer's."""

    def __init__(self) -> None:
        """No sampler yet."""
        self._sampler: Any = None
        self._done = 0

    def due(self, sampler: Any) -> bool:
        """Whether its next rollout is one of them."""
        return sampler is not self._sampler or self._done % COMPARE_EVERY == 0

    def passed(self, sampler: Any) -> None:
        """A rollout of it has come through all checks."""
        self._done = 1 if sampler is not self._sampler else self._done + 1
        self._sampler = sampler


def check_synced(ours: Fingerprint, theirs: Fingerprint | None) -> None:
    """Refuse samples of weights that are not those that train.

    Args:
        ours: The trainer's.
        theirs: What the sampler says that it sampled from; None: it says nothing, which is let pass.

    Raises:
        SamplerMismatch: Naming the version or the tensors that differ.
    """
    if theirs is None:
        return
    names = [name for name in {**ours.checksums, **theirs.checksums} if not _same(name, ours, theirs)]
    if not names and ours.version == theirs.version:
        return
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    what = f"{', '.join(names[:3])}{more} differ" if names else "the versions differ"
    raise SamplerMismatch(
        f"the sampler drew from weights of version {theirs.version}, the trainer has {ours.version}: {what}. "
        "A push was skipped, or sent something else. Nothing was learnt from these samples."
    )


def _same(name: str, ours: Fingerprint, theirs: Fingerprint) -> bool:
    return ours.checksums.get(name) == theirs.checksums.get(name)


@cache
def _multipliers(device: torch.device) -> tuple[Tensor, Tensor]:
    """Odd numbers of all sizes, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randint(-(2**63), 2**63 - 1, (_ROW + _SLAB // _ROW,), dtype=torch.int64, generator=generator) | 1
    inner, outer = both.to(device).split([_ROW, _SLAB // _ROW])
    return inner, outer
