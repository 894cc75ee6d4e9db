"""Scoring: ln π_ref is the policy's own, parts resume, absent rewards drop completions."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from copg_jax import scoring
from copg_jax.data import scored
from copg_jax.data.dataset import GroupDataset, prepare
from copg_jax.data.generated import write_generated
from copg_jax.data.groups import TokenGroup
from copg_jax.data.reader import DataConfig, GroupReader
from copg_jax.data.tokenizer import load_tokenizer
from copg_jax.errors import InputError
from copg_jax.infer import GroupForward
from copg_jax.models.decoder import output_matrix
from copg_jax.models.params import init_params
from copg_jax.rewards import RewardSpec, WeightedRewards
from tests.bucket import make_bucket
from tests.models import tiny
from tests.toys import LLAMA, mesh

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
SIDE_CAR = scored.SideCar("tokenizer", "reference", [], {}, complete=False)


@pytest.fixture(autouse=True)
def _fresh():
    calls.clear()
    failing_call.clear()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    """Tokenizer of generated posts, data beside it."""
    folder = tmp_path_factory.mktemp("generated")
    write_generated(folder, num_posts=30, num_comparisons=24, seed=1, vocab_size=400)
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


def score(dataset: GroupDataset, folder: Path | epath.Path, part_size: int = 10) -> None:
    """Scores the comparisons in three parts."""
    scoring.score_dataset(
        dataset,
        folder=epath.Path(folder),
        part_size=part_size,
        rewards=REWARDS,
        seq_logp=Forward(),  # pyright: ignore
        side_car=SIDE_CAR,
    )


def contents(folder: Path) -> Any:
    """Rows and metrics without what depends on the clock."""
    reader = GroupReader(DataConfig(path=str(folder)))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [dataclasses.replace(group, where="") for group in reader]
    return rows, [
        {k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")}
        for row in metrics
    ]


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory) -> Path:
    """A folder scored without interruption."""
    calls.clear()
    folder = tmp_path_factory.mktemp("whole")
    score(dataset, folder)
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
        np.testing.assert_allclose(row.ref_logps, Forward()([origin])[0], rtol=1e-6)
    assert back.has_rewards and back.has_ref_logps
    assert back.stats["changed"]["completion without a reward"] > 0


def test_metrics_count_the_dropped_rewards(whole, dataset):
    _, metrics = contents(whole)
    assert [row["step"] for row in metrics] == [10, 20, 24]
    dropped = sum("you know" in text for row in dataset for text in row.completions)
    assert sum(row["reward/dropped"] for row in metrics) == dropped
    assert {"reward/mean", "reward/std", "ref_logp/mean"} <= metrics[0].keys()


def test_interrupted_and_resumed_scoring_is_uninterrupted_scoring(whole, dataset, tmp_path):
    failing_call.append(2)
    with pytest.raises(InputError, match="down"):
        score(dataset, tmp_path)
    assert scored.finished_parts(tmp_path) == [0]
    with pytest.raises(InputError, match="interrupted after 1 parts"):
        scored.verify(tmp_path, tokenizer_hash="tokenizer", reference_hash="reference")
    failing_call.clear()
    calls.clear()
    score(dataset, tmp_path)
    assert calls == [20, 8]  # the finished part is not scored again
    assert contents(tmp_path) == contents(whole)
    scored.verify(tmp_path, tokenizer_hash="tokenizer", reference_hash="reference")


def test_in_a_bucket_the_metrics_of_finished_parts_are_there_while_the_next_is_scored(
    dataset, monkeypatch
):
    make_bucket(monkeypatch)
    folder, found = epath.Path("gs://b/scored"), []
    score_part = scoring._score_part

    def watched(*arguments: Any) -> dict[str, float]:
        path = folder / "metrics.jsonl"
        found.append(len(path.read_text().splitlines()) if path.exists() else 0)
        return score_part(*arguments)

    monkeypatch.setattr(scoring, "_score_part", watched)
    score(dataset, folder)
    assert found == [0, 1, 2]


def test_scoring_again_does_nothing(dataset, tmp_path):
    score(dataset, tmp_path)
    before = contents(tmp_path)
    calls.clear()
    score(dataset, tmp_path)
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
        lambda p, batch: policy.seq_logp(LLAMA, p, batch),
        params,
        param_shardings=None,
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
    logp = np.asarray(jax.nn.log_softmax(hidden @ output_matrix(LLAMA, params)))
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
        param_shardings=None,
        mesh=mesh(),
        batch_size=2,
        name="test",
    )
    (got,) = forward([row])
    np.testing.assert_array_equal(got, [2.0 * len(ids) for ids in row.completion_tokens])
    assert forward([]) == []
