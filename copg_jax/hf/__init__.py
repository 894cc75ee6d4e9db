"""Hugging Face folders: weights, names and tokenizers, in and out, without torch."""
