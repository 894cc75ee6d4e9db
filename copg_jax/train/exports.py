"""The folders that a training run leaves: models of the last and of the best step.

A run that trains adapters leaves each twice: alone, as `peft` loads them, and merged into their
base.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from copg_jax import checksums, distributed
from copg_jax.config.sections import ModelConfig
from copg_jax.errors import Damaged
from copg_jax.hf.adapter_config import adapter_config
from copg_jax.hf.adapters import Merged, on_host, save_adapter
from copg_jax.hf.pretrained import PretrainedModel
from copg_jax.hf.weights import save_pretrained
from copg_jax.models.lora import find_targets
from copg_jax.models.params import abstract_params
from copg_jax.train.state import TrainState

log = logging.getLogger(__name__)

_ADAPTER = {
    "model": "adapter",
    "best": "best_adapter",
}  # the folder beside that of the merged model


def bytes_to_write(model: PretrainedModel, shapes: TrainState, *, keeps_best: bool) -> int:
    """What a run may write beside tokens: checkpoints, one of them before an older one is removed,
    and exports in float32.
    """
    params = abstract_params(model.arch, head=model.head)
    state, whole, trained = (
        sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (shapes, params, shapes.params)
    )
    adapter = 0 if model.lora is None else trained
    return (3 + keeps_best) * state + (1 + keeps_best) * (whole + adapter)


def is_exported(folder: epath.Path, model: PretrainedModel, *, has_best: bool) -> bool:
    """Whether the folders that a complete run leaves are there and as they were written."""
    names = ["model", *(["best"] if has_best else [])]
    if model.lora is not None:
        names += [_ADAPTER[name] for name in names]
    found = False
    with distributed.main_first(folder):
        if distributed.is_main_process():
            try:
                for name in names:
                    checksums.check(folder / name, fix="It is exported again.")
                found = True
            except Damaged as error:
                if checksums.is_sealed(folder / "model"):
                    log.warning("%s", error)
    return bool(distributed.from_main(found))


def export(
    folder: epath.Path,
    name: str,
    model: PretrainedModel,
    params: Any,
    *,
    base: ModelConfig,
    card: Callable[[bool], str],
) -> None:
    """Writes `folder`/`name`, and before it the adapter where one was trained.

    Args:
        folder: of the run.
        name: "model" or "best".
        model: what was trained.
        params: what is trained of it.
        base: the model that training began with, by its name.
        card: whether it is of the adapter → text of README.md.
    """
    values = params
    if model.lora is not None:
        rank, alpha, targets = model.lora.rank, model.lora.alpha, find_targets(model.lora.targets)
        tensors = on_host(model.arch, rank, targets, params)
        config = adapter_config(
            rank, alpha, targets, head=model.head, base=base.path, revision=base.revision
        )
        adapter = folder / _ADAPTER[name]
        save_adapter(adapter, config, tensors, base_hash=model.base_hash, card=card(True))
        log.info("wrote %s", adapter)
        values = Merged(model.folder, alpha / rank, tensors)
    save_pretrained(
        folder / name,
        model.arch,
        values,
        head=model.head,
        tokenizer=model.tokenizer,
        end_ids=model.end_ids,
        source=model.config,
        card=card(False),
    )
    log.info("wrote %s", folder / name)
