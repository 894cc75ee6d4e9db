"""Parts of a folder of groups: `part-00000.parquet`, ..., each written whole or not at all.

1. `write_rows` writes one, with a key of what it is of and checksums of its pages.
2. `find_whole` finds those that are as they were written: an interrupted run goes on with the
   others. A part tells this by itself, should the record that names it be lost.
3. `check_named` refuses parts that are not those that a record names.
"""

import logging
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from copg_jax.checksums import check_file, file_sum
from copg_jax.data.rows import Row
from copg_jax.data.scored_rows import SCHEMA
from copg_jax.errors import Damaged, InputError
from copg_jax.files import bucket_errors

log = logging.getLogger(__name__)

_KEY = b"copg_jax.key"  # in the metadata of a part


def part_name(index: int) -> str:
    """Name of the file of a part."""
    return f"part-{index:05d}.parquet"


def write_rows(
    folder: epath.Path,
    index: int,
    rows: Sequence[Row],
    key: str,
    metadata: Mapping[bytes, bytes] | None = None,
) -> dict[str, str]:
    """Writes one part, at once or not at all, and returns its name with its checksum.

    Args:
        folder: where the parts are.
        index: of the part.
        rows: as SCHEMA has them.
        key: what decides the parts of this folder, see `find_whole`.
        metadata: what else the part says of itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".part-*"):
        left.unlink()  # of a process that was ended
    path = folder / part_name(index)
    part = folder / f".{path.name}.tmp"
    own = {_KEY: _own_key(path, key), **(metadata or {})}
    table = pa.Table.from_pylist(rows, SCHEMA.with_metadata(own))
    try:
        with part.open("wb") as file:
            pq.write_table(table, file, write_page_checksum=True)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return {path.name: file_sum(path)}


def find_whole(folder: epath.Path, named: Mapping[str, str], key: str) -> dict[str, str]:
    """Returns names and checksums of the parts that are as they were written; names the others in
    the log, since they are to be made again.

    Args:
        folder: where the parts are; need not exist.
        named: those that a record names, and their checksums.
        key: what decides the parts, and which rows are in which. A part that the record does not
            name was written with the same one.

    Raises:
        InputError: a part cannot be read.
    """
    whole = {}
    for name, wanted in named.items():
        try:
            check_file(folder / name, wanted, fix="It is made again.")
        except Damaged as error:
            log.warning("%s", error)
        else:
            whole[name] = wanted
    with bucket_errors(folder):
        others = [p for p in sorted(folder.glob("part-*.parquet")) if p.name not in named]
        return whole | {path.name: file_sum(path) for path in others if _is_whole(path, key)}


def check_named(folder: epath.Path, named: Mapping[str, str], record: str, *, fix: str) -> None:
    """Raises InputError unless the parts are those that a record names, as they were written.

    Args:
        folder: where the parts are.
        named: the parts and their checksums.
        record: name of the file that names them.
        fix: the way out of one that is damaged, for the error.
    """
    for name, wanted in named.items():
        check_file(folder / name, wanted, fix=fix)
    for path in sorted(folder.glob("part-*.parquet")):
        if path.name not in named:
            raise InputError(
                f"{path}: no part of this data: {record} does not name it. Fix: move it away."
            )


def _own_key(path: epath.Path, key: str) -> bytes:
    return f"{path.name} of {key}".encode()


def _is_whole(path: epath.Path, key: str) -> bool:
    """Whether a part is of this key, and all of its pages fit their checksums."""
    raw = pa.BufferReader(path.read_bytes())
    try:
        schema = pq.read_table(raw, page_checksum_verification=True).schema
    except (OSError, pa.ArrowException):
        return False
    return schema.equals(SCHEMA) and (schema.metadata or {}).get(_KEY) == _own_key(path, key)
