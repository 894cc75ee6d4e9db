"""Scoring: ln π_ref is the policy's own, ids are kept, parts resume, absent rewards drop."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from copg_jax import inputs, scoring
from copg_jax.checksums import file_sum
from copg_jax.config.reward_spec import RewardSpec
from copg_jax.config.sections import DataConfig
from copg_jax.data import scored, scored_rows
from copg_jax.data.dataset import GroupDataset, prepare
from copg_jax.data.formats.choice import FORMATS
from copg_jax.data.groups import TokenGroup
from copg_jax.data.reader import GroupReader
from copg_jax.data.tokenizer import Encoder, load_tokenizer, tokenizer_hash
from copg_jax.errors import InputError
from copg_jax.infer import GroupForward
from copg_jax.models.decoder import Decoder
from copg_jax.models.forward import make_seq_logp
from copg_jax.models.params import init_params
from copg_jax.rewards.functions import WeightedRewards
from experiments.generated import write_generated
from tests.bucket import make_bucket
from tests.models import tiny
from tests.runs import assert_same_scores
from tests.toys import LLAMA, mesh, names_all

calls: list[int] = []
failing_call: list[int] = []


def by_length(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Number of characters; None for texts of which "filler" is true; fails where told to."""
    calls.append(len(completions))
    if len(calls) in failing_call:
        raise InputError("the reward function is down")
    return [None if "you know" in text else float(len(text)) for text in completions]


REWARDS = WeightedRewards(
    [RewardSpec(f"{__name__}.by_length"), RewardSpec("copg_jax.rewards.length", weight=0.5)]
)


@pytest.fixture(autouse=True)
def _fresh():
    calls.clear()
    failing_call.clear()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    """Tokenizer of generated posts, data beside it."""
    folder = tmp_path_factory.mktemp("generated")
    write_generated(folder, num_examples=30, num_comparisons=24, seed=1, vocab_size=400)
    return load_tokenizer(folder / "tokenizer")


def tokenized(tokenizer: Any, source: str, path: Path) -> GroupDataset:
    """A data set of token groups."""
    config = DataConfig(path=source)
    return prepare(
        GroupReader(config), tokenizer, path=path, limits=config.limits, vocab_size=len(tokenizer)
    )


@pytest.fixture(scope="module")
def dataset(tokenizer, tmp_path_factory) -> GroupDataset:
    """24 generated comparisons."""
    source = Path(tokenizer.name_or_path).parent / "comparisons.jsonl"
    return tokenized(tokenizer, str(source), tmp_path_factory.mktemp("tokens") / "groups.arrow")


class Forward:
    """Stands in for the reference: ln π_ref is a function of the ids."""

    def __call__(self, rows: list[TokenGroup]) -> list[np.ndarray]:
        return [
            np.array([-float(ids.sum()) / 100 for ids in row.completion_tokens], np.float32)
            for row in rows
        ]


def score(
    dataset: GroupDataset,
    folder: Path | epath.Path,
    side_car: scored.SideCar,
    part_size: int = 10,
) -> None:
    """Scores the comparisons in three parts."""
    scoring.score_dataset(
        dataset,
        folder=epath.Path(folder),
        part_size=part_size,
        rewards=REWARDS,
        reference=Forward(),  # pyright: ignore
        side_car=side_car,
    )


