"""The rows of a data set that are wanted, as groups of text.

1. `GroupReader` makes a `TextGroup` of each row and keeps those of the wanted split and part.
2. What it leaves out is counted by reason.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple

from copg_jax.config.sections import DataConfig
from copg_jax.data.formats.columns import InvalidRow, TextGroup, detect_schema, to_group
from copg_jax.data.formats.tldr import post_fraction
from copg_jax.data.rows import Row, fingerprint, read_rows, split_family
from copg_jax.errors import InputError

OTHER_SPLIT = "row of another split"
OTHER_PART = "post of another part"


class GroupReader:
    """Iterates over the `TextGroup`s of a data set; `counts` has what the last pass left out."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self.counts: Counter[str] = Counter()
        self.rows_read = 0
        self._first: tuple[str, str] | None = None

    def fingerprint(self) -> str:
        """Hash of everything that decides which groups come out: file contents and the config."""
        config = self._config
        contents = fingerprint(config.path, split=config.split, revision=config.revision)
        return json.dumps([contents, *astuple(config)])

    def __iter__(self) -> Iterator[TextGroup]:
        config = self._config
        self.counts.clear()
        self._first = None
        self.rows_read = kept = 0
        for where, row in read_rows(config.path, split=config.split, revision=config.revision):
            if kept == config.max_rows:
                return
            self.rows_read += 1
            group = self._group_or_reason(where, row)
            if isinstance(group, str):
                self.counts[group] += 1
            else:
                kept += 1
                yield group

    def _group_or_reason(self, where: str, row: Row) -> TextGroup | str:
        config = self._config
        own_split = row.get("split")
        if isinstance(own_split, str) and (split_family(own_split) or own_split) != (
            split_family(config.split) or config.split
        ):
            return OTHER_SPLIT
        try:
            group = to_group(where, row)
        except InvalidRow as error:
            if config.invalid_rows == "error":
                raise
            return error.reason
        self._check_one_schema(where, detect_schema(where, row).name)
        if isinstance(group, str) or config.part == "all":
            return group
        held_out = post_fraction(group.prompt) < config.holdout_fraction
        return group if held_out == (config.part == "validation") else OTHER_PART

    def _check_one_schema(self, where: str, name: str) -> None:
        """A folder may hold posts and comparisons side by side; training on both is an accident."""
        self._first = self._first or (name, where)
        if name != self._first[0]:
            raise InputError(
                f"{where}: schema '{name}' after '{self._first[0]}' at {self._first[1]}: wanted "
                "one schema in a data set. Let data.path name the files of one schema, by a glob "
                "perhaps."
            )
