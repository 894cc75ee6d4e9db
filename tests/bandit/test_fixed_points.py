"""Where each algorithm ends in the paper's bandit: recorded numbers, found numerically."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.bandit import exact, population

# Regret and policy at the end of the expected update from the paper's μ1, μ2, β = 0.5.
ENDS = {
    "copg": (0.0, [0.70538, 0.25950, 0.03512]),
    "rloo": (0.0, [0.70538, 0.25950, 0.03512]),
    "dpo": (0.0, [0.70538, 0.25950, 0.03512]),
    "ipo": (0.15253, [0.42417, 0.35271, 0.22313]),
    "pg_value": (0.01482, [0.81155, 0.16752, 0.02093]),
    "pg_none": (0.63779, [0.19399, 0.25014, 0.55587]),
}


@pytest.mark.parametrize("algorithm", list(ENDS))
def test_each_algorithm_ends_where_recorded_from_every_start(paper_bandit, algorithm):
    follow = lambda z: population.direction(algorithm, z, paper_bandit)
    find = jax.jit(lambda z: population.fixed_point(follow, z))
    regret, policy = ENDS[algorithm]
    starts = [jnp.zeros(3), *(2 * jax.random.normal(jax.random.key(0), (3, 3)))]
    for start in starts:
        end = find(start)
        np.testing.assert_allclose(exact.regret(end, paper_bandit), regret, atol=5e-6)
        np.testing.assert_allclose(jnp.exp(end), policy, atol=6e-6)
        np.testing.assert_allclose(follow(end), 0, atol=1e-12)
    assert (population.flow_spectrum(follow, find(starts[0])) < 0).all()  # it attracts


def test_small_gradient_steps_reach_the_same_ends(paper_bandit):
    """The implicit flow is not an artefact: plain steps of size 0.5 end there too."""
    for algorithm, (regret, _) in ENDS.items():
        if algorithm == "dpo":
            continue  # its slowest rate is 0.008: covered by its zero gradient at π*
        follow = lambda z, a=algorithm: population.direction(a, z, paper_bandit)
        end = jax.lax.fori_loop(0, 1000, lambda _, z, f=follow: z + 0.5 * f(z), jnp.zeros(3))
        np.testing.assert_allclose(
            exact.regret(jax.nn.log_softmax(end), paper_bandit), regret, atol=1e-5
        )


def test_a_baseline_moves_the_end_off_policy_but_not_on_policy(paper_bandit):
    @jax.jit
    def follow(logits, mu, baseline):
        bandit = paper_bandit._replace(mu1=mu, mu2=mu)
        log_policy = jax.nn.log_softmax(logits)
        coefficients = population._pg(log_policy, bandit, baseline)
        return population.logit_gradient(coefficients, log_policy, bandit)

    logits = jnp.array([0.1, -0.4, 0.2])
    on = [follow(logits, jax.nn.softmax(logits), b) for b in (0.0, 1.0, -3.0)]
    np.testing.assert_allclose(on[0], on[1], atol=1e-12)
    np.testing.assert_allclose(on[0], on[2], atol=1e-12)
    ends = [
        population.fixed_point(lambda z, b=b: follow(z, paper_bandit.mu1, b), jnp.zeros(3))
        for b in (0.0, 1.0)
    ]
    assert exact.total_variation(ends[0], ends[1]) > 0.05


def test_ipo_ends_elsewhere_because_it_fits_the_expected_preference(paper_bandit):
    """Its end is the linear solution with σ(ΔR) − ½ in place of ΔR, to rounding."""
    reward = paper_bandit.reward
    gap = jax.nn.sigmoid(reward[:, None] - reward[None, :]) - 0.5
    weights = exact.pair_weights(paper_bandit.mu1, paper_bandit.mu2)
    ratio = exact.copg_maximiser(weights, exact.reward_pull(weights, gap), paper_bandit.beta)
    end = population.fixed_point(
        lambda z: population.direction("ipo", z, paper_bandit), jnp.zeros(3)
    )
    solved = jax.nn.log_softmax(jnp.log(paper_bandit.ref) + ratio)
    assert exact.total_variation(end, solved) < 1e-10
