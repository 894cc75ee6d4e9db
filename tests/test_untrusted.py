"""Nothing that the user did not name is run or opened to others, whatever files say."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from etils import epath

from copg_jax.config.sections import DataConfig
from copg_jax.data.reader import GroupReader
from copg_jax.errors import InputError
from copg_jax.files import GrowingFile, local_copy, write_text
from copg_jax.hf import weights
from tests.models import tiny

MODULE = "a_module_that_only_data_names"


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is written where the module is imported, or its pickle loaded."""
    path = tmp_path / "was_run"
    (tmp_path / f"{MODULE}.py").write_text(f"open({str(path)!r}, 'w').close()\nf = print\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


@pytest.mark.parametrize("name", ["function", "reward", "loss", "_target_", "py/object", "class"])
def test_a_dotted_path_in_a_row_is_text(tmp_path, mark, name):
    row = {"prompt": "a", "completions": [" b", " c"], "rewards": [1, 0], name: f"{MODULE}.f"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    [group] = GroupReader(DataConfig(str(tmp_path / "rows.jsonl")))
    assert group.completions == (" b", " c")
    assert MODULE not in sys.modules
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickle_is_never_loaded(tmp_path, mark, name):
    folder = tiny.write_checkpoint(tmp_path / "model", "llama3")
    (folder / "model.safetensors").unlink()
    command = f"touch {mark}"
    (folder / name).write_bytes(b"cos\nsystem\n(S'" + command.encode() + b"'\ntR.")
    with pytest.raises(InputError, match=r"never read|not a readable safetensors"):
        weights.load_params(folder, weights.read_architecture(folder), head="lm")
    assert not mark.exists()


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_are_open_to_others_as_far_as_the_umask_says(tmp_path, monkeypatch, mask):
    monkeypatch.setattr("copg_jax.files._CACHE", tmp_path / "cache")
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "rows.jsonl").write_text("{}\n")
    before = os.umask(mask)
    try:
        write_text(epath.Path(tmp_path / "text"), "a")
        with GrowingFile(tmp_path / "folder" / "log", ["a\n"]) as file:
            file.write("b\n")
        copy = Path(local_copy(f"file://{tmp_path}/bucket/rows.jsonl", [".jsonl"]))
    finally:
        os.umask(before)
    made = [tmp_path / "text", tmp_path / "folder", tmp_path / "folder" / "log", copy]
    made += [tmp_path / "cache", copy.parent]
    for path in made:
        assert not stat.S_IMODE(path.stat().st_mode) & mask, path
