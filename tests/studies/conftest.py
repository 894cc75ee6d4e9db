"""Studies are of the theory, and are tested as it is: in float64, on the bandits of its tests."""

from tests.bandit.conftest import float64, paper_bandit

__all__ = ["float64", "paper_bandit"]
