"""The rows of a data set that are wanted, as groups.

1. `GroupReader` makes a `TextGroup` of each row, of scored data a `TokenGroup` with the stored ids,
   and keeps those of the wanted split and part.
2. What it leaves out is counted by reason.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple

from etils import epath

from copg_jax.config.sections import DataConfig
from copg_jax.data import scored
from copg_jax.data.formats import tldr
from copg_jax.data.formats.columns import InvalidRow, TextGroup, detect_schema, to_group
from copg_jax.data.groups import TokenGroup
from copg_jax.data.rows import SIDE_CAR, Row, fingerprint, read_rows, split_family
from copg_jax.errors import InputError
from copg_jax.files import bucket_errors

OTHER_SPLIT = "row of another split"
OTHER_PART = "post of another part"


class GroupReader:
    """Iterates over the groups of a data set; `counts` has what the last pass left out."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self.counts: Counter[str] = Counter()
        self.rows_read = 0
        self._first: tuple[str, str] | None = None
        self._make: Callable[[str, Row], TextGroup | TokenGroup | str] = self._text_group

    def check_ids(self, tokenizer_hash: str) -> None:
        """Raises InputError where the data has ids, and they are not this tokenizer's or not as
        they were written.
        """
        path = self._config.path
        if scored.is_scored(path):
            hashes = {"tokenizer_hash": tokenizer_hash, "text_format_hash": tldr.format_hash()}
            scored.check_parts(path, scored.verify(path, **hashes))
        else:
            _refuse_bare_parts(path)

    def fingerprint(self) -> str:
        """Hash of everything that decides which groups come out: file contents and the config."""
        config = self._config
        contents = fingerprint(config.path, split=config.split, revision=config.revision)
        return json.dumps([contents, *astuple(config)])

    def __iter__(self) -> Iterator[TextGroup | TokenGroup]:
        config = self._config
        self._make = scored.read_row if scored.is_scored(config.path) else self._text_group
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

    def _group_or_reason(self, where: str, row: Row) -> TextGroup | TokenGroup | str:
        config = self._config
        group = self._make(where, row)
        if isinstance(group, str) or config.part == "all":
            return group
        held_out = tldr.post_fraction(group.prompt) < config.holdout_fraction
        return group if held_out == (config.part == "validation") else OTHER_PART

    def _text_group(self, where: str, row: Row) -> TextGroup | str:
        config = self._config
        if row.keys() >= set(scored.SCHEMA.names):
            raise InputError(
                f"{where}: a part of scored data without its {SIDE_CAR}. Let data.path name the "
                "whole folder that experiments.score wrote."
            )
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
        if isinstance(group, TextGroup):
            schema = detect_schema(where, row)
            scores = " with scores" * ("chosen" in schema.fields and not group.is_choice)
            self._check_one_schema(where, schema.name + scores)
        return group

    def _check_one_schema(self, where: str, name: str) -> None:
        """A folder may hold posts and comparisons side by side; training on both is an accident."""
        self._first = self._first or (name, where)
        if name != self._first[0]:
            raise InputError(
                f"{where}: schema '{name}' after '{self._first[0]}' at {self._first[1]}: wanted "
                "one schema in a data set. Let data.path name the files of one schema, by a glob "
                "perhaps."
            )


def _refuse_bare_parts(path: str) -> None:
    """Raises InputError where `path` is the folder of a score run that has lost its side-car."""
    folder = epath.Path(path)
    with bucket_errors(path):
        is_bare = (folder / "inputs.json").exists() and any(folder.glob("part-*.parquet"))
    if is_bare:
        raise InputError(
            f"{folder / SIDE_CAR}: missing, though parts of scored data are there. Fix: run the "
            "same score command again."
        )
