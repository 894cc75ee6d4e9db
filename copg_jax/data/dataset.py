"""Data sets of token groups: a memory-mapped Arrow file made once and read by index.

1. `prepare` streams groups through the tokenizer into the file, those of scored data as the ids
   that they are; host memory stays flat.
2. Counts of what was kept, cut and left out lie beside it in a JSON side-car, with the file's
   checksum and a key by which it is reused while inputs, tokenizer and limits stay the same.
3. `GroupDataset` reads group i from the memory map.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from copg_jax.checksums import check_file, file_sum, read_record, write_record
from copg_jax.config.sections import Limits
from copg_jax.data.formats.texts import TextGroup, given_text, stored_text
from copg_jax.data.formats.tldr import post_fraction
from copg_jax.data.groups import NUMBERS, TokenGroup, fit_group, tokenize_group
from copg_jax.data.reader import GroupReader
from copg_jax.data.rows import InvalidRow
from copg_jax.data.tokenizer import Encoder
from copg_jax.errors import InputError

log = logging.getLogger(__name__)

_FORMAT = 4
_ROWS_PER_RECORD_BATCH = 256
_GROUPS_PER_REPORT = 10_000
_MADE_ANEW = "It is made anew."
_ARROW_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "where": pa.string(),
        "prompt": pa.string(),
        "prompt_tokens": pa.list_(pa.int32()),
        "completions": pa.list_(pa.string()),
        "completion_tokens": pa.list_(pa.list_(pa.int32())),
        "rewards": pa.list_(pa.float32()),
        "ref_logps": pa.list_(pa.float32()),
        "has_eos": pa.list_(pa.bool_()),
        "origin": pa.list_(pa.int8()),
        "mu_logps": pa.list_(pa.float32()),
        "kept": pa.list_(pa.bool_()),
        "columns": pa.string(),
        "format": pa.string(),
    }
)


class GroupDataset:
    """Groups of tokens in a memory-mapped Arrow file; `dataset[i]` reads group i only.

    Attributes:
        stats: what was kept, cut and dropped by reason, and lengths; see `format_stats`.
        fingerprint: hash of contents and settings it was made from.
    """

    def __init__(self, path: Path) -> None:
        side_car = _read_side_car(path)
        self.stats: dict[str, Any] = side_car["stats"]
        self.fingerprint = hashlib.sha256(str(side_car["key"]).encode()).hexdigest()
        self._batches = _record_batches(path)

    def __len__(self) -> int:
        return self.stats["kept"]

    def __getitem__(self, index: int) -> TokenGroup:
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = self._batches[index // _ROWS_PER_RECORD_BATCH]
        row = {
            name: column[index % _ROWS_PER_RECORD_BATCH]
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
        format = row["format"].as_py()
        return TokenGroup(
            id=row["id"].as_py(),
            where=row["where"].as_py(),
            prompt=given_text(row["prompt"].as_py(), format),
            prompt_tokens=row["prompt_tokens"].values.to_numpy(),
            completions=tuple(given_text(text, format) for text in row["completions"].as_py()),
            completion_tokens=tuple(
                ids.values.to_numpy() for ids in row["completion_tokens"].values
            ),
            columns=json.loads(row["columns"].as_py()),
            format=format,
            **{
                name: row[name].values.to_numpy(zero_copy_only=False)
                for name in (*NUMBERS, "kept")
                if row[name].is_valid
            },
        )

    def num_tokens(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens of each of these groups, as (prompt, all completions); int64 [n, 2]."""
        sizes = np.empty((len(indices), 2), int)
        rows = np.asarray(indices) % _ROWS_PER_RECORD_BATCH
        which = np.asarray(indices) // _ROWS_PER_RECORD_BATCH
        for number in np.unique(which):
            here = which == number
            columns = self._batches[number]
            prompt = columns["prompt_tokens"].offsets.to_numpy()
            groups = columns["completion_tokens"].offsets.to_numpy()
            tokens = columns["completion_tokens"].values.offsets.to_numpy()
            first, after = rows[here], rows[here] + 1
            sizes[here, 0] = prompt[after] - prompt[first]
            sizes[here, 1] = tokens[groups[after]] - tokens[groups[first]]
        return sizes

    def __iter__(self) -> Iterator[TokenGroup]:
        return (self[index] for index in range(len(self)))

    def posts(self) -> Iterator[float]:
        """What tells the post of each group from others, however it was written or cut."""
        prompts = (prompt for batch in self._batches for prompt in batch["prompt"].to_pylist())
        return map(post_fraction, prompts)

    @property
    def has_rewards(self) -> bool:
        """Whether every group has a reward for each completion."""
        return self.stats["with_rewards"] == len(self)

    def shape(self, multiple: int = 8) -> tuple[int, int, int]:
        """Returns the smallest (P, K, C) of every group, P and C rounded up to `multiple`."""
        prompt, completion = (
            self.stats[name]["max"] for name in ("prompt_tokens", "completion_tokens")
        )
        return (
            -(-prompt // multiple) * multiple,
            self.stats["completions"]["max"],
            -(-completion // multiple) * multiple,
        )


def prepare(
    rows: Iterable[TextGroup | TokenGroup],
    tokenizer: PreTrainedTokenizerBase,
    *,
    path: Path,
    limits: Limits,
    vocab_size: int,
    end_ids: Sequence[int] = (),
) -> GroupDataset:
    """Tokenises groups into an Arrow file, or opens it where it is still valid.

    It is, while file contents, data config, tokenizer, limits and vocabulary size are the same, and
    the file is as it was written.

    Args:
        rows: a `GroupReader`, or any groups (then the file is always made anew).
        tokenizer: the model's tokenizer.
        path: the Arrow file; a JSON side-car with the counts lies beside it.
        limits: most tokens of a prompt and of a completion; what to do with bad rows.
        vocab_size: number of token ids that the model knows.
        end_ids: see `Encoder`.

    Raises:
        InputError: bad row, no row left, token id that the model does not know, or scored data of
            another tokenizer.
    """
    encoder = Encoder(tokenizer, end_ids)
    key = None
    if isinstance(rows, GroupReader):
        key = data_key(rows, encoder, limits, vocab_size)
        if is_prepared(path, key):
            return GroupDataset(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The counts go last, so that their presence means that the Arrow file belongs to them.
    _side_car(path).unlink(missing_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink()  # of a process that was ended
    part = path.with_name(f".{path.name}.tmp")
    dropped: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    try:
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, _ARROW_SCHEMA) as writer:
            groups = _token_groups(rows, encoder, limits, vocab_size, dropped, changed)
            while some := list(islice(groups, _ROWS_PER_RECORD_BATCH)):
                writer.write_batch(_record_batch(some))
        if isinstance(rows, GroupReader):
            dropped += rows.counts
            changed += rows.changed
        stats = _stats(part, dropped, changed)
        if isinstance(rows, GroupReader):
            stats |= {"rows": rows.rows_read, "text_format": rows.text_format}
        if stats["kept"] == 0:
            source = rows.source if isinstance(rows, GroupReader) else path
            raise InputError(
                f"{source}: the data set is empty: nothing was kept.\n{format_stats(stats)}\nCheck "
                "data.path, data.split and data.part."
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    write_record(_side_car(path), {"key": key, "stats": stats, "sum": file_sum(path)})
    return GroupDataset(path)


def data_key(rows: GroupReader, encoder: Encoder, limits: Limits, vocab_size: int) -> str:
    """Everything that decides what `prepare` makes of these; the arguments are `prepare`'s.

    Raises:
        InputError: data that cannot be read, or that was scored with another tokenizer.
    """
    rows.check_ids(encoder)
    made_of = rows.fingerprint(), rows.by_choice
    return json.dumps([_FORMAT, *made_of, *encoder.reads_by, *limits, vocab_size])


def is_prepared(path: Path, key: str) -> bool:
    """Whether `path` is the Arrow file that `prepare` makes of data with this `data_key`; says so
    where there is one that is damaged or of other data.
    """
    if not (path.exists() or _side_car(path).exists()):
        return False
    try:
        side_car = _read_side_car(path)
        if side_car["key"] != key:
            raise InputError(f"{path}: made of other data, tokenizer or limits. {_MADE_ANEW}")
        check_file(path, side_car["sum"], fix=_MADE_ANEW)
    except InputError as error:
        log.info("%s", error)
        return False
    return True


def format_stats(stats: dict[str, Any]) -> str:
    """Formats the counts of a prepared data set as a few readable lines."""
    lines = [f"kept {stats['kept']:,} of {stats['rows']:,} rows"]
    lines += [f"  {count:>9,} x dropped: {reason}" for reason, count in stats["dropped"].items()]
    lines += [f"  {count:>9,} x {reason}" for reason, count in stats["changed"].items()]
    for name in ("prompt_tokens", "completion_tokens", "completions"):
        sizes = stats[name]
        lines.append(
            f"  {name.replace('_', ' '):<18} mean {sizes['mean']:>6.1f}  max {sizes['max']:>5}"
        )
    return "\n".join(lines)


def _stats(path: Path, dropped: Counter[str], changed: Counter[str]) -> dict[str, Any]:
    """What an Arrow file holds and what was left out of it, ready for JSON."""
    batches = _record_batches(path)
    kept = sum(map(len, batches))
    stats: dict[str, Any] = {
        "rows": kept + dropped.total(),
        "kept": kept,
        "dropped": dict(dropped.most_common()),
        "changed": {name: count for name, count in changed.most_common() if count},
        "with_rewards": kept - sum(batch["rewards"].null_count for batch in batches),
    }
    for name, lists in {
        "prompt_tokens": [batch["prompt_tokens"] for batch in batches],
        "completion_tokens": [batch["completion_tokens"].flatten() for batch in batches],
        "completions": [batch["completions"] for batch in batches],
    }.items():
        sizes = np.concatenate([[], *(column.value_lengths() for column in lists)])
        stats[name] = {"mean": sizes.sum() / max(len(sizes), 1), "max": int(sizes.max(initial=0))}
    return stats


def _token_groups(
    rows: Iterable[TextGroup | TokenGroup],
    encoder: Encoder,
    limits: Limits,
    vocab_size: int,
    dropped: Counter[str],
    changed: Counter[str],
) -> Iterator[TokenGroup]:
    for number, group in enumerate(rows, start=1):
        if number % _GROUPS_PER_REPORT == 0:
            log.info("tokenising: %s groups read", f"{number:,}")
        try:
            if isinstance(group, TextGroup):
                tokens = tokenize_group(group, encoder, limits, changed)
            else:
                tokens = fit_group(group, limits, changed)
        except InvalidRow as error:
            if limits.invalid_rows == "error":
                raise
            tokens = error.reason
        if isinstance(tokens, str):
            dropped[tokens] += 1
            continue
        ids = np.concatenate([tokens.prompt_tokens, *tokens.completion_tokens])
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if len(outside):
            raise InputError(
                f"{group.where}: token id {outside[0]} is outside the model's vocabulary of "
                f"{vocab_size} tokens, so tokenizer and model do not belong together. Use the "
                "tokenizer of the model's own folder."
            )
        yield tokens


def _record_batches(path: Path) -> list[pa.RecordBatch]:
    """The batches of an Arrow file; they hold pointers into a memory map, not its contents."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    # Threads may share the batches, not the reader.
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def _record_batch(groups: list[TokenGroup]) -> pa.RecordBatch:
    rows = []
    for group in groups:
        texts = [stored_text(text) for text in (group.prompt, *group.completions)]
        columns = json.dumps(group.columns, default=str)
        own = {"prompt": texts[0], "completions": texts[1:], "columns": columns}
        rows.append(vars(group) | own)
    return pa.RecordBatch.from_pylist(rows, schema=_ARROW_SCHEMA)


def _side_car(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_side_car(path: Path) -> dict[str, Any]:
    return read_record(_side_car(path), wanted=("key", "stats", "sum"), fix=_MADE_ANEW)
