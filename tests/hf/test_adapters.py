"""PEFT folders: what we read computes as `peft` has it, and `peft` computes as we do from ours."""

import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from copg_jax.config.sections import LoraConfig, ModelConfig
from copg_jax.hf import adapters, weights
from copg_jax.hf.adapter_config import adapter_config
from copg_jax.hf.card import model_card
from copg_jax.hf.pretrained import PretrainedModel, open_model
from copg_jax.models.decoder import Decoder
from copg_jax.models.forward import make_score
from copg_jax.models.params import Params
from tests import peft_folders, toys
from tests.hf import record_peft
from tests.hf.record_peft import ALPHA, KINDS, PROMPT, RANK
from tests.models import record_golden, tiny

SCALE = ALPHA / RANK
kinds = pytest.mark.parametrize("kind", KINDS)
few_kinds = pytest.mark.parametrize(
    "kind", ["qwen3", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "qwen3")]
)
# Of peft and transformers, to each other.
of_others = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def opened(base: Path, adapter: Path, head: str = "lm", **options: Any) -> PretrainedModel:
    """A model with an adapter on top, in float32."""
    if not (base / "tokenizer.json").exists():
        tiny.tokenizer().save_pretrained(base)
    section = ModelConfig(str(base), adapter=str(adapter), dtype="float32")
    return open_model(section, toys.mesh(), head=head, **options)


def logits(model: PretrainedModel, params: Params) -> np.ndarray:
    """Those that predict completion tokens."""
    tokens, _ = record_golden.inputs()
    hidden = tiny.predictive(model.arch, params, tiny.group_of(tokens, PROMPT))[:, 0]
    return tiny.logits(hidden, Decoder(model.arch).output_matrix(params))


def rewards(model: PretrainedModel, params: Params) -> np.ndarray:
    """Of the rows that peft has seen."""
    tokens, lengths = record_golden.inputs()
    group = tiny.group_of(record_golden.padded(tokens, lengths), PROMPT, lengths)
    return np.asarray(jax.jit(make_score(model.arch))(params, group)[:, 0])


def written_by_us(folder: Path, kind: str) -> tuple[PretrainedModel, Params, Path]:
    """A model with random adapters, and the PEFT folder that is written of them."""
    base, foreign = record_peft.write(folder, kind, "lm")
    model = opened(base, foreign)
    params = model.load_frozen()
    assert model.adapter is not None
    targets = model.adapter.targets
    tensors = adapters.on_host(model.arch, RANK, targets, params)
    fields = adapter_config(RANK, ALPHA, targets, head="lm", base=str(base), revision=None)
    card = model_card("lm", is_adapter=True)
    adapters.save_adapter(folder / "ours", fields, tensors, base_hash=model.base_hash, card=card)
    return model, params, folder / "ours"


@few_kinds
def test_a_peft_folder_computes_as_peft_computes_it(kind: str, tmp_path: Path):
    golden = np.load(record_peft.FILE)
    base, adapter = record_peft.write(tmp_path, kind, "lm")
    model = opened(base, adapter)
    got, wanted = logits(model, model.load_frozen()), golden[f"{kind}/lm"][:, PROMPT - 1 : -1]
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    without = np.load(record_golden.FOLDER / f"{kind}.npz")["logits"][:, PROMPT - 1 : -1]
    assert np.abs(wanted - without).max() > 0.1


@pytest.mark.parametrize("kind", ["qwen3"])
def test_a_peft_folder_with_a_score_head_is_a_reward_model(kind: str, tmp_path: Path):
    base, adapter = record_peft.write(tmp_path, kind, "score")
    model = opened(base, adapter, "score")
    wanted = np.load(record_peft.FILE)[f"{kind}/score"]
    np.testing.assert_allclose(rewards(model, model.load_frozen()), wanted, atol=1e-4)


def test_what_is_written_is_what_is_read_and_says_which_base_it_is_of(tmp_path: Path):
    model, params, folder = written_by_us(tmp_path, "qwen2")
    again = opened(model.folder, folder)
    toys.assert_trees_equal(again.load_frozen()["lora"], params["lora"])
    assert again.adapter is not None
    assert (again.adapter.rank, again.adapter.alpha) == (RANK, ALPHA)
    wanted = peft_folders.tensors(model.arch, RANK)
    written = load_file(folder / "adapter_model.safetensors")
    assert written.keys() == wanted.keys()
    for name, value in written.items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(model.folder)
    assert again.hash not in (model.base_hash, model.hash)


def test_the_merged_folder_has_the_logits_of_base_and_adapter(tmp_path: Path):
    model, params, folder = written_by_us(tmp_path, "qwen3")
    merged = adapters.Merged(model.folder, SCALE, load_file(folder / adapters.TENSORS_NAME))
    weights.save_pretrained(
        tmp_path / "merged",
        model.arch,
        merged,
        head="lm",
        tokenizer=model.tokenizer,
        source=model.config,
    )
    whole = open_model(ModelConfig(str(tmp_path / "merged"), dtype="float32"), toys.mesh())
    np.testing.assert_allclose(logits(whole, whole.load()), logits(model, params), atol=1e-4)


def test_models_of_one_base_hold_its_weights_once(tmp_path: Path):
    base, adapter = record_peft.write(tmp_path, "llama3", "lm")
    _, judge = record_peft.write(tmp_path, "llama3", "score")
    model = opened(base, adapter)
    params, reward_params = model.load_frozen(), opened(base, judge, "score").load_frozen()
    trained = opened(base, adapter, lora=LoraConfig(RANK, ALPHA))
    trees = (reward_params, trained.load_frozen())
    for name in ("q_proj", "up_proj", "input_layernorm"):
        assert all(tree["layers"][name] is params["layers"][name] for tree in trees)
    assert reward_params["embed_tokens"] is params["embed_tokens"]
    assert "lm_head" in params and "lm_head" not in reward_params
    assert reward_params["lora"]["layers"]["q_proj_a"] is not params["lora"]["layers"]["q_proj_a"]


