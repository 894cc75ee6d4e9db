"""Claims about scored data: read back as any other data, atomic, tied to its models."""

import json
import math

import numpy as np
import pytest

from copg_jax.data.formats.columns import TextGroup
from copg_jax.data.groups import TokenGroup
from copg_jax.data.reader import DataConfig, GroupReader
from copg_jax.data.rows import find_files
from copg_jax.data.scored import (
    ScoredGroup,
    SideCar,
    finished_parts,
    read_side_car,
    verify,
    write_part,
    write_side_car,
)
from copg_jax.errors import InputError

PROMPT = "SUBREDDIT: r/x\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"
SIDE_CAR = SideCar(
    tokenizer_hash="tok1",
    reference_hash="ref1",
    rewards=[{"function": "length"}],
    limits={"max_prompt_tokens": 512},
    complete=True,
    counts={"rows": 2},
)


def scored(rewards=(1.5, None), ref_logps=(-3.25, -4.5)):
    """A pair with scores."""
    group = TokenGroup(
        id="g0",
        where="f.jsonl:8",
        prompt=PROMPT,
        prompt_tokens=np.arange(5, dtype=np.int32),
        completions=(" a", " b"),
        completion_tokens=(np.arange(2, dtype=np.int32), np.arange(3, dtype=np.int32)),
        columns={"reference": "r", "nested": [1, None]},
    )
    return ScoredGroup(group, rewards, ref_logps, {"length": rewards})


def test_scored_groups_are_read_back_as_groups(tmp_path):
    write_part(tmp_path, 1, [scored((0.5, 0.25))])
    write_part(tmp_path, 0, [scored((1.5, math.nan))])
    write_side_car(tmp_path, SIDE_CAR)
    groups = list(GroupReader(DataConfig(path=str(tmp_path))))
    columns = {"reference": "r", "nested": [1, None], "subreddit": "x", "title": "t"}
    assert groups == [
        TextGroup(
            "g0",
            f"{tmp_path}/part-0000{part}.parquet:1",
            PROMPT,
            (" a", " b"),
            rewards,
            (-3.25, -4.5),
            columns,
        )
        for part, rewards in ((0, (1.5, None)), (1, (0.5, 0.25)))
    ]


def test_parts_hold_counts_and_the_reward_of_each_function(tmp_path):
    import pyarrow.parquet as pq

    row = pq.read_table(write_part(tmp_path, 0, [scored()])).to_pylist()[0]
    assert row["prompt_token_count"] == 5 and row["completion_token_counts"] == [2, 3]
    assert dict(row["sources"]) == {"length": [1.5, None]}


def test_only_whole_parts_count_as_finished(tmp_path):
    assert finished_parts(tmp_path) == []
    for index in (0, 2):
        write_part(tmp_path, index, [scored()])
    (tmp_path / ".part-00003.parquet.77").write_bytes(b"half")
    with pytest.raises(InputError):
        write_part(tmp_path, 4, [scored(), scored((math.inf, 0.0))])
    assert finished_parts(tmp_path) == [0, 2]
    assert len(find_files(str(tmp_path))) == 2


def test_scores_that_cannot_be_trained_on_name_place_and_completion(tmp_path):
    with pytest.raises(InputError, match=r"f.jsonl:8: the reward of completion 1 is inf"):
        write_part(tmp_path, 0, [scored((0.0, math.inf))])
    with pytest.raises(
        InputError, match=r"f.jsonl:8: the reference log-prob.* completion 0 is nan"
    ):
        write_part(tmp_path, 0, [scored(ref_logps=(math.nan, -1.0))])
    with pytest.raises(InputError, match=r"f.jsonl:8: got 1 rewards for 2 completions"):
        write_part(tmp_path, 0, [scored((1.0,))])


def test_data_of_another_tokenizer_or_reference_is_refused(tmp_path):
    write_side_car(tmp_path, SIDE_CAR)
    assert verify(tmp_path, tokenizer_hash="tok1", reference_hash="ref1") == SIDE_CAR
    with pytest.raises(InputError, match=r"'tokenizer_hash': .* the tokenizer tok1, .* has tok2"):
        verify(tmp_path, tokenizer_hash="tok2", reference_hash="ref1")
    with pytest.raises(InputError, match=r"'reference_hash': .* reference model ref1, .* has ref2"):
        verify(tmp_path, tokenizer_hash="tok1", reference_hash="ref2")


def test_unfinished_missing_or_foreign_side_cars_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"scored.json: cannot be read .*score stage"):
        read_side_car(tmp_path)
    write_side_car(tmp_path, SideCar("tok1", "ref1", None, {}, complete=False))
    with pytest.raises(InputError, match="interrupted after 0 parts"):
        verify(tmp_path, tokenizer_hash="tok1", reference_hash="ref1")
    (tmp_path / "scored.json").write_text("{")
    with pytest.raises(InputError, match=r"scored.json:1: malformed JSON"):
        read_side_car(tmp_path)
    (tmp_path / "scored.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(InputError, match=r"wanted scored data of format 1 .*, got format 0"):
        read_side_car(tmp_path)
