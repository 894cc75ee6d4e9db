"""The batches of a run, in their order and of one shape; of one shape for all runs of a study."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax

from copg_jax import reuse, sharding
from copg_jax.config.sections import TrainingConfig
from copg_jax.data.stream import Groups, GroupStream
from copg_jax.models.layout import Shape, pack_epochs


def open_stream(
    dataset: Groups, training: TrainingConfig, seed: int, mesh: jax.sharding.Mesh, start: int
) -> GroupStream:
    """This host's share of the batches after step `start`.

    Args:
        dataset: groups to train on.
        training: sizes of the run.
        seed: decides the order.
        mesh: the device mesh.
        start: steps that are done.
    """
    seeds = reuse.seeds_of_runs()
    host, num_hosts = sharding.batch_share(mesh)
    sizes = {
        "batch_size": training.batch_size,
        "num_epochs": training.num_epochs,
        "num_bins": sharding.num_batch_shards(mesh) * training.num_microbatches,
    }
    order = partial(GroupStream, dataset, **sizes)
    key = dataset.fingerprint, *sizes.values(), seeds
    common = reuse.once("shape", key, lambda: _common_shape(order, seeds)) if seeds else None
    pack = partial(pack_epochs, at_least=common)
    return order(pack, seed=seed, start_step=start, host=host, num_hosts=num_hosts)


def _common_shape(order: Callable[..., GroupStream], seeds: Sequence[int]) -> Shape:
    """The least shape that fits the batches of all these seeds."""
    shapes: list[Shape] = []

    def pack_and_note(*lengths: Any, **sizes: Any) -> Any:
        batch_at = pack_epochs(*lengths, **sizes)
        shapes.append(batch_at(0).shape)
        return batch_at

    for seed in seeds:
        order(pack_and_note, seed=seed)
    return reduce(Shape.joined, shapes)
