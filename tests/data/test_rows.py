"""Claims about reading rows: every file kind, exact places in errors, the hub."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from copg_jax.data.rows import InvalidRow, read_rows
from copg_jax.data.sources import find_files, fingerprint
from copg_jax.errors import InputError


def test_jsonl_json_array_and_parquet_give_the_same_rows(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.json", "d.parquet"):
        assert [row for _, row in read_rows(str(tmp_path / name))] == rows
    places = [where for where, _ in read_rows(str(tmp_path / "*.jsonl"))]
    assert places == [f"{tmp_path}/a.jsonl:{line}" for line in (1, 2, 3)]
    assert len(list(read_rows(str(tmp_path)))) == 12


def test_a_folder_with_split_names_gives_the_split_asked_for(tmp_path):
    for name in ("train-00000.jsonl", "valid.jsonl", "test/0.jsonl", "info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    assert [f.name for f in find_files(str(tmp_path), "train")] == ["train-00000.jsonl"]
    assert [f.name for f in find_files(str(tmp_path), "validation")] == ["valid.jsonl"]
    assert [f.name for f in find_files(str(tmp_path), "test")] == ["0.jsonl"]
    (tmp_path / "valid.jsonl").unlink()
    with pytest.raises(InputError, match=r"no file of split 'validation'.*'test', 'train'"):
        find_files(str(tmp_path), "validation")


def test_malformed_json_names_file_line_and_column(write_lines):
    path = write_lines({"a": 1}, '{"a": 1, }')
    with pytest.raises(InputError, match=rf"{path}:2: malformed JSON at column 10"):
        list(read_rows(path))


def test_rows_that_are_no_objects_or_no_text_are_named(write_lines, tmp_path):
    (_, row) = list(read_rows(write_lines({}, "3")))[1]
    assert ":2: wanted a JSON object with named fields, got int." in str(row)
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}\n')
    with pytest.raises(InputError, match=r"latin.jsonl:1: not UTF-8"):
        list(read_rows(str(tmp_path / "latin.jsonl")))


def test_missing_and_unreadable_files_say_what_was_wanted(tmp_path):
    with pytest.raises(InputError, match=r"no/such/file.jsonl: no such file or folder.*data.path"):
        list(read_rows("no/such/file.jsonl"))
    with pytest.raises(InputError, match="holds no data file"):
        list(read_rows(str(tmp_path)))
    (tmp_path / "rows.csv").write_text("a\n")
    with pytest.raises(InputError, match=r"unknown file type '.csv'. Wanted one of .jsonl"):
        list(read_rows(str(tmp_path / "rows.csv")))
    (tmp_path / "bad.parquet").write_bytes(b"PAR0")
    with pytest.raises(InputError, match=r"bad.parquet: not a readable Parquet file"):
        list(read_rows(str(tmp_path / "bad.parquet")))
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "folder.jsonl")
    with pytest.raises(InputError, match=r"got folders alone .*loop.jsonl"):
        list(read_rows(str(tmp_path / "loop.json*")))


def test_the_fingerprint_follows_contents_not_times(write_lines):
    path = write_lines({"a": 1})
    first = fingerprint(path)
    write_lines({"a": 1})
    assert fingerprint(path) == first
    write_lines({"a": 2})
    assert fingerprint(path) != first


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: records the calls, streams two rows."""
    import datasets

    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        if path == "no/where":
            raise FileNotFoundError("no such data set")
        return iter([{"prompt": "p", "completion": "c"}] * 2)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_ids_are_streamed_and_script_only_sets_read_as_parquet(hub):
    rows = list(read_rows("trl-lib/tldr", split="validation", revision="abc"))
    assert [where for where, _ in rows] == [f"trl-lib/tldr[validation]:{i}" for i in (1, 2)]
    list(read_rows("openai/summarize_from_feedback"))
    assert hub == [
        ("trl-lib/tldr", {"revision": "abc", "split": "validation", "streaming": True}),
        (
            "openai/summarize_from_feedback",
            {
                "revision": "refs/convert/parquet",
                "split": "train",
                "streaming": True,
                "data_files": {"train": "comparisons/train/*.parquet"},
            },
        ),
    ]
    list(read_rows("openai/gsm8k", subset="main"))
    assert hub[2] == ("openai/gsm8k", {"revision": None, "split": "train", "streaming": True,
                                       "name": "main"})  # fmt: skip
    with pytest.raises(InputError, match=r"no/where: not a local path.*no such data set"):
        list(read_rows("no/where"))


DEEP = '{"prompt": "p", "completion": "c", "x": ' + "[" * 10_000 + "]" * 10_000 + "}"
LONG = '{"prompt": "p", "completion": "c", "x": ' + "9" * 5000 + "}"
TWICE = '{"prompt": "p", "completion": "c", "x": {"a": 1, "a": 2}}'
UNREADABLE = [
    (DEEP, "nested too deep"),
    (DEEP.replace("[", '{"a":').replace("]", "}").replace('"a":}', '"a":1}'), "nested too deep"),
    (LONG, "number too long"),
    (LONG.replace("999", "-999", 1), "number too long"),
    (TWICE, "field twice"),
    ('{"prompt": "p", "prompt": "q", "completion": "c"}', "field twice"),
    ("[1, 2]", "wrong type"),
    ("null", "wrong type"),
]


@pytest.mark.parametrize(("line", "reason"), UNREADABLE, ids=range(len(UNREADABLE)))
def test_a_row_that_cannot_be_read_is_an_invalid_row_and_the_others_are_read(
    write_lines, line, reason
):
    path = write_lines({"a": 1}, line, {"a": 3})
    first, (where, row), last = read_rows(path)
    assert (first[1], last[1]) == ({"a": 1}, {"a": 3})
    assert isinstance(row, InvalidRow) and row.reason == reason
    assert str(row).startswith(where) and where == f"{path}:2"


@pytest.mark.parametrize("line", [DEEP, LONG, TWICE], ids=["deep", "long", "twice"])
def test_an_array_with_such_a_row_is_refused_with_the_way_to_leave_it_out(tmp_path, line):
    path = tmp_path / "rows.json"
    path.write_text(f"[{line}]")
    with pytest.raises(InputError, match=r"rows.json:1: .*\n.*write one JSON object a line"):
        list(read_rows(str(path)))


def test_a_value_of_parquet_that_cannot_be_read_spoils_its_row_alone(tmp_path):
    texts = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    dates = pa.array([0, 0, 2**62], pa.timestamp("us"))
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": texts, "date": dates}), path)
    first, second, third = (row for _, row in read_rows(str(path)))
    assert isinstance(first, dict) and first["prompt"] == "a"
    for row, name in ((second, "'prompt'"), (third, "'date'")):
        assert isinstance(row, InvalidRow) and row.reason == "unreadable value"
        assert f"field {name} cannot be read" in str(row)


def test_a_column_that_is_there_twice_is_named(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"rows.parquet: column 'prompt' is there twice"):
        list(read_rows(str(tmp_path / "rows.parquet")))


def test_only_a_newline_ends_a_row(write_lines):
    text = "a\u2028b\x85c\x1cd\u2029"
    path = write_lines(json.dumps({"prompt": text}, ensure_ascii=False), {"prompt": "next"})
    assert [row["prompt"] for _, row in read_rows(path)] == [text, "next"]
