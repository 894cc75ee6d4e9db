"""Claims about what counts as data: hidden files, metadata, splits, two formats, hub ids."""

import os

import pytest

from copg_jax.data.sources import (
    describe_files,
    find_files,
    fingerprint,
    is_hub_id,
    split_family,
)
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


TWICE = [
    ("train.jsonl", "train.parquet"),
    ("train.jsonl", "train.json"),
    ("train.jsonl", "train-00000-of-00001.parquet"),
    ("train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl"),
    ("train.jsonl", "train/0.jsonl"),
    ("a.jsonl", "a/b/0.parquet"),
]


@pytest.mark.parametrize("names", TWICE)
def test_the_same_name_in_two_forms_is_refused_with_both(tmp_path, names):
    path = make(tmp_path, *names)
    for place in (path, f"{path}/**"):
        with pytest.raises(InputError, match=r"the same name .* read twice") as caught:
            found(place)
        assert all(f"{path}/{name}" in str(caught.value) for name in names)
    assert found(f"{path}/{names[0]}") == [names[0]]


def test_files_that_are_parts_of_one_data_set_are_all_read(tmp_path):
    names = ["a/0.jsonl", "b/0.jsonl", "c-00000-of-00002.jsonl", "c-00001-of-00002.jsonl"]
    path = make(tmp_path, *names)
    assert len(found(path)) == len(found(f"{path}/**")) == 4


@pytest.mark.parametrize("names", [("a.jsonl", "b.jsonl"), ("x/0.jsonl", "copy of x/0.jsonl")])
def test_two_files_of_the_same_contents_are_refused_with_both(tmp_path, names):
    path = make(tmp_path, *names)
    with pytest.raises(InputError, match=r"the same contents.* read twice") as caught:
        fingerprint(path)
    assert all(f"{path}/{name}" in str(caught.value) for name in names)
    (tmp_path / names[0]).write_text('{"prompt": "p"}\n')
    assert fingerprint(path) != fingerprint(f"{path}/{names[1]}")


@pytest.mark.parametrize("pattern", ["**", "*", "*/*", "**/*.jsonl"])
def test_a_glob_gives_files_alone_whatever_folders_it_matches(tmp_path, pattern):
    path = make(tmp_path, "in/a.jsonl", "in/b.jsonl/c.jsonl")
    assert "a.jsonl" in found(f"{path}/in/{pattern}" if pattern != "*/*" else f"{path}/*/*")


@pytest.mark.parametrize("pattern", ["in*", "*", "i[n]"])
def test_a_glob_that_matches_folders_alone_names_them_and_the_fix(tmp_path, pattern):
    path = make(tmp_path, "in/a.jsonl")
    with pytest.raises(InputError, match=r"got folders alone \(.*/in\)") as caught:
        found(f"{path}/{pattern}")
    assert f"{path}/{pattern}/*.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "split", "wanted"),
    [
        ("*.jsonl", "train", "train.jsonl"),
        ("*.jsonl", "validation", "val.jsonl"),
        ("[tv]*", "train", "train.jsonl"),
        ("**/*", "val", "val.jsonl"),
        ("v*.jsonl", "train", "val.jsonl"),  # which names one split alone
    ],
)
def test_a_glob_over_several_splits_keeps_the_one_that_is_meant_and_says_so(
    tmp_path, pattern, split, wanted
):
    path = f"{make(tmp_path, 'train.jsonl', 'val.jsonl')}/{pattern}"
    assert found(path, split) == [wanted]
    left = {"train.jsonl": "val.jsonl", "val.jsonl": "train.jsonl"}[wanted]
    said = f"1 file: {tmp_path}/{wanted}"
    said += f"; 1 left out: {tmp_path}/{left}" * (pattern != "v*.jsonl")
    assert describe_files(path, split) == said
    if pattern == "*.jsonl":
        with pytest.raises(InputError, match=r"no file of split 'test'"):
            found(path, "test")


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
