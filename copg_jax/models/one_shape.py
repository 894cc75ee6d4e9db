"""Batches of one shape, which is known before the groups are: nothing is compiled for others."""

from collections.abc import Iterable
from functools import reduce

import numpy as np

from copg_jax.models.layout import Capacity, PackedBatches, Shape, pack, round_up


class OneShape:
    """Deals groups into batches of one shape.

    Args:
        expected: tokens of the groups of some calls, as (prompt, all completions), each [n, 2]; the
            shape fits them all.
        batch_size: B, rounded up to a multiple of R.
        num_bins: R.
        sizes: P, K and C that fit every group.

    Attributes:
        shape: of all batches that are as was expected.
    """

    def __init__(
        self,
        expected: Iterable[np.ndarray],
        *,
        batch_size: int,
        num_bins: int,
        sizes: tuple[int, int, int],
    ) -> None:
        self._batch_size, self._num_bins = round_up(batch_size, num_bins), num_bins
        self._sizes = sizes
        self.shape = reduce(Shape.joined, (self._pack(call).shape for call in expected))

    def _pack(self, num_tokens: np.ndarray) -> PackedBatches:
        packed = pack(
            num_tokens, batch_size=self._batch_size, num_bins=self._num_bins, sizes=self._sizes
        )
        return packed._replace(shape=one_width(packed.shape))

    def pack(self, num_tokens: np.ndarray) -> PackedBatches:
        """All batches of a call; where it has more tokens in a bin than was expected, with more
        capacity by whole sixteenths, the same each time.

        Args:
            num_tokens: of each group, as (prompt, all completions); [n, 2].
        """
        packed = self._pack(num_tokens)
        pairs = zip(self.shape.capacity, packed.shape.capacity, strict=True)
        grown = (
            old if new <= old else round_up(new, round_up(-(-old // 16), 8)) for old, new in pairs
        )
        return packed._replace(shape=self.shape._replace(capacity=Capacity(*grown)))


def one_width(shape: Shape) -> Shape:
    """The same with all places of a bin as wide as the longest prompt: groups that differ from call
    to call share a shape only so.
    """
    return shape._replace(prompt_sizes=(shape.prompt_size,) * len(shape.prompt_sizes))
