"""Runs whose data, models and results lie in a bucket, with one in memory in its place."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from copg_jax import files
from copg_jax.config.load import load_config
from copg_jax.data import scored
from copg_jax.data.rows import read_rows
from copg_jax.data.sources import find_files
from copg_jax.errors import InputError
from copg_jax.files import GrowingFile, local_copy
from copg_jax.hf import weights as hf_weights
from copg_jax.models.params import init_params
from copg_jax.run_folder import check_run_folder, write_run_header
from copg_jax.tracking import MetricsLogger
from copg_jax.train import run as training
from copg_jax.train.checkpoint import Checkpoints
from tests.bucket import make_bucket
from tests.models import tiny
from tests.toys import LLAMA, names_all
from tests.workplace import DATA, MAINS, TRAINING, Workplace

SUFFIXES = (".txt", ".json")


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An empty bucket, and a cache of copies of its own."""
    monkeypatch.setattr(files, "_CACHE", tmp_path / "cache")
    return make_bucket(monkeypatch)


@pytest.fixture(params=["gs://bucket", "local"])
def root(request, bucket, tmp_path) -> epath.Path:
    """A folder in the bucket, and one on disk."""
    return epath.Path(request.param if "://" in request.param else tmp_path / "local")


def test_a_growing_file_holds_every_line_at_each_sync_and_at_the_end(root):
    path = root / "runs" / "a.txt"
    with GrowingFile(path, ["0\n"]) as file:
        file.write("1\n")
        file.sync()
        assert path.read_text() == "0\n1\n"
        file.write("2\n")
    assert path.read_text() == "0\n1\n2\n"
    with GrowingFile(path) as file:
        file.write("new\n")
    assert path.read_text() == "new\n"


def test_metrics_go_on_where_a_checkpoint_was_saved(root):
    with MetricsLogger(root, total_steps=3, quiet=True) as logger:
        logger.log(1, {"loss": 1.0})
        logger.sync()
        logger.log(2, {"loss": 2.0})
    with MetricsLogger(root, total_steps=3, quiet=True, resume_step=1) as logger:
        logger.log(2, {"loss": 20.0})
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 20.0)]


def test_the_header_claims_its_folder(root):
    write_run_header(root, LLAMA, {"data": "a"})
    check_run_folder(root, LLAMA)
    with pytest.raises(InputError, match="another content of: data"):
        write_run_header(root, LLAMA, {"data": "b"})
    assert (root / "config.yaml").exists()


def test_an_export_is_read_back_bit_for_bit_and_replaces_the_one_before(root):
    params = init_params(LLAMA, jax.random.key(0))
    for scale in (2, 1):
        scaled = jax.tree.map(lambda x, scale=scale: scale * x, params)
        hf_weights.save_pretrained(
            root / "model",
            LLAMA,
            scaled,
            head="lm",
            tokenizer=tiny.tokenizer(),
            max_shard_bytes=8192,
        )
        folder = hf_weights.resolve(str(root / "model"))
        read = hf_weights.load_params(folder, hf_weights.read_architecture(folder), head="lm")
        jax.tree.map(np.testing.assert_array_equal, read, scaled)
    names = {path.name for path in root.iterdir()}
    assert names == {"model"}


def test_a_copy_is_made_once_and_again_when_the_bucket_has_changed(bucket):
    bucket.pipe({"/b/m/a.json": b"1", "/b/m/deep/b.txt": b"2", "/b/m/c.bin": b"3"})
    copy = Path(local_copy("gs://b/m", SUFFIXES))
    assert sorted(path.name for path in copy.rglob("*.*")) == ["a.json", "b.txt"]
    (copy / "mark").write_text("")
    assert Path(local_copy("gs://b/m/", SUFFIXES)) == copy
    assert (copy / "mark").exists()
    bucket.pipe("/b/m/a.json", b"9")
    again = Path(local_copy("gs://b/m", SUFFIXES))
    assert (again / "a.json").read_text() == "9"
    assert not (again / "mark").exists()


def test_a_file_and_a_glob_are_copied_by_name(bucket):
    for name in ("train-1", "train-2", "valid"):
        bucket.pipe({f"/b/data/{name}.jsonl": b'{"a": 1}\n'})
    assert [row for _, row in read_rows("gs://b/data/train-1.jsonl")] == [{"a": 1}]
    names = [file.name for file in find_files("gs://b/data/*.jsonl")]
    assert names == ["train-1.jsonl", "train-2.jsonl"]
    assert [file.name for file in find_files("gs://b/data", "valid")] == ["valid.jsonl"]
    assert Path(local_copy("data/x.jsonl", SUFFIXES)) == Path("data/x.jsonl")


