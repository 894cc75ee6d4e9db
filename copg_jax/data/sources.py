"""Which files are the data behind a path, and what they contain.

1. `find_files` turns a path (file, folder or glob) into a sorted list of local files; hidden files,
   metadata and files of other splits are none of them.
2. `is_hub_id` tells a data set of the hub, `owner/name`, from a local path.
3. `fingerprint` hashes the files' contents, so that prepared data is reused only while valid.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

from copg_jax.errors import InputError
from copg_jax.files import local_copy

_PLAIN, COMPRESSED = (".jsonl", ".json"), (".gz", ".zst")
SUFFIXES = (*_PLAIN, ".parquet", *(plain + end for plain in _PLAIN for end in COMPRESSED))
SIDE_CAR = "scored.json"
SAMPLES = "sampled.json"
# Files that lie beside data and describe it.
_METADATA = {
    "config.json",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "metadata.json",
    "state.json",
}
# Words that name a split, as the library `datasets` understands them.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_FAMILY = {word: family for family, words in _SPLITS.items() for word in words}
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(_FAMILY)})(?![a-z])")
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # surrogates: bytes that are no UTF-8
_SHARD = re.compile(r"-\d{5}-of-\d{5}\Z")
_TWICE = (
    "Rows would be read twice. Remove one of them, or let data.path name the files that are meant."
)
_NUM_LISTED = 5


def suffix_of(file: Path) -> str:
    """The ending of a file's name that says what it holds, such as `.jsonl.gz`."""
    return next((ending for ending in SUFFIXES if file.name.endswith(ending)), file.suffix)


def is_hub_id(path: str) -> bool:
    """Whether `path` means a hub data set: `owner/name`, and neither is local."""
    return (
        re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None
        and not path.endswith(SUFFIXES)
        and not Path(path).exists()
        and not Path(path).parent.is_dir()
    )


def find_files(path: str, split: str = "train") -> list[Path]:
    """Returns the data files behind a path or a URL (local copies of them), sorted by name.

    Of a folder or glob, these are no data: names that begin with a dot or two underscores, and
    files that describe a data set. Where files are named after splits (`train.jsonl`,
    `valid-00000.parquet`, `test/0.parquet`), only those of `split` are kept; those without such a
    name are of the split `train` if no other is. A glob that matches files of one split alone means
    these, whatever `split` is.

    Raises:
        InputError: nothing there, no data file in the folder, no file of this split, or the same
            data in two formats.
    """
    return _find_files(path, split)[0]


def _find_files(path: str, split: str) -> tuple[list[Path], list[Path]]:
    """The data files behind a path, and those that look like data and are left out."""
    place = Path(local_copy(path, SUFFIXES))
    if place.is_file():
        found = files = [place]
    elif place.is_dir():
        found = [file for file in place.rglob("*") if _looks_like_data(file) and not file.is_dir()]
        if (place / SIDE_CAR).exists() or (place / SAMPLES).exists():
            found = list(place.glob("part-*.parquet"))
        files = _of_split(place, _data_of(place, found), split)
    else:
        matches = [Path(match) for match in glob(str(place), recursive=True)]
        found = [match for match in matches if not match.is_dir()]
        if matches and not found:
            raise InputError(
                f"{path}: wanted files, got folders alone ({_listed(sorted(matches))}). Let "
                f"data.path name the files in them: {path.rstrip('/')}/*.jsonl, for example."
            )
        root = _fixed_part(place)
        files = _data_of(root, found)
        if len({word and _FAMILY[word] for word in _words(root, files).values()}) > 1:
            files = _of_split(root, files, split)
    if not files:
        raise InputError(_nothing_at(path))
    for file in files:
        if _NO_TEXT.search(str(file)):
            raise InputError(f"{str(file)!r}: wanted a file name that is text. Rename the file.")
        if not _looks_like_data(file):
            raise InputError(
                f"{file}: unknown file type '{file.suffix}'. Wanted one of {', '.join(SUFFIXES)}."
                f"{_convert(file)}"
            )
        if not file.exists():
            raise InputError(
                f"{file}: wanted a file, got a link to {os.readlink(file)}, which is not there. "
                "Restore that file, or remove the link."
            )
    _require_once(files)
    return files, sorted(set(filter(_looks_like_data, found)) - set(files))


def _looks_like_data(file: Path) -> bool:
    return suffix_of(file) in SUFFIXES


def _convert(file: Path) -> str:
    """How a file of comma-separated values becomes data; nothing for another one."""
    if file.suffix not in (".csv", ".tsv"):
        return ""
    options = ", parse_options=csv.ParseOptions(delimiter='\\t')" * (file.suffix == ".tsv")
    options += ", parse_options=csv.ParseOptions(newlines_in_values=True)" * (not options)
    target = file.with_suffix(".parquet").name
    return (
        " Types of its values, and line breaks in them, are a guess: convert it and look at the "
        'result: python -c "from pyarrow import csv, parquet; '
        f"parquet.write_table(csv.read_csv('{file.name}'{options}), '{target}')\""
    )


