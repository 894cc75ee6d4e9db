"""Claims about scored data: its ids and numbers are trained on as they are, or refused."""

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from copg_jax.checksums import file_sum
from copg_jax.config.load import load_config
from copg_jax.config.sections import DataConfig
from copg_jax.config.stages import ScoreConfig
from copg_jax.data import scored, scored_rows
from copg_jax.data.dataset import prepare
from copg_jax.data.formats.choice import FORMATS
from copg_jax.data.formats.columns import InvalidRow
from copg_jax.data.groups import TOO_FEW, TokenGroup, collate
from copg_jax.data.reader import GroupReader
from copg_jax.data.scored import ScoredGroup, SideCar, read_side_car, verify
from copg_jax.data.sources import find_files
from copg_jax.data.tokenizer import Encoder, tokenizer_hash
from copg_jax.errors import InputError

PROMPT = "SUBREDDIT: r/x\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"
VOCAB = 500
SIDE_CAR = SideCar(
    tokenizer_hash="tok1",
    text_format="tldr",
    text_format_hash=FORMATS["tldr"].hash,
    reference_hash="ref1",
    reference_dtype="float32",
    rewards=[{"function": "copg_jax.rewards.length", "arguments": {}, "weight": 0.5, "hash": "h"}],
    limits={"max_prompt_tokens": 512, "max_completion_tokens": 99, "invalid_rows": "error"},
    complete=True,
    counts={"rows": 2},
)


def token_group(prompt=(5, 400, 6), ids=((7, 8), (9, 3, 4)), **changes) -> TokenGroup:
    """A pair of ids that are no tokenizer's encoding of its texts."""
    group = TokenGroup(
        id="g0",
        where="f.jsonl:8",
        prompt=PROMPT,
        prompt_tokens=np.array(prompt, np.int32),
        completions=tuple(f" text {i}" for i in range(len(ids))),
        completion_tokens=tuple(np.array(one, np.int32) for one in ids),
        columns={"reference": "r", "nested": [1, None]},
    )
    return dataclasses.replace(group, **changes)


def scored_group(reward=(1.5, math.nan), ref_logp=(-3.25, -4.5), **changes) -> ScoredGroup:
    """The same with scores."""
    group = token_group(
        rewards=np.array(reward), ref_logps=np.array(ref_logp, np.float32), **changes
    )
    return ScoredGroup(group, {"a": np.array([0.5, math.nan]), "b": group.rewards})


def write(folder, *groups, tokenizer=None, **changes) -> str:
    """A scored folder of one part; returns its path."""
    folder = epath.Path(folder)
    own = {} if tokenizer is None else {"tokenizer_hash": tokenizer_hash(tokenizer)}
    parts = scored.write_part(folder, 0, groups, "key")
    scored.write_side_car(folder, dataclasses.replace(SIDE_CAR, parts=parts, **own, **changes))
    return str(folder)


def prepared(path, tokenizer, arrow="groups.arrow", **settings):
    """The data set of a scored folder."""
    config = DataConfig(path=path, **settings)
    return prepare(
        GroupReader(config),
        tokenizer,
        path=Path(path).parent / "tokens" / arrow,
        limits=config.limits,
        vocab_size=VOCAB,
    )


def assert_same_group(got: TokenGroup, wanted: TokenGroup) -> None:
    """Bit for bit, but for where it is from."""
    for field in dataclasses.fields(TokenGroup):
        left, right = getattr(got, field.name), getattr(wanted, field.name)
        if field.name == "completion_tokens":
            assert [ids.tolist() for ids in left] == [ids.tolist() for ids in right]
        elif isinstance(right, np.ndarray):
            assert left.dtype == right.dtype and left.tobytes() == right.tobytes(), field.name
        elif field.name != "where":
            assert left == right, field.name


