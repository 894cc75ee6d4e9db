"""Bad settings, models and data are refused before anything long begins, with what to change."""

import json
import os
import shutil

import pytest

from copg_jax import checksums, lock
from copg_jax.config.sections import Limits
from copg_jax.data.dataset import prepare
from copg_jax.data.formats.texts import TextGroup
from copg_jax.data.tokenizer import load_tokenizer
from copg_jax.inputs import warn_of_overlap
from tests.toys import names_all
from tests.workplace import MAINS, Workplace, tiny_model


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    """Data and a base model, which stands in for the models that SFT and the policy stage leave."""
    place = Workplace(tmp_path_factory.mktemp("refusals"))
    for stage in ("sft", "policy"):
        shutil.copytree(place.folder / "base", place.folder / stage / "model")
    return place


@pytest.fixture
def elsewhere(tmp_path) -> str:
    """Argument for an output folder that is not used yet."""
    return f"output_dir={tmp_path / 'run'}"


@pytest.mark.parametrize("stage", MAINS)
def test_a_folder_that_another_run_is_writing_is_refused_by_every_stage(workplace, stage, tmp_path):
    with lock.hold(tmp_path):
        text = workplace.refusal(stage, f"output_dir={tmp_path}")
    names_all(text, [f"output_dir {tmp_path}", f"process {os.getpid()} on host", "Fix"])


@pytest.mark.parametrize("stage", MAINS)
def test_an_output_folder_in_what_is_read_is_refused_by_every_stage(workplace, stage):
    inside = workplace.folder / ("sft" if stage != "evaluate" else "policy") / "model" / "run"
    if stage == "sft":
        inside = workplace.folder / "base" / "run"
    names_all(workplace.refusal(stage, f"output_dir={inside}"), [str(inside), "overlaps", ".path"])
    assert not inside.exists()


def test_unknown_and_mistyped_keys_are_named_with_the_one_that_was_meant(workplace, elsewhere):
    names_all(
        workplace.refusal("policy", elsewhere, "loss.bta=0.1", "training.max_steps=many"),
        ["'loss.bta'", "did you mean 'loss.beta'?", "training.max_steps", "wanted int", "'many'"],
    )


