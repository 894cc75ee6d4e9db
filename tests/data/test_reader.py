"""Claims about which rows of a data set are read, and what is counted."""

from dataclasses import replace
from pathlib import Path

import pytest

from copg_jax.config.sections import TEXT_FORMATS, DataConfig
from copg_jax.data.formats.choice import FORMATS
from copg_jax.data.formats.tldr import NEWS
from copg_jax.data.reader import CONTRADICTED, OTHER_PART, OTHER_SPLIT, REJECTED, GroupReader
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


TEXT = {"prompt": "Say a.", "chosen": "a", "rejected": "b"}
NEWS_ROW = {"prompt": "TITLE: t\n\ntext\n\nTL;DR:", "chosen": "a", "rejected": "b"}


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


def test_the_fingerprint_knows_contents_and_settings_but_no_path(write_lines, monkeypatch):
    path = Path(write_lines(TEXT))
    monkeypatch.chdir(path.parent)
    paths = [path, path.name, f"./{path.name}", f"../{path.parent.name}/{path.name}"]
    assert len({GroupReader(DataConfig(path=str(p))).fingerprint() for p in paths}) == 1
    first = GroupReader(DataConfig(path=str(path))).fingerprint()
    assert GroupReader(DataConfig(path=str(path), split="test")).fingerprint() != first
    assert GroupReader(DataConfig(path=str(path)), chosen_only=True).fingerprint() != first


@pytest.mark.parametrize("path", ["owner/name", "owner/other"])
def test_the_fingerprint_of_a_hub_data_set_knows_its_id_and_shows_no_setting(path):
    config = DataConfig(path=path, revision="sk-4711")
    fingerprint = GroupReader(config).fingerprint()
    assert fingerprint != GroupReader(replace(config, path="owner/third")).fingerprint()
    assert "sk-4711" not in fingerprint and path not in fingerprint


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


def test_values_that_no_file_could_hold_are_left_out_and_counted(write_lines):
    lines = [
        TEXT | {"prompt": "hi \ud83d"},
        TEXT | {"margin": [["\udc00"]]},
        '{"prompt": "p", "chosen": "a", "rejected": "b", "x": ' + "[" * 10**4 + "]" * 10**4 + "}",
        '{"prompt": "p", "chosen": "a", "rejected": "b", "x": ' + "1" * 5000 + "}",
        TEXT | {"rewards": [10**400, 1]},
        "3",
        TEXT,
    ]
    reader = GroupReader(DataConfig(path=write_lines(*lines), invalid_rows="drop"))
    (group,) = reader
    assert (group.prompt, reader.rows_read) == ("Say a.", 7)
    assert reader.counts == {
        "half a surrogate pair": 2,
        "nested too deep": 1,
        "number too long": 1,
        "non-finite rewards": 1,
        "wrong type": 1,
    }
    for line, name in ((lines[0], "'prompt'"), (lines[2], "nested"), (lines[3], "digits")):
        path = write_lines(line)
        with pytest.raises(InvalidRow, match=rf"{path}:1: .*{name}"):
            list(GroupReader(DataConfig(path=path)))


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


@pytest.mark.parametrize(
    ("first", "second", "wanted", "got"),
    [
        (TEXT, posts(1)[0], "text", "tldr"),
        (posts(1)[0], TEXT, "tldr", "text"),
        (TEXT, NEWS_ROW, "text", "tldr"),
        (NEWS_ROW, TEXT, "tldr", "text"),
    ],
)
def test_the_first_row_decides_the_format_and_one_in_another_names_both_and_the_fix(
    write_lines, first, second, wanted, got
):
    path = write_lines(first, first, second)
    text = f"{path}:3: the text is in the format '{got}', but the row at {path}:1, which was first"
    with pytest.raises(InvalidRow, match=rf"{text}, in '{wanted}': .* data.format=text, which"):
        list(GroupReader(DataConfig(path=path)))
    # A row that cannot be used decides nothing.
    path = write_lines(second | {"chosen": 3}, second | {"prompt": " "}, first, second)
    reader = GroupReader(DataConfig(path=path, invalid_rows="drop"))
    assert len(list(reader)) == (0 if first is NEWS_ROW else 1)
    assert reader.text_format == wanted
    assert reader.counts[f"not in the format '{wanted}'"] == 1


def test_a_format_that_is_named_takes_its_rows_and_refuses_others(write_lines, comparison_row):
    every = [posts(1)[0], TEXT, NEWS_ROW]
    config = DataConfig(path=write_lines(*every), format="text")
    assert [group.prompt for group in GroupReader(config)] == [row["prompt"] for row in every]
    for name, row in (("tldr", TEXT), ("text", comparison_row)):
        config = DataConfig(path=write_lines(row), format=name)
        other = "tldr" if name == "text" else "text"
        with pytest.raises(InvalidRow, match=rf":1: .* not in the format '{name}'.*{other}"):
            list(GroupReader(config))


