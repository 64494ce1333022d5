"""Reinforcement learning agents for text: pure maths, a value-headed policy, samplers and PPO."""
