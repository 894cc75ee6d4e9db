"""The rows of a data set that are wanted, as groups.

1. `GroupReader` makes a `TextGroup` of each row, of samples and scored data a `TokenGroup` with
   the stored ids, and keeps those of the wanted split and part.
2. What it leaves out is counted by reason.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from etils import epath

from copg_jax.config.sections import DataConfig
from copg_jax.data import sampled, scored
from copg_jax.data.combine import Moments, combine, that_decide
from copg_jax.data.formats.choice import FormatChoice, text_format_hash
from copg_jax.data.formats.columns import detect_schema, to_group, to_prompt
from copg_jax.data.formats.texts import TextGroup, stored_text
from copg_jax.data.formats.tldr import post_fraction
from copg_jax.data.groups import NUMBERS, TokenGroup
from copg_jax.data.reward_stats import moments, read_rewards, stored_names
from copg_jax.data.rows import InvalidRow, Row, read_rows, rename
from copg_jax.data.scored_rows import SCHEMA, read_row, read_sampled_row
from copg_jax.data.sources import SAMPLES, SIDE_CAR, describe_files, fingerprint, split_family
from copg_jax.data.tokenizer import Encoder
from copg_jax.errors import InputError
from copg_jax.files import bucket_errors

log = logging.getLogger(__name__)

OTHER_SPLIT = "row of another split"
OTHER_PART = "post of another part"
PROMPT_AGAIN = "prompt that was there before"
REJECTED = "rejected completion left out: only the chosen one is learnt"
CONTRADICTED = "chosen has the lower score"


class GroupReader:
    """Iterates over the groups of a data set.

    Args:
        config: where they are, and which of them.
        chosen_only: of a preference only the chosen completion, without a reward; other rows with
            rewards for several completions are refused.
        by_choice: the rewards of a pair of which one is chosen are 1 and 0, whatever its scores.
        prompts_only: each prompt once and no completions; rows need not have any.

    Attributes:
        counts: rows that the last pass left out, by reason.
        changed: what it left out of rows, by reason.
        text_format: name of the format of the texts, once one was read.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        chosen_only: bool = False,
        by_choice: bool = False,
        prompts_only: bool = False,
    ) -> None:
        self._config, self._chosen_only, self._prompts_only = config, chosen_only, prompts_only
        self._prompts: set[str] = set()
        self._answered: dict[str, str] = {}  # prompt of an engine → where it is
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
        name = self._format_of_ids()
        if name is None:
            _refuse_bare_parts(config.path)
            _require_stored(config)
            return
        if config.format not in ("auto", name):
            raise InputError(
                f"{config.path}: the data was sampled or scored in the text format '{name}', but "
                f"data.format is '{config.format}'. Set data.format={name}, or score again."
            )
        if config.columns:
            raise InputError(
                f"{config.path}: scored data and samples have the fields that they were given, "
                f"but data.columns is {config.columns}. Leave it out."
            )
        hashes = {
            "tokenizer_hash": encoder.hash,
            "text_format_hash": text_format_hash(name, encoder),
        }
        if scored.is_scored(config.path):
            scored.check_parts(config.path, scored.verify(config.path, **hashes))
        else:
            sampled.verify_sampled(epath.Path(config.path), **hashes)
        _require_stored(config)

    def _format_of_ids(self) -> str | None:
        """The text format of data that has ids, scored or sampled; None for other data."""
        path = self._config.path
        if scored.is_scored(path):
            return scored.read_side_car(epath.Path(path)).text_format
        if sampled.is_sampled(path):
            return sampled.read_sampled(epath.Path(path)).text_format
        return None

    def fingerprint(self) -> str:
        """Hash of everything that decides which groups come out: file contents and the config."""
        config = self._config
        contents = fingerprint(config.path, **_where(config))
        # The contents stand for the path, which may be written in another way, or be a secret.
        own = {name: value for name, value in vars(config).items() if name != "path"}
        decides = json.dumps([contents, own, self._chosen_only, self._prompts_only], sort_keys=True)
        return hashlib.sha256(decides.encode()).hexdigest()

    def __iter__(self) -> Iterator[TextGroup | TokenGroup]:
        config = self._config
        combination = _combination(config)
        self._make = self._text_group
        self._choice = FormatChoice(config.format)
        if (name := self._format_of_ids()) is not None:
            read = read_sampled_row
            if scored.is_scored(config.path):
                read = partial(read_row, combination=combination)
            self._make, self.text_format = partial(read, text_format=name), name
        self.counts.clear()
        self.changed.clear()
        self._prompts.clear()
        self._answered.clear()
        self._first = None
        self.rows_read = kept = 0
        for where, row in read_rows(config.path, **_where(config)):
            if kept == config.max_rows:
                return
            self.rows_read += 1
            group = self._group_or_reason(where, row)
            if isinstance(group, str):
                self.counts[group] += 1
            else:
                kept += 1
                self._count_absent(row)
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
            if not isinstance(group, str) and self._prompts_only:
                return self._only_prompt(group)
        except InvalidRow as error:
            if config.invalid_rows == "error":
                raise
            return error.reason
        return group

    def _count_absent(self, row: Row | InvalidRow) -> None:
        """Counts the completions that lack a reward which decides, by its name."""
        for name in that_decide(self._config.rewards):
            assert isinstance(row, dict)  # it became a group
            values = dict(row["rewards"])[name]
            self.changed[f"completion without the reward '{name}'"] += values.count(None)

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

    def _only_prompt(self, group: TextGroup | TokenGroup) -> TextGroup | TokenGroup | str:
        """A group without completions, the first time that its prompt is there."""
        prompt = stored_text(group.prompt)
        if prompt in self._prompts:
            return PROMPT_AGAIN
        self._prompts.add(prompt)
        if isinstance(group, TextGroup):
            return group
        nothing = {**dict.fromkeys(NUMBERS), "kept": np.zeros(len(group.completions), bool)}
        return replace(group, completions=(), completion_tokens=(), **nothing)

    def _text_group(self, where: str, row: Row) -> TextGroup | str:
        config = self._config
        if row.keys() >= set(SCHEMA.names):
            raise InputError(
                f"{where}: a part of scored data or samples without its {SIDE_CAR} or {SAMPLES}. "
                "Let data.path name the whole folder that experiments.score or sample wrote."
            )
        row = rename(where, row, config.columns)
        own_split = row.get("split")
        if isinstance(own_split, str) and (split_family(own_split) or own_split) != (
            split_family(config.split) or config.split
        ):
            return OTHER_SPLIT
        group = to_prompt(where, row) if self._prompts_only else to_group(where, row)
        if isinstance(group, TextGroup):
            group = self._rendered(group)
            if self._choice.chosen is not None:
                self.text_format = self._choice.chosen.name
        if isinstance(group, TextGroup) and not self._prompts_only:
            schema = detect_schema(where, row)
            scores = " with scores" * ("chosen" in schema.fields and not group.is_choice)
            self._check_one_schema(where, schema.name + scores)
            if _is_contradicted(group):
                self.changed[CONTRADICTED] += 1
            if self.by_choice and group.chosen is not None:
                choice = [float(k == group.chosen) for k in range(len(group.completions))]
                group = replace(group, rewards=tuple(choice), is_choice=True)
        return group

    def _rendered(self, group: TextGroup) -> TextGroup | str:
        """The group in the format of the data set; texts whose ids an engine gives stay its own.

        Raises:
            InputError: an engine's second answer to a prompt.
        """
        rendered = self._choice.render(group)
        if isinstance(rendered, str) or group.engine is None:
            return rendered
        prompt = stored_text(group.prompt)
        if (first := self._answered.setdefault(prompt, group.where)) != group.where:
            raise InputError(
                f"{group.where}: the prompt that was answered at {first} already: wanted each "
                "prompt of an engine's file once, with all of its completions. Remove one."
            )
        own = group.engine.completion_ids is not None
        return replace(rendered, completions=group.completions) if own else rendered

    def _check_one_schema(self, where: str, name: str) -> None:
        """A folder may hold posts and comparisons side by side; training on both is an accident."""
        self._first = self._first or (name, where)
        if name != self._first[0]:
            raise InputError(
                f"{where}: schema '{name}' after '{self._first[0]}' at {self._first[1]}: wanted "
                "one schema in a data set. Let data.path name the files of one schema, by a glob "
                "perhaps."
            )


