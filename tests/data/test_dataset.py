"""Claims about the prepared data set: same groups back, flat memory, reuse, counts, refusals."""

import dataclasses
import json
import tracemalloc
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from copg_jax.config.sections import DataConfig, Limits
from copg_jax.data.dataset import format_stats, prepare
from copg_jax.data.formats.texts import TextGroup
from copg_jax.data.formats.tldr import Post, format_prompt
from copg_jax.data.groups import tokenize_group
from copg_jax.data.reader import GroupReader
from copg_jax.data.tokenizer import Encoder
from copg_jax.errors import InputError

VOCAB = 500


def text_groups(count):
    """Pairs with distinct prompts, made on the fly."""
    for i in range(count):
        prompt = format_prompt(Post("x", f"t{i}", "my bike broke at the park\n" * (1 + i % 3)))
        columns = {"topic": i, "nested": {"a": [None]}}
        yield TextGroup(f"g{i}", f"f:{i}", prompt, (" a", f" b{i}"), (1.0, -0.5), columns)


def test_groups_come_back_as_they_were_made(plain, tmp_path):
    dataset = prepare(
        text_groups(600), plain, path=tmp_path / "a.arrow", limits=Limits(), vocab_size=VOCAB
    )
    assert len(dataset) == 600 and dataset.has_rewards and dataset[0].ref_logps is None
    encoder = Encoder(plain)
    for index, group in enumerate(text_groups(600)):
        if index % 83 and index not in (255, 256, 599):
            continue
        wanted = tokenize_group(group, encoder, Limits(), Counter())
        got = dataset[index]
        for field in dataclasses.fields(wanted):
            left, right = getattr(wanted, field.name), getattr(got, field.name)
            if field.name == "completion_tokens":
                assert [ids.tolist() for ids in left] == [ids.tolist() for ids in right]
            else:
                np.testing.assert_array_equal(left, right)
    prompt_size, num_completions, completion_size = dataset.shape(multiple=8)
    assert prompt_size % 8 == 0 and num_completions == 2 and completion_size % 8 == 0
    assert prompt_size - 8 < dataset.stats["prompt_tokens"]["max"] <= prompt_size
    with pytest.raises(IndexError):
        dataset[600]


def test_memory_stays_flat_as_the_data_grows(plain, tmp_path):
    peaks = {}
    for count in (256, 10 * 256):
        path = tmp_path / f"{count}.arrow"
        tracemalloc.start()
        arrow_before = pa.total_allocated_bytes()
        dataset = prepare(text_groups(count), plain, path=path, limits=Limits(), vocab_size=VOCAB)
        assert sum(1 for _ in dataset) == count
        peaks[count] = tracemalloc.get_traced_memory()[1]
        assert pa.total_allocated_bytes() - arrow_before < 2**20
        tracemalloc.stop()
    assert peaks[2560] < 1.3 * peaks[256] + 2**20


def test_a_prepared_file_is_reused_until_contents_or_settings_change(
    plain, with_bos, write_lines, tmp_path
):
    path = write_lines({"prompt": "p", "completion": "c"})
    arrow = tmp_path / "cache" / "a.arrow"

    def prepared(tokenizer=plain, limits=None, vocab_size=VOCAB):
        config = DataConfig(path=path)
        prepare(
            GroupReader(config),
            tokenizer,
            path=arrow,
            limits=limits or config.limits,
            vocab_size=vocab_size,
        )
        return arrow.stat().st_ino, arrow.stat().st_mtime_ns

    first = prepared()
    assert prepared() == first
    for change in ({"tokenizer": with_bos}, {"limits": Limits(99, 9)}, {"vocab_size": 600}):
        assert prepared(**change) != first
        first = prepared()
    write_lines({"prompt": "p", "completion": "other"})
    assert prepared() != first
    assert sorted(f.name for f in arrow.parent.iterdir()) == ["a.arrow", "a.json"]


def test_counts_of_what_was_kept_cut_and_dropped_read_as_a_table(plain, write_lines, tmp_path):
    post = {
        "prompt": format_prompt(Post("x", "t", "my bike\n" * 30)),
        "chosen": "a",
        "rejected": "b",
    }
    rows = [post, post | {"chosen": "b"}, post | {"chosen": "a" * 99}]
    rows.append(post | {"prompt": format_prompt(Post("x", "t " * 99, "p"))})
    config = DataConfig(
        path=write_lines(*rows), invalid_rows="drop", max_prompt_tokens=70, max_completion_tokens=20
    )
    dataset = prepare(
        GroupReader(config),
        plain,
        path=tmp_path / "a.arrow",
        limits=config.limits,
        vocab_size=VOCAB,
    )
    stats = dataset.stats
    assert (stats["rows"], stats["kept"]) == (4, 1)
    assert stats["dropped"] == {
        "identical completions": 1,
        "too few completions left": 1,
        "prompt over 70 tokens": 1,
    }
    assert stats["changed"] == {"prompt cut": 1, "completion over 20 tokens": 1}
    text = format_stats(stats)
    for line in ("kept 1 of 4 rows", "1 x dropped: identical completions", "1 x prompt cut"):
        assert line in text
    assert "prompt tokens" in text and "max" in text