def test_what_was_scored_comes_back_number_for_number(plain, tmp_path, rng):
    wanted = []
    for i in range(300):
        k = int(rng.integers(2, 5))
        group = token_group(
            rng.integers(0, VOCAB, rng.integers(1, 9)),
            [rng.integers(0, VOCAB, rng.integers(1, 9)) for _ in range(k)],
            id=f"g{i}",
            completions=tuple(f" \tü\u2028{i} {slot}\n" for slot in range(k)),
            rewards=rng.normal(size=k).astype(np.float32) * np.float32(10.0) ** (i % 60 - 40),
            ref_logps=(-100 * rng.random(k)).astype(np.float32),
            has_eos=rng.random(k) < 0.5,
            origin=rng.integers(0, 3, k).astype(np.int8),
            columns={"topic": i, "nested": {"a": [None, "ü"]}},
            format="tldr",
        )
        wanted.append(group)
    groups = [ScoredGroup(group, {}) for group in wanted]
    dataset = prepared(write(tmp_path / "s", *groups, tokenizer=plain), plain)
    assert len(dataset) == 300 and dataset.has_rewards
    for got, group in zip(dataset, wanted, strict=True):
        assert_same_group(got, group)


def test_the_columns_are_those_of_the_docstring_with_every_reward_by_its_name(tmp_path):
    table = pq.read_table(Path(write(tmp_path, scored_group())) / "part-00000.parquet")
    assert re.findall(r"^\| `(\w+)` \|", scored_rows.__doc__, re.MULTILINE) == table.column_names
    (row,) = table.to_pylist()
    assert dict(row["rewards"]) == {"a": [0.5, None], "b": [1.5, None]}
    assert row["reward"] == [1.5, None] and row["ref_logp"] == [-3.25, -4.5]
    assert row["has_eos"] == [True, True] and row["origin"] == [0, 0] and row["logp_mu"] is None
    assert row["completion_token_ids"] == [[7, 8], [9, 3, 4]]
    assert json.loads(row["columns"]) == {"reference": "r", "nested": [1, None]}


def test_ids_reach_the_batch_as_they_are_without_a_tokenizer(plain, tmp_path, monkeypatch):
    own = scored_group((1.0, 2.0), has_eos=np.array([True, False]))
    # Another end token than the tokenizer's, one that is inside, and none: nobody mends them.
    eos = plain.eos_token_id
    odd = scored_group((3.0, 4.0), ids=((9, 17), (eos, 8, eos)), prompt=(499,))
    path = write(tmp_path / "s", own, odd, tokenizer=plain)

    def never(*_):
        raise AssertionError("text was tokenised")

    for name in ("encode_prompt", "encode_completions", "token_ends"):
        monkeypatch.setattr(Encoder, name, never)
    dataset = prepared(path, plain)
    batch = collate(list(dataset), *dataset.shape(multiple=1))
    assert batch.prompt_tokens.tolist() == [[5, 400, 6], [499, 0, 0]]
    assert batch.completion_tokens.tolist() == [[[7, 8, 0], [9, 3, 4]], [[9, 17, 0], [eos, 8, eos]]]
    assert batch.completion_length.tolist() == [[2, 3], [2, 3]]
    assert batch.reward.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert batch.ref_logp.tolist() == [[-3.25, -4.5]] * 2
    assert [group.has_eos.tolist() for group in dataset] == [[True, False], [True, True]]


def test_limits_leave_completions_out_and_refuse_prompts_but_cut_nothing(plain, tmp_path):
    groups = [
        scored_group((1.0, 2.0, 3.0), (-1.0,) * 3, ids=((1,), (2, 3, 4), (5, 6))),
        scored_group((1.0, math.nan), (-1.0,) * 2),
        scored_group((1.0, 2.0), (-1.0,) * 2, ids=((1,), (2, 3, 4))),
    ]
    path = write(tmp_path / "s", *groups, tokenizer=plain)
    dataset = prepared(path, plain, max_completion_tokens=2)
    assert dataset.stats["changed"] == {
        "completion over 2 tokens": 2,
        "completion without a reward": 1,
    }
    assert dataset.stats["dropped"] == {TOO_FEW: 2}
    (group,) = dataset
    assert [ids.tolist() for ids in group.completion_tokens] == [[1], [5, 6]]
    assert group.rewards.tolist() == [1.0, 3.0] and group.completions == (" text 0", " text 2")
    text = r"part-00000.parquet:1: the prompt has 3 tokens, over .* of 2.*data.max_prompt_tokens"
    with pytest.raises(InvalidRow, match=text):
        prepared(path, plain, "other.arrow", max_prompt_tokens=2)
    with pytest.raises(InputError, match="3 x dropped: prompt over 2 tokens"):
        prepared(path, plain, "other.arrow", max_prompt_tokens=2, invalid_rows="drop")


