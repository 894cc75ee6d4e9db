"""Llama and its relatives in Flax NNX, behind pure functions on nested dicts of arrays."""
