"""Constraints: which tokens may be chosen in a state. They belong to the MDP and renormalise π and π_ref alike."""

from textenv.constraints.base import BoundConstraint, Constraint, Rule, Vocabulary, as_constraint
from textenv.constraints.patterns import JSONSchema, Regex
from textenv.constraints.tokens import AllOf, Allow, BadTokens, ForcedPrefix, KnownTokens, MinLength

__all__ = [
    "AllOf",
    "Allow",
    "BadTokens",
    "BoundConstraint",
    "Constraint",
    "ForcedPrefix",
    "JSONSchema",
    "KnownTokens",
    "MinLength",
    "Regex",
    "Rule",
    "Vocabulary",
    "as_constraint",
]
