"""A model from a Hugging Face folder: all but its weights, which are read into their shards."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
import numpy as np

from copg_jax import checksums, sharding
from copg_jax.config.sections import LoraConfig, ModelConfig
from copg_jax.data.tokenizer import load_tokenizer
from copg_jax.errors import InputError
from copg_jax.hf.adapters import Adapter, combined_hash, open_adapter
from copg_jax.hf.config_json import read_config
from copg_jax.hf.names import assemble
from copg_jax.hf.weights import (
    RESTORE,
    load_params,
    open_tensors,
    params_hash,
    read_architecture,
    resolve,
)
from copg_jax.models.kernels import choose
from copg_jax.models.lora import check_rank, find_targets, lora_specs
from copg_jax.models.params import (
    Architecture,
    Params,
    abstract,
    axes_of,
    frozen_dtype,
    initial,
    param_specs,
)
from copg_jax.sharding import Partitioner

_HELD: WeakValueDictionary[tuple[Any, ...], jax.Array] = WeakValueDictionary()
"""Frozen weights that are in memory, by hash of their folder, name, dtype and place."""


@dataclass(frozen=True)
class PretrainedModel:
    """An architecture with its tokenizer, the folder of its weights and the config.json there,
    adapters on top of them, and where each weight lies.

    What is trained is all weights, in float32, or adapters and a new score head beside frozen
    weights. These lie in the compute dtype, so that without adapters the model is its base bit for
    bit, and are arguments of what is compiled.
    """

    arch: Architecture
    tokenizer: Any
    folder: Path
    config: Mapping[str, Any]
    head: str
    mesh: jax.sharding.Mesh
    adapter: Adapter | None = None  # on top of the folder's weights
    lora: LoraConfig | None = None  # adapters are trained; None = all weights

    @property
    def specs(self) -> Params:
        """What is trained: all parameters, or adapters and a new head."""
        whole = param_specs(self.arch, head=self.head)
        if self.lora is None:
            return whole
        targets = find_targets(self.lora.targets)
        score = {name: spec for name, spec in whole.items() if name == "score"}
        return {"lora": lora_specs(self.arch, self.lora.rank, targets), **score}

    @property
    def lora_parameters(self) -> int | None:
        """Number of those of the adapters that are trained; None where all weights are."""
        if self.lora is None:
            return None
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes["lora"]))

    @property
    def axes(self) -> Params:
        """Logical axes of what is trained."""
        return axes_of(self.specs)

    @property
    def shapes(self) -> Params:
        """Shapes and dtypes of what is trained."""
        return abstract(self.specs)

    @property
    def shardings(self) -> Params:
        """Where each parameter lies that is trained.

        Raises:
            InputError: the mesh does not divide the model.
        """
        return sharding.shardings(self.mesh, self.axes, self.shapes)

    @property
    def partitioner(self) -> Partitioner:
        """Where its activations lie."""
        return Partitioner(self.mesh)

    @cached_property
    def base_hash(self) -> str:
        """Hash of the weights and config on disk, which are compared with their checksums."""
        return params_hash(self.folder)

    @property
    def hash(self) -> str:
        """Hash of the model: of its folder, and of the adapter on top of it."""
        if self.adapter is None:
            return self.base_hash
        return combined_hash(self.base_hash, self.adapter)

    def require_context(self, where: str, prompt: int, completion: int, *, fix: str) -> None:
        """Raises InputError unless it computes sequences of so many tokens.

        Args:
            where: what has them; begins the message.
            prompt: most tokens of a prompt.
            completion: most tokens of a completion.
            fix: what makes them shorter.
        """
        most, field = self.arch.most_tokens
        if prompt + completion > most:
            raise InputError(
                f"{where}: prompts of up to {prompt} and completions of up to {completion} tokens, "
                f"{prompt + completion} together, but {self.folder} has {field}={most}, and longer "
                "sequences are not supported; behind such prompts completions of at most "
                f"{max(most - prompt, 0)} have room. Fix: {fix}."
            )

    def load(self, *, key: jax.Array | None = None) -> Params:
        """Reads what is trained, in float32, into its shards.

        Args:
            key: draws a score head or adapters that the folders lack.

        Raises:
            InputError: weights that have changed since they were written, that are NaN or infinite,
                or that do not fit the architecture.
        """
        self.base_hash  # noqa: B018  (raises where the weights have changed)
        if self.lora is not None:
            return self._load_trained_adapter(key)
        params = load_params(
            self.folder,
            self.arch,
            head=self.head,
            shardings=self.shardings,
            init_missing_score=key,
        )
        self._require_finite(params, self.folder)
        return params

    def load_frozen(self) -> Params:
        """Reads the model as weights that are only read (π_ref, a reward model, what adapters are
        trained on), in the compute dtype; an adapter lies beside them in float32.

        Models of one base hold its weights once. A head that is trained may be missing.

        Raises:
            InputError: as `load`.
        """
        params = self._load_base()
        scaled = self.lora or self.adapter
        if self.adapter is not None:
            params |= self._load_adapter()
        if scaled is not None:
            scale = np.float32(scaled.alpha / scaled.rank)
            params["lora_scale"] = jax.device_put(scale, sharding.replicated(self.mesh))
        return params

    def _load_base(self) -> Params:
        """The folder's weights; those in memory already are taken from there."""
        lacks_score = self.lora is not None or (self.adapter is not None and self.adapter.has_score)
        source, tensors = open_tensors(
            self.folder, self.arch, head=self.head, may_lack_score=lacks_score
        )
        specs = param_specs(self.arch, head=self.head)
        places = sharding.shardings(self.mesh, axes_of(specs), abstract(specs))
        dtype = partial(frozen_dtype, self.arch)

        def key(stack: str | None, leaf: str) -> tuple[Any, ...]:
            spec, place = (tree[leaf] if stack is None else tree[stack][leaf] for tree in trees)
            return self.base_hash, stack, leaf, dtype(spec.axes), place

        trees = specs, places
        leaves = {(tensor.stack, tensor.leaf) for tensor in tensors.values()}
        held = {leaf: _HELD.get(key(*leaf)) for leaf in leaves}
        absent = {n: t for n, t in tensors.items() if held[t.stack, t.leaf] is None}
        params = assemble(source, absent, places, dtype=dtype)
        self._require_finite(params, self.folder)
        for stack, leaf in leaves:
            tree = params if stack is None else params.setdefault(stack, {})
            if (value := held[stack, leaf]) is not None:
                tree[leaf] = value
            _HELD[key(stack, leaf)] = tree[leaf]
        return params

    def _load_adapter(self) -> Params:
        """ "lora" and perhaps "score" of the PEFT folder."""
        assert self.adapter is not None
        adapter = self.adapter
        specs = {"lora": lora_specs(self.arch, adapter.rank, adapter.targets)}
        specs["score"] = param_specs(self.arch, head="score")["score"]
        found = adapter.load(sharding.shardings(self.mesh, axes_of(specs), abstract(specs)))
        self._require_finite(found, adapter.folder)
        return found

    def _load_trained_adapter(self, key: jax.Array | None) -> Params:
        """What training begins with: the adapter given, or a new one, and a head."""
        found = {} if self.adapter is None else self._load_adapter()
        if self.head == "score" and "score" not in found:
            base = self._load_base()
            # A copy: the state of training is donated.
            found |= {"score": jnp.copy(base["score"])} if "score" in base else {}
        if missing := {name: spec for name, spec in self.specs.items() if name not in found}:
            assert key is not None
            places = {name: self.shardings[name] for name in missing}
            found |= jax.jit(partial(initial, missing), out_shardings=places)(key)
        return {name: found[name] for name in self.specs}

    def _require_finite(self, params: Params, folder: Path) -> None:
        """Raises InputError for weights that are NaN or infinite."""
        finite = jax.jit(_are_finite, out_shardings=sharding.replicated(self.mesh))(params)
        bad = [
            jax.tree_util.keystr(path, simple=True, separator=".")
            for path, is_finite in jax.tree_util.tree_leaves_with_path(jax.device_get(finite))
            if not is_finite
        ]
        if bad:
            raise InputError(
                f"{folder}: wanted finite weights, got NaN or infinite ones in "
                f"{', '.join(bad[:4])}{f' and {len(bad) - 4} more' * (len(bad) > 4)}. Fix: copy "
                "the model again, or take an earlier one of its training."
            )


