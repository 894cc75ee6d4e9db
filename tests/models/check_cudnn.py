"""cuDNN's attention against the definition, and against XLA's time, on the GPU of this machine.

    python -m tests.models.check_cudnn

1. Values and gradients at lengths on both sides of a tile of 128 keys.
2. Rows whose scores are all far below zero, where a kernel that forgets a mask gives NaN.
3. Time of forward and backward pass at the sizes of Llama-2-7B, beside XLA's.
"""

import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from copg_jax.models.attention import prompt_attention
from tests.models import dense

CASES = (  # P, (heads, key heads), head_dim
    (256, (4, 4), 64),
    (320, (8, 2), 128),
    (344, (4, 1), 64),
    (512, (8, 8), 128),
    (1088, (4, 2), 128),
)


def compare() -> None:
    """1."""
    for size, heads, head_dim in CASES:
        length = [size, 1, 65, size - 3, size // 2]
        q, k, v, length = dense.random_prompts(size, heads, head_dim, "bfloat16", length)
        cotangent = jax.random.normal(jax.random.key(9), q.shape)
        attend = partial(prompt_attention, prompt_length=length, backend="cudnn")
        actual = dense.loss_and_grads(attend, q, k, v, length, cotangent)
        desired = dense.loss_and_grads(dense.prompt_attention, q, k, v, length, cotangent)
        errors = [dense.error(got, want) for got, want in zip(actual, desired, strict=True)]
        print(f"P={size} heads={heads} head_dim={head_dim}: errors of mixed, dq, dk, dv", errors)
        assert max(errors) < 1e-2 and not np.isnan(errors).any(), errors


def stay_finite() -> None:
    """2."""
    for size in (256, 320, 344, 448, 1000):
        q, k, v, length = dense.random_prompts(size, (2, 2), 64, "bfloat16", [size, size - 64, 3])
        # All scores are near -128: exp(0 - logsumexp) overflows float32.
        q, k = q.at[..., 0].set(8.0), k.at[..., 0].set(-128.0)
        attend = partial(prompt_attention, prompt_length=length, backend="cudnn")
        found = dense.loss_and_grads(attend, q, k, v, length, jnp.ones(q.shape))
        assert all(jnp.isfinite(x).all() for x in found), f"P={size}: not finite"


def seconds(backend: str) -> float:
    """3. Median of 10 forward and backward passes of one layer with 64 groups."""
    length = np.random.default_rng(0).integers(150, 513, 64).tolist()
    q, k, v, length = dense.random_prompts(512, (32, 32), 128, "bfloat16", length)
    attend = partial(prompt_attention, prompt_length=length, backend=backend)
    loss = lambda *x: attend(*x).astype(jnp.float32).sum()
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    jax.block_until_ready(run(q, k, v))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(run(q, k, v))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    print(jax.devices()[0].device_kind, "jax", jax.__version__)
    compare()
    stay_finite()
    print({backend: f"{seconds(backend) * 1e3:.2f} ms" for backend in ("cudnn", "xla")})