def describe_files(path: str, split: str = "train") -> str:
    """The files behind a path for a log: how many are read and left out, and the first names."""
    if is_hub_id(path):
        return "a data set of the hub"
    files, left = _find_files(path, split)
    text = f"{len(files)} file{'s' * (len(files) > 1)}: {_listed(files)}"
    return text + f"; {len(left)} left out: {_listed(left)}" * bool(left)


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files[:_NUM_LISTED])) + ", ..." * (len(files) > _NUM_LISTED)


def fingerprint(
    path: str, *, split: str = "train", revision: str | None = None, subset: str | None = None
) -> str:
    """Returns a hash of the contents behind `path`.

    Note:
        For a hub id it covers id, split, revision and subset only: a commit as revision pins the
        contents.

    Raises:
        InputError: a file that cannot be read, or two with the same contents.
    """
    digest = hashlib.sha256()
    if is_hub_id(path):
        digest.update(repr((path, split, revision, subset)).encode())
        return digest.hexdigest()
    seen: dict[bytes, Path] = {}
    for file in find_files(path, split):
        try:
            with file.open("rb") as stream:
                contents = hashlib.file_digest(stream, "sha256").digest()
        except OSError as error:
            raise InputError(
                f"{file}: cannot be read ({error}). Check the file and its permissions."
            ) from error
        digest.update(f"{file.name}:".encode() + contents)
        if (other := seen.setdefault(contents, file)) != file:
            raise InputError(f"{file} and {other}: the same contents. {_TWICE}")
    return digest.hexdigest()


def split_family(name: str) -> str | None:
    """Returns `train`, `validation` or `test` for a name with a word for it (`valid1`, `a-val`)."""
    word = _split_word(name)
    return word and _FAMILY[word]


def _split_word(name: str) -> str | None:
    match = _SPLIT_WORD.search(name.lower())
    return match and match.group()


def _data_of(root: Path, files: Sequence[Path] | map) -> list[Path]:
    """Those of the files below `root` that are data, sorted."""

    def is_data(file: Path) -> bool:
        *_, name = parts = file.relative_to(root).parts
        hidden = any(part.startswith((".", "__")) for part in parts)
        return not (hidden or name.lower() in _METADATA or name.lower().startswith("readme"))

    return sorted(filter(is_data, files))


def _fixed_part(pattern: Path) -> Path:
    """The folder of a glob in which it begins to look."""
    return next(parent for parent in pattern.parents if not has_magic(str(parent)))


def _words(folder: Path, files: Sequence[Path]) -> dict[Path, str | None]:
    """The word for a split in the name of each file below a folder."""

    def word_of(file: Path) -> str | None:
        parts = reversed(file.relative_to(folder).parts)  # the file's own name says more
        return next((word for part in parts if (word := _split_word(part))), None)

    return {file: word_of(file) for file in files}


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    if not files:
        tables = sorted(file for file in folder.rglob("*") if _convert(file))
        raise InputError(
            f"{folder}: the folder holds no data file. Wanted at least one of "
            f"{', '.join(SUFFIXES)} that is not hidden and no metadata."
            + "".join(f" Of {file}:{_convert(file)}" for file in tables[:1])
        )

    words = _words(folder, files)
    if not any(words.values()):
        return files
    family = split_family(split) or split
    for is_meant in (
        lambda word: word == split.lower(),
        lambda word: word is not None and _FAMILY[word] == family,
        lambda word: word is None and family == "train",
    ):
        chosen = [file for file in files if is_meant(words[file])]
        if chosen:
            return chosen
    found = sorted({word for word in words.values() if word})
    raise InputError(
        f"{folder}: no file of split '{split}'; there are files of {found}. Set data.split."
    )


def _require_once(files: Sequence[Path]) -> None:
    """Raises InputError where the names of two files say that they hold the same rows: those of
    `train.jsonl`, `train.parquet`, `train-00000-of-00002.parquet` and `train/0.jsonl`.
    """
    seen: dict[Path, tuple[Path, tuple[str, str]]] = {}
    for file in files:
        whole = file.name.removesuffix(suffix_of(file))
        stem = _SHARD.sub("", whole)
        form = suffix_of(file), whole.removeprefix(stem)[6:]  # with the number of parts
        other, other_form = seen.setdefault(file.with_name(stem), (file, form))
        if other != file and other_form != form:
            raise InputError(f"{file} and {other}: the same name in two formats. {_TWICE}")
    for file in files:
        for parent in file.parents:
            if parent in seen:
                raise InputError(f"{file} and {seen[parent][0]}: the same name twice. {_TWICE}")


def _nothing_at(path: str) -> str:
    first = Path(path).parts[0] if path else ""
    local = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and Path(first).is_dir():
        local = f" (the folder '{first}' is there, so that this is taken for a path)"
    return (
        f"{path}: no such file or folder. Wanted a local file, folder or glob of "
        f"{', '.join(SUFFIXES)}, or a data set's hub id 'owner/name'{local}. Check data.path "
        "(relative paths start at the working directory)."
    )