@pytest.mark.parametrize("ids", [(VOCAB,), (-1, 3)])
def test_ids_that_the_model_lacks_are_named(plain, tmp_path, ids):
    path = write(tmp_path / "s", scored_group((1.0, 2.0), ids=((1,), ids)), tokenizer=plain)
    with pytest.raises(
        InputError, match=rf"0.parquet:1: token id {ids[0]} is outside .* of {VOCAB}"
    ):
        prepared(path, plain)


def test_parts_and_limits_of_posts_hold_for_scored_data_too(plain, tmp_path):
    prompts = [PROMPT.replace("TITLE: t", f"TITLE: t{i}") for i in range(60)]
    groups = [scored_group((1.0, 2.0), prompt=(i + 1,)) for i in range(60)]
    groups = [
        g._replace(group=dataclasses.replace(g.group, prompt=prompt))
        for g, prompt in zip(groups, prompts, strict=True)
    ]
    path = write(tmp_path / "s", *groups, tokenizer=plain)
    settings = {"holdout_fraction": 0.4}
    parts = [
        prepared(path, plain, f"{part}.arrow", part=part, **settings)
        for part in ("train", "validation")
    ]
    prompts = [{group.prompt for group in part} for part in parts]
    assert not prompts[0] & prompts[1] and min(map(len, prompts)) > 10
    assert sum(map(len, parts)) == 60
    assert len(prepared(path, plain, max_rows=7)) == 7


def test_only_whole_parts_count_as_finished(tmp_path):
    assert scored.whole_parts(tmp_path, "key") == {}
    (tmp_path / ".part-00003.parquet.77").write_bytes(b"half")
    parts = {}
    for index in (0, 2):
        parts |= scored.write_part(tmp_path, index, [scored_group()], "key")
    assert [path.name for path in tmp_path.glob(".*")] == []
    scored.write_side_car(tmp_path, dataclasses.replace(SIDE_CAR, parts=parts))
    with pytest.raises(InputError):
        scored.write_part(tmp_path, 4, [scored_group(), scored_group((math.inf, 0.0))], "key")
    assert list(scored.whole_parts(tmp_path, "key")) == ["part-00000.parquet", "part-00002.parquet"]
    assert len(find_files(str(tmp_path))) == 2
    assert scored.count_rewards(tmp_path) == {"completions scored": 4, "without a reward": 2}


@pytest.mark.parametrize(
    ("group", "text"),
    [
        (scored_group((0.0, math.inf)), "the reward of completion 1 is inf"),
        (scored_group((0.0, 1e39)), "the reward of completion 1 is inf"),  # in float32 it is
        (
            scored_group()._replace(by_name={"a": np.array([-math.inf, 0.0])}),
            "the reward 'a' of completion 0 is -inf",
        ),
        (scored_group(ref_logp=(math.nan, -1)), "the reference log-prob.* completion 0 is nan"),
        (scored_group(ref_logp=(0, 1e6)), "the reference log-prob.* 1 is 1000000.0: .*at most 0"),
        (scored_group(ref_logp=(0.5, -1)), "the reference log-probability of completion 0 is 0.5"),
        (scored_group(ref_logp=(0, -math.inf)), "the reference log-prob.* completion 1 is -inf"),
        (scored_group((1.0,)), "wanted ids .*for each of 2 completions, .*'rewards': 1"),
        (scored_group(ids=((1,), ())), r"wanted ids .* got \[3, 1, 0\] ids"),
        (scored_group(prompt=()), r"wanted ids of the prompt .* got \[0, 2, 3\] ids"),
    ],
    ids=range(10),
)
def test_scores_that_cannot_be_trained_on_name_place_and_completion(tmp_path, group, text):
    with pytest.raises(InputError, match=f"f.jsonl:8: {text}"):
        scored.write_part(tmp_path, 0, [scored_group(), group], "key")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("origin", None, "TypeError"),
        ("prompt_token_ids", [], "wanted ids of the prompt"),
        ("completion_token_ids", [[7], []], "wanted ids of the prompt"),
        ("completion_token_ids", [[7]], "for each of 2 completions"),
        ("completions", ["a"], "for each of 1 completions"),
        ("reward", [1.0], "for each of 2 completions"),
        ("has_eos", [True] * 3, "for each of 2 completions"),
        ("ref_logp", [-1.0, None], "the reference log-probability of completion 1 is nan"),
        ("columns", "{", "JSONDecodeError"),
        ("columns", ..., "KeyError: 'columns'"),
    ],
)
def test_a_row_that_the_score_stage_did_not_write_so_is_named(plain, tmp_path, column, value, text):
    path = write(tmp_path / "s", scored_group((1.0, 2.0)), tokenizer=plain)
    part = Path(path) / "part-00000.parquet"
    (row,) = pq.read_table(part).to_pylist()
    row = {name: item for name, item in (row | {column: value}).items() if item is not ...}
    schema = pa.schema([field for field in scored.SCHEMA if field.name in row])
    pq.write_table(pa.Table.from_pylist([row], schema), part)
    side_car = read_side_car(epath.Path(path))
    parts = {part.name: file_sum(part)}  # as if the score stage had written it
    scored.write_side_car(epath.Path(path), dataclasses.replace(side_car, parts=parts))
    with pytest.raises(InputError, match=rf"part-00000.parquet:1: .*{text}"):
        prepared(path, plain)