def contents(folder: Path) -> Any:
    """Rows and metrics without what depends on the clock."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    parts = [pq.read_table(path).to_pylist() for path in sorted(folder.glob("part-*.parquet"))]
    return parts, [
        {k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")}
        for row in metrics
    ]


@pytest.fixture(scope="module")
def side_car(tokenizer) -> scored.SideCar:
    """Of data that this tokenizer encoded."""
    hashes = {"tokenizer_hash": tokenizer_hash(tokenizer), "text_format_hash": FORMATS["tldr"].hash}
    return scored.SideCar(
        text_format="tldr",
        reference_hash="reference",
        reference_dtype="float32",
        rewards=[],
        limits={},
        complete=False,
        **hashes,
    )


@pytest.fixture(scope="module")
def whole(dataset, side_car, tmp_path_factory) -> Path:
    """A folder scored without interruption."""
    calls.clear()
    folder = tmp_path_factory.mktemp("whole")
    score(dataset, folder, side_car)
    return folder


def test_a_scored_folder_reads_back_as_the_same_tokens_and_drops_what_has_no_reward(
    whole, dataset, tokenizer, tmp_path
):
    back = tokenized(tokenizer, str(whole), tmp_path / "back.arrow")
    wanted = {row.id + row.completions[0] + row.completions[1]: row for row in dataset}
    dropped = sum("you know" in "".join(row.completions) for row in dataset)
    assert 0 < dropped < len(dataset)
    assert len(back) == len(dataset) - dropped
    for row in back:
        origin = wanted[row.id + row.completions[0] + row.completions[1]]
        np.testing.assert_array_equal(row.prompt_tokens, origin.prompt_tokens)
        for got, ids in zip(row.completion_tokens, origin.completion_tokens, strict=True):
            np.testing.assert_array_equal(got, ids)
        total = [len(text) - 0.5 * len(text.split()) for text in origin.completions]
        np.testing.assert_allclose(row.rewards, total)
        np.testing.assert_array_equal(row.ref_logps, Forward()([origin])[0])
        assert row.has_eos.all() and not row.origin.any()
        assert all(ids[-1] == tokenizer.eos_token_id for ids in row.completion_tokens)
    assert back.has_rewards
    assert back.stats["changed"]["completion without a reward"] > 0


def test_metrics_count_the_dropped_rewards(whole, dataset):
    _, metrics = contents(whole)
    assert [row["step"] for row in metrics] == [10, 20, 24]
    dropped = sum("you know" in text for row in dataset for text in row.completions)
    assert sum(row["reward/dropped"] for row in metrics) == dropped
    assert {"reward/mean", "reward/std", "ref_logp/mean"} <= metrics[0].keys()
    assert sum(row["rewards/by_length/dropped"] for row in metrics) == dropped
    words = [-len(text.split()) for row in dataset for text in row.completions]
    parts = [
        row["rewards/length/mean"] * size for row, size in zip(metrics, (20, 20, 8), strict=True)
    ]
    assert sum(parts) == pytest.approx(sum(words))


def test_the_side_car_and_the_log_have_the_statistics_of_each_reward(
    dataset, side_car, tmp_path, caplog
):
    caplog.set_level("INFO", "copg_jax")
    score(dataset, tmp_path, side_car)
    found = scored.read_side_car(epath.Path(tmp_path)).counts["rewards"]
    assert list(found) == ["by_length", "length", "total reward"]
    texts = [text for row in dataset for text in row.completions]
    missing = sum("you know" in text for text in texts)
    assert [found[name]["missing"] for name in found] == [missing, 0, missing]
    words = [-len(text.split()) for text in texts]
    assert found["length"]["mean"] == pytest.approx(np.mean(words))
    pairs = np.array(words).reshape(-1, 2)  # K = 2
    assert found["length"]["gap_std"] == pytest.approx(np.sqrt((np.diff(pairs) ** 2).mean()))
    assert found["length"]["ties"] == np.mean(np.diff(pairs) == 0)
    assert found["by_length"]["length_corr"] > 0.5 > -0.5 > found["length"]["length_corr"]
    (table,) = [text for text in caplog.messages if "gap_std" in text]
    names_all(table, ["length_corr", "by_length", "total reward", f"{np.mean(words):.4g}"])


def test_scoring_a_scored_folder_keeps_its_ids_ends_and_origins(
    whole, tokenizer, side_car, tmp_path, monkeypatch
):
    # The same folder, had a sampler made it: some completions did not end, some are of another µ.
    folder = tmp_path / "samples"
    shutil.copytree(whole, folder)
    for path in sorted(folder.glob("part-*.parquet")):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            row["has_eos"], row["origin"] = [True, False], [1, 2]
            row["completion_token_ids"][1].pop()
        pq.write_table(pa.Table.from_pylist(rows, scored_rows.SCHEMA), path)
    parts = {path.name: file_sum(path) for path in folder.glob("part-*.parquet")}
    whole_side_car = scored.read_side_car(epath.Path(folder))
    scored.write_side_car(epath.Path(folder), replace(whole_side_car, parts=parts))
    monkeypatch.setattr(Encoder, "encode_completions", None)
    samples = tokenized(tokenizer, str(folder), tmp_path / "samples.arrow")
    score(samples, tmp_path / "again", side_car)
    (parts, _), wanted = contents(tmp_path / "again"), iter(samples)
    for row in (row for part in parts for row in part):
        group = next(wanted)
        assert (row["has_eos"], row["origin"]) == ([True, False], [1, 2])
        assert row["prompt_token_ids"] == group.prompt_tokens.tolist()
        ids = [ids.tolist() for ids in group.completion_tokens]
        assert row["completion_token_ids"] == ids and ids[1][-1] != tokenizer.eos_token_id
    assert next(wanted, None) is None and len(samples) > 10


def test_interrupted_and_resumed_scoring_is_uninterrupted_scoring(
    whole, dataset, side_car, tmp_path
):
    failing_call.append(2)
    with pytest.raises(InputError, match="down"):
        score(dataset, tmp_path, side_car)
    assert list(scored.whole_parts(epath.Path(tmp_path), "")) == ["part-00000.parquet"]
    with pytest.raises(InputError, match="interrupted after 1 parts"):
        scored.verify(tmp_path, reference_hash="reference")
    failing_call.clear()
    calls.clear()
    score(dataset, tmp_path, side_car)
    assert calls == [20, 8]  # the finished part is not scored again
    assert contents(tmp_path) == contents(whole)
    scored.verify(tmp_path, reference_hash="reference", reference_dtype="float32")


@pytest.mark.parametrize("part", [0, 2])
def test_a_part_and_its_line_in_the_log_are_never_apart(
    whole, dataset, side_car, tmp_path, monkeypatch, part
):
    write_part = scored.write_part

    def ended(folder: Any, index: int, *of: Any) -> Any:
        if index == part:
            raise KeyboardInterrupt
        return write_part(folder, index, *of)

    monkeypatch.setattr(scored, "write_part", ended)
    with pytest.raises(KeyboardInterrupt):
        score(dataset, tmp_path, side_car)
    monkeypatch.undo()
    score(dataset, tmp_path, side_car)
    assert contents(tmp_path) == contents(whole)


def test_no_part_is_scored_again_for_a_lost_side_car(whole, dataset, side_car, tmp_path):
    shutil.copytree(whole, tmp_path / "s")
    (tmp_path / "s" / "scored.json").unlink()
    calls.clear()
    score(dataset, tmp_path / "s", side_car)
    assert calls == []
    assert contents(tmp_path / "s") == contents(whole)
    assert (tmp_path / "s" / "scored.json").read_bytes() == (whole / "scored.json").read_bytes()


@pytest.mark.parametrize(
    "change", ["one bit", "halved", "of another place", "of another reference"]
)
def test_without_a_side_car_a_part_counts_that_is_whole_and_of_this_data(
    whole, dataset, side_car, tmp_path, change
):
    shutil.copytree(whole, tmp_path / "s")
    (tmp_path / "s" / "scored.json").unlink()
    path = tmp_path / "s" / "part-00000.parquet"
    raw = bytearray(path.read_bytes())
    if change == "one bit":
        raw[60] ^= 1
        path.write_bytes(raw)
    elif change == "halved":
        path.write_bytes(raw[: len(raw) // 2])
    elif change == "of another place":
        shutil.copy(tmp_path / "s" / "part-00001.parquet", path)
    else:
        other = replace(side_car, reference_hash="another")
        score(dataset, tmp_path / "other", other)
        shutil.copy(tmp_path / "other" / path.name, path)
    calls.clear()
    score(dataset, tmp_path / "s", side_car)
    assert calls == [20]
    assert contents(tmp_path / "s")[0] == contents(whole)[0]


@pytest.mark.parametrize("change", ["one bit", "gone"])
@pytest.mark.parametrize("complete", [True, False])
def test_a_damaged_part_alone_is_scored_again_and_named(
    whole, dataset, side_car, tmp_path, caplog, change, complete
):
    shutil.copytree(whole, tmp_path / "s")
    folder = epath.Path(tmp_path / "s")
    if not complete:
        scored.write_side_car(folder, replace(scored.read_side_car(folder), complete=False))
    path = folder / "part-00001.parquet"
    raw = bytearray(path.read_bytes())
    raw[60] ^= 1
    path.write_bytes(raw) if change == "one bit" else path.unlink()
    calls.clear()
    score(dataset, tmp_path / "s", side_car)
    assert calls == [20] and "part-00001.parquet" in caplog.text
    (parts, log), (wanted, wanted_log) = contents(tmp_path / "s"), contents(whole)
    assert parts == wanted
    assert [row["step"] for row in log] == [10, 24, 20]  # in the order in which they were done
    assert sorted(log, key=lambda row: row["step"]) == wanted_log


def test_in_a_bucket_the_metrics_of_finished_parts_are_there_while_the_next_is_scored(
    dataset, side_car, monkeypatch
):
    make_bucket(monkeypatch)
    folder, found = epath.Path("gs://b/scored"), []
    score_rows = scoring.score_groups

    def watched(*arguments: Any) -> Any:
        path = folder / "metrics.jsonl"
        found.append(len(path.read_text().splitlines()) if path.exists() else 0)
        return score_rows(*arguments)

    monkeypatch.setattr(scoring, "score_groups", watched)
    score(dataset, folder, side_car)
    assert found == [0, 1, 2]


@pytest.mark.parametrize("column", [name for name in scored_rows.SCHEMA.names if name != "logp_mu"])
def test_another_value_in_any_column_is_another_scored_folder(whole, tmp_path, column):
    folder = tmp_path / "other"
    shutil.copytree(whole, folder)
    assert_same_scores(folder, whole)
    path = folder / "part-00001.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[3][column] = changed(rows[3][column])
    pq.write_table(pa.Table.from_pylist(rows, scored_rows.SCHEMA), path)
    with pytest.raises(AssertionError):
        assert_same_scores(folder, whole)


def changed(value: Any) -> Any:
    """The value, its last part another."""
    if isinstance(value, list | tuple):
        return type(value)([*value[:-1], changed(value[-1])])
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else (value or 0) + 1


def test_a_policy_takes_ln_ref_of_its_own_reference_in_its_own_dtype_only(
    whole, dataset, tokenizer, tmp_path
):
    def require(path: str, dtype: str = "float32", reference: str = "reference") -> None:
        model: Any = SimpleNamespace(hash=reference, arch=SimpleNamespace(dtype=dtype))
        inputs.require_same_reference(DataConfig(path=path), model, back)

    back = tokenized(tokenizer, str(whole), tmp_path / "back.arrow")
    require(str(whole))
    with pytest.raises(InputError) as caught:
        require(str(whole), dtype="bfloat16")
    names_all(
        str(caught.value),
        [
            f"{whole}/scored.json",
            "reference_dtype",
            "float32, but this run has bfloat16",
            "KL",
            "model.dtype=float32",
            "reference.dtype=bfloat16",
        ],
    )
    with pytest.raises(InputError, match=r"'reference_hash': .* reference, but this run has other"):
        require(str(whole), reference="other")
    source = str(Path(tokenizer.name_or_path).parent / "comparisons.jsonl")
    with pytest.raises(InputError) as caught:
        inputs.require_scored_folder(DataConfig(path=source))
    names_all(str(caught.value), [source, "no ref_logp", "run experiments.score"])


def test_scoring_again_does_nothing(dataset, side_car, tmp_path):
    score(dataset, tmp_path, side_car)
    before = contents(tmp_path)
    calls.clear()
    score(dataset, tmp_path, side_car)
    assert not calls
    assert contents(tmp_path) == before


def random_groups(rng: np.random.Generator) -> list[TokenGroup]:
    """Groups of one to three completions, prompts and completions of random lengths."""
    return [
        TokenGroup(
            id=str(i),
            where="",
            prompt="",
            prompt_tokens=rng.integers(0, LLAMA.vocab_size, rng.integers(1, 12)).astype(np.int32),
            completions=("",) * k,
            completion_tokens=tuple(
                rng.integers(0, LLAMA.vocab_size, rng.integers(1, 9)).astype(np.int32)
                for _ in range(k)
            ),
        )
        for i, k in enumerate([1, 3, 2, 1, 3, 2, 2, 1, 3, 1])
    ]


def test_ref_logps_are_those_of_the_plain_model_in_the_order_of_the_groups(rng):
    params = init_params(LLAMA, jax.random.key(0))
    params = jax.tree.map(lambda x: x if x.ndim == 1 else 10 * x, params)
    rows = random_groups(rng)
    forward = GroupForward(
        make_seq_logp(LLAMA),
        params,
        mesh=mesh(1, 4, 1),
        batch_size=3,  # rounded up to 4
        name="test",
    )
    got = forward(rows)
    texts = [(row.prompt_tokens, ids) for row in rows for ids in row.completion_tokens]
    padded = np.zeros((len(texts), 24), np.int32)
    for i, (prompt, ids) in enumerate(texts):
        padded[i, : len(prompt) + len(ids)] = np.concatenate([prompt, ids])
    hidden = tiny.plain_hidden(LLAMA, params, jnp.asarray(padded))
    logp = np.asarray(jax.nn.log_softmax(hidden @ Decoder(LLAMA).output_matrix(params)))
    wanted = [
        sum(logp[i, len(prompt) - 1 + t, token] for t, token in enumerate(ids))
        for i, (prompt, ids) in enumerate(texts)
    ]
    assert [len(values) for values in got] == [len(row.completion_tokens) for row in rows]
    np.testing.assert_allclose(np.concatenate(got), wanted, atol=1e-4, rtol=1e-5)


def test_forward_of_a_single_group_and_of_none():
    row = random_groups(np.random.default_rng(1))[1]
    forward = GroupForward(
        lambda p, batch: p * batch.completion_length,
        jnp.float32(2.0),
        mesh=mesh(),
        batch_size=2,
        name="test",
    )
    (got,) = forward([row])
    np.testing.assert_array_equal(got, [2.0 * len(ids) for ids in row.completion_tokens])
    assert forward([]) == []
