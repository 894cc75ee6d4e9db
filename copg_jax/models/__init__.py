"""Llama in Flax NNX behind pure functions on nested dicts of arrays, and its file formats."""