def test_a_part_without_its_side_car_is_no_data(tmp_path):
    path = write(tmp_path, scored_group())
    for part in (f"{path}/part-*.parquet", f"{path}/part-00000.parquet"):
        with pytest.raises(InputError, match=r"part-00000.parquet:1: .* without its scored.json"):
            list(GroupReader(DataConfig(path=part)))


def test_data_of_another_tokenizer_format_reference_or_dtype_is_refused(tmp_path):
    scored.write_side_car(epath.Path(tmp_path), SIDE_CAR)
    same = {
        name: getattr(SIDE_CAR, name)
        for name in ("tokenizer_hash", "text_format_hash", "reference_hash", "reference_dtype")
    }
    assert verify(tmp_path, **same) == verify(tmp_path) == SIDE_CAR
    for name, text in {
        "tokenizer_hash": "the tokenizer tok1, but this run has other: .*score again",
        "text_format_hash": f"the text format {same['text_format_hash']}, but this run has other",
        "reference_hash": "the reference model ref1, but this run has other: .*score again",
        "reference_dtype": "float32, but this run has other .*reference.dtype=other.*: the "
        "difference would read as KL. Set model.dtype=float32, or score again",
    }.items():
        with pytest.raises(InputError, match=rf"scored.json: field '{name}': .*{text}"):
            verify(tmp_path, **(same | {name: "other"}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "'tokenizer_hash': .*the token ids of the data mean nothing to it"),
        ({"text_format_hash": "other"}, "'text_format_hash'"),
        ({"complete": False}, "interrupted after 1 parts"),
    ],
)
def test_no_stage_reads_ids_of_another_tokenizer_or_half_scored_data(
    plain, with_bos, tmp_path, changes, text
):
    path = write(tmp_path / "s", scored_group((1.0, 2.0)), tokenizer=plain)
    assert len(prepared(path, plain)) == 1
    write(tmp_path / "s", scored_group((1.0, 2.0)), tokenizer=plain, **changes)
    with pytest.raises(InputError, match=text):  # though its tokens are there already
        prepared(path, with_bos if not changes else plain)


