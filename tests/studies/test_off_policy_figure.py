"""The study of losses off-policy draws what the theory says."""

import matplotlib
import numpy as np
import pytest

from copg_jax.bandit import train
from experiments.studies import ablations, off_policy

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture
def bandit():
    return train.bandit_from_config(train.BanditConfig())


def test_on_data_of_the_optimum_the_value_of_the_reference_has_a_second_end(bandit):
    """π* is stationary there under any baseline, but from π_ref this one leads elsewhere."""
    measured = off_policy.distances(ablations.tilted_sampler(bandit, 0.0))
    assert measured["CoPG"] < 1e-9 and measured["b = mean R (OPMD)"] < 1e-9
    assert measured["b = β ln mean exp(R/β) (OAPL)"] == pytest.approx(0.23, abs=1e-3)


def test_the_picture_shows_the_recorded_distances(bandit):
    figure, axes = plt.subplots(1, 2)
    off_policy.draw(axes, bandit, tilts=(1.0,), sizes=(2,))
    left, right = ([line.get_ydata()[0] for line in ax.get_lines()] for ax in axes)
    np.testing.assert_allclose(left, [0.0, 0.0856, 0.0, 0.0506, 0.0946], atol=6e-5)
    expected = [0.0, 0.0, 0.1835, 0.3132, 0.1628, 0.2967]  # µ = π_ref, then μ1, of each loss
    np.testing.assert_allclose(right, expected, atol=6e-5)
    plt.close(figure)