@pytest.mark.parametrize(
    ("stage", "setting", "parts"),
    [
        ("policy", "loss.beta=0", ["loss.beta must be > 0", "got 0"]),
        ("evaluate", "beta=-1", ["beta must be > 0", "got -1"]),
        ("policy", "loss.name=ppo", ["loss.name must be one of copg, dpo", "'ppo'"]),
        ("policy", "loss.baseline=1", ["loss.baseline", "loss"]),
        (
            "policy",
            "loss.arguments={baseline: 1}",
            ["loss.arguments", "copg", "'baseline'", "it takes beta."],
        ),
        ("policy", "loss.name=tests.no_such.loss", ["loss.name", "'tests.no_such.loss'"]),
        ("sft", "model.dtype=float16", ["model.dtype must be one of", "'float16'"]),
        ("sft", "training.remat=some", ["training.remat must be one of", "'some'"]),
        ("sft", "logits_chunk=0", ["logits_chunk must be >= 1", "got 0"]),
        ("score", "part_size=0", ["part_size"]),
        ("sft", "training.num_microbatches=3", ["training.batch_size", "multiple", "8 and 3"]),
        ("sft", "training.num_microbatches=2", ["training.batch_size", "2 x 8", "nearest is 16"]),
        ("sft", "mesh.tensor=3", ["mesh", "tensor=3", "8 device"]),
        ("sft", "training.batch_size=64", ["24 groups", "64", "batch size"]),
        ("sft", "model.path=nowhere/at/all", ["nowhere/at/all", "model folder"]),
        ("sft", "data.path=nowhere.jsonl", ["nowhere.jsonl"]),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" in value else "",
)
def test_bad_settings_are_named_with_what_was_wanted(workplace, elsewhere, stage, setting, parts):
    names_all(workplace.refusal(stage, elsewhere, setting), parts)


def test_a_mesh_that_does_not_divide_the_model_lists_what_it_does_not_divide(workplace, elsewhere):
    text = workplace.refusal("sft", elsewhere, "mesh.tensor=4", "mesh.fsdp=2")
    names_all(text, ["k_proj", "kv_heads", "size 2", "mesh.tensor=4"])


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(workplace, elsewhere, tmp_path):
    tiny_model(tmp_path / "small", load_tokenizer(workplace.folder / "base"), 300)
    text = workplace.refusal("sft", elsewhere, f"model.path={tmp_path / 'small'}")
    names_all(text, [str(tmp_path / "small"), "400 ids", "300", "vocab_size in config.json", "Fix"])


@pytest.mark.parametrize(
    ("stage", "window", "parts"),
    [
        ("sft", 100, ["sft.jsonl", "data.max_prompt_tokens"]),
        ("score", 100, ["comparisons.jsonl", "data.max_prompt_tokens"]),
        (
            "evaluate",
            400,
            ["evaluation.generation", "completions of up to 395", "max_new_tokens"],
        ),
    ],
)
def test_a_window_that_is_shorter_than_the_data_is_refused_with_both_numbers(
    workplace, elsewhere, tmp_path, stage, window, parts
):
    model = tmp_path / "mistral"
    shutil.copytree(workplace.folder / "base", model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mistral", "sliding_window": window}
    (model / "config.json").write_text(json.dumps(config))
    (model / checksums.NAME).unlink()
    paths = [f"{name}.path={model}" for name in ("model", "reference")]
    paths = {"sft": paths[:1], "score": paths[1:]}.get(stage, paths)
    longer = ["evaluation.generation.max_new_tokens=395"] if stage == "evaluate" else []
    text = workplace.refusal(stage, elsewhere, *paths, *longer)
    names_all(text, [*parts, str(model), f"sliding_window={window}", "Fix"])


def test_fewer_prompts_than_asked_for_are_refused(workplace, elsewhere):
    text = workplace.refusal("evaluate", elsewhere, "evaluation.generation.num_prompts=1000")
    names_all(text, ["evaluation.data", "wanted 1000", "got 9", str(workplace.posts)])
    assert "num_prompts=9" in text


def test_data_without_choices_trains_no_reward_model(workplace, elsewhere):
    text = workplace.refusal("reward", elsewhere, f"data.path={workplace.posts}")
    names_all(text, [f"{workplace.posts}:", "wanted two or more completions", "got 1", "`chosen`"])


@pytest.mark.parametrize(
    "row", [{"prompt": "p"}, {"prompt": "p", "completion": "c"}, "of another kind", "comparisons"]
)
def test_data_that_was_not_scored_trains_no_policy(workplace, elsewhere, tmp_path, row):
    path = workplace.comparisons if row == "comparisons" else tmp_path / "rows.jsonl"
    if row != "comparisons":
        path.write_text(json.dumps(row) + "\n")
    text = workplace.refusal("policy", elsewhere, f"data.path={path}")
    names_all(text, [str(path), "no ref_logp", "experiments.score"])
    assert not (tmp_path / "run").exists()  # not even tokens


@pytest.mark.parametrize(
    ("stage", "row", "parts"),
    [
        ("reward", {"completion": "c"}, ["got 1 without", "`chosen` and `rejected`"]),
        ("reward", {"completions": ["a", "b"]}, ["got 2 without", "`rewards`"]),
        ("score", {}, ["a prompt and no completion", "`completions`", "`rewards`"]),
        ("sft", {}, ["a prompt and no completion", "`completion`", "`chosen`"]),
        (
            "sft",
            {"completions": ["a", "b", "c"], "rewards": [1, 2, 3]},
            ["got 3 completions with rewards", "Fix", "`completion`"],
        ),
    ],
)
def test_rows_that_a_stage_cannot_mean_are_named_with_what_it_wants(
    workplace, elsewhere, tmp_path, stage, row, parts
):
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps({"prompt": "p"} | row) + "\n") * 8)
    settings = ["data.holdout_fraction=0", "data.part=all", f"data.path={path}"]
    names_all(workplace.refusal(stage, elsewhere, *settings), [f"{path}:1", *parts])


LENGTH = "rewards=[{function: copg_jax.rewards.length}]"


