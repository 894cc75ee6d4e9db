"""Claims about which rows of a data set are read, and what is counted."""

import pytest

from copg_jax.config.sections import DataConfig
from copg_jax.data.formats.tldr import NEWS
from copg_jax.data.reader import OTHER_PART, OTHER_SPLIT, GroupReader
from copg_jax.data.rows import InvalidRow
from copg_jax.errors import InputError


def posts(count: int) -> list[dict]:
    """Preference pairs: two for each post."""
    return [
        {
            "prompt": f"SUBREDDIT: r/x\n\nTITLE: t{i // 2}\n\nPOST: post\n\nTL;DR:",
            "chosen": f"a{i}",
            "rejected": f"b{i}",
        }
        for i in range(count)
    ]


def test_train_and_validation_parts_share_no_post_and_miss_no_row(write_lines):
    path = write_lines(*posts(200))
    parts = {}
    for part in ("train", "validation"):
        reader = GroupReader(DataConfig(path=path, holdout_fraction=0.3, part=part))
        parts[part] = list(reader)
        assert reader.counts[OTHER_PART] == 200 - len(parts[part])
    prompts = {part: {group.prompt for group in groups} for part, groups in parts.items()}
    assert not prompts["train"] & prompts["validation"]
    assert len(parts["train"]) + len(parts["validation"]) == 200
    assert 30 <= len(parts["validation"]) <= 90


def test_rows_that_name_another_split_are_left_out_and_counted(write_lines, comparison_row):
    splits = ["train", "valid1", "valid2", None, "train"]
    path = write_lines(*(comparison_row | {"split": split} for split in splits))
    for split, kept in (("train", 3), ("validation", 3), ("test", 1)):
        reader = GroupReader(DataConfig(path=path, split=split))
        assert len(list(reader)) == kept
        assert reader.counts == ({OTHER_SPLIT: 5 - kept})


def test_bad_rows_stop_the_reading_or_are_counted_by_reason(write_lines):
    news = posts(1)[0] | {"prompt": "TITLE: t\n\ntext\n\nTL;DR:"}
    rows = [*posts(2), posts(1)[0] | {"prompt": ""}, posts(1)[0] | {"chosen": 1}, {"a": 1}, news]
    path = write_lines(*rows)
    with pytest.raises(InvalidRow, match=rf"{path}:3: "):
        list(GroupReader(DataConfig(path=path)))
    reader = GroupReader(DataConfig(path=path, invalid_rows="drop"))
    assert len(list(reader)) == 2 and reader.rows_read == 6
    assert reader.counts == {"empty prompt": 1, "wrong type": 1, "missing field": 1, NEWS: 1}
    assert len(list(reader)) == 2 and reader.rows_read == 6  # a second pass counts afresh


def test_malformed_json_stops_even_where_bad_rows_are_dropped(write_lines):
    path = write_lines(posts(1)[0], "{")
    with pytest.raises(InputError, match=":2: malformed JSON at column"):
        list(GroupReader(DataConfig(path=path, invalid_rows="drop")))


def test_files_of_two_schemas_are_not_mixed(write_lines, sft_row, comparison_row, tmp_path):
    write_lines(comparison_row, name="a.jsonl")
    write_lines(sft_row, name="b.jsonl")
    text = r"b.jsonl:1: schema 'OpenAI TL;DR posts' after 'OpenAI comparisons' at .*a.jsonl:1"
    with pytest.raises(InputError, match=text):
        list(GroupReader(DataConfig(path=str(tmp_path))))


@pytest.mark.parametrize("scored_first", [True, False])
def test_pairs_with_scores_and_pairs_without_are_not_mixed(write_lines, scored_first):
    rows = posts(3)
    for row in rows[:1] if scored_first else rows[1:]:
        row |= {"score_chosen": 2.0, "score_rejected": 1.0}
    path = write_lines(*rows)
    with pytest.raises(InputError, match=rf"{path}:2: schema 'preference pairs.* after .*:1"):
        list(GroupReader(DataConfig(path=path)))


def test_max_rows_counts_rows_of_the_part(write_lines):
    path = write_lines(*posts(100))
    config = DataConfig(path=path, max_rows=7, holdout_fraction=0.5, part="validation")
    assert len(list(GroupReader(config))) == 7


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be at least 1, got 0"),
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"holdout_fraction": 1.0}, r"holdout_fraction must be in \[0, 1\), got 1.0"),
        ({"part": "test"}, "part must be one of all, train, validation, got 'test'"),
        ({"invalid_rows": "skip"}, "invalid_rows must be one of error, drop, got 'skip'"),
        ({"part": "validation"}, "holdout_fraction is 0"),
    ],
)
def test_values_out_of_range_are_refused(changes, text):
    with pytest.raises(InputError, match=text):
        DataConfig(path="x", **changes)


def test_real_comparisons_split_by_post(tldr_folder):
    path = str(tldr_folder / "comparisons.jsonl")
    prompts, rows = {}, {}
    for part in ("train", "validation"):
        groups = list(GroupReader(DataConfig(path=path, holdout_fraction=0.1, part=part)))
        prompts[part], rows[part] = {group.prompt for group in groups}, len(groups)
    assert not prompts["train"] & prompts["validation"]
    assert sum(rows.values()) == 5671
    assert 0.05 < rows["validation"] / 5671 < 0.15
