"""Samplers: how a policy's responses are drawn."""

from __future__ import annotations

from agents.sampling.base import Sampler, Samples
from agents.sampling.transformers_sampler import TransformersSampler

__all__ = ["Sampler", "Samples", "TransformersSampler"]
