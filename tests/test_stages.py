"""The stages end to end on a tiny model, through their configs and mains: what they leave behind,
and which later runs go on from there and which are refused.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from copg_jax import checksums, distributed, inputs, sharding
from copg_jax.config import stages as config
from copg_jax.config.load import load_config
from copg_jax.config.options import option
from copg_jax.config.schema import iter_fields
from copg_jax.data import scored
from copg_jax.data.tokenizer import load_tokenizer
from copg_jax.errors import InputError
from copg_jax.files import read_json_lines
from copg_jax.hf import weights as hf_weights
from copg_jax.hf.pretrained import open_model
from copg_jax.models.params import abstract_params
from copg_jax.train import exports
from copg_jax.train import run as training
from tests.reads import dead_fields, section_classes
from tests.toys import names_all
from tests.workplace import MAINS, Workplace


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    """A folder in which all stages have run, in order, and SFT of adapters too."""
    place = Workplace(tmp_path_factory.mktemp("stages"))
    for stage in MAINS:
        place.run(stage)
    place.run("sft", *adapters_of(place))
    return place


def adapters_of(place: Workplace, stage: str = "sft") -> list[str]:
    """Settings by which a stage trains adapters, into a folder of its own."""
    lora = ["lora.rank=2", "lora.alpha=3", "lora.targets=[q_proj, o_proj, up_proj]"]
    often = ["validation=null", "training.save_every=1", "optim.learning_rate=1e-2"]
    return [*lora, *often, f"output_dir={place.folder / f'{stage}_lora'}"]


def names_in(rows: Sequence[dict[str, Any]]) -> set[str]:
    """All metric names that occur with a number."""
    return {name for row in rows for name, value in row.items() if value is not None}


def test_every_stage_writes_its_config_and_versions(workplace):
    for stage, (_, cls) in MAINS.items():
        folder = workplace.folder / stage
        again = load_config(cls, [str(folder / "config.yaml")])
        assert again == load_config(cls, workplace.arguments(stage))
        versions = json.loads((folder / "versions.json").read_text())
        assert {"jax", "flax", "python", "device_count"} <= versions.keys()


# Read elsewhere: by one piece of code for all stages that train, by pools, workers and engines.
READ_ELSEWHERE = re.compile(
    r"lora\..*|data\.sources\[i\]\..*|.*rewards\[i\]\.timeout_sec|offline\..*|generator\..*"
)


def reads_of(workplace: Workplace, stage: str) -> set[str]:
    """Fields that a stage reads, and those that other tests show to be read."""
    names = {field.name for field in iter_fields(MAINS[stage][1])}
    return workplace.reads[stage] | set(filter(READ_ELSEWHERE.fullmatch, names))


@pytest.mark.parametrize("stage", MAINS)
def test_no_config_field_is_dead(workplace, stage):
    assert dead_fields(MAINS[stage][1], reads_of(workplace, stage)) == []


@pytest.mark.parametrize("stage", MAINS)
def test_a_dead_field_is_found_in_every_section(workplace, stage, monkeypatch):
    cls = MAINS[stage][1]
    before = {field.name for field in iter_fields(cls)}
    reads = reads_of(workplace, stage)
    for section in set(section_classes(cls)):
        # A name that is read, in other sections.
        names = ("path", "weight", "beta")
        name = next(name for name in names if name not in section.__dataclass_fields__)
        extra = dataclasses.make_dataclass("_", [(name, float, option(0.0, "nobody reads it"))])
        with monkeypatch.context() as added:
            added.setitem(section.__dataclass_fields__, name, dataclasses.fields(extra)[0])
            added.setitem(section.__annotations__, name, float)
            new = {field.name for field in iter_fields(cls)} - before
            assert new
            assert set(dead_fields(cls, reads)) == new


def test_sft_logs_its_losses_and_leaves_a_language_model(workplace):
    rows = workplace.metrics("sft")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 2, 3]
    assert {"optim/grad_norm", "perf/pairs_per_sec", "perf/tokens_per_sec"} <= names_in(rows)
    # An untrained model gives each of the tokens about the same probability.
    model = hf_weights.read_architecture(workplace.folder / "sft" / "model")
    assert rows[0]["eval/loss"] == pytest.approx(np.log(model.vocab_size), rel=0.05)
    base = hf_weights.load_params(workplace.folder / "base", model, head="lm")
    trained = hf_weights.load_params(workplace.folder / "sft" / "model", model, head="lm")
    change = np.abs(base["embed_tokens"] - trained["embed_tokens"]).max()
    assert 1e-6 < change < 1e-3  # 3 steps of at most 2e-5
    load_tokenizer(workplace.folder / "sft" / "model")


def test_the_reward_stage_leaves_a_sequence_classifier(workplace):
    folder = workplace.folder / "reward"
    rows = workplace.metrics("reward")
    assert {"loss", "rewards/accuracies", "rewards/margins", "rewards/mean"} <= names_in(rows)
    assert {"data/longer_accuracies", "eval/data/longer_accuracies"} <= names_in(rows)
    raw = json.loads((folder / "model" / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForSequenceClassification"]
    loaded = hf_weights.load_params(
        folder / "model", hf_weights.read_architecture(folder / "model"), head="score"
    )
    assert loaded["score"].shape == (16,)


@pytest.mark.parametrize("export", ["sft/model", "reward/model", "policy/model", "policy/best"])
def test_an_export_says_what_the_config_of_the_model_that_it_began_with_said(workplace, export):
    assert json.loads((workplace.folder / export / "config.json").read_text())["note"] == (
        "of the base"
    )
    assert checksums.check(workplace.folder / export, fix="") == {}


def test_the_scored_folder_says_where_its_numbers_come_from(workplace):
    folder = workplace.folder / "score"
    side_car = scored.read_side_car(folder)
    assert list(side_car.parts) == ["part-00000.parquet", "part-00001.parquet"]
    assert scored.whole_parts(folder, "") == side_car.parts
    assert side_car.complete
    assert side_car.reference_hash == hf_weights.params_hash(workplace.folder / "sft" / "model")
    assert side_car.rewards[0]["function"] == "copg_jax.rewards.RewardModel"
    assert [spec["name"] for spec in side_car.rewards] == ["RewardModel", "words"]
    assert list(side_car.counts["rewards"]) == ["RewardModel", "words", "total reward"]


def test_a_watched_reward_is_logged_with_its_error_and_decides_nothing(workplace):
    averages = json.loads((workplace.folder / "evaluate" / "evaluation.json").read_text())
    for name in ("mean", "stderr"):
        own = "eval/reward/" if name == "mean" else "eval/reward_stderr/"
        assert averages[f"{own}RewardModel"] == averages[f"eval/reward_{name}"]
        assert averages[f"{own}words"] != averages[f"eval/reward_{name}"]
    rows = [row for row in workplace.metrics("policy") if "eval/reward_mean" in row]
    assert all({"eval/reward/words", "eval/reward_stderr/words"} <= row.keys() for row in rows)
    for _, row in read_json_lines(workplace.folder / "evaluate" / "generations.jsonl"):
        assert row["rewards"].keys() == {"RewardModel", "words"}
        assert row["reward"] == row["rewards"]["RewardModel"]


def test_a_run_does_not_go_on_with_another_combination_of_its_rewards(workplace):
    both = lambda setting: [f"{section}.{setting}" for section in ("data", "validation")]
    words = both("rewards={words: 1.0}")
    names_all(
        workplace.refusal("policy", *words), ["data.rewards", str(workplace.folder / "policy")]
    )
    text = workplace.refusal("policy", *words, *both("combine=standardized_sum"))
    names_all(text, ["data.combine: sum -> standardized_sum"])


def test_the_policy_starts_at_its_reference_and_the_last_and_the_best_model_are_left(workplace):
    folder = workplace.folder / "policy"
    rows = workplace.metrics("policy")
    first = next(row for row in rows if row["step"] == 1)
    # The policy is π_ref: all log-ratios are 0, whatever path computed them.
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first["copg/reward_r2"] == pytest.approx(0, abs=1e-3)
    start = rows[0]
    assert start["step"] == 0
    assert start["eval/kl"] == pytest.approx(0, abs=1e-4)
    assert start["eval/kl_k3"] == pytest.approx(0, abs=1e-4)
    assert {f"eval/{name}" for name in EVALUATED} <= names_in(rows)
    assert [row["step"] for row in rows if "eval/reward_mean" in row] == [0, 2, 3]
    assert all("sample/0" in row["text"] for row in rows if "eval/reward_mean" in row)
    best = max(row["eval/reward_mean"] for row in rows[1:] if "eval/reward_mean" in row)
    (step,) = {r["step"] for r in rows[1:] if r.get("eval/reward_mean") == best}
    for name, kept in (("model", 3), ("best", step)):
        model = hf_weights.read_architecture(folder / name)
        params = hf_weights.load_params(folder / name, model, head="lm")
        assert jax.tree.map(np.shape, params) == jax.tree.map(
            lambda leaf: leaf.shape, abstract_params(model)
        )
        assert (folder / "checkpoints" / str(kept)).is_dir()
    same = hf_weights.params_hash(folder / "model") == hf_weights.params_hash(folder / "best")
    assert same == (step == 3)


EVALUATED = (
    "reward_mean",
    "reward_stderr",
    "kl",
    "kl_k3",
    "objective",
    "length",
    "eos_rate",
    "num_prompts",
    "dropped_rewards",
)


def test_evaluation_alone_writes_its_averages_and_every_generation(workplace):
    folder = workplace.folder / "evaluate"
    averages = json.loads((folder / "evaluation.json").read_text())
    assert {f"eval/{name}" for name in EVALUATED} <= averages.keys()
    assert averages["eval/num_prompts"] == 5
    assert averages["eval/kl_k3"] > 0  # the policy has moved away from its reference
    lines = (folder / "generations.jsonl").read_text().splitlines()
    generations = [json.loads(line) for line in lines]
    assert len(generations) == 5
    assert averages["eval/reward_mean"] == pytest.approx(
        np.mean([row["reward"] for row in generations])
    )
    assert len({row["prompt"] for row in generations}) == 5


def test_an_interrupted_evaluation_goes_on_where_it_was(workplace):
    folder = workplace.folder / "evaluate"
    whole = (folder / "generations.jsonl").read_text()
    averages = json.loads((folder / "evaluation.json").read_text())
    lines = whole.splitlines(True)
    # Two prompts in the order of their batch, and a line that was cut short.
    (folder / "generations.jsonl").write_text(lines[3] + lines[1] + lines[0][:20])
    assert workplace.run("evaluate") == pytest.approx(averages, rel=1e-5)
    again = (folder / "generations.jsonl").read_text().splitlines(True)
    assert (again[1], again[3]) == (lines[1], lines[3])
    assert [json.loads(line)["completion"] for line in again] == [
        json.loads(line)["completion"] for line in lines
    ]


def test_a_completed_run_is_not_run_again(workplace, monkeypatch):
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("ran again")

    monkeypatch.setattr(training.loop, "run", never)
    before = (workplace.folder / "sft" / "metrics.jsonl").read_text()
    workplace.run("sft")
    workplace.run("policy")
    assert (workplace.folder / "sft" / "metrics.jsonl").read_text() == before


def test_an_export_that_was_cut_short_is_made_up_for(workplace):
    folder = workplace.folder / "policy"
    wanted = [hf_weights.params_hash(folder / name) for name in ("best", "model")]
    before = workplace.metrics("policy")
    shutil.rmtree(folder / "best")
    shutil.rmtree(folder / "model")
    workplace.run("policy")
    assert [hf_weights.params_hash(folder / name) for name in ("best", "model")] == wanted
    assert workplace.metrics("policy") == before


def test_the_export_needs_no_more_memory_than_training(workplace, tmp_path, monkeypatch):
    shutil.copytree(workplace.folder / "policy", tmp_path / "policy")
    (tmp_path / "policy" / "model" / "config.json").unlink()
    # Not the last step, so that there are two sets of parameters to export.
    monkeypatch.setattr(training.Checkpoints, "best", lambda _: (2, 0.0))
    model = hf_weights.read_architecture(workplace.folder / "base")
    embedding = (model.vocab_size, model.hidden_size)
    sizes: dict[str, list[int]] = {"run": [], "save_pretrained": []}

    def measure(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def measured(*arguments: Any, **options: Any) -> Any:
            # Trees of parameters or of moments; bytes would count shards that were looked at twice.
            sizes[name].append(sum(array.shape == embedding for array in jax.live_arrays()))
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, measured)

    measure(training.loop, "run")
    measure(exports, "save_pretrained")
    workplace.run("policy", f"output_dir={tmp_path / 'policy'}")
    (trained,), (best, last) = sizes.values()
    assert max(best, last) < trained  # one tree of each, against one with two of moments


def test_a_run_of_adapters_leaves_them_alone_and_merged_into_a_base_that_has_not_moved(workplace):
    folder = workplace.folder / "sft_lora"
    base, merged = (load_file(at / "model.safetensors") for at in
                    (workplace.folder / "base", folder / "model"))  # fmt: skip
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert checksums.check(folder / "model", fix="") == {}
    base_hash = hf_weights.params_hash(workplace.folder / "base")
    assert checksums.check(folder / "adapter", fix="") == {"base": base_hash}
    fields = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (2, 3)
    card = (folder / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and "rank: 2" in card and "| step | 3 |" in card
    moved = set()
    for name, value in base.items():
        a, b = (
            adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{factor}.weight")
            for factor in "AB"
        )
        wanted = value if a is None or b is None else value + np.float32(1.5) * (b @ a)
        np.testing.assert_array_equal(merged[name], wanted)
        moved |= {name.split(".")[-2]} if np.abs(merged[name] - value).max() > 1e-5 else set()
    assert moved == {"q_proj", "o_proj", "up_proj"}


def test_an_interrupted_run_of_adapters_ends_as_one_that_was_not_bit_for_bit(workplace, tmp_path):
    folder = tmp_path / "sft_lora"
    shutil.copytree(workplace.folder / "sft_lora", folder)
    files = [folder / "adapter" / "adapter_model.safetensors", folder / "model/model.safetensors"]
    wanted = [file.read_bytes() for file in files]
    for name in ("adapter", "model", "checkpoints/3"):
        shutil.rmtree(folder / name)
    workplace.run("sft", *adapters_of(workplace), f"output_dir={folder}")
    assert [file.read_bytes() for file in files] == wanted
    saved = (folder / "checkpoints" / "3" / "default" / "_METADATA").read_text()
    assert "q_proj_a" in saved
    assert "embed_tokens" not in saved  # nor any other weight of the base


@pytest.mark.slow
def test_adapters_of_a_policy_begin_at_a_reference_that_is_their_base(workplace):
    workplace.run("policy", *adapters_of(workplace, "policy"))
    rows = workplace.metrics("policy_lora")
    start, first = rows[0], next(row for row in rows if row["step"] == 1)
    assert start["eval/kl"] == pytest.approx(0, abs=1e-5)
    assert start["eval/kl_k3"] == pytest.approx(0, abs=1e-6)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["eval/kl_k3"] > 0
    folder = workplace.folder / "policy_lora"
    assert {"model", "adapter", "best", "best_adapter"} <= {item.name for item in folder.iterdir()}
    # Evaluated on top of their base they are what they are merged.
    base = f"model.path={workplace.folder / 'sft' / 'model'}"
    adapter = [base, f"model.adapter={folder / 'adapter'}"]
    found = [
        workplace.run("evaluate", *model, f"output_dir={folder / name}")
        for name, model in (("alone", adapter), ("merged", [f"model.path={folder / 'model'}"]))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-4)


def test_the_folder_of_another_run_is_refused_with_the_differences(workplace):
    text = workplace.refusal("sft", "optim.learning_rate=0.5", "seed=3")
    names_all(text, [str(workplace.folder / "sft"), "optim.learning_rate: 2e-05 -> 0.5"])
    names_all(text, ["seed: 0 -> 3", "another output_dir"])
    assert "training" not in text
    refused = workplace.refusal("score", "part_size=5")
    assert "part_size: 16 -> 5" in refused


def test_a_scored_folder_of_the_first_format_is_neither_trained_on_nor_gone_on_with(
    workplace, tmp_path
):
    folder = tmp_path / "old"
    shutil.copytree(workplace.folder / "score", folder)
    side_car = json.loads((folder / "scored.json").read_text()) | {"format": 1}
    (folder / "scored.json").write_text(json.dumps(side_car))
    elsewhere = f"output_dir={tmp_path / 'run'}"
    again = f"python -m experiments.score {folder}/config.yaml output_dir={folder}-format2"
    for text in (
        workplace.refusal("policy", elsewhere, f"data.path={folder}"),
        workplace.refusal("score", f"output_dir={folder}"),
    ):
        names_all(text, [f"{folder}/scored.json", "format 2, got format 1", again])
    assert json.loads((folder / "scored.json").read_text()) == side_car


def test_a_run_whose_data_changed_under_the_same_path_is_refused(workplace, tmp_path):
    data = tmp_path / "comparisons.jsonl"
    lines = workplace.comparisons.read_text().splitlines(True)
    data.write_text("".join(lines))
    changed = [f"data.path={data}", f"output_dir={tmp_path / 'scored'}"]
    workplace.run("score", *changed)
    data.write_text("".join(lines[1:]))
    text = workplace.refusal("score", *changed)
    names_all(text, ["another content of: data", "output_dir", "inputs.json"])


def contents(workplace) -> dict[str, bytes]:
    """Results of finished stages, which a resumed run must not compute anew, by file."""
    names = "sft/model/*.safetensors", "score/*.parquet", "evaluate/*.jsonl"
    files = [file for name in names for file in workplace.folder.glob(name) if file.is_file()]
    assert {file.parent.name for file in files} == {"model", "score", "evaluate"}
    return {str(file): file.read_bytes() for file in files}


def test_what_does_not_define_a_run_may_differ_when_it_is_resumed(workplace):
    less_memory = ["logits_chunk=8", "reference.attention=xla"]
    before = contents(workplace)
    workplace.run("sft", "mesh.fsdp=4", "mesh.tensor=2", "training.log_every=1")
    workplace.run("score", *less_memory, "batch_size=4")
    workplace.run("evaluate", *less_memory, "model.attention=xla")
    assert contents(workplace) == before


def test_data_scored_with_another_reference_or_tokenizer_trains_no_policy(workplace, tmp_path):
    elsewhere = f"output_dir={tmp_path / 'run'}"
    text = workplace.refusal("policy", elsewhere, f"model.path={workplace.folder / 'base'}")
    names_all(text, ["scored.json", "reference_hash", "score again"])
    for field, value, words in (
        ("tokenizer_hash", "f" * 16, ["tokenizer", "f" * 16]),
        ("reference_dtype", "bfloat16", ["has float32", "read as KL", "model.dtype=bfloat16"]),
        ("complete", False, ["interrupted"]),
    ):
        copy = epath.Path(tmp_path / field)
        shutil.copytree(workplace.folder / "score", copy)
        side_car = dataclasses.replace(scored.read_side_car(copy), **{field: value})
        scored.write_side_car(copy, side_car)
        text = workplace.refusal("policy", elsewhere, f"data.path={copy}")
        names_all(text, [str(copy), *words])


@pytest.mark.parametrize(("stage", "key"), [("policy", "evaluation.rewards"), ("score", "rewards")])
def test_no_reward_function_is_refused_with_an_example(workplace, tmp_path, stage, key):
    text = workplace.refusal(stage, f"output_dir={tmp_path / 'run'}", f"{key}=[]")
    names_all(text, ["rewards", "got none", "rouge_l"])


def test_another_process_opens_the_tokens_of_process_0_if_both_read_the_same_data(
    workplace, tmp_path, monkeypatch
):
    arguments = [*workplace.arguments("score"), f"output_dir={tmp_path}"]
    settings = load_config(config.ScoreConfig, arguments)
    model = open_model(settings.reference, sharding.make_mesh(settings.mesh))

    def opened() -> Any:
        return inputs.open_data(settings.data, model, epath.Path(tmp_path), "groups")

    path = tmp_path / "tokens" / "groups.arrow"
    monkeypatch.setattr(distributed, "_VISIBLE_SEC", 0.0)
    with monkeypatch.context() as second:
        second.setattr(jax, "process_count", lambda: 2)
        second.setattr(jax, "process_index", lambda: 1)
        second.setattr(distributed, "_hear", lambda turn, index: "True")
        second.setattr(distributed, "from_all", lambda key: [key, key])
        # It waits for a file of this data, and never makes one under the eyes of process 0.
        with pytest.raises(InputError, match="process 1 does not see it"):
            opened()
        assert not path.exists()
        second.setattr(jax, "process_index", lambda: 0)
        second.setattr(distributed, "_say", lambda turn, text: None)
        wanted = opened().fingerprint
        second.setattr(jax, "process_index", lambda: 1)
        made = path.stat()
        assert opened().fingerprint == wanted
        assert path.stat() == made
        second.setattr(distributed, "from_all", lambda key: ["another", key])
        with pytest.raises(InputError) as caught:
            opened()
        names_all(str(caught.value), [settings.data.path, "process 1 than in process 0", "Fix"])
        # A process without the data says so, instead of leaving the others to wait for its word.
        said = []
        second.setattr(distributed, "from_all", lambda key: [said.append(key) or "another", key])
        settings = dataclasses.replace(
            settings, data=dataclasses.replace(settings.data, path=str(tmp_path / "absent"))
        )
        with pytest.raises(InputError, match="process 1 of 2 cannot read it") as caught:
            opened()
        names_all(str(caught.value), ["absent", "no such file", "Check data.path"])
        second.setattr(distributed, "from_all", lambda key: ["another", *said])
        settings = load_config(config.ScoreConfig, arguments)
        with pytest.raises(InputError, match="process 1 of 2 cannot read it"):
            opened()
