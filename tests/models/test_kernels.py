"""Every backend computes the same prompt attention, and the one that fits is chosen."""

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax import sharding
from copg_jax.config.sections import ATTENTIONS, MeshConfig
from copg_jax.errors import InputError
from copg_jax.models import attention, kernels
from copg_jax.models.attention import prompt_attention
from copg_jax.models.decoder import REMAT_POLICIES
from copg_jax.models.forward import make_seq_logp
from copg_jax.models.params import abstract_params, init_params, logical_axes
from copg_jax.sharding import Partitioner
from experiments.matmuls import matmul_flops
from experiments.planning.topology import open_topology
from tests import toys
from tests.models import dense, tiny


@jax.custom_vjp
def _bad_gradient(x, valid):
    """x, whose gradient is NaN in rows of padding."""
    del valid
    return x


_bad_gradient.defvjp(
    lambda x, valid: (x, valid),
    lambda valid, cotangent: (jnp.where(valid, cotangent, jnp.nan), None),
)


def _stand_in(q, k, v, *, is_causal, query_seq_lengths, key_value_seq_lengths, implementation):
    """`jax.nn.dot_product_attention` where there is no cuDNN, as bad as it may be in padding."""
    assert (implementation, is_causal, q.dtype) == ("cudnn", True, jnp.bfloat16)
    assert q.shape[1] % 128 == 0 and query_seq_lengths is key_value_seq_lengths
    valid = (jnp.arange(q.shape[1])[None, :] < query_seq_lengths[:, None])[..., None, None]
    mixed = dense.prompt_attention(*(_bad_gradient(x, valid) for x in (q, k, v)))
    return jnp.where(valid, mixed, jnp.nan).astype(q.dtype)


@pytest.fixture
def anywhere(monkeypatch):
    """Kernels run without their hardware: splash is interpreted, cuDNN is played."""
    interpreted = kernels._Kernel(partial(kernels._splash, interpret=True), kernels._missing_splash)
    monkeypatch.setitem(kernels._KERNELS, "splash", interpreted)
    monkeypatch.setattr(jax.nn, "dot_product_attention", _stand_in)


@pytest.mark.parametrize(
    ("size", "heads", "length"),
    [(256, (2, 2), [256, 1]), (300, (4, 2), [300, 257]), (520, (2, 1), [129, 520])],
    ids=["one block", "padded block, shared heads", "several blocks, one key head"],
)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("xla", "float32"),
        ("xla", "bfloat16"),
        ("splash", "float32"),
        ("splash", "bfloat16"),
        ("cudnn", "bfloat16"),
    ],
)
def test_every_backend_gives_the_values_and_gradients_of_the_definition(
    anywhere, backend, dtype, size, heads, length
):
    q, k, v, length = dense.random_prompts(size, heads, 16, dtype, length)
    cotangent = jax.random.normal(jax.random.key(9), q.shape)
    attend = partial(prompt_attention, prompt_length=length, backend=backend)
    actual = dense.loss_and_grads(attend, q, k, v, length, cotangent)
    desired = dense.loss_and_grads(dense.prompt_attention, q, k, v, length, cotangent)
    for name, got, wanted in zip(("mixed", "q", "k", "v"), actual, desired, strict=True):
        assert dense.error(got, wanted) < {"float32": 1e-5, "bfloat16": 1e-2}[dtype], name


@pytest.mark.parametrize("backend", ATTENTIONS)
def test_what_stands_in_padding_changes_nothing_and_leaves_only_finite_numbers(anywhere, backend):
    q, k, v, length = dense.random_prompts(256, (2, 1), 16, "bfloat16", [130, 3])
    valid = (jnp.arange(256)[None, :] < length[:, None])[..., None, None]
    attend = jax.jit(partial(prompt_attention, prompt_length=length, backend=backend))
    mixed = attend(q, k, v)
    assert np.isfinite(np.asarray(mixed, np.float32)).all()
    other = attend(*(jnp.where(valid, x, 99.0).astype(x.dtype) for x in (q, k, v)))
    np.testing.assert_array_equal(jnp.where(valid, mixed, 0), jnp.where(valid, other, 0))
    # A loss that reads rows of padding, as later layers read those of batches without a layout.
    grads = jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(np.asarray(grad, np.float32)).all() for grad in grads)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 1), (2, 2, 2)], ids=str)
def test_a_fused_kernel_on_any_mesh_computes_the_same(anywhere, sizes):
    q, k, v, length = dense.random_prompts(256, (4, 2), 8, "float32", [256, 1, 200, 77])
    cotangent = jax.random.normal(jax.random.key(9), q.shape)
    partitioner = Partitioner(toys.mesh(*sizes))
    attend = partial(
        prompt_attention, prompt_length=length, backend="splash", partitioner=partitioner
    )
    actual = dense.loss_and_grads(attend, q, k, v, length, cotangent)
    desired = dense.loss_and_grads(dense.prompt_attention, q, k, v, length, cotangent)
    for name, got, wanted in zip(("mixed", "q", "k", "v"), actual, desired, strict=True):
        assert dense.error(got, wanted) < 1e-5, name