def test_what_is_trained_begins_with_the_adapter_that_is_given_or_with_a_new_one(tmp_path: Path):
    base, adapter = record_peft.write(tmp_path, "llama3", "lm")
    key = jax.random.key(0)
    model = opened(base, adapter, lora=LoraConfig(RANK, ALPHA))
    # What is frozen keeps the given one, which π_ref has, while another is trained.
    toys.assert_trees_equal(model.load(key=key)["lora"], model.load_frozen()["lora"])
    section = ModelConfig(str(base), dtype="float32")
    new = open_model(section, toys.mesh(), lora=LoraConfig(RANK, targets=["q_proj"]))
    assert new.hash == new.base_hash
    assert new.load_frozen().keys() == {*model.load_frozen()} - {"lora"}
    drawn = new.load(key=key)["lora"]["layers"]
    assert drawn.keys() == {"q_proj_a", "q_proj_b"}
    assert not np.any(drawn["q_proj_b"])
    limit = new.arch.hidden_size**-0.5
    assert 0.8 * limit < np.abs(drawn["q_proj_a"]).max() <= limit
    judge = open_model(section, toys.mesh(), head="score", lora=LoraConfig(RANK))
    assert judge.load(key=key).keys() == judge.shapes.keys() == {"lora", "score"}


@pytest.mark.parametrize(
    "modules", ["all-linear", r".*\.(q|v)_proj", ["self_attn.q_proj", "v_proj"], ["q_proj"]]
)
def test_every_form_of_target_modules_is_understood(modules: Any, tmp_path: Path):
    base = tiny.write_checkpoint(tmp_path / "base", "llama3")
    arch = weights.read_architecture(base)
    targets = {"all-linear": tuple(peft_folders.MODULES)}.get(str(modules), ("q_proj", "v_proj"))
    targets = ("q_proj",) if modules == ["q_proj"] else targets
    values = peft_folders.tensors(arch, RANK, targets)
    fields = peft_folders.config(RANK, ALPHA, modules)
    folder = peft_folders.write_folder(tmp_path / "adapter", fields, values)
    adapter = opened(base, folder).adapter
    assert adapter is not None
    assert adapter.targets == targets


@pytest.fixture
def peft() -> ModuleType:
    """The oracle."""
    return importlib.import_module("peft")


@pytest.mark.oracle("peft")
@of_others
@kinds
def test_recorded_arrays_are_what_peft_gives_today(kind: str, tmp_path: Path):
    golden = np.load(record_peft.FILE)
    for name, value in record_peft.record(kind, tmp_path).items():
        np.testing.assert_allclose(value, golden[name], atol=record_golden.BETWEEN_PROCESSORS)


@pytest.mark.oracle("peft")
@of_others
@kinds
def test_peft_computes_as_we_do_from_what_we_write(kind: str, tmp_path: Path, peft: Any):
    model, params, folder = written_by_us(tmp_path, kind)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # peft only warns of tensors that it does not find
        theirs = peft.PeftModel.from_pretrained(record_peft.load(model.folder, "lm"), folder)
    found, ours = record_peft.logits(theirs)[:, PROMPT - 1 : -1], logits(model, params)
    np.testing.assert_allclose(found, ours, atol=1e-4)
    alone = record_peft.logits(record_peft.load(model.folder, "lm"))[:, PROMPT - 1 : -1]
    assert np.abs(ours - alone).max() > 0.1  # it changes the logits
    # Under another prefix peft loads nothing, and the comparison above would see it.
    (folder / "adapter_model.safetensors").unlink()
    values = peft_folders.tensors(model.arch, RANK)
    wrong = {name.removeprefix("base_model.model."): value for name, value in values.items()}
    fields = json.loads((folder / "adapter_config.json").read_text())
    peft_folders.write_folder(folder, fields, wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(record_peft.load(model.folder, "lm"), folder)
    without = record_peft.logits(theirs)[:, PROMPT - 1 : -1]
    np.testing.assert_allclose(without, alone, atol=1e-5)
    assert np.abs(without - ours).max() > 0.1


@pytest.mark.oracle("peft")
@of_others
@pytest.mark.parametrize(
    "modules", ["all-linear", r".*\.(q|v)_proj", ["self_attn.q_proj", "down_proj"]]
)
@pytest.mark.parametrize("head", ["lm", "score"])
def test_what_peft_writes_computes_as_it_does_there(
    head: str, modules: Any, tmp_path: Path, peft: Any
):
    base, _ = record_peft.write(tmp_path, "qwen3", "lm")
    settings = {"r": 2, "lora_alpha": 5, "target_modules": modules, "init_lora_weights": False}
    task = {"lm": "CAUSAL_LM", "score": "SEQ_CLS"}[head]
    theirs = peft.get_peft_model(
        record_peft.load(base, head), peft.LoraConfig(task_type=task, **settings)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    model = opened(base, tmp_path / "theirs", head)
    params = model.load_frozen()
    if head == "score":
        got, wanted = rewards(model, params), record_peft.rewards(theirs)
    else:
        got, wanted = logits(model, params), record_peft.logits(theirs)[:, PROMPT - 1 : -1]
    np.testing.assert_allclose(got, wanted, atol=1e-4)
