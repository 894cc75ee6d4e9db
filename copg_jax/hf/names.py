"""Where each Hugging Face tensor lives in our parameter tree, and its shape on either side.

1. `hf_tensors` names every tensor of a Hugging Face folder and points at its leaf (and layer).
2. `to_hf` turns one leaf of one layer into the Hugging Face matrix [out, in].
3. `check_fit` compares a checkpoint with the table and reports every difference at once;
   `check_ignored` looks at what is there and not read.
4. `assemble` builds the tree from any `TensorSource`, reading only the slices a sharding needs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from copg_jax.errors import InputError
from copg_jax.models.decoder import inverse_frequencies
from copg_jax.models.params import (
    LAYER_PARAMS,
    Architecture,
    Params,
    ParamSpec,
    layer_specs,
    layer_stacks,
    param_specs,
)
from copg_jax.sharding import Axes

_TOP_NAMES = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "score": "score.weight",
}
_LISTED = 12  # differences of one kind that an error message spells out


class HfTensor(NamedTuple):
    """One Hugging Face tensor: our leaf, its stack and index there (None = not stacked), and the
    ParamSpec of the leaf without the stack's axis.
    """

    leaf: str
    stack: str | None
    layer: int | None
    spec: ParamSpec

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint: matrices are [out, in], the score head is [1, D]."""
        if self.leaf == "score":
            return (1, *self.spec.shape)
        if self.leaf == "embed_tokens" or len(self.spec.shape) == 1:
            return self.spec.shape
        inputs, outputs = _in_out(self.spec)
        return math.prod(outputs), math.prod(inputs)


class TensorSource(Protocol):
    """Named tensors that can be read in part."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, index: Sequence[slice]) -> np.ndarray: ...


def hf_tensors(arch: Architecture, *, head: str) -> dict[str, HfTensor]:
    """Every tensor name of a Hugging Face folder and where it lies in our tree, in file order."""
    specs = param_specs(arch, head=head)
    tensors = {
        _TOP_NAMES["embed_tokens"]: HfTensor("embed_tokens", None, None, specs["embed_tokens"])
    }
    layers = [(stack, i) for stack, size in layer_stacks(arch).items() for i in range(size)]
    for number, (stack, layer) in enumerate(layers):
        for leaf, spec in layer_specs(arch).items():
            name = f"model.layers.{number}.{LAYER_PARAMS[leaf].hf_name}"
            tensors[name] = HfTensor(leaf, stack, layer, spec)
    for leaf in ("norm", "lm_head", "score"):
        if leaf in specs:
            tensors[_TOP_NAMES[leaf]] = HfTensor(leaf, None, None, specs[leaf])
    return tensors


def to_hf(tensor: HfTensor, value: np.ndarray) -> np.ndarray:
    """Our leaf (of one layer) as the Hugging Face tensor, C-contiguous."""
    if len(tensor.hf_shape) == 2 and tensor.leaf not in ("embed_tokens", "score"):
        value = value.reshape(tensor.hf_shape[::-1]).T
    return np.ascontiguousarray(value.reshape(tensor.hf_shape))


def check_fit(
    source: TensorSource,
    tensors: Mapping[str, HfTensor],
    where: str,
    *,
    optional: Sequence[str] = (),
) -> None:
    """Compare a checkpoint with the table; one InputError lists the differences.

    Args:
        source: the checkpoint.
        tensors: those wanted.
        where: file or folder to name in the error.
        optional: tensor names that may be present without being wanted.
    """
    lines = []
    for kind, names in differences(source, tensors, optional=optional).items():
        lines += [f"  {kind}: {text}" for text in names[:_LISTED]]
        if len(names) > _LISTED:
            lines.append(f"  {kind}: ... and {len(names) - _LISTED} more")
    if lines:
        raise InputError(
            f"{where}: the tensors do not fit the config and the head that was asked for:\n"
            + "\n".join(lines)
            + "\nUse the config.json that belongs to these weights, and a causal language model "
            "for head 'lm' or a one-label sequence classifier for head 'score'."
        )


def differences(
    source: TensorSource, tensors: Mapping[str, HfTensor], *, optional: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Tensors that are missing, surplus or misshapen; args as those of `check_fit`."""
    found = source.shapes()
    ignored = {*optional, *(name for name in found if name.endswith("rotary_emb.inv_freq"))}
    return {
        "missing": [
            f"{name} {tensor.hf_shape}" for name, tensor in tensors.items() if name not in found
        ],
        "surplus": [f"{name} {found[name]}" for name in found if name not in {*tensors, *ignored}],
        "misshapen": [
            f"{name}: wanted {tensor.hf_shape}, got {found[name]}"
            for name, tensor in tensors.items()
            if name in found and tuple(found[name]) != tensor.hf_shape
        ],
    }


