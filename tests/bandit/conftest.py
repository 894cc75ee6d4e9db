"""The theory is tested in float64, which ends with each test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.bandit.exact import Bandit, make_bandit


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def paper_bandit() -> Bandit:
    """The bandit of Sec. 5."""
    return make_bandit([2.5, 2.0, 1.0], mu1=[0.1, 0.2, 0.7], mu2=[0.05, 0.05, 0.9], beta=0.5)


@pytest.fixture
def random_bandits():
    """Makes a stack of random problems, leading axis = instance: [n, contexts, arms]."""

    def make(num: int, num_contexts: int = 3, num_arms: int = 4, seed: int = 0) -> Bandit:
        rng = np.random.default_rng(seed)
        shape = (num_contexts, num_arms)

        def one() -> Bandit:
            ref, mu1, mu2 = rng.dirichlet(np.full(num_arms, 2.0), size=(3, num_contexts))
            return make_bandit(
                rng.normal(size=shape) * 2,
                mu1=mu1,
                mu2=mu2,
                ref=ref,
                beta=float(np.exp(rng.uniform(np.log(0.1), np.log(2.0)))),
                context_prob=rng.dirichlet(np.full(num_contexts, 3.0)),
            )

        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[one() for _ in range(num)])

    return make
