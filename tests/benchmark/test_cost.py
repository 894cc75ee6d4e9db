"""The count of operations: loops count as often as they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from copg_jax.models.ops import linear
from experiments.benchmark.cost import compile_cost
from experiments.matmuls import matmul_flops

ROUNDS, SIZE = 5, 64
X = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
WEIGHTS = jax.ShapeDtypeStruct((ROUNDS, SIZE, SIZE), jnp.float32)
WEIGHT = np.ones(WEIGHTS.shape, np.float32)
PRODUCT = 2 * SIZE**3


def layer(x, w):
    return jnp.maximum(x @ w, 0.0)


def scanned(x, weights):
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0].sum()


def unrolled(x, weights):
    for w in weights:
        x = layer(x, w)
    return x.sum()


def test_a_loop_costs_what_its_rounds_cost():
    loop = compile_cost(jax.jit(jax.grad(scanned, argnums=1)), X, WEIGHTS)
    plain = compile_cost(jax.jit(jax.grad(unrolled, argnums=1)), X, WEIGHTS)
    # A loop has three products a round; unrolled, the gradient of the first x is left out.
    assert loop.flops == pytest.approx(3 * ROUNDS * PRODUCT, rel=0.08)
    assert plain.flops == pytest.approx((3 * ROUNDS - 1) * PRODUCT, rel=0.05)


def test_what_the_backward_pass_computes_again_counts():
    again = lambda x, weights: jax.lax.scan(
        jax.checkpoint(lambda x, w: (layer(x, w), None), prevent_cse=False), x, weights
    )[0].sum()
    stored = compile_cost(jax.jit(jax.grad(scanned, argnums=1)), X, WEIGHTS)
    computed = compile_cost(jax.jit(jax.grad(again, argnums=1)), X, WEIGHTS)
    assert computed.flops - stored.flops == pytest.approx(PRODUCT * ROUNDS, rel=0.15)


def test_the_gradient_of_a_frozen_matrix_does_not_count():
    def loss(x, scale):
        step = lambda x, w: (jnp.maximum(linear(x * scale, w), 0.0), None)
        return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), x, WEIGHT)[0].sum()

    found = matmul_flops(jax.jit(jax.grad(loss, argnums=1)).trace(X, 1.0).jaxpr)
    # Forward, again, and towards x; `linear` writes down that of the matrix too.
    assert found == 3 * ROUNDS * PRODUCT


def test_loops_in_loops_multiply():
    def nested(x, weights):
        return jax.lax.scan(lambda x, _: (scanned_x(x, weights), None), x, None, length=3)[0].sum()

    def scanned_x(x, weights):
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0]

    assert compile_cost(jax.jit(nested), X, WEIGHTS).flops == pytest.approx(
        3 * ROUNDS * PRODUCT, rel=0.05
    )


def test_memory_and_time_are_those_of_the_compiler_and_a_call_compiles_no_more():
    traces = []

    def function(x, weights):
        traces.append(1)
        return jnp.linalg.norm(jnp.stack([layer(x, w) for w in weights]))

    jitted = jax.jit(function)
    cost = compile_cost(jitted, X, WEIGHTS)
    assert cost.temp_bytes >= 4 * ROUNDS * SIZE**2 and 0 < cost.compile_sec < 60
    jitted(np.ones(X.shape, np.float32), np.ones(WEIGHTS.shape, np.float32))
    assert len(traces) == 1


def test_kernels_are_left_out_of_every_round():
    kernel = pl.pallas_call(
        lambda x, w, out: out.__setitem__(..., x[...] @ w[...]), X, interpret=False
    )

    def rounds(num):
        steps = lambda x, _: (kernel(x, x) @ x, None)
        jaxpr = jax.jit(lambda x: jax.lax.scan(steps, x, None, length=num)[0]).trace(X).jaxpr
        return matmul_flops(jaxpr), matmul_flops(jaxpr, kernels=False)

    assert rounds(ROUNDS) == (2 * ROUNDS * PRODUCT, ROUNDS * PRODUCT)
