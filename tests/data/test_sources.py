"""Claims about what counts as data: hidden files, metadata, splits, two formats, hub ids."""

import os

import pytest

from copg_jax.data.sources import describe_files, find_files, is_hub_id, split_family
from copg_jax.errors import InputError


def make(folder, *names):
    """Writes files with one row each; returns the folder as data.path would name it."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n")
    return str(folder)


def found(path, split="train"):
    """Names of the files that are read."""
    return [file.name for file in find_files(path, split)]


NO_DATA = [
    ".ipynb_checkpoints/train-checkpoint.jsonl",
    ".cache/huggingface/download/train.json",
    ".git/index.json",
    "__MACOSX/._train.jsonl",
    "._train.jsonl",
    "dataset_infos.json",
    "dataset_info.json",
    "state.json",
    "config.json",
    "README.json",
]


@pytest.mark.parametrize("name", NO_DATA)
def test_hidden_files_and_metadata_are_no_data(tmp_path, name):
    path = make(tmp_path, "train.jsonl", name)
    assert found(path) == ["train.jsonl"]
    assert found(f"{path}/**/*.json*") == ["train.jsonl"]
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(InputError, match=r"holds no data file.* not hidden and no metadata"):
        found(path)


def test_what_is_named_itself_is_read_whatever_its_name_and_folder(tmp_path):
    make(tmp_path, ".hidden/state.json", ".hidden/a.jsonl")
    assert found(str(tmp_path / ".hidden" / "state.json")) == ["state.json"]
    assert found(str(tmp_path / ".hidden")) == ["a.jsonl"]
    assert found(str(tmp_path / ".hidden" / "*.jsonl")) == ["a.jsonl"]


@pytest.mark.parametrize("name", ["val", "dev", "valid", "validation", "Val-00000-of-2", "my_val"])
def test_validation_files_have_many_names_and_each_split_reaches_its_own(tmp_path, name):
    path = make(tmp_path, "train.jsonl", f"{name}.jsonl", "eval.jsonl")
    assert found(path) == ["train.jsonl"]
    assert found(path, "val") == found(path, "validation") == [f"{name}.jsonl"]
    assert found(path, "test") == found(path, "eval") == ["eval.jsonl"]


def test_files_without_a_split_are_those_to_train_on_beside_others(tmp_path):
    path = make(tmp_path, "data.jsonl", "dev.jsonl", "val.jsonl")
    assert found(path) == ["data.jsonl"]
    assert (found(path, "val"), found(path, "dev")) == (["val.jsonl"], ["dev.jsonl"])
    assert found(path, "validation") == ["dev.jsonl", "val.jsonl"]
    with pytest.raises(InputError, match=r"no file of split 'test'.*'dev', 'val'.*data.split"):
        found(path, "test")
    (tmp_path / "train.jsonl").write_text("{}\n")
    assert found(path) == ["train.jsonl"]


def test_a_word_that_holds_the_name_of_a_split_is_none():
    names = ["developer", "contest", "evaluate", "valley", "trainer", "interval"]
    assert [split_family(name) for name in names] == [None] * len(names)


@pytest.mark.parametrize("other", ["train.parquet", "train.json"])
def test_the_same_name_in_two_formats_is_refused_with_both(tmp_path, other):
    path = make(tmp_path, "train.jsonl", other)
    for place in (path, f"{path}/train*"):
        with pytest.raises(InputError, match=r"train.jsonl.* in two formats") as caught:
            found(place)
        assert other in str(caught.value)
    assert found(f"{path}/*.jsonl") == ["train.jsonl"]


def test_the_files_that_are_read_are_listed_the_first_few_and_how_many(tmp_path):
    path = make(tmp_path, *(f"part{i}.jsonl" for i in range(9)))
    text = describe_files(path)
    assert text.startswith(f"9 files: {path}/part0.jsonl, {path}/part1.jsonl") and "..." in text
    assert "part8" not in text
    assert describe_files(f"{path}/part8.jsonl") == f"1 file: {path}/part8.jsonl"


@pytest.mark.parametrize("name", [b"\xff.jsonl", b"a\x1b[2J.jsonl"])
def test_a_file_whose_name_is_no_text_is_refused(tmp_path, name):
    assert found(make(tmp_path, "zwei\u3000é.jsonl")) == ["zwei\u3000é.jsonl"]
    (tmp_path / os.fsdecode(name)).write_text("{}\n")
    with pytest.raises(InputError, match=r"wanted a file name that is text") as caught:
        find_files(str(tmp_path))
    assert str(caught.value).isprintable()


def test_a_path_into_a_local_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("runs/typo")
    make(tmp_path, "runs/scored/part.jsonl")
    assert not is_hub_id("runs/typo") and not is_hub_id("runs/scored")
    with pytest.raises(InputError, match=r"runs/typo: no such file.*the folder 'runs' is there"):
        find_files("runs/typo")
