"""Rewards: the protocol, their combination, and those that come with the package."""

from copg_jax.rewards.model import RewardModel
from copg_jax.rewards.text import given, length, rouge_l

__all__ = ["RewardModel", "given", "length", "rouge_l"]
