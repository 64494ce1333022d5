"""Samplers: how a policy's responses are drawn."""

from __future__ import annotations

from agents.sampling.base import Sampler, Samples
from agents.sampling.names import named_weights
from agents.sampling.sync import Fingerprint, fingerprint
from agents.sampling.transformers_sampler import TransformersSampler

__all__ = ["Fingerprint", "Sampler", "Samples", "TransformersSampler", "fingerprint", "named_weights"]
