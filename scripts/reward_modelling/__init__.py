"""Reward models from comparisons, ratings or labels, and what they are worth on held-out data."""
