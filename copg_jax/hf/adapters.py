"""PEFT folders: a LoRA that lies beside the model that it was trained on.

1. `open_adapter` checks a folder against its base: fields, names and shapes of all tensors, and the
   hash of the base where the folder, being one of ours, has it. It is read whole or not at all.
2. `save_adapter` writes one that `peft` loads.
3. `Merged` gives the tensors of the base with what the adapter adds, W + s B A, one at a time.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from copg_jax import checksums, distributed
from copg_jax.errors import InputError
from copg_jax.hf import adapter_config
from copg_jax.hf.card import CARD_NAME
from copg_jax.hf.names import HfTensor, assemble, differences, to_hf
from copg_jax.hf.tensor_files import SafetensorsFolder, write_safetensors
from copg_jax.hf.weights import RESTORE, check_replaceable, fetch, params_hash, resolve
from copg_jax.models import lora
from copg_jax.models.params import (
    LAYER_PARAMS,
    Architecture,
    Params,
    layer_stacks,
    param_specs,
)

TENSORS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of peft, before the names of the base
_SCORE = f"{_PREFIX}score.weight"
_BASE = "base"  # fact of a sealed folder: the hash of the model it was trained on
_FILES = (adapter_config.NAME, TENSORS_NAME, CARD_NAME, checksums.NAME)


@dataclass(frozen=True)
class Adapter:
    """A checked PEFT folder.

    Attributes:
      folder: Where it lies.
      rank: r.
      alpha: Of the scale alpha / r.
      targets: Weights that have one, in the order of the table.
      has_score: Whether a score head lies beside them.
      hash: Of its config and tensors.
    """

    folder: Path
    arch: Architecture
    rank: int
    alpha: float
    targets: tuple[str, ...]
    has_score: bool
    hash: str

    def load(self, shardings: Params | None = None) -> Params:
        """Reads it as "lora" and, where there is one, "score", in float32.

        Args:
            shardings: tree like the result, or None for the default device.
        """
        source = SafetensorsFolder(self.folder, TENSORS_NAME)
        tensors = lora_tensors(self.arch, self.rank, self.targets)
        found = {"lora": assemble(source, tensors, shardings and shardings["lora"])}
        if self.has_score:
            score = {_SCORE: score_tensor(self.arch)}
            found |= assemble(source, score, shardings)
        return found


def lora_tensors(arch: Architecture, rank: int, targets: Any) -> dict[str, HfTensor]:
    """Every tensor of a PEFT folder, and where it lies in the tree of `lora.lora_specs`."""
    specs = lora.layer_lora_specs(arch, rank, targets)
    layers = [(stack, i) for stack, size in layer_stacks(arch).items() for i in range(size)]
    found = {}
    for number, (stack, layer) in enumerate(layers):
        for name in targets:
            module = LAYER_PARAMS[name].hf_name.removesuffix(".weight")
            for ending, factor in (("lora_A", lora.A), ("lora_B", lora.B)):
                leaf = name + factor
                hf_name = f"{_PREFIX}model.layers.{number}.{module}.{ending}.weight"
                found[hf_name] = HfTensor(leaf, stack, layer, specs[leaf])
    return found


def score_tensor(arch: Architecture) -> HfTensor:
    """The score head."""
    return HfTensor("score", None, None, param_specs(arch, head="score")["score"])


def open_adapter(path: str, arch: Architecture, *, head: str, base_hash: str) -> Adapter:
    """Reads and checks everything about a PEFT folder but the values of its tensors.

    Args:
        path: folder, URL of one in a bucket, or hub id.
        arch: of the base.
        head: "lm", or "score", which may have a head of its own.
        base_hash: `params_hash` of the base.

    Raises:
        InputError: no such folder, files changed since they were written, an adapter of another
            base or kind, or one whose tensors are not those that its config and the base ask for,
            of which all are named.
    """
    folder = resolve(path)
    config = adapter_config.read_adapter_config(folder, head=head)
    if checksums.is_sealed(folder):
        trained_on = checksums.check(folder, fix=RESTORE).get(_BASE)
        if trained_on not in (None, base_hash):
            raise InputError(
                f"{folder}: wanted an adapter of the model in model.path, whose hash is "
                f"{base_hash[:12]}, got one of another model, {trained_on[:12]}. Fix: give the "
                "model that it was trained on as model.path."
            )
    source = SafetensorsFolder(folder, TENSORS_NAME)
    targets = _find_targets(folder, arch, config, source.shapes())
    tensors = lora_tensors(arch, config.rank, targets)
    optional = [_SCORE] if head == "score" else []
    tensors |= {name: score_tensor(arch) for name in optional if name in source.shapes()}
    problems = [
        f"  {kind}: {text}"
        for kind, texts in differences(source, tensors).items()
        for text in texts
    ]
    if problems:
        raise InputError(
            f"{folder}: the tensors are not those of r={config.rank} adapters of "
            f"{', '.join(targets) or 'any linear layer'} in all layers of the base:\n"
            + "\n".join(problems)
            + "\nNothing was loaded. Fix: the adapter of this base, as peft saves it; adapters of "
            "some layers only are not supported."
        )
    return Adapter(
        folder,
        arch,
        config.rank,
        config.alpha,
        targets,
        _SCORE in source.shapes(),
        params_hash(folder, adapter_config.NAME),
    )


def _find_targets(
    folder: Path,
    arch: Architecture,
    config: adapter_config.AdapterConfig,
    names: Mapping[str, Any],
) -> tuple[str, ...]:
    """The weights that a config and the names of the tensors ask for, in any layer.

    A pattern in the config is not run: which modules it has matched the tensors tell.
    """
    of_modules = {
        name.rpartition(".lora_")[0].removeprefix(_PREFIX): tensor.leaf.removesuffix(lora.A)
        for name, tensor in lora_tensors(arch, config.rank, lora.TARGETS).items()
        if tensor.leaf.endswith(lora.A)
    }
    asked: set[str] = set()
    for wanted in config.modules or ():
        found = {m for m in of_modules if m == wanted or m.endswith(f".{wanted}")}
        if not found:
            raise InputError(
                f"{folder / adapter_config.NAME}: target_modules: wanted linear layers of the "
                f"base, {', '.join(lora.TARGETS)}, got {wanted!r:.80}"
            )
        asked |= found
    present = {name.rpartition(".lora_")[0].removeprefix(_PREFIX) for name in names}
    there = {of_modules[module] for module in asked | (present & of_modules.keys())}
    return tuple(name for name in lora.TARGETS if name in there)


def combined_hash(base_hash: str, adapter: Adapter) -> str:
    """Of a model and an adapter on top of it."""
    return hashlib.sha256(f"{base_hash} {adapter.hash}".encode()).hexdigest()


def on_host(arch: Architecture, rank: int, targets: Any, params: Params) -> dict[str, np.ndarray]:
    """The tensors of a PEFT folder, whole on every host; every process calls it.

    Args:
        arch: of the base.
        rank: r.
        targets: weights that have an adapter.
        params: "lora" and perhaps "score", any sharding.
    """
    tensors = lora_tensors(arch, rank, targets)
    found = {name: to_hf(t, fetch(params["lora"], t)) for name, t in tensors.items()}
    if "score" in params:
        score = score_tensor(arch)
        found[_SCORE] = to_hf(score, fetch(params, score))
    return found


def save_adapter(
    folder: epath.PathLike,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    base_hash: str,
    card: str,
) -> None:
    """Writes a PEFT folder and, last, the checksums of all but its card; process 0 does.

    Args:
        folder: target; replaced where it holds such an export and no other file.
        config: from `adapter_config.adapter_config`.
        tensors: from `on_host`.
        base_hash: `params_hash` of the base, which a later run compares.
        card: text of its README.md.
    """
    folder = epath.Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    with distributed.main_first(folder / checksums.NAME):
        if distributed.is_main_process():
            check_replaceable(folder, _FILES)
            temporary.rmtree(missing_ok=True)
            temporary.mkdir(parents=True)
            text = json.dumps(dict(config), indent=2) + "\n"
            (temporary / adapter_config.NAME).write_text(text)
            with (temporary / TENSORS_NAME).open("wb") as stream:
                shapes = {name: value.shape for name, value in tensors.items()}
                write_safetensors(stream, shapes, tensors.__getitem__)
            (temporary / CARD_NAME).write_bytes(card.encode())
            folder.rmtree(missing_ok=True)
            temporary.rename(folder)
            checksums.seal(folder, {_BASE: base_hash}, leave_out=CARD_NAME)


class Merged:
    """The tensors of a base model with what an adapter adds to them, in float32.

    Args:
        base: folder of the base.
        scale: s.
        tensors: of the adapter, from `on_host`.
    """

    def __init__(self, base: Path, scale: float, tensors: Mapping[str, np.ndarray]) -> None:
        self._base, self._scale, self._tensors = SafetensorsFolder(base), scale, tensors

    def __call__(self, name: str) -> np.ndarray:
        """W + s B A, or W where there is no adapter, by its Hugging Face name."""
        if _PREFIX + name in self._tensors:  # the score head
            return self._tensors[_PREFIX + name]
        value = self._base.read(name, (slice(None),)).astype(np.float32)
        module = _PREFIX + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in self._tensors:
            a, b = (self._tensors[f"{module}.lora_{factor}.weight"] for factor in "AB")
            value = value + np.float32(self._scale) * (b @ a)
        return value