def check_ignored(
    source: TensorSource, tensors: Mapping[str, HfTensor], arch: Architecture, where: str
) -> None:
    """Compares the tensors that are not read with what stands in for them.

    Args:
        source: checkpoint that passed `check_fit`.
        tensors: those that are read.
        arch: the architecture.
        where: file or folder to name in the error.

    Raises:
        InputError: a stored copy of the tied embedding, or rotary frequencies, say something else.
    """
    everything = (slice(None),)
    for name in source.shapes():
        if name.endswith("rotary_emb.inv_freq"):
            what, tolerance = "the frequencies that config.json gives", 1e-2  # bfloat16, perhaps
            found, wanted = source.read(name, everything), inverse_frequencies(arch)
        elif name not in tensors and name == _TOP_NAMES["lm_head"] and arch.tie_word_embeddings:
            what, tolerance = "the embedding, which tie_word_embeddings makes it", 0.0
            found = source.read(name, everything)
            wanted = source.read(_TOP_NAMES["embed_tokens"], everything)
        else:
            continue
        found, wanted = found.astype(np.float32), wanted.astype(np.float32)
        if found.shape != wanted.shape or not np.allclose(found, wanted, tolerance, 0.0):
            raise InputError(
                f"{where}: {name}: wanted {what}, got other numbers. Fix: use the config.json that "
                "belongs to these weights."
            )


def assemble(
    source: TensorSource,
    tensors: Mapping[str, HfTensor],
    shardings: Params | None = None,
    *,
    dtype: Callable[[Axes], str] = lambda axes: "float32",
) -> Params:
    """Read the tensors into leaves, each shard straight to its device; the host holds one tensor at
    a time, and of it what its devices need.

    Args:
        source: checkpoint that passed `check_fit`.
        tensors: those wanted; together they decide which leaves the tree has.
        shardings: tree of NamedSharding like the result, or None for the default device.
        dtype: of a leaf with these logical axes.
    """
    names: dict[tuple[str | None, str], list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault((tensor.stack, tensor.leaf), []).append(name)
    params: Params = {}
    for (stack, leaf), of_leaf in names.items():
        tree = params if stack is None else params.setdefault(stack, {})
        sharding = shardings and (shardings if stack is None else shardings[stack])[leaf]
        tree[leaf] = _assemble_leaf(source, [(n, tensors[n]) for n in of_leaf], sharding, dtype)
    return params


def _assemble_leaf(
    source: TensorSource,
    tensors: list[tuple[str, HfTensor]],
    sharding: Any,
    dtype: Callable[[Axes], str],
) -> jax.Array:
    place = partial(_place_tensor, source, dtype=dtype(tensors[0][1].spec.axes))
    if tensors[0][1].stack is None:
        return place(*tensors[0], sharding)
    of_layer = sharding and NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    layers = [place(name, tensor, of_layer) for name, tensor in tensors]
    return jax.jit(_stack, out_shardings=sharding)(*layers)


def _stack(*layers: jax.Array) -> jax.Array:
    return jnp.stack(layers)


def _place_tensor(
    source: TensorSource, name: str, tensor: HfTensor, sharding: Any, *, dtype: str
) -> jax.Array:
    parts: dict[str, np.ndarray] = {}

    def read(index: Any) -> np.ndarray:
        if str(index) not in parts:  # devices that hold the same part share one read
            part = _read_part(source, name, tensor, index)
            parts[str(index)] = part.astype(jnp.dtype(dtype), copy=False)
        return parts[str(index)]

    if sharding is None:
        placed = jax.device_put(read(tuple(slice(None) for _ in tensor.spec.shape)))
    else:
        placed = jax.make_array_from_callback(tensor.spec.shape, sharding, read)
    return placed.block_until_ready()  # until then the host keeps the parts


def _read_part(
    source: TensorSource, name: str, tensor: HfTensor, index: tuple[slice, ...]
) -> np.ndarray:
    """The part `index` of one layer's leaf; of a [heads, head_dim] axis whole heads are read."""
    if tensor.leaf == "score":
        return source.read(name, (slice(None), *index))[0]
    if tensor.leaf == "embed_tokens" or len(tensor.spec.shape) == 1:
        return source.read(name, index)
    inputs, outputs = _in_out(tensor.spec)
    cuts = index[: len(inputs)], index[len(inputs) :]
    (rows, row_shape), (columns, column_shape) = _merged(outputs, cuts[1]), _merged(inputs, cuts[0])
    part = source.read(name, (rows, columns)).T.reshape(*column_shape, *row_shape)
    within = [slice(None), *cuts[0][1:], slice(None), *cuts[1][1:]]
    return part[tuple(within)]


def _in_out(spec: ParamSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split a matrix' shape into input and output axes; only o_proj has two input axes."""
    return spec.shape[: spec.num_inputs], spec.shape[spec.num_inputs :]


def _merged(dims: tuple[int, ...], cuts: tuple[slice, ...]) -> tuple[slice, tuple[int, ...]]:
    """The slice of the flattened axes that covers the first cut, and its unflattened shape."""
    inner = math.prod(dims[1:])
    start, stop, _ = cuts[0].indices(dims[0])
    return slice(start * inner, stop * inner), (stop - start, *dims[1:])
