"""A bucket in memory, behind gs:// URLs: for `etils.epath` and for fsspec, without a network."""

import sys
from typing import Any

import pytest
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """Objects come into being whole and cannot grow."""

    protocol = ("gs", "gcs")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "a" in mode:
            raise NotImplementedError("objects cannot grow")
        return super()._open(path, mode, **options)


def make_bucket(monkeypatch: pytest.MonkeyPatch) -> MemoryFileSystem:
    """A new bucket, into which gs:// leads until the end of the test."""
    new = type("NewBucket", (Bucket,), {"store": {}, "pseudo_dirs": [""]})
    for name in Bucket.protocol:
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, name, new)
    # Of etils, a file system that it keeps.
    monkeypatch.setattr(backend, "fsspec_backend", backend._FileSystemSpecBackend())
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", backend.fsspec_backend)
    return new()
