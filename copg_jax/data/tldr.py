"""TL;DR data sets: which rows are wanted, and an iterator over them as groups of text.

1. `DataConfig` says where the rows are and which part of them is wanted.
2. `GroupReader` makes a `TextGroup` of each row and keeps those of the wanted split and part.
3. What it leaves out is counted by reason.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import NamedTuple

from copg_jax.cli import option
from copg_jax.data.prompts import post_fraction
from copg_jax.data.rows import Row, fingerprint, read_rows, split_family
from copg_jax.data.schemas import InvalidRow, TextGroup, detect_schema, to_group
from copg_jax.errors import InputError

OTHER_SPLIT = "row of another split"
OTHER_PART = "post of another part"


class Limits(NamedTuple):
    """Most tokens of a prompt (with BOS) and a completion (with EOS); what to do with bad rows."""

    max_prompt_tokens: int = 512
    max_completion_tokens: int = 192
    invalid_rows: str = "error"


@dataclass(frozen=True)
class DataConfig:
    """Where the rows are and which of them to use."""

    path: str = option(
        help="file, folder or glob of .jsonl/.json/.parquet, scored folder, or hub id owner/name"
    )
    split: str = option(
        "train", "hub split, or the files or rows of this split where they name one"
    )
    revision: str | None = option(None, "hub revision; a commit pins the contents")
    max_prompt_tokens: int = option(512, "longer posts are cut at a newline until the prompt fits")
    max_completion_tokens: int = option(
        192, "longer completions (EOS included) are dropped and counted"
    )
    holdout_fraction: float = option(0.0, "share of posts (not rows) in the validation part")
    part: str = option("all", "all, train or validation: which side of the split by post to read")
    invalid_rows: str = option(
        "error", "error: stop at the first bad row; drop: leave out and count"
    )
    max_rows: int | None = option(None, "stop after this many rows of the part")

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_completion_tokens", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")
        if not 0.0 <= self.holdout_fraction < 1.0:
            raise InputError(f"holdout_fraction must be in [0, 1), got {self.holdout_fraction}.")
        for name, choices in (
            ("part", ("all", "train", "validation")),
            ("invalid_rows", ("error", "drop")),
        ):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} must be one of {', '.join(choices)}, got '{getattr(self, name)}'."
                )
        if self.part == "validation" and self.holdout_fraction == 0.0:
            raise InputError(
                "part is validation but holdout_fraction is 0, which holds no post out: set it "
                "above 0."
            )

    @property
    def limits(self) -> Limits:
        """The token limits, as plain values for `groups.prepare`."""
        return Limits(self.max_prompt_tokens, self.max_completion_tokens, self.invalid_rows)


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