def test_unfinished_missing_or_foreign_side_cars_are_refused(tmp_path):
    folder = epath.Path(tmp_path)
    with pytest.raises(InputError, match=r"scored.json: cannot be read .*score stage"):
        read_side_car(folder)
    scored.write_side_car(folder, dataclasses.replace(SIDE_CAR, complete=False))
    with pytest.raises(InputError, match="interrupted after 0 parts"):
        verify(folder)
    (folder / "scored.json").write_text("{")
    with pytest.raises(InputError, match=r"scored.json: damaged: wanted JSON .*delete it and run"):
        read_side_car(folder)
    (folder / "scored.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(InputError, match="wanted scored data of format 2, got format 0"):
        read_side_car(folder)


@pytest.mark.parametrize("name", ["parts", "reference_dtype"])
def test_a_side_car_of_an_earlier_version_is_told_so(tmp_path, name):
    folder = epath.Path(tmp_path)
    scored.write_side_car(folder, SIDE_CAR)
    values = json.loads((folder / "scored.json").read_text())
    del values[name]
    (folder / "scored.json").write_text(json.dumps(values))
    text = f"of an earlier version of copg_jax, without {name}. Score again:\n .*experiments.score"
    with pytest.raises(InputError, match=text):
        read_side_car(folder)


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 10**5, "edited"])
def test_a_damaged_side_car_is_named_with_the_way_out(tmp_path, raw):
    folder = epath.Path(tmp_path)
    scored.write_side_car(folder, SIDE_CAR)
    if raw == "edited":
        raw = (folder / "scored.json").read_bytes().replace(b"ref1", b"ref2")
    (folder / "scored.json").write_bytes(raw)
    with pytest.raises(InputError, match=r"scored.json: .*delete it and run the same score"):
        read_side_car(folder)


@pytest.mark.parametrize("change", ["half the rows", "a rolled column", "one bit", "gone"])
def test_a_part_that_is_not_as_it_was_written_is_refused_with_the_way_out(plain, tmp_path, change):
    path = write(
        tmp_path / "s", *[scored_group((float(i), 2.0)) for i in range(4)], tokenizer=plain
    )
    part = Path(path) / "part-00000.parquet"
    raw, table = part.read_bytes(), pq.read_table(part)
    if change == "half the rows":
        pq.write_table(table.slice(0, 2), part)
    elif change == "a rolled column":
        rewards = table["reward"].to_pylist()
        rolled = pa.array([*rewards[1:], rewards[0]], table["reward"].type)
        pq.write_table(
            table.set_column(table.schema.get_field_index("reward"), "reward", rolled), part
        )
    elif change == "one bit":
        part.write_bytes(raw[:100] + bytes([raw[100] ^ 1]) + raw[101:])
    else:
        part.unlink()
    with pytest.raises(InputError, match=r"part-00000.parquet: (damaged|cannot).*score command ag"):
        prepared(path, plain)


@pytest.mark.parametrize("name", ["part-old.parquet", "part-00007.parquet"])
def test_a_part_that_is_not_of_this_data_is_refused(plain, tmp_path, name):
    path = write(tmp_path / "s", scored_group((1.0, 2.0)), tokenizer=plain)
    (Path(path) / name).write_bytes((Path(path) / "part-00000.parquet").read_bytes())
    with pytest.raises(InputError, match=rf"{name}: no part of this data.*move it away"):
        prepared(path, plain)


def command_in(text: str) -> list[str]:
    """Arguments of the command that an error text ends in."""
    words = shlex.split(text.splitlines()[-1])
    assert words[:3] == ["python", "-m", "experiments.score"]
    return words[3:]


def test_the_first_format_is_refused_with_the_command_that_scores_again(plain, tmp_path):
    first = {
        "tokenizer_hash": "tok1",
        "reference_hash": "ref1",
        "rewards": SIDE_CAR.rewards,
        "limits": SIDE_CAR.limits,
        "complete": True,
        "counts": {},
        "format": 1,
    }
    folder = tmp_path / "old data"
    write(folder, scored_group())
    (folder / "scored.json").write_text(json.dumps(first))
    with pytest.raises(
        InputError, match=r"old data/scored.json: .* of format 2, got format 1"
    ) as e:
        prepared(str(folder), plain)
    config = load_config(ScoreConfig, command_in(str(e.value)))
    assert config.output_dir == f"{folder}-format2"
    assert config.data.max_completion_tokens == 99 and config.data.path == "DATA"
    (reward,) = config.rewards
    assert (reward.function, reward.weight) == ("copg_jax.rewards.length", 0.5)
    (folder / "config.yaml").write_text(
        "output_dir: x\nreference: {path: m}\ndata: {path: d}\nbatch_size: 3\n"
    )
    with pytest.raises(InputError) as e:
        prepared(str(folder), plain)
    config = load_config(ScoreConfig, command_in(str(e.value)))
    assert (config.output_dir, config.batch_size) == (f"{folder}-format2", 3)
