"""A model from a Hugging Face folder: all but its weights, which are read into their shards."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from copg_jax import checksums, sharding
from copg_jax.config.sections import ModelConfig
from copg_jax.data.tokenizer import Encoder, load_tokenizer
from copg_jax.errors import InputError
from copg_jax.hf.config_json import read_config, read_end_ids
from copg_jax.hf.weights import (
    RESTORE,
    load_params,
    params_hash,
    read_architecture,
    resolve,
)
from copg_jax.models.kernels import choose
from copg_jax.models.params import (
    Architecture,
    Params,
    abstract_params,
    cast_matrices,
    logical_axes,
)
from copg_jax.sharding import Partitioner


@dataclass(frozen=True)
class PretrainedModel:
    """An architecture with its tokenizer, the folder of its weights and the config.json there, and
    where each weight lies.
    """

    arch: Architecture
    tokenizer: Any
    folder: Path
    config: Mapping[str, Any]
    head: str
    mesh: jax.sharding.Mesh

    @property
    def axes(self) -> Params:
        """Logical axes of the parameters."""
        return logical_axes(self.arch, head=self.head)

    @property
    def shapes(self) -> Params:
        """Shapes and dtypes of the parameters."""
        return abstract_params(self.arch, head=self.head)

    @property
    def shardings(self) -> Params:
        """Where each parameter lies.

        Raises:
            InputError: the mesh does not divide the model.
        """
        return sharding.shardings(self.mesh, self.axes, self.shapes)

    @property
    def partitioner(self) -> Partitioner:
        """Where its activations lie."""
        return Partitioner(self.mesh)

    @cached_property
    def hash(self) -> str:
        """Hash of the weights and config on disk, which are compared with their checksums."""
        return params_hash(self.folder)

    @cached_property
    def end_ids(self) -> list[int]:
        """Ids at any of which a generation ends: the tokenizer's EOS, the turn end of its chat
        template, and those that the folder's generation_config.json names.

        Raises:
            InputError: that file cannot be read, or names an id that the model does not have.
        """
        return Encoder(self.tokenizer, read_end_ids(self.folder, self.config)).end_ids

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

    def load(self, *, score_key: jax.Array | None = None) -> Any:
        """Reads the float32 weights into their shards.

        Args:
            score_key: draws a score head that the folder lacks.

        Raises:
            InputError: weights that have changed since they were written, that are NaN or infinite,
                or that do not fit the architecture.
        """
        self.hash  # noqa: B018  (raises where the weights have changed)
        params = load_params(
            self.folder,
            self.arch,
            head=self.head,
            shardings=self.shardings,
            init_missing_score=score_key,
        )
        finite = jax.jit(_are_finite, out_shardings=sharding.replicated(self.mesh))(params)
        bad = [
            jax.tree_util.keystr(path, simple=True, separator=".")
            for path, is_finite in jax.tree_util.tree_leaves_with_path(jax.device_get(finite))
            if not is_finite
        ]
        if bad:
            raise InputError(
                f"{self.folder}: wanted finite weights, got NaN or infinite ones in "
                f"{', '.join(bad[:4])}{f' and {len(bad) - 4} more' * (len(bad) > 4)}. Fix: copy "
                "the model again, or take an earlier one of its training."
            )
        return params

    def load_frozen(self) -> Any:
        """Reads weights that are only read (π_ref, a reward model), into the compute dtype."""
        cast = partial(cast_matrices, self.arch)
        return jax.jit(cast, out_shardings=self.shardings)(self.load())


def _are_finite(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), params)


def open_model(
    section: ModelConfig, mesh: jax.sharding.Mesh, *, head: str = "lm", remat: str = "none"
) -> PretrainedModel:
    """Reads everything about a model but its weights, and checks that the parts fit.

    Args:
        section: where it is and how it is computed.
        mesh: the device mesh.
        head: "lm" or "score".
        remat: what a backward pass recomputes; one of `REMATS`.

    Raises:
        InputError: no such folder, files changed since they were written, a model that this decoder
            cannot compute, a tokenizer with more ids than the model has, a mesh that does not
            divide it, or an attention that cannot run there.
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
    return model