def _gradient(mesh, **change):
    """Of the log-probabilities of a batch."""
    arch = dataclasses.replace(toys.EVERYTHING, **change)
    batch = toys.in_bins(toys.group_batch(np.ones((8, 2))), sharding.num_batch_shards(mesh))
    params = init_params(arch, jax.random.key(0))
    shardings = sharding.shardings(mesh, logical_axes(arch), params)
    seq_logp = make_seq_logp(arch, Partitioner(mesh))
    run = jax.jit(
        jax.grad(lambda params, batch: seq_logp(params, batch).sum()),
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
    )
    return toys.leaves(run(params, batch))


def test_a_model_with_a_fused_kernel_on_a_mesh_has_the_gradients_of_xla_on_one_device(
    anywhere, monkeypatch
):
    monkeypatch.setattr(attention, "_SHORTEST_FUSED", 0)
    actual = _gradient(toys.mesh(1, 2, 2), attention="splash", remat="mlp")
    for got, wanted in zip(actual, _gradient(toys.mesh()), strict=True):
        np.testing.assert_allclose(got, wanted, 1e-4, 1e-4 * np.abs(wanted).max())


def test_short_prompts_are_left_to_xla():
    # The CPU has no splash attention: calling it would raise.
    q, k, v, length = dense.random_prompts(255, (1, 1), 16, "bfloat16", [255])
    mixed = [prompt_attention(q, k, v, length, backend=name) for name in ("xla", "splash")]
    np.testing.assert_array_equal(*mixed)


def _on(platform, kind, capability=None):
    """A mesh of one device."""
    device = SimpleNamespace(platform=platform, device_kind=kind)
    if capability is not None:
        device.compute_capability = capability
    return SimpleNamespace(devices=np.array([[[device]]]))


TPU, CPU = _on("tpu", "TPU v5 lite"), _on("cpu", "cpu")
H200, V100 = _on("gpu", "NVIDIA H200", "9.0"), _on("gpu", "Tesla V100", "7.0")
MI300 = _on("gpu", "AMD Instinct MI300X", "gfx942")
BFLOAT16 = dataclasses.replace(toys.LLAMA, dtype="bfloat16", head_dim=64)


@pytest.mark.parametrize(
    ("mesh", "change", "best"),
    [
        (TPU, {}, "splash"),
        (H200, {}, "cudnn"),
        (CPU, {}, "xla"),
        (V100, {}, "xla"),
        (MI300, {}, "xla"),
        (TPU, {"dtype": "float32"}, "xla"),
        (H200, {"dtype": "float32"}, "xla"),
        (H200, {"head_dim": 256}, "xla"),
        (TPU, {"head_dim": 256}, "splash"),
    ],
)
def test_auto_takes_the_kernel_of_the_devices_where_it_fits(mesh, change, best):
    arch = dataclasses.replace(BFLOAT16, **change)
    assert kernels.choose("auto", arch, mesh) == dataclasses.replace(arch, attention=best)
    assert kernels.choose("xla", arch, mesh).attention == "xla"
    assert kernels.choose(best, arch, mesh).attention == best


