"""Checksums: what is damaged, what cannot be read now, and what buckets raise."""

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest
from etils import epath
from etils.epath import gpath

from copg_jax import checksums
from copg_jax.errors import Damaged, InputError
from tests.bucket import make_bucket

READS: dict[str, Callable[[epath.Path], Any]] = {
    "file_sum": lambda folder: checksums.file_sum(folder / "a.txt"),
    "read_record": lambda folder: checksums.read_record(folder / checksums.NAME, fix="FIX"),
    "check": lambda folder: checksums.check(folder, fix="FIX"),
    "sealed_sums": lambda folder: checksums.sealed_sums(folder, fix="FIX"),
    "is_sealed": checksums.is_sealed,
    "note": lambda folder: checksums.note(folder, {"a": 1}),
    "seal": checksums.seal,
}


class HttpError(Exception):
    """What a client of a bucket raises: no OSError."""


@pytest.mark.parametrize("function", READS)
def test_whatever_a_bucket_raises_is_named_and_is_no_damage(function, monkeypatch):
    bucket = make_bucket(monkeypatch)
    folder = epath.Path("gs://b/folder")
    (folder / "a.txt").write_text("a")
    checksums.seal(folder)

    def forbidden(*_: Any, **__: Any) -> Any:
        raise HttpError("403")

    for name in ("_open", "ls", "find", "info", "exists", "isdir"):
        monkeypatch.setattr(type(bucket), name, forbidden)
    with pytest.raises(InputError, match=r"gs://b/folder.*HttpError: 403") as caught:
        READS[function](folder)
    assert not isinstance(caught.value, Damaged)


@pytest.mark.parametrize("function", ["file_sum", "read_record", "check"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.ETIMEDOUT, errno.ENOENT, errno.EISDIR])
def test_only_a_missing_file_is_damaged_of_those_that_cannot_be_read(
    tmp_path, monkeypatch, function, number
):
    folder = epath.Path(tmp_path)
    (folder / "a.txt").write_text("a")
    checksums.seal(folder)

    def failing(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    for method in ("open", "read_bytes"):
        monkeypatch.setattr(gpath.PosixGPath, method, failing, raising=False)
    with pytest.raises(InputError, match=os.strerror(number)) as caught:
        READS[function](folder)
    assert isinstance(caught.value, Damaged) == (number in (errno.ENOENT, errno.EISDIR))


@pytest.mark.parametrize("values", [{1: "a"}, {"a": {2: 3}}, {"a": (1, 2)}])
def test_a_record_is_whole_whatever_json_makes_of_its_values(tmp_path, values):
    checksums.write_record(tmp_path / "r.json", values)
    assert len(checksums.read_record(tmp_path / "r.json", fix="")) == 1
