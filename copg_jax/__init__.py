"""Contrastive Policy Gradient in JAX: a policy learns from scored completions, as if supervised.

The package is laid out in the order of a run: `data` turns rows into groups of completions,
`models` gives them log-probabilities, `losses` turns log-ratios and rewards into a scalar,
`step` and `loop` train. `bandit` holds the theory. The scripts in `experiments/` tie them together.
"""

import os

__version__ = "0.1.0"

# transformers gives configs and tokenizers here; its advice to install PyTorch would mislead.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