@pytest.fixture(scope="module")
def ties(workplace):
    """Rows of which every one has equally good completions, and a folder of them, scored."""
    path = workplace.folder / "ties.jsonl"
    rows = [
        {"prompt": f"Post {i}:", "completions": [f" good {i}", f" fine {i}"], "rewards": [i, i]}
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = ["data.part=all", "data.holdout_fraction=0"]
    workplace.run("score", f"data.path={path}", *whole, "rewards=[]")
    return path


def test_a_reward_model_is_not_trained_on_ties_alone(workplace, elsewhere, ties):
    text = workplace.refusal("reward", elsewhere, f"data.path={ties}", "training.max_steps=1")
    names_all(text, [str(ties), "different rewards", "nothing to learn", "Fix"])


@pytest.mark.parametrize("loss", ["copg", "dpo", "ipo", "rloo"])
def test_a_policy_is_not_trained_on_ties_alone(workplace, elsewhere, ties, loss):
    text = workplace.refusal("policy", elsewhere, f"loss.name={loss}", "data.part=all",
                             "data.holdout_fraction=0")  # fmt: skip
    names_all(text, [str(workplace.folder / "score"), "got 24 in each", "nothing to learn"])


@pytest.mark.parametrize("weights", [["0"], ["0.0", "-0"]])
def test_rewards_that_all_weigh_nothing_are_refused(workplace, elsewhere, weights):
    specs = [f"{{function: copg_jax.rewards.length, weight: {weight}}}" for weight in weights]
    text = workplace.refusal("score", elsewhere, f"rewards=[{', '.join(specs)}]")
    names_all(text, ["rewards: wanted a weight other than 0"])


@pytest.mark.parametrize(("tokens", "most"), [(10**12, 3982), (4096, 3982), (3983, 3982)])
def test_completions_beyond_the_positions_of_the_model_are_refused(
    workplace, elsewhere, tokens, most
):
    setting = f"evaluation.generation.max_new_tokens={tokens}"
    text = workplace.refusal("evaluate", elsewhere, setting, f"evaluation.{LENGTH}")
    names_all(text, ["max_new_tokens", f"up to {tokens} tokens", f"at most {most}", "up to 114"])
    names_all(text, ["max_position_embeddings=4096", str(workplace.folder), "Fix"])


def test_a_refused_run_leaves_no_config_behind(workplace, elsewhere, tmp_path):
    workplace.refusal("reward", elsewhere, f"data.path={workplace.posts}")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_sft_on_preferences_says_that_it_learns_the_chosen_alone(
    workplace, elsewhere, capfd, tmp_path
):
    comparisons = [f"data.path={workplace.comparisons}", "data.max_rows=9", "validation=null"]
    workplace.run("sft", elsewhere, *comparisons, "training.max_steps=1")
    assert "9 x rejected completion left out" in capfd.readouterr().err
    stats = json.loads((tmp_path / "run" / "tokens" / "train.json").read_text())["stats"]
    assert stats["completions"]["max"] == 1 and stats["with_rewards"] == 0


def test_validation_on_rows_that_are_trained_on_is_said(workplace, elsewhere, capsys):
    settings = [
        f"{part}.{to}" for part in ("data", "validation") for to in ("part=all", "max_rows=9")
    ]
    workplace.run("sft", elsewhere, *settings, "training.max_steps=1")
    said = "validation: the posts of 9 of its 9 groups are trained on as well"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["posts", "prompts"])
def test_validation_on_a_copy_of_rows_that_are_trained_on_is_said(
    kind, workplace, tmp_path, caplog
):
    tokenizer = load_tokenizer(workplace.folder / "base")
    prompt = "SUBREDDIT: r/a\n\nTITLE: t{}\n\nPOST: {}\n\nTL;DR:"
    prompt = prompt if kind == "posts" else "Say {}."

    def dataset(name, numbers):
        rows = [TextGroup(f"{i}", f"{name}:{i}", prompt.format(i, name), ("a",)) for i in numbers]
        path = tmp_path / f"{name}.arrow"
        return prepare(rows, tokenizer, path=path, limits=Limits(), vocab_size=len(tokenizer))

    train = dataset("train", range(8))
    warn_of_overlap(train, dataset("other", range(8, 12)))
    assert not caplog.records
    warn_of_overlap(train, dataset("val", range(5, 12)))
    assert "the posts of 3 of its 7 groups are trained on as well" in caplog.text


def test_a_reward_model_is_trained_on_the_choices_of_pairs_whose_scores_are_equal(
    workplace, elsewhere, tmp_path
):
    row = {"prompt": "Say a.", "chosen": "a", "rejected": "b", "rewards": [1, 1]}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 16)
    settings = [f"data.path={tmp_path / 'pairs.jsonl'}", "validation=null", "data.part=all"]
    workplace.run("reward", elsewhere, *settings, "training.max_steps=1")
    stats = json.loads((tmp_path / "run" / "tokens" / "train.json").read_text())["stats"]
    assert stats["kept"] == stats["with_rewards"] == 16
