"""Samples through the files: drawn, resumed, scored and trained on as they are."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath

from copg_jax import gradients, losses, scoring, sharding
from copg_jax.config.sections import DataConfig, MeshConfig, ModelConfig
from copg_jax.data import sampled
from copg_jax.data.dataset import GroupDataset, prepare
from copg_jax.data.groups import TokenGroup, collate
from copg_jax.data.reader import GroupReader
from copg_jax.data.tokenizer import Encoder, load_tokenizer
from copg_jax.generation import PromptSampler
from copg_jax.hf.pretrained import PretrainedModel, open_model
from copg_jax.infer import GroupForward
from copg_jax.models.forward import make_seq_logp
from copg_jax.models.layout import ReusedShapes
from copg_jax.models.one_shape import OneShape
from copg_jax.objective import make_policy_loss
from tests.runs import json_rows
from tests.toys import names_all
from tests.workplace import Workplace

REWARDS = "rewards=[{function: copg_jax.rewards.length}]"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    """A base model that has drawn samples, and scored them as its own reference."""
    place = Workplace(tmp_path_factory.mktemp("samples"))
    draw(place)
    score(place, "scored")
    return place


def draw(place: Workplace, *more: str) -> None:
    """Two completions of 24 prompts, in two parts."""
    place.run("sample", f"model.path={place.folder / 'base'}", *more)


def score(place: Workplace, name: str, *more: str) -> None:
    """Scores the samples."""
    own = [f"data.path={place.folder / 'sample'}", f"reference.path={place.folder / 'base'}"]
    whole = ["data.part=all", "data.holdout_fraction=0", REWARDS]
    place.run("score", *own, *whole, f"output_dir={place.folder / name}", *more)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Rows of all parts."""
    paths = sorted(folder.glob("part-*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def base(place: Workplace) -> PretrainedModel:
    """The model that drew the samples."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return open_model(ModelConfig(str(place.folder / "base"), dtype="float32"), mesh)


def opened(place: Workplace, name: str, arrow: Path) -> GroupDataset:
    """The data set of a folder."""
    config = DataConfig(str(place.folder / name))
    tokenizer = load_tokenizer(place.folder / "base")
    return prepare(
        GroupReader(config), tokenizer, path=arrow, limits=config.limits, vocab_size=len(tokenizer)
    )


def test_samples_are_groups_with_their_ids_texts_ends_and_probabilities(place, tmp_path):
    rows, model = rows_of(place.folder / "sample"), base(place)
    encoder = Encoder(model.tokenizer)
    assert len(rows) == 24 and len({row["prompt"] for row in rows}) == 24
    ends = [ended for row in rows for ended in row["has_eos"]]
    assert any(ended for ended in ends) and not all(ends)
    for row in rows:
        assert row["prompt_token_ids"] == encoder.encode_prompt(row["prompt"])
        assert row["origin"] == [0, 0] and row["reward"] is row["ref_logp"] is None
        assert row["completion_token_ids"][0] != row["completion_token_ids"][1]
        for ids, text, ended in zip(
            row["completion_token_ids"], row["completions"], row["has_eos"], strict=True
        ):
            assert (ids[-1] == encoder.eos_id) == ended and (ended or len(ids) == 24)
            assert text == encoder.completion_text(ids[: len(ids) - ended])
    groups = list(opened(place, "sample", tmp_path / "groups.arrow"))
    forward = GroupForward(
        make_seq_logp(model.arch), model.load(), mesh=model.mesh, batch_size=8, name="base"
    )
    for group, logps in zip(groups, forward(groups), strict=True):
        assert group.mu_logps is not None
        np.testing.assert_allclose(group.mu_logps, logps, atol=2e-4)


def test_an_interrupted_run_goes_on_and_other_batches_draw_the_same(place, tmp_path):
    whole, again = place.folder / "sample", tmp_path / "again"
    shutil.copytree(whole, again)
    (again / "part-00000.parquet").unlink()  # as if it had been left before
    side_car = sampled.read_sampled(epath.Path(again))
    left = {"part-00001.parquet": side_car.parts["part-00001.parquet"]}
    values = {**vars(side_car), "complete": False, "parts": left}
    sampled.save_sampled(epath.Path(again), sampled.Sampled(**values))
    names_all(
        place.refusal("score", f"data.path={again}", f"reference.path={place.folder / 'base'}",
                      REWARDS, f"output_dir={tmp_path / 'x'}"),
        ["sampled.json", "interrupted after 1 parts"],
    )  # fmt: skip
    written = (again / "part-00001.parquet").stat().st_mtime_ns
    draw(place, f"output_dir={again}")
    assert (again / "part-00001.parquet").stat().st_mtime_ns == written
    assert rows_of(again) == rows_of(whole)
    assert sampled.read_sampled(epath.Path(again)) == sampled.read_sampled(epath.Path(whole))
    other = tmp_path / "other"
    draw(place, f"output_dir={other}", "batch_size=3", "sampling.seed=0")
    for row, wanted in zip(rows_of(other), rows_of(whole), strict=True):
        np.testing.assert_allclose(row.pop("logp_mu"), wanted.pop("logp_mu"), atol=1e-4)
        assert row == wanted


def test_scoring_keeps_the_ids_and_takes_ln_mu_of_the_reference_s_own_samples(
    place, tmp_path, monkeypatch
):
    samples, scored = rows_of(place.folder / "sample"), rows_of(place.folder / "scored")
    kept = ("prompt_token_ids", "completion_token_ids", "completions", "has_eos", "origin")
    for row, sample in zip(scored, samples, strict=True):
        assert {name: row[name] for name in kept} == {name: sample[name] for name in kept}
        assert row["ref_logp"] == row["logp_mu"] == sample["logp_mu"]
        assert row["reward"] == [-len(text.split()) for text in row["completions"]]
    computed: list[int] = []
    run = GroupForward.__call__

    def counted(self: Any, rows: Any) -> Any:
        computed.append(len(rows))
        return run(self, rows)

    monkeypatch.setattr(GroupForward, "__call__", counted)
    score(place, "same")
    assert computed == []
    score(place, "of_another_dtype", "reference.dtype=bfloat16")
    assert sum(computed) == 24
    got = [value for row in rows_of(place.folder / "of_another_dtype") for value in row["ref_logp"]]
    wanted = [value for row in scored for value in row["ref_logp"]]
    assert got != wanted
    np.testing.assert_allclose(got, wanted, rtol=0.02)


@pytest.mark.parametrize("sampling", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}])
def test_ln_mu_of_another_distribution_than_the_reference_is_not_its_own(place, sampling):
    side_car = sampled.read_sampled(epath.Path(place.folder / "sample"))
    assert side_car.is_whole_model and scoring.drawn_from(str(place.folder / "sample"), base(place))
    other = {**vars(side_car), "sampling": side_car.sampling | sampling}
    assert not sampled.Sampled(**other).is_whole_model


def test_a_completion_that_was_cut_is_trained_on_as_it_is(place, tmp_path):
    dataset = opened(place, "scored", tmp_path / "scored.arrow")
    eos = load_tokenizer(place.folder / "base").eos_token_id
    batch = collate(list(dataset), *dataset.shape())
    has_eos = np.array([group.has_eos for group in dataset])
    last = np.take_along_axis(
        batch.completion_tokens, batch.completion_length[..., None] - 1, axis=-1
    )[..., 0]
    np.testing.assert_array_equal(last == eos, has_eos)
    assert (batch.completion_length[~has_eos] == 24).all()


def test_on_policy_with_two_samples_the_gradient_of_a_step_is_that_of_rloo(place, tmp_path):
    """Through the files: the policy is the reference that drew them (Property 2)."""
    dataset, model = opened(place, "scored", tmp_path / "scored.arrow"), base(place)
    batch = collate([dataset[i] for i in range(8)], *dataset.shape())
    seq_logp, params = make_seq_logp(model.arch), model.load()

    def gradient(objective: Any) -> Any:
        loss_fn = make_policy_loss(seq_logp, objective)
        return jax.jit(jax.grad(lambda params: loss_fn(params, batch, 0.5).total))(params)

    copg, rloo = (gradient(loss) for loss in (losses.copg_loss, losses.rloo_loss))
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(copg))
    assert largest > 0.1
    for one, other in zip(jax.tree.leaves(copg), jax.tree.leaves(rloo), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * largest)
    # Both are the closed form's weights on ∇ln π; the log-ratios are 0 here.
    weights = gradients.rloo_gradient(np.zeros_like(batch.reward), batch.reward, beta=0.5)
    by_hand = jax.jit(jax.grad(lambda params: -(weights * seq_logp(params, batch)).sum()))(params)
    for one, other in zip(jax.tree.leaves(copg), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3 * largest)


def test_topr_trains_on_samples_whose_policy_is_known(place, tmp_path):
    dataset = opened(place, "scored", tmp_path / "scored.arrow")
    batch = collate(list(dataset), *dataset.shape())
    np.testing.assert_array_equal(batch.mu_logp, batch.ref_logp)  # the reference drew them
    own = [f"model.path={place.folder / 'base'}", "data.part=all", "data.holdout_fraction=0",
           "data.max_rows=null", "validation=null", "evaluation=null", "loss.name=topr",
           f"data.path={place.folder / 'scored'}", f"output_dir={tmp_path / 'topr'}"]  # fmt: skip
    place.run("policy", *own, "loss.arguments={baseline: 40}")
    rows = [row for row in json_rows(tmp_path / "topr" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(np.isfinite(row["loss"]) and row["optim/grad_norm"] > 0 for row in rows)


@pytest.mark.slow
def test_a_policy_trains_on_a_pool_with_shares_and_on_pairs_across_its_origins(place, tmp_path):
    """Other samples of the same prompts are a second source; with a glob, several folders of it."""
    for name, seed in (("round-0", 1), ("round-1", 2)):
        draw(place, f"sampling.seed={seed}", f"output_dir={tmp_path / 'drawn' / name}")
        drawn = f"data.path={tmp_path / 'drawn' / name}"
        score(place, "x", drawn, f"output_dir={tmp_path / name}")
    rounds, first = tmp_path / "round-*", place.folder / "scored"
    base = [f"model.path={place.folder / 'base'}", "data.path=null", "data.part=all"]
    base += ["data.holdout_fraction=0", "data.max_rows=null", "validation=null", "evaluation=null"]

    def train(name: str, sources: str, *more: str) -> list[dict[str, Any]]:
        folder = tmp_path / name
        place.run("policy", *base, f"data.sources={sources}", f"output_dir={folder}", *more)
        return [row for row in json_rows(folder / "metrics.jsonl") if "loss" in row]

    shares = f"[{{path: {rounds}, share: 0.75}}, {{path: {first}, share: 0.25}}]"
    rows = train("shares", shares)
    assert [row["step"] for row in rows] == [1, 2, 3]
    # At the reference the loss is 0.
    assert abs(rows[0]["loss"]) < 1e-2 < abs(rows[2]["loss"])
    origins = f"[{{path: {rounds}, origin: 1}}, {{path: {first}, origin: 0}}]"
    across = train("across", origins, "loss.pairs=cross")
    assert abs(across[0]["loss"]) < 1e-2 < abs(across[2]["loss"])
    assert across[1:] != rows[1:]
    again = train("across", origins, "loss.pairs=cross")  # is complete
    assert again == across


def test_prompts_alone_are_enough_each_is_taken_once_and_those_for_an_engine_have_ids(
    place, tmp_path
):
    rows = [{"prompt": "Say a.", "id": "x", "answer": 4}, {"prompt": "Say b."}]
    rows += [{"prompt": "Say a."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [f"data.path={tmp_path / 'rows.jsonl'}", "data.part=all", "data.holdout_fraction=0"]
    draw(place, *own, "engine_prompts=true", f"output_dir={tmp_path / 'out'}")
    lines = (tmp_path / "out" / "prompts.jsonl").read_text().split("\n")
    encoder = Encoder(load_tokenizer(place.folder / "base"))
    assert [json.loads(line) for line in lines if line] == [
        {"id": "x", "prompt": "Say a.", "prompt_token_ids": encoder.encode_prompt("Say a."),
         "answer": 4},
        {"id": "rows.jsonl:2", "prompt": "Say b.",
         "prompt_token_ids": encoder.encode_prompt("Say b.")},
    ]  # fmt: skip
    assert not (tmp_path / "out" / "sampled.json").exists()


seen: list[Any] = []


def watching(prompts: list[str], completions: list[str], writer: list[Any]) -> list[float]:
    """Notes the column that it gets for each completion."""
    seen.extend(writer)
    return [float(len(text)) for text in completions]


def test_columns_of_completions_that_were_there_are_not_those_of_the_new_ones(
    place, tmp_path, capfd
):
    """Of an engine's file, with as many completions as are drawn."""
    writers = ["a person", "a model"]
    row = {"prompt": "Say a.", "completions": ["a", "b"], "completion_token_ids": [[70], [71]]}
    row |= {"finish_reason": ["stop", "stop"], "writer": writers}
    rows = [row, row, row | {"prompt": "Say b."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [f"data.path={tmp_path / 'rows.jsonl'}", "data.part=all", "data.holdout_fraction=0"]
    draw(place, *own, f"output_dir={tmp_path / 'out'}")
    assert "one entry for each completion of the data: writer" in capfd.readouterr().err
    assert len(rows_of(tmp_path / "out")) == 2  # each prompt once
    seen.clear()
    rewards = f"rewards=[{{function: {__name__}.watching}}]"
    score(place, "watched", rewards, f"data.path={tmp_path / 'out'}")
    assert seen == [writers] * 4


@pytest.mark.parametrize("setting", ["sampling.top_k=5", "sampling.top_p=0.9"])
def test_a_truncated_support_is_warned_of(place, tmp_path, setting, capfd):
    draw(place, setting, "data.max_rows=3", f"output_dir={tmp_path / 'out'}")
    assert "equal supports" in capfd.readouterr().err
    side_car = sampled.read_sampled(epath.Path(tmp_path / "out"))
    assert not side_car.is_whole_model and side_car.complete
    assert len(rows_of(tmp_path / "out")) == 3


def rooms(shapes, lengths: list[int]) -> list[int]:
    """The room for prompts of each batch that a sampler launches; two places a batch, one bin."""
    seen = []
    sampler = PromptSampler(
        lambda params, tokens, length, layout, keys: seen.append((length, layout)),
        mesh=sharding.make_mesh(MeshConfig(), jax.devices()[:1]),
        batch_size=2,
        num_samples=2,
        max_new_tokens=4,
        shapes=shapes,
    )
    groups = [TokenGroup("a", "a:1", "a", np.ones(n, np.int32), (), ()) for n in lengths]
    list(sampler.launched(None, groups, jax.random.split(jax.random.key(0), len(groups))))
    assert sorted(int(n) for own, _ in seen for n in own if n) == sorted(lengths)
    return [layout.token_slots.shape[1] for _, layout in seen]


def test_prompts_longer_in_all_than_was_expected_get_more_room():
    expected = np.array([(6, 0), (6, 0)])
    shapes = OneShape([expected], batch_size=2, num_bins=1, sizes=(16, 2, 4))
    # By whole sixteenths of the capacity, so that few are compiled.
    assert [rooms(shapes, [length] * 2) for length in (6, 9)] == [[16], [24]]


@pytest.mark.parametrize("kind", ["plain", "reused", "one"])
def test_a_long_prompt_alone_in_a_batch_has_room(kind):
    expected = np.array([(60, 0), (5, 0), (5, 0)])
    one = OneShape([expected], batch_size=2, num_bins=1, sizes=(64, 2, 4))
    shapes = {"plain": None, "reused": ReusedShapes(), "one": one}[kind]
    assert min(rooms(shapes, [60, 5, 5])) >= 5
