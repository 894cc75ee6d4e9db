"""Workloads: the lengths of TL;DR; rows that cannot be computed are refused by file and line."""

import json
import math

import jax
import numpy as np
import pytest

from copg_jax.errors import InputError
from copg_jax.models.params import abstract_params
from experiments.benchmark.workload import MODELS, read_workload, write_workload
from tests.toys import names_all


def test_a_written_workload_has_the_lengths_of_tldr_and_is_read_back(tmp_path):
    path = tmp_path / "new folder" / "w.jsonl"
    write_workload(path, num_pairs=400)
    groups = read_workload(path, vocab_size=32000)
    prompt = np.array([len(group.prompt_tokens) for group in groups])
    completion = np.array([len(ids) for group in groups for ids in group.completion_tokens])
    assert len(groups) == 400 and completion.shape == (800,)
    assert prompt.min() >= 64 and prompt.max() <= 512 and abs(prompt.mean() - 340) < 15
    assert completion.min() >= 8 and completion.max() <= 64 and abs(completion.mean() - 36) < 2
    first = json.loads(path.read_text().splitlines()[0])
    np.testing.assert_array_equal(groups[0].prompt_tokens, first["prompt_ids"])
    np.testing.assert_array_equal(groups[0].completion_tokens[1], first["completion_ids"][1])
    np.testing.assert_allclose(groups[0].rewards, first["rewards"], rtol=1e-6)


def test_a_seed_decides_everything(tmp_path):
    texts = []
    for seed in (0, 0, 1):
        write_workload(tmp_path / "w.jsonl", num_pairs=3, seed=seed)
        texts.append((tmp_path / "w.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"prompt_ids": [1, 64]}, ["prompt_ids", "0 to 63", "got 1 to 64"]),
        ({"prompt_ids": [-1]}, ["prompt_ids", "got -1 to -1"]),
        ({"prompt_ids": []}, ["prompt_ids", "at least one"]),
        ({"prompt_ids": [0.5]}, ["prompt_ids", "integer"]),
        ({"completion_ids": [[3], []]}, ["completion_ids", "at least one"]),
        ({"completion_ids": [[3]]}, ["at least 2 completions", "got 1 completions and 2 rewards"]),
        ({"rewards": [1.0]}, ["reward each", "got 2 completions and 1 rewards"]),
        ({"rewards": None}, ["rewards"]),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_computed_is_refused_by_file_and_line(rows, write, change, wanted):
    rows[2] |= change
    path = write(rows)
    with pytest.raises(InputError) as caught:
        read_workload(path, vocab_size=64)
    names_all(str(caught.value), [f"{path}:3", *wanted])


def test_rows_that_are_no_objects_are_refused(rows, write):
    for bad in ([1], "text", {"prompt": [1]}):
        with pytest.raises(InputError, match=r"workload\.jsonl:11: wanted a JSON object"):
            read_workload(write([*rows, bad]), vocab_size=64)


def test_a_missing_file_says_how_to_write_one(tmp_path):
    with pytest.raises(InputError) as caught:
        read_workload(tmp_path / "none.jsonl", vocab_size=64)
    names_all(str(caught.value), ["none.jsonl", "experiments.benchmark workload", "--out"])


def test_an_empty_file_is_refused(write):
    with pytest.raises(InputError, match="at least one row"):
        read_workload(write([]), vocab_size=64)


def test_the_architectures_have_the_sizes_of_their_names():
    def parameters(name: str) -> int:
        shapes = jax.tree.leaves(abstract_params(MODELS[name]))
        return sum(math.prod(leaf.shape) for leaf in shapes)

    assert parameters("small") == pytest.approx(19.5e6, rel=0.01)
    assert parameters("smol") == pytest.approx(125e6, rel=0.02)
    assert parameters("1b") == pytest.approx(1.1e9, rel=0.01)
    assert parameters("7b") == pytest.approx(6.74e9, rel=0.001)