def test_what_is_not_there_is_named(bucket):
    for path in ("gs://b/none.json", "gs://b/none/*.json", "gs://b/none"):
        with pytest.raises(InputError) as caught:
            local_copy(path, SUFFIXES)
        names_all(str(caught.value), [path])
    with pytest.raises(InputError, match=r"cannot be reached.*Protocol"):
        local_copy("nowhere://b/m", SUFFIXES)


def test_of_several_processes_one_makes_the_copy_and_the_others_wait_for_it(bucket, monkeypatch):
    bucket.pipe("/b/m/a.json", b"1")
    get, calls = type(bucket).get, []

    def slow(system: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        time.sleep(0.1)
        return get(system, *arguments, **options)

    monkeypatch.setattr(type(bucket), "get", slow)
    with ThreadPoolExecutor() as pool:  # a lock of files holds between threads too
        copies = set(pool.map(local_copy, ["gs://b/m"] * 4, [SUFFIXES] * 4))
    assert len(calls) == len(copies) == 1


def test_what_a_copy_that_was_cut_short_has_left_is_gone_with_the_next(bucket, monkeypatch):
    bucket.pipe("/b/m/a.json", b"1")

    def dies(system: Any, names: list[str], targets: list[str]) -> None:
        Path(targets[0]).with_name("half.json").write_text("")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(bucket), "get", dies)
        local_copy("gs://b/m", SUFFIXES)
    copy = Path(local_copy("gs://b/m", SUFFIXES))
    assert [path.name for path in copy.iterdir()] == ["a.json"]
    assert not list((files._CACHE / "copies").rglob("half.json"))


def test_a_bucket_that_cannot_be_reached_is_named_whatever_it_raises(bucket, monkeypatch):
    class HttpError(Exception):
        """As of gcsfs."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise HttpError("Forbidden, 403")

    for name in ("exists", "find"):
        monkeypatch.setattr(type(bucket), name, forbidden)
    wanted = ["gs://b/m", "HttpError: Forbidden, 403", "credentials", "gcsfs"]
    for ask in (
        lambda path: local_copy(path, SUFFIXES),
        lambda path: check_run_folder(path, LLAMA),
    ):
        with pytest.raises(InputError) as caught:
            ask("gs://b/m")
        names_all(str(caught.value), wanted)


def test_a_bucket_without_the_package_for_it_is_refused_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError) as caught:
        check_run_folder("gs://nobody/nothing", LLAMA)
    names_all(
        str(caught.value), ["gs://nobody/nothing", "ImportError", "package gcsfs", "tpu extra"]
    )


def test_stages_read_from_a_bucket_and_write_into_it(bucket, tmp_path, monkeypatch):
    place = Workplace(tmp_path / "place")
    bucket.put(str(place.folder), "/b/place", recursive=True)
    # TensorStore has a way of its own into buckets, which nothing here can stand in for.
    monkeypatch.setattr(
        training, "Checkpoints", lambda _, **options: Checkpoints(tmp_path / "saved", **options)
    )
    posts, comparisons = "gs://b/place/data/sft.jsonl", "gs://b/place/data/comparisons.jsonl"
    rewards = "rewards=[{function: copg_jax.rewards.length}]"
    prompts = [f"evaluation.data.path={posts}", f"evaluation.{rewards}"]
    sizes = ["num_prompts=4", "max_new_tokens=4"]
    stages = {
        "sft": ["model.path=gs://b/place/base", f"data.path={posts}", *DATA, *TRAINING],
        "score": ["reference.path=gs://b/sft/model", f"data.path={comparisons}", *DATA, rewards],
        "evaluate": ["model.path=gs://b/sft/model", *prompts]
        + [f"evaluation.generation.{size}" for size in sizes],
    }
    for stage, arguments in stages.items():
        main, cls = MAINS[stage]
        main(load_config(cls, [*arguments, f"output_dir=gs://b/{stage}"]))
    written = {
        stage: {path.name for path in epath.Path(f"gs://b/{stage}").iterdir()} for stage in stages
    }
    header = {"config.yaml", "inputs.json", "versions.json", "metrics.jsonl"}
    assert written == {
        "sft": {*header, "model"},
        "score": {*header, "part-00000.parquet", "scored.json"},
        "evaluate": {*header, "evaluation.json", "generations.jsonl"},
    }
    folder = epath.Path("gs://b/score")
    side_car = scored.read_side_car(folder)
    scored.verify(
        folder,
        tokenizer_hash=side_car.tokenizer_hash,
        reference_hash=hf_weights.params_hash(hf_weights.resolve("gs://b/sft/model")),
    )
    assert len(list(read_rows("gs://b/score"))) == 24