def test_every_format_can_be_named():
    assert ("auto", *FORMATS) == TEXT_FORMATS


def test_text_is_split_into_parts_by_prompt(write_lines):
    rows = [TEXT | {"prompt": f"Say {i // 2}."} for i in range(200)]
    path, prompts = write_lines(*rows), {}
    for part in ("train", "validation"):
        groups = GroupReader(DataConfig(path=path, holdout_fraction=0.3, part=part))
        prompts[part] = {group.prompt for group in groups}
    assert not prompts["train"] & prompts["validation"]
    assert 15 <= len(prompts["validation"]) <= 45 and sum(map(len, prompts.values())) == 100


SCORED_PAIR = TEXT | {"score_chosen": 1.0, "score_rejected": 2.0}


@pytest.mark.parametrize("row", [TEXT, SCORED_PAIR, "comparison"])
def test_of_a_preference_the_chosen_completion_alone_is_learnt_and_the_others_counted(
    write_lines, row, comparison_row
):
    row, wanted = (comparison_row, " no bike") if row == "comparison" else (row, "a")
    reader = GroupReader(DataConfig(path=write_lines(row, row)), chosen_only=True)
    groups = list(reader)
    assert [group.completions for group in groups] == [(wanted,)] * 2
    assert [group.rewards for group in groups] == [None] * 2
    assert reader.changed[REJECTED] == 2


@pytest.mark.parametrize("chosen_only", [False, True])
@pytest.mark.parametrize(
    ("scores", "count"),
    [
        ({"score_chosen": 1.0, "score_rejected": 2.0}, 2),
        ({"rewards": [-1, 0]}, 2),
        ({"score_chosen": 1.0, "score_rejected": 1.0}, 0),
        ({"score_chosen": None, "score_rejected": 2.0}, 0),
        ({"rewards": [2, 1]}, 0),
        ({}, 0),
    ],
)
def test_pairs_whose_scores_contradict_the_choice_are_counted(
    write_lines, scores, count, chosen_only
):
    row = TEXT | scores
    reader = GroupReader(DataConfig(path=write_lines(row, row)), chosen_only=chosen_only)
    assert len(list(reader)) == 2
    assert reader.changed[CONTRADICTED] == count


@pytest.mark.parametrize(
    ("scores", "by_scores"),
    [
        ({"score_chosen": 2.0, "score_rejected": 5.0}, (2.0, 5.0)),
        ({"rewards": [1, 1]}, (1, 1)),
        ({"chosen_reward": 3.0, "rejected_reward": None}, (3.0, None)),
        ({}, (1.0, 0.0)),
    ],
)
def test_by_choice_a_pair_is_learnt_as_it_was_chosen_whatever_its_scores(
    write_lines, scores, by_scores
):
    config = DataConfig(path=write_lines(TEXT | scores))
    (scored_group,), (chosen,) = (GroupReader(config, by_choice=by) for by in (False, True))
    assert scored_group.rewards == by_scores
    assert chosen.rewards == (1.0, 0.0) and chosen.completions == scored_group.completions


def test_by_choice_a_comparison_keeps_its_choice_and_a_group_without_one_its_scores(
    write_lines, comparison_row
):
    (comparison,) = GroupReader(DataConfig(path=write_lines(comparison_row)), by_choice=True)
    assert comparison.rewards == (0.0, 1.0)
    row = {"prompt": "Say a.", "completions": ["a", "b"], "rewards": [2, 5]}
    (group,) = GroupReader(DataConfig(path=write_lines(row)), by_choice=True)
    assert group.rewards == (2, 5)


@pytest.mark.parametrize(
    "nulls",
    [
        {"score_chosen": None, "score_rejected": None},
        {"chosen_reward": None, "rejected_reward": None},
        {"rewards": [None, None]},
    ],
)
def test_a_pair_with_two_null_scores_has_no_rewards_and_is_of_the_schema_of_its_neighbours(
    write_lines, nulls
):
    given = {name: [2, 1] if name == "rewards" else 1.0 for name in nulls}
    path = write_lines(TEXT | given, TEXT | nulls)
    first, second = GroupReader(DataConfig(path=path))
    assert None not in first.rewards
    assert second.rewards == (None, None)


def test_of_scored_groups_nothing_is_chosen_but_completions_without_rewards_are_all_good(
    write_lines,
):
    row = {"prompt": "Say a.", "completions": ["a", "b", "c"]}
    (group,) = GroupReader(DataConfig(path=write_lines(row)), chosen_only=True)
    assert group.completions == ("a", "b", "c")
    path = write_lines(row | {"rewards": [1, 2, 3]})
    with pytest.raises(InputError, match=rf"{path}:1: .*got 3 completions with rewards.*Fix"):
        list(GroupReader(DataConfig(path=path), chosen_only=True))


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
        ({"format": "talk"}, "format must be one of auto, tldr, text, chat, got 'talk'"),
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