@pytest.mark.parametrize(
    ("wanted", "mesh", "change", "parts"),
    [
        ("splash", H200, {}, ["a TPU, got NVIDIA H200", "takes cudnn"]),
        ("cudnn", TPU, {}, ["NVIDIA GPU of compute capability 8.0", "TPU v5 lite", "takes splash"]),
        ("cudnn", V100, {}, ["8.0 or more, got Tesla V100", "takes xla"]),
        ("cudnn", MI300, {}, ["NVIDIA", "AMD Instinct", "takes xla"]),
        ("cudnn", H200, {"head_dim": 20}, ["head_dim", "multiple of 8, got 20"]),
        ("cudnn", H200, {"dtype": "float32"}, ["dtype bfloat16, got float32", "takes xla"]),
        ("splash", TPU, {"dtype": "float32"}, ["dtype bfloat16, got float32", "takes xla"]),
        ("flash", TPU, {}, ["one of auto, xla, splash, cudnn", "'flash'"]),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_with_one_that_can(wanted, mesh, change, parts):
    with pytest.raises(InputError) as caught:
        kernels.choose(wanted, dataclasses.replace(BFLOAT16, **change), mesh)
    toys.names_all(str(caught.value), ["attention", *parts])


@pytest.fixture
def cudnn_traces(monkeypatch):
    """cuDNN's kernel can be traced and lowered, though not run."""
    module = "jax._src.cudnn.fused_attention_stablehlo."
    monkeypatch.setattr(module + "check_cudnn_version", lambda: 91800)
    monkeypatch.setattr(module + "check_compute_capability", lambda capability: True)


@pytest.mark.parametrize(
    ("backend", "stored"),
    [("xla", "named 'mixed'"), ("splash", "f32[1,2,256] "), ("cudnn", "f32[1,2,256] ")],
    ids=["xla: what was mixed", "splash: and its logsumexp", "cudnn: and its logsumexp"],
)
@pytest.mark.parametrize("remat", ["full", "mlp", "dots"])
def test_all_policies_but_full_store_what_attention_mixed(
    cudnn_traces, capsys, remat, backend, stored
):
    q, k, v, length = dense.random_prompts(256, (2, 1), 8, "bfloat16", [256])
    attend = lambda *x: jnp.sin(prompt_attention(*x, length, backend=backend))
    jax.ad_checkpoint.print_saved_residuals(
        jax.checkpoint(attend, policy=REMAT_POLICIES[remat]), q, k, v
    )
    text = capsys.readouterr().out
    assert (stored in text) == (remat != "full"), text


@pytest.mark.parametrize("model", [toys.LLAMA, toys.EVERYTHING], ids=["llama", "everything"])
def test_each_policy_multiplies_more_than_the_one_before_but_dots_which_stores_every_product(
    model,
):
    def count(remat):
        arch = dataclasses.replace(tiny.deeper(model, 4), remat=remat)
        batch = toys.in_bins(toys.group_batch(np.ones((2, 2))), 1)
        loss = lambda params: make_seq_logp(arch)(params, batch).sum()
        return matmul_flops(jax.jit(jax.grad(loss)).trace(abstract_params(arch)).jaxpr)

    none, dots, mlp, full = map(count, REMAT_POLICIES)
    assert none == dots < mlp < full


def test_cudnn_is_called_for_the_shards_of_a_mesh(cudnn_traces):
    q, k, v, length = dense.random_prompts(300, (4, 2), 64, "bfloat16", [300, 7, 20, 90])
    attend = partial(prompt_attention, backend="cudnn", partitioner=Partitioner(toys.mesh(1, 2, 2)))
    loss = lambda *x: attend(*x).astype(jnp.float32).sum()
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v, length)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmhaSoftmax" in line]
    assert len(calls) == 2
    for call in calls:
        toys.names_all(
            call, ["PADDING_CAUSAL", "tensor<2x384x2x64xbf16>", "<2x384x1x64xbf16>", "<2xi32>"]
        )


def test_cudnn_agrees_with_the_definition_on_an_nvidia_gpu():
    plugins = any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13))
    if shutil.which("nvidia-smi") is None or not plugins:
        pytest.skip("NOT CHECKED: cuDNN's attention; it needs an NVIDIA GPU and the gpu extra")
    command = [sys.executable, "-m", "tests.models.check_cudnn"]
    done = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "cuda"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_products_of_a_kernel_are_counted_over_all_its_blocks_and_devices():
    q, k, v, length = dense.random_prompts(600, (4, 2), 8, "bfloat16", [600] * 4)
    attend = partial(prompt_attention, prompt_length=length, backend="splash")
    on_four = partial(attend, partitioner=Partitioner(toys.mesh(1, 2, 2)))
    alone, cut = (matmul_flops(jax.jit(f).trace(q, k, v).jaxpr) for f in (attend, on_four))
    # Two blocks of 384 both ways; scores and mixing are a product each.
    assert alone == cut == 2 * 2 * 4 * 4 * (2 * 384) ** 2 * 8


@pytest.fixture
def no_new_cache_entries():
    """What is compiled for devices that are not here cannot be read back from the cache."""
    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, float("inf"))
    yield
    jax.config.update(option, before)


@pytest.mark.oracle("libtpu")
@pytest.mark.parametrize(("size", "head_dim"), [(344, 64), (1100, 128)])
def test_splash_compiles_for_a_slice_of_tpus(no_new_cache_entries, size, head_dim):
    mesh = sharding.make_mesh(MeshConfig(1, 2, 2), list(open_topology("v5e:2x2").devices))
    arch = dataclasses.replace(BFLOAT16, head_dim=head_dim)
    attend = partial(
        prompt_attention,
        backend=kernels.choose("auto", arch, mesh).attention,
        partitioner=Partitioner(mesh),
    )
    rows = sharding.batch_sharding(mesh)
    shapes = [((4, size, heads, head_dim), jnp.bfloat16) for heads in (4, 2, 2)]
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for shape, dtype in [*shapes, ((4,), jnp.int32)]
    ]

    def total(*x: jax.Array) -> jax.Array:
        return attend(*x).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*arguments).compile().as_text()
    toys.names_all(text, ["splash_mha_fwd", "splash_mha_dkv"])
    assert ("splash_mha_dq" in text) == (size > 512)
