"""Rewards: the protocol, their combination, and those that come with the package."""

from copg_jax.rewards.model import RewardModel
from copg_jax.rewards.text import length, rouge_l

__all__ = ["RewardModel", "length", "rouge_l"]
