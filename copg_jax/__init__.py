"""Contrastive Policy Gradient in JAX: a policy learns from scored completions, as if supervised.

The package is laid out in the order of a run: `data` turns rows into groups of completions,
`models` gives them log-probabilities, `losses` turns log-ratios and rewards into a scalar,
`step` and `loop` train. `bandit` holds the theory. The scripts in `experiments/` tie them together.
"""

__version__ = "0.1.0"
