"""The rows of a data set that are wanted, as groups.

1. `GroupReader` makes a `TextGroup` of each row, of scored data a `TokenGroup` with the stored ids,
   and keeps those of the wanted split and part.
2. What it leaves out is counted by reason.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from etils import epath

from copg_jax.config.sections import DataConfig
from copg_jax.data import scored
from copg_jax.data.formats.choice import FormatChoice, text_format_hash
from copg_jax.data.formats.columns import detect_schema, to_group
from copg_jax.data.formats.texts import TextGroup, stored_text
from copg_jax.data.formats.tldr import post_fraction
from copg_jax.data.groups import TokenGroup
from copg_jax.data.rows import InvalidRow, Row, read_rows, rename
from copg_jax.data.scored_rows import read_row
from copg_jax.data.sources import SIDE_CAR, describe_files, fingerprint, split_family
from copg_jax.data.tokenizer import Encoder
from copg_jax.errors import InputError
from copg_jax.files import bucket_errors

OTHER_SPLIT = "row of another split"
OTHER_PART = "post of another part"
REJECTED = "rejected completion left out: only the chosen one is learnt"
CONTRADICTED = "chosen has the lower score"


class GroupReader:
    """Iterates over the groups of a data set.

    Args:
        config: where they are, and which of them.
        chosen_only: of a preference only the chosen completion, without a reward; other rows with
            rewards for several completions are refused.
        by_choice: the rewards of a pair of which one is chosen are 1 and 0, whatever its scores.

    Attributes:
        counts: rows that the last pass left out, by reason.
        changed: what it left out of rows, by reason.
        text_format: name of the format of the texts, once one was read.
    """

    def __init__(
        self, config: DataConfig, *, chosen_only: bool = False, by_choice: bool = False
    ) -> None:
        self._config, self._chosen_only = config, chosen_only
        self.by_choice = by_choice
        self.counts: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.text_format: str | None = None
        self.rows_read = 0
        self._first: tuple[str, str] | None = None
        self._make: Callable[[str, Row], TextGroup | TokenGroup | str] = self._text_group

    @property
    def source(self) -> str:
        """Where the data is, for messages: its path and files."""
        path = self._config.path
        return f"{path} ({describe_files(path, self._config.split)})"

    def check_ids(self, encoder: Encoder) -> None:
        """Raises InputError where the data has ids, and they are not this tokenizer's, not as they
        were written, or those of texts in another format.
        """
        config = self._config
        if not scored.is_scored(config.path):
            _refuse_bare_parts(config.path)
            return
        name = scored.read_side_car(epath.Path(config.path)).text_format
        if config.format not in ("auto", name):
            raise InputError(
                f"{config.path}: the data was scored in the text format '{name}', but data.format "
                f"is '{config.format}'. Set data.format={name}, or score again."
            )
        if config.columns:
            raise InputError(
                f"{config.path}: scored data have the fields that scoring gave them, but "
                f"data.columns is {config.columns}. Leave it out."
            )
        side_car = scored.verify(
            config.path,
            tokenizer_hash=encoder.hash,
            text_format_hash=text_format_hash(name, encoder),
        )
        scored.check_parts(config.path, side_car)

    def fingerprint(self) -> str:
        """Hash of everything that decides which groups come out: file contents and the config."""
        config = self._config
        contents = fingerprint(config.path, split=config.split, revision=config.revision)
        # The contents stand for the path, which may be written in another way, or be a secret.
        own = {name: value for name, value in vars(config).items() if name != "path"}
        decides = json.dumps([contents, own, self._chosen_only])
        return hashlib.sha256(decides.encode()).hexdigest()

    def __iter__(self) -> Iterator[TextGroup | TokenGroup]:
        config = self._config
        self._make = self._text_group
        self._choice = FormatChoice(config.format)
        if scored.is_scored(config.path):
            name = scored.read_side_car(epath.Path(config.path)).text_format
            self._make, self.text_format = partial(read_row, text_format=name), name
        self.counts.clear()
        self.changed.clear()
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

    def _group_or_reason(self, where: str, row: Row | InvalidRow) -> TextGroup | TokenGroup | str:
        config = self._config
        try:
            if isinstance(row, InvalidRow):
                raise row
            group = self._make(where, row)
            if not isinstance(group, str) and config.part != "all":
                held_out = post_fraction(stored_text(group.prompt)) < config.holdout_fraction
                if held_out != (config.part == "validation"):
                    return OTHER_PART
            if not isinstance(group, str) and self._chosen_only:
                group = self._only_chosen(group)
        except InvalidRow as error:
            if config.invalid_rows == "error":
                raise
            return error.reason
        return group

    def _only_chosen(self, group: TextGroup | TokenGroup) -> TextGroup | TokenGroup:
        """A group of one completion, or of several that all may be learnt."""
        if len(group.completions) == 1 or group.rewards is None:
            return group
        if isinstance(group, TokenGroup) or group.chosen is None:
            raise InputError(
                f"{group.where}: wanted rows whose completions are all good, or a pair of which "
                f"one is chosen; got {len(group.completions)} completions with rewards, which this "
                "stage does not use. Fix: let data.path name rows with `prompt` and the one "
                "`completion` to learn from."
            )
        self.changed[REJECTED] += len(group.completions) - 1
        chosen = group.completions[group.chosen]
        return replace(group, completions=(chosen,), rewards=None)

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
        row = rename(where, row, config.columns)
        group = to_group(where, row)
        if isinstance(group, TextGroup):
            group = self._choice.render(group)
            if self._choice.chosen is not None:
                self.text_format = self._choice.chosen.name
        if isinstance(group, TextGroup):
            schema = detect_schema(where, row)
            scores = " with scores" * ("chosen" in schema.fields and not group.is_choice)
            self._check_one_schema(where, schema.name + scores)
            if _is_contradicted(group):
                self.changed[CONTRADICTED] += 1
            if self.by_choice and group.chosen is not None:
                choice = [float(k == group.chosen) for k in range(len(group.completions))]
                group = replace(group, rewards=tuple(choice), is_choice=True)
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


def _is_contradicted(group: TextGroup) -> bool:
    """Whether the scores of a pair prefer the rejected completion."""
    if group.chosen is None or group.rewards is None:
        return False
    chosen = group.rewards[group.chosen]
    return chosen is not None and any(
        other is not None and chosen < other for other in group.rewards
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
