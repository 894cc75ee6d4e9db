"""Groups in memory, read like those of an Arrow file."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from copg_jax.config.sections import DataConfig
from copg_jax.data.formats.texts import TextGroup, stored_text
from copg_jax.data.formats.tldr import post_fraction
from copg_jax.data.groups import TokenGroup
from copg_jax.data.reader import GroupReader


class GroupList:
    """A few groups, see `GroupDataset`.

    Args:
        groups: at least one.
        fingerprint: hash of what they are made of.
        stats: what is known of them.
    """

    def __init__(
        self, groups: Sequence[TokenGroup], fingerprint: str, stats: dict[str, Any]
    ) -> None:
        self._groups, self.fingerprint, self.stats = groups, fingerprint, stats

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> TokenGroup:
        return self._groups[index]

    def __iter__(self) -> Iterator[TokenGroup]:
        return iter(self._groups)

    def num_tokens(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `GroupDataset.num_tokens`."""
        own = [self._groups[index] for index in np.asarray(indices).tolist()]
        sizes = [(len(g.prompt_tokens), sum(map(len, g.completion_tokens))) for g in own]
        return np.array(sizes, int).reshape(-1, 2)

    def posts(self) -> Iterator[float]:
        """See `GroupDataset.posts`."""
        return (post_fraction(stored_text(group.prompt)) for group in self._groups)

    @property
    def has_rewards(self) -> bool:
        """See `GroupDataset.has_rewards`."""
        return all(group.rewards is not None for group in self._groups)

    def shape(self, multiple: int = 8) -> tuple[int, int, int]:
        """See `GroupDataset.shape`."""
        prompt = max(len(group.prompt_tokens) for group in self._groups)
        ids = [own for group in self._groups for own in group.completion_tokens]
        return (
            -(-prompt // multiple) * multiple,
            max(len(group.completion_tokens) for group in self._groups),
            -(-max(map(len, ids), default=0) // multiple) * multiple,
        )


def read_folder(folder: epath.Path) -> GroupList:
    """The groups of a folder of samples, or of scored ones, that is whole."""
    reader = GroupReader(DataConfig(str(folder)))
    groups = [group for group in reader if not isinstance(group, TextGroup)]
    return GroupList(groups, reader.fingerprint(), {"text_format": reader.text_format})
