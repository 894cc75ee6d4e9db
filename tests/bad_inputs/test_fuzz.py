"""Whatever stands in rows and in the files beside our data: it is taken, or named as bad input."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from copg_jax.config.load import load_config
from copg_jax.config.sections import DataConfig
from copg_jax.config.stages import SFTConfig
from copg_jax.data import scored
from copg_jax.data.dataset import GroupDataset, prepare
from copg_jax.data.reader import GroupReader
from copg_jax.data.tokenizer import load_tokenizer, tokenizer_hash
from copg_jax.errors import InputError
from copg_jax.run_folder import check_run_folder, write_run_header
from copg_jax.tracking import MetricsLogger
from tests.bad_inputs.ground import write

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)
CONFIG = load_config(SFTConfig, ["output_dir=a", "model.path=m", "data.path=d"])
SCHEMAS: list[dict[str, Any]] = [
    {"prompt": "Say a.", "completion": "a"},
    {"prompt": "Say a.", "label": "a"},
    {"prompt": "Say a.", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 0},
    {"prompt": "Say a.", "completions": ["a", "b"], "rewards": [1.0, None]},
    {"subreddit": "s", "title": "t", "post": "p", "summary": "x"},
    {
        "info": {"id": "i", "post": "p", "title": "t", "subreddit": "s"},
        "summaries": [{"text": "a"}, {"text": "b"}],
        "choice": 1,
    },
]
NAMES = sorted({name for row in SCHEMAS for name in row})
NAMES += ["id", "split", "messages", "images", "reward_chosen", "chosen_score", "logp_mu", "self"]

# Texts of JSON values: those that Python writes, and those that it reads without being able to.
STRANGE = [
    "1e999",
    "-1e999",
    "NaN",
    "9" * 400,
    "9" * 5000,
    "1" + "0" * 39,
    '"\\ud83d"',
    '"\\udc00x"',
]
STRANGE += ["[" * 9000 + "]" * 9000, '{"a":' * 9000 + "0" + "}" * 9000, '{"a": 1, "a": 2}', "[", ""]
TEXTS = st.text(st.characters(codec=None, exclude_categories=()), max_size=9)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
JSON = VALUES.map(json.dumps) | st.sampled_from(STRANGE)
CHANGES = st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3)


def raw(values: dict[str, Any], changes: dict[str, str]) -> bytes:
    """The text of an object with some fields in JSON of their own."""
    fields = {name: json.dumps(value) for name, value in values.items()} | changes
    text = ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields.items())
    return f"{{{text}}}".encode()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are others, missing, or there twice."""
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 8)))
    return content[:start] + draw(st.binary(max_size=8)) + content[end:]


@pytest.fixture(scope="module")
def tokenizer(ground) -> Any:
    return load_tokenizer(ground.base)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("here")


def prepared(path: Path, tokenizer: Any, **options: Any) -> GroupDataset:
    """The data set of a file or a scored folder, tokenised beside it."""
    config = DataConfig(path=str(path), **options)
    arrow = path.parent / "tokens" / "train.arrow"
    limits = config.limits
    return prepare(GroupReader(config), tokenizer, path=arrow, limits=limits, vocab_size=400)


def assert_rows_are_read_or_refused(path: Path, tokenizer: Any) -> None:
    """Bad rows stop the reading with their place, or are left out; what is kept is whole."""
    for invalid_rows in ("error", "drop"):
        with contextlib.suppress(InputError):
            dataset = prepared(path, tokenizer, invalid_rows=invalid_rows)
            assert len(list(dataset)) == len(dataset) > 0


@EXAMPLES
@given(st.sampled_from(SCHEMAS), CHANGES, st.sampled_from(["rows.jsonl", "rows.json"]))
def test_any_value_in_any_field_of_a_row_is_read_or_refused(here, tokenizer, row, changes, name):
    rows = [json.dumps(row).encode(), raw(row, changes)]
    content = b"\n".join(rows) if name == "rows.jsonl" else b"[" + b", ".join(rows) + b"]"
    write(here / name, content)
    assert_rows_are_read_or_refused(here / name, tokenizer)


@EXAMPLES
@given(st.data(), st.sampled_from(SCHEMAS))
def test_a_damaged_row_is_read_or_refused(here, tokenizer, data, row):
    content = json.dumps(row).encode() + b"\n"
    write(here / "rows.jsonl", content + data.draw(damaged(content)))
    assert_rows_are_read_or_refused(here / "rows.jsonl", tokenizer)


# --- files beside our data ---


def read_scored(folder: Path, tokenizer: Any) -> None:
    """As training does."""
    hashes = {"tokenizer_hash": tokenizer_hash(tokenizer), "reference_dtype": "float32"}
    scored.verify(folder, **hashes)
    assert len(list(GroupReader(DataConfig(path=str(folder))))) == 24


def read_tokens(folder: Path, tokenizer: Any) -> None:
    """As a run that goes on does."""
    assert len(list(prepared(folder / "rows.jsonl", tokenizer))) == 40


def begin(folder: Path, tokenizer: Any) -> None:
    """As a run does at its start."""
    check_run_folder(folder, CONFIG)
    write_run_header(folder, CONFIG, {"data": "1", "model": "2"})
    assert json.loads((folder / "inputs.json").read_text()) == {"data": "1", "model": "2"}


def log_on(folder: Path, tokenizer: Any) -> None:
    """As a run that goes on after its second step does."""
    with MetricsLogger(folder, total_steps=3, quiet=True, resume_step=2) as logger:
        logger.log(3, {"loss": 1.0})
    assert json.loads((folder / "metrics.jsonl").read_bytes().split(b"\n")[-2])["step"] == 3


FILES: dict[str, Callable[[Path, Any], None]] = {
    "scored.json": read_scored,
    "tokens/train.json": read_tokens,
    "inputs.json": begin,
    "versions.json": begin,
    "config.yaml": begin,
    "metrics.jsonl": log_on,
}


@pytest.fixture(scope="module")
def whole(ground, tokenizer, tmp_path_factory) -> Path:
    """A folder for each reader, in which all is well."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(ground.scored, folder, dirs_exist_ok=True)
    for name in ("config.yaml", "inputs.json"):
        (folder / name).unlink()
    begin(folder, tokenizer)
    shutil.copy(ground.posts, folder / "rows.jsonl")
    read_tokens(folder, tokenizer)
    rows = [{"step": step, "time": 1.0, "loss": 0.5} for step in (1, 2)]
    write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", FILES)
@settings(EXAMPLES, max_examples=50)
@given(st.data())
def test_any_file_of_ours_is_read_made_again_or_refused(here, whole, tokenizer, name, data):
    content = (whole / name).read_bytes()
    kinds = [damaged(content), JSON.map(str.encode), st.binary(max_size=20)]
    if name.endswith(".json"):
        values = json.loads(content)
        fields = st.sampled_from([*values, "new"])
        kinds.append(st.dictionaries(fields, JSON, max_size=2).map(lambda new: raw(values, new)))
    folder = here / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    write(folder / name, data.draw(st.one_of(kinds)))
    with contextlib.suppress(InputError):
        FILES[name](folder, tokenizer)
    assert epath.Path(folder / name).exists()