def _are_finite(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), params)


def open_model(
    section: ModelConfig,
    mesh: jax.sharding.Mesh,
    *,
    head: str = "lm",
    remat: str = "none",
    lora: LoraConfig | None = None,
) -> PretrainedModel:
    """Reads everything about a model but its weights, and checks that the parts fit.

    Args:
        section: where it is and how it is computed.
        mesh: the device mesh.
        head: "lm" or "score".
        remat: what a backward pass recomputes; one of `REMATS`.
        lora: adapters to train; those of `section.adapter`, if it is given, are trained further.

    Raises:
        InputError: no such folder, files changed since they were written, a model that this decoder
            cannot compute, a tokenizer with more ids than the model has, a mesh that does not
            divide it, an attention that cannot run there, or an adapter that is not one of it.
    """
    folder = resolve(section.path, section.revision)
    if checksums.is_sealed(folder):  # the weights are looked at when they are hashed
        checksums.check(folder, fix=RESTORE, but=".safetensors")
    arch = replace(read_architecture(folder), dtype=section.dtype, remat=remat)
    arch = choose(section.attention, arch, mesh)
    tokenizer = load_tokenizer(folder)
    # Ids may have gaps: their number can be small and the largest too large.
    num_ids = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if num_ids > arch.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {num_ids} ids, the model only {arch.vocab_size} "
            "(vocab_size in config.json): they do not belong together. Fix: use the tokenizer "
            "files that came with these weights."
        )
    model = PretrainedModel(arch, tokenizer, folder, read_config(folder), head, mesh)
    model.shardings  # noqa: B018  (raises where the mesh does not divide the model)
    if lora is not None:
        check_rank(arch, lora.rank, find_targets(lora.targets))
        model = replace(model, lora=lora)
    if section.adapter is None:
        return model
    adapter = open_adapter(section.adapter, arch, head=head, base_hash=model.base_hash)
    if lora is not None:
        _check_continues(adapter, lora)
    return replace(model, adapter=adapter)


def _check_continues(adapter: Adapter, lora: LoraConfig) -> None:
    """Raises InputError unless training can go on with an adapter as it is."""
    wanted = {"rank": lora.rank, "alpha": lora.alpha, "targets": find_targets(lora.targets)}
    for name, value in wanted.items():
        if (found := getattr(adapter, name)) != value:
            found = f"[{', '.join(found)}]" if name == "targets" else f"{found:g}"
            raise InputError(
                f"lora.{name}: wanted that of model.adapter {adapter.folder}, which is trained "
                f"further, got {value}. Fix: lora.{name}={found}; or, for a new adapter, the "
                "folder in which this one is merged as model.path."
            )
