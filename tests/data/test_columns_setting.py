"""`data.columns` reads fields of other names; rows come compressed, too, and tables are refused."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest

from copg_jax.config.load import load_config
from copg_jax.config.sections import DataConfig
from copg_jax.config.stages import SFTConfig
from copg_jax.data.reader import GroupReader
from copg_jax.data.rows import InvalidRow, read_rows
from copg_jax.data.sources import find_files
from copg_jax.errors import InputError

ROW = {"question": "a", "answer": "b", "topic": 3}
NAMES = {"prompt": "question", "completion": "answer"}


def test_fields_of_other_names_are_read_and_no_columns_any_more(write_lines):
    path = write_lines(ROW)
    (group,) = GroupReader(DataConfig(path=path, columns=NAMES))
    assert (group.prompt, group.completions) == ("a", ("b",))
    assert group.columns == {"topic": 3, "reference": "b"}
    turned = {"prompt": "completion", "completion": "prompt"}
    path = write_lines({"prompt": "b", "completion": "a"}, name="turned.jsonl")
    (group,) = GroupReader(DataConfig(path=path, columns=turned))
    assert (group.prompt, group.completions) == ("a", ("b",))


def test_rows_of_every_format_and_columns_of_rewards_have_names_to_give(write_lines):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_lines({"conversation": messages, "gold": "c"})
    names = {"messages": "conversation", "reference": "gold"}
    (group,) = GroupReader(DataConfig(path=path, columns=names))
    assert (group.prompt, group.columns) == (messages[:1], {"reference": "c"})
    post = {"sub": "x", "head": "t", "body": "p", "tldr": "s"}
    names = dict(zip(("subreddit", "title", "post", "summary"), post, strict=True))
    (group,) = GroupReader(DataConfig(path=write_lines(post), columns=names))
    assert group.format == "tldr" and group.completions == (" s",)


def test_a_field_that_is_missing_names_those_there_are(write_lines):
    path = write_lines(ROW, {"query": "a", "answer": "b"})
    with pytest.raises(InvalidRow, match=rf"{path}:2: .*'question', .* missing.*'answer', 'query'"):
        list(GroupReader(DataConfig(path=path, columns=NAMES)))


def test_two_fields_for_one_and_one_for_two_are_refused(write_lines):
    path = write_lines(ROW | {"prompt": "c"})
    with pytest.raises(InvalidRow, match=rf"{path}:1: .*'question', but the row has 'prompt' too"):
        list(GroupReader(DataConfig(path=path, columns=NAMES)))
    with pytest.raises(InputError, match="columns must name a field of the data once"):
        DataConfig(path=path, columns={"prompt": "text", "completion": "text"})


def test_columns_are_set_on_the_command_line_and_are_part_of_what_data_is(write_lines):
    path = write_lines(ROW)
    arguments = ["output_dir=a", "model.path=m", f"data.path={path}"]
    columns = "data.columns={prompt: question, completion: answer}"
    config = load_config(SFTConfig, [*arguments, columns])
    assert config.data.columns == NAMES
    plain = load_config(SFTConfig, arguments).data
    assert GroupReader(config.data).fingerprint() != GroupReader(plain).fingerprint()


ROWS = [{"prompt": "a", "completion": f"b{i}"} for i in range(99)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
PACKED = {
    "rows.jsonl.gz": gzip.compress(LINES),
    "rows.jsonl.zst": pa.Codec("zstd").compress(LINES, asbytes=True),
    "rows.json.gz": gzip.compress(b" \n" + json.dumps(ROWS).encode()),
    "rows.json.zst": pa.Codec("zstd").compress(json.dumps(ROWS).encode(), asbytes=True),
    "parts.jsonl.gz": gzip.compress(LINES[:900]) + gzip.compress(LINES[900:]),
}


@pytest.mark.parametrize("name", PACKED)
def test_compressed_rows_are_read_and_half_a_file_of_them_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(PACKED[name])
    assert [row for _, row in read_rows(str(tmp_path))] == ROWS
    where, _ = next(read_rows(str(tmp_path / name)))
    assert where.startswith(f"{tmp_path / name}:")
    half = PACKED[name][: len(PACKED[name]) // 2]
    for content in (half, PACKED[name] + b"more", b"no archive"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: cannot be read .*fetch it again"):
            list(read_rows(str(tmp_path)))


def test_a_file_and_its_compressed_copy_are_not_both_read(tmp_path):
    for name in ("train.jsonl", "train.jsonl.gz"):
        (tmp_path / name).write_bytes(b"{}\n")
    with pytest.raises(InputError, match="the same name in two formats"):
        find_files(str(tmp_path))


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_table_is_refused_with_a_command_that_converts_it(name, is_folder, tmp_path, monkeypatch):
    comma = {"rows.csv": ",", "rows.tsv": "\t"}[name]
    (tmp_path / name).write_text(f"prompt{comma}completion\na{comma}b\n")
    with pytest.raises(InputError) as caught:
        find_files(str(tmp_path if is_folder else tmp_path / name))
    _, _, command = str(caught.value).partition('python -c "')
    monkeypatch.chdir(tmp_path)
    exec(command.rstrip('"'), {})
    rows = [row for _, row in read_rows(str(Path("rows.parquet")))]
    assert rows == [{"prompt": "a", "completion": "b"}]