def test_a_data_set_with_nothing_left_says_why(plain, write_lines, tmp_path):
    for rows in ([], [{"prompt": "", "completion": "c"}]):
        config = DataConfig(path=write_lines(*rows), invalid_rows="drop")
        with pytest.raises(InputError, match=rf"data set is empty.*\nkept 0 of {len(rows)} rows"):
            prepare(
                GroupReader(config),
                plain,
                path=tmp_path / "a.arrow",
                limits=config.limits,
                vocab_size=VOCAB,
            )
    assert not list(tmp_path.glob("*.arrow*")) and not list(tmp_path.glob(".a*"))


def test_a_token_id_that_the_model_lacks_is_named(plain, tmp_path):
    with pytest.raises(
        InputError, match=r"f:0: token id \d+ is outside the model's vocabulary of 200"
    ):
        prepare(text_groups(2), plain, path=tmp_path / "a.arrow", limits=Limits(), vocab_size=200)


def test_bad_rows_stop_the_preparation_with_their_place(plain, write_lines, tmp_path):
    path = write_lines({"prompt": "p", "completion": "c"}, {"prompt": "p " * 99, "completion": "c"})
    config = DataConfig(path=path, max_prompt_tokens=20)
    with pytest.raises(
        InputError, match=rf"{path}:2: the prompt has .* or set data.invalid_rows=drop"
    ):
        prepare(
            GroupReader(config),
            plain,
            path=tmp_path / "a.arrow",
            limits=config.limits,
            vocab_size=VOCAB,
        )


def test_real_rows_keep_within_the_limits(plain, tldr_folder, tmp_path):
    config = DataConfig(path=str(tldr_folder / "sft.jsonl"), max_rows=40, max_completion_tokens=400)
    dataset = prepare(
        GroupReader(config),
        plain,
        path=tmp_path / "a.arrow",
        limits=config.limits,
        vocab_size=VOCAB,
    )
    assert len(dataset) == 40 and dataset.stats["changed"]["prompt cut"] > 0
    assert dataset.stats["prompt_tokens"]["max"] <= 512
    assert all(group.prompt.endswith("\n\nTL;DR:") for group in dataset)


def prepare_rows(folder, plain):
    """The token file of three rows, made or opened."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        lines = [{"prompt": f"TL;DR {i}", "completion": " a b"} for i in range(3)]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(path=str(rows))
    path = folder / "tokens" / "a.arrow"
    return prepare(GroupReader(config), plain, path=path, limits=config.limits, vocab_size=VOCAB)


@pytest.mark.parametrize("name", ["a.arrow", "a.json"])
@pytest.mark.parametrize("damage", ["flip", "half", "", "[]", "null", '{"key": 1}', "\udcff"])
def test_damaged_token_files_are_made_anew_with_one_line_in_the_log(
    plain, tmp_path, caplog, name, damage
):
    caplog.set_level("INFO")
    wanted = [str(vars(group)) for group in prepare_rows(tmp_path, plain)]
    assert "made anew" not in caplog.text
    path = tmp_path / "tokens" / name
    raw = path.read_bytes()
    at = len(raw) // 2
    texts = {"flip": raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :], "half": raw[:at]}
    path.write_bytes(texts.get(damage, damage.encode(errors="surrogateescape")))
    assert [str(vars(group)) for group in prepare_rows(tmp_path, plain)] == wanted
    (line,) = [text for text in caplog.messages if "made anew" in text]
    assert name in line


def test_what_an_ended_process_left_of_a_token_file_is_removed(plain, tmp_path):
    (tmp_path / "tokens").mkdir()
    for left in (".a.arrow.4711", ".a.arrow.tmp"):
        (tmp_path / "tokens" / left).write_bytes(b"half")
    prepare_rows(tmp_path, plain)
    names = sorted(path.name for path in (tmp_path / "tokens").iterdir())
    assert names == ["a.arrow", "a.json"]


def test_data_that_is_learnt_by_choice_is_not_that_which_is_learnt_by_scores(
    plain, write_lines, tmp_path
):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "rewards": [2, 5]}
    config, rewards = DataConfig(path=write_lines(row)), []
    for by_choice in (False, True):
        reader = GroupReader(config, by_choice=by_choice)
        path = tmp_path / "a.arrow"
        (group,) = prepare(reader, plain, path=path, limits=Limits(), vocab_size=VOCAB)
        rewards.append(group.rewards.tolist())
    assert rewards == [[2.0, 5.0], [1.0, 0.0]]