def _require_stored(config: DataConfig) -> None:
    """Raises InputError where weights are given for rewards that the data does not have."""
    if not config.rewards:
        return
    if not scored.is_scored(config.path):
        raise InputError(
            f"data.rewards: weights of stored rewards want a folder that experiments.score wrote, "
            f"got {config.path}. Fix: score it, and point data.path at the folder that writes."
        )
    names = stored_names(config.path)
    for unknown in sorted(config.rewards.keys() - names):
        raise InputError(
            f"data.rewards: {config.path} has no reward {unknown!r}; it has {', '.join(names)}. "
            "Fix: name these, or score again with that reward too."
        )


def _where(config: DataConfig) -> dict[str, Any]:
    """Which rows behind a path are meant."""
    return {"split": config.split, "revision": config.revision, "subset": config.subset}


def _combination(config: DataConfig) -> Callable[[Mapping[str, np.ndarray]], np.ndarray] | None:
    """What makes the reward of the stored ones, where the config does not keep that of scoring."""
    _require_stored(config)
    weights, how = config.rewards, config.combine
    if not weights:
        return None
    found: dict[str, Moments] = {}
    if how == "standardized_sum":
        stored = read_rewards(config.path).by_name
        found = {name: moments(stored[name]) for name in that_decide(weights)}
    for name, (mean, std) in found.items():
        if not std > 0:
            raise InputError(
                f"data.combine: wanted different values of the reward {name!r} in {config.path}, "
                "got none or the same everywhere: without a standard deviation it cannot be "
                "standardised. Fix: leave it out of data.rewards."
            )
        log.info(
            "%s: reward '%s' has mean %.4g and standard deviation %.4g, so that its weight in the "
            "sum is %.4g",
            config.path,
            name,
            mean,
            std,
            weights[name] / std,
        )
    return partial(combine, weights=weights, how=how, moments=found)


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
