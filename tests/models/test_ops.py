"""Gradients written by hand are those of the definition, and would be told from wrong ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.models import ops

EPS = 1e-5


def _normal(seed, *shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def _plain_norm(x, scale):
    wide, scale = x.astype(jnp.float32), scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    return wide / jnp.sqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + EPS) * scale


def _norm(x, scale):
    return ops.rms_norm(x, scale, EPS)


def _gradients(function, gradient, *inputs):
    output, vjp = jax.vjp(function, *inputs)
    return vjp(gradient.astype(output.dtype))


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 7, 16), (33, 8)])
def test_gradients_of_the_norm_are_those_of_its_definition(shape):
    x, scale, gradient = _normal(0, *shape), _normal(1, shape[-1]), _normal(2, *shape)
    np.testing.assert_allclose(_norm(x, scale), _plain_norm(x, scale), atol=1e-6)
    wanted = _gradients(_plain_norm, gradient, x, scale)
    for got, value in zip(_gradients(_norm, gradient, x, scale), wanted, strict=True):
        np.testing.assert_allclose(got, value, atol=1e-5)


def test_gradients_of_the_norm_are_finite_differences_in_float64():
    x, scale, gradient = _normal(0, 3, 5), _normal(1, 5), _normal(2, 3, 5)
    of_x, of_scale = _gradients(_norm, gradient, x, scale)

    def total(x, scale):
        r = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPS)
        return np.sum(np.asarray(gradient, np.float64) * x / r * scale)

    wide = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    for which, found in enumerate((of_x, of_scale)):
        for index in np.ndindex(found.shape):
            moved = [[a.copy() for a in wide] for _ in range(2)]
            moved[0][which][index] += 1e-6
            moved[1][which][index] -= 1e-6
            slope = (total(*moved[0]) - total(*moved[1])) / 2e-6
            np.testing.assert_allclose(found[index], slope, atol=1e-5)


def test_the_norm_of_zeros_and_its_gradient_are_finite():
    zeros, scale = jnp.zeros((2, 4)), jnp.ones(4)
    of_x, of_scale = _gradients(_norm, jnp.ones((2, 4)), zeros, scale)
    np.testing.assert_allclose(of_x, np.full((2, 4), EPS**-0.5), rtol=1e-6)
    np.testing.assert_array_equal(of_scale, np.zeros(4))


def test_the_norm_is_computed_in_float32_and_its_scale_has_a_float32_gradient():
    x, scale, gradient = _normal(0, 64, 32, dtype="bfloat16"), _normal(1, 32), _normal(2, 64, 32)
    of_x, of_scale = _gradients(_norm, gradient, x, scale)
    assert _norm(x, scale).dtype == of_x.dtype == jnp.bfloat16
    assert of_scale.dtype == jnp.float32
    rounded = gradient.astype("bfloat16")
    _, wanted = _gradients(_plain_norm, rounded, x, scale)
    np.testing.assert_allclose(of_scale, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("leading", [(5,), (2, 3)])
def test_gradients_of_a_product_are_those_of_its_definition(leading):
    x, matrix, gradient = _normal(0, *leading, 4), _normal(1, 4, 6), _normal(2, *leading, 6)
    plain = lambda x, matrix: jnp.tensordot(x, matrix, 1)
    np.testing.assert_allclose(ops.linear(x, matrix), plain(x, matrix), atol=1e-5)
    wanted = _gradients(plain, gradient, x, matrix)
    for got, value in zip(_gradients(ops.linear, gradient, x, matrix), wanted, strict=True):
        np.testing.assert_allclose(got, value, atol=1e-5)


def test_the_weight_gradient_of_a_product_transposes_nothing():
    inputs = _normal(0, 1, 8, 4), _normal(1, 4, 6), _normal(2, 1, 8, 6)

    def transposed(function):
        gradient = lambda x, matrix, gradient: jax.vjp(function, x, matrix)[1](gradient)[1]
        return "transpose[" in str(jax.make_jaxpr(gradient)(*inputs))

    assert not transposed(ops.linear)
    assert transposed(lambda x, matrix: jnp.einsum("btd,df->btf", x, matrix))
