"""What the steps of a round train on: samples of the last rounds, and scored data beside them.

All batches of all rounds have one shape, which is found from the prompts of the first rounds with
completions that are as long as they can be.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, reduce
from typing import Any

import jax
import numpy as np

from copg_jax import sharding
from copg_jax.config.stages import OnlineConfig
from copg_jax.data.dataset import GroupDataset
from copg_jax.data.group_list import GroupList
from copg_jax.data.pool import JoinedPool, Pool, Source
from copg_jax.data.stream import Batch, Groups, GroupStream
from copg_jax.models.layout import Capacity, Shape, pack_epochs, round_up
from copg_jax.models.one_shape import one_width
from copg_jax.train.fresh import FreshRound, RoundMaker


class Mixture:
    """Batches of fresh samples and offline data.

    Args:
        config: of the run.
        maker: knows the prompts of each round.
        offline: scored data of origin 1, if any.
        answers: where pairs are those of different origins, the groups of it by prompt.
        mesh: the device mesh.
    """

    def __init__(
        self,
        config: OnlineConfig,
        maker: RoundMaker,
        offline: GroupDataset | None,
        answers: Mapping[bytes, Sequence[int]],
        mesh: jax.sharding.Mesh,
    ) -> None:
        self._config, self._maker, self._mesh = config, maker, mesh
        self._offline, self._answers = offline, answers

    def stream(self, window: Sequence[FreshRound], number: int) -> GroupStream:
        """The batches of a round, in an order of its own.

        Args:
            window: the rounds that it trains on.
            number: of the round.
        """

        def pack(num_tokens: Any, **options: Any) -> Callable[[int], Batch]:
            return pack_epochs(num_tokens, at_least=self._shape, **self._dealt(options))

        groups = [fresh.groups for fresh in window]
        return self._stream(groups, number, self._config.seed, pack)

    def _dealt(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Of `pack_epochs`: with the sizes of all rounds. With a share each batch is dealt alone,
        and those of the round are all that is looked at: an epoch, which ends when all offline
        data was seen, may be much longer, and its batches have the share on average only.
        """
        config = self._config
        own: dict[str, Any] = {"sizes": self._sizes}
        if config.offline is not None and config.offline.share is not None:
            own["epoch_size"] = config.training.batch_size
            own["num_fitted"] = config.steps_per_round
        return {**options, **own}

    def _groups(self, fresh: Sequence[GroupList]) -> Groups:
        """Samples and offline data; joined by prompt where pairs are across origins."""
        offline, section = self._offline, self._config.offline
        if offline is None or section is None:
            return Pool([Source(fresh)])
        if section.share is not None:
            share = section.share
            return Pool([Source(fresh, 1 - share), Source([offline], share, origin=1)])
        prompts = {group.prompt_tokens.tobytes() for one in fresh for group in one}
        own = [offline[index] for prompt in sorted(prompts) for index in self._answers[prompt]]
        answers = GroupList(own, offline.fingerprint, {})
        return JoinedPool(Pool([Source(fresh), Source([answers], origin=1)]))

    def _stream(self, fresh: Sequence[GroupList], number: int, seed: int, pack: Any) -> GroupStream:
        training, groups = self._config.training, self._groups(fresh)
        host, num_hosts = sharding.batch_share(self._mesh)
        steps = self._config.steps_per_round * training.batch_size
        return GroupStream(
            groups,
            pack,
            batch_size=training.batch_size,
            num_epochs=math.ceil(steps / len(groups)),
            seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]),
            num_bins=sharding.num_batch_shards(self._mesh) * training.num_microbatches,
            host=host,
            num_hosts=num_hosts,
        )

    @cached_property
    def _sizes(self) -> tuple[int, int, int]:
        """P, K and C that fit every group of every round."""
        numbers, config = self._config.sampling, self._config
        prompt, completions, length = (
            self._maker.longest,
            numbers.num_samples,
            numbers.max_new_tokens,
        )
        if self._offline is not None:
            own = self._offline.shape(multiple=1)
            prompt, length = max(prompt, own[0]), max(length, own[2])
            if self._answers:
                times = math.ceil(
                    config.replay_rounds * config.prompts_per_round / self._maker.count
                )
                most = max(
                    sum(len(self._offline[index].completions) for index in indices)
                    for indices in self._answers.values()
                )
                completions = times * completions + most
            else:
                completions = max(completions, own[1])
        return round_up(prompt, 8), completions, round_up(length, 8)

    @cached_property
    def _shape(self) -> Shape:
        """Fits the batches of the first rounds, with completions as long as they can be."""
        shapes: list[Shape] = []

        def pack_and_note(num_tokens: Any, **options: Any) -> Callable[[int], Batch]:
            batch_at = pack_epochs(num_tokens, **self._dealt(options))
            shapes.append(one_width(batch_at(0).shape))
            return batch_at

        for seed in self._maker.seeds:
            window: list[GroupList] = []
            for number in self._maker.expected_rounds:
                expected = self._maker.expected(number, seed)
                window = [*window, expected][-self._config.replay_rounds :]
                self._stream(window, number, seed, pack_and_note)
        tokens, own = reduce(Shape.joined, shapes).capacity
        # Real lengths are dealt in another way.
        of_prompts = round_up(tokens, round_up(-(-tokens // 32), 8))
        return reduce(Shape.joined, shapes)._replace(capacity=Capacity(of_prompts, own))


def drawn_at(window: Sequence[FreshRound], stream: GroupStream, at: int) -> np.ndarray:
    """The step at which each fresh group of a batch was drawn; int [n].

    Args:
        window: rounds that the stream was made of.
        stream: of `Mixture.stream`.
        at: number of the batch, from 0.
    """
    steps = np.repeat([one.step for one in window], [len(one.groups) for one in window])
    rows, groups = stream.rows(at), stream.dataset
    if isinstance(groups, JoinedPool):
        rows = np.concatenate([groups.members(int(row)) for row in rows])
    return steps[rows[rows < len(steps)]]
