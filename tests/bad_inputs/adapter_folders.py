"""PEFT folders that are none or not of the model below them, and LoRA that cannot be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from copg_jax import checksums
from copg_jax.hf import weights
from tests import peft_folders
from tests.bad_inputs.ground import Case, Ground, edit_json, resumed, runs, settings

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LORA = ("lora.rank=2", "lora.alpha=4")
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"

Values = dict[str, np.ndarray]


def adapter(
    name: str,
    change: Callable[[Path], object],
    *words: str,
    stage: str = "sft",
    edit: Callable[[Values], object] = lambda values: None,
    arguments: tuple[str, ...] = LORA,
) -> Case:
    """A stage on HERE/adapter, a good PEFT folder of rank 2 on the base, after a change of it."""

    def make(ground: Ground, here: Path) -> None:
        arch = weights.read_architecture(ground.base)
        values = peft_folders.tensors(arch, 2)
        edit(values)
        fields = peft_folders.config(2, 4)
        change(peft_folders.write_folder(here / "adapter", fields, values))

    section = "reference" if stage == "score" else "model"
    given = () if stage in ("score", "evaluate") else arguments
    act = runs(stage, f"{section}.adapter=HERE/adapter", *given, make=make)
    return Case(name, act, ("HERE/adapter", *words))


def field(name: str, value: Any, stage: str = "sft") -> Case:
    """A field of adapter_config.json that describes no LoRA of ours."""
    change = edit_json(CONFIG, **{name: value})
    return adapter(f"{name} of {value!r:.30} of an adapter", change, CONFIG, name, stage=stage)


def keep(folder: Path) -> None:
    """No change."""


def renamed(old: str, new: str) -> Callable[[Values], None]:
    """All tensors under other names."""

    def edit(values: Values) -> None:
        for name in list(values):
            values[name.replace(old, new)] = values.pop(name)

    return edit


def trained_on_another(folder: Path) -> None:
    """Seals an adapter as one of another base."""
    checksums.seal(folder, {"base": "0" * 64})


def damaged(folder: Path) -> None:
    """Changes a sealed adapter."""
    checksums.seal(folder)
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | {"lora_alpha": 5}))


def to_pickle(folder: Path) -> None:
    """Leaves the tensors pickled."""
    (folder / TENSORS).rename(folder / "adapter_model.bin")


CASES = [
    *(
        field(name, value)
        for name, value in {
            "peft_type": "IA3",
            "r": 0,
            "lora_alpha": "big",
            "target_modules": [],
            "use_rslora": True,
            "use_dora": True,
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": {"q_proj": 4},
            "modules_to_save": ["lm_head"],
            "bias": "all",
            "init_lora_weights": "pissa",
            "layers_to_transform": [0],
            "trainable_token_indices": [1],
            "a_field_of_next_year": {"rank": 3},
        }.items()
    ),
    field("target_modules", ["q_proj", "lm_head"], stage="evaluate"),
    adapter(
        "an adapter whose tensors have another prefix", keep, "missing", "surplus",
        *(f"{Q0}.lora_{factor}.weight" for factor in "AB"), "Nothing was loaded",
        edit=renamed("base_model.model.", ""),
    ),
    adapter("an adapter without one of its tensors", keep, "missing", f"{Q0}.lora_B.weight",
            edit=lambda values: values.pop(f"{Q0}.lora_B.weight")),
    adapter("an adapter of another rank than its config says", edit_json(CONFIG, r=3), "misshapen",
            f"{Q0}.lora_A.weight", "r=3", stage="evaluate"),
    adapter("an adapter of a wider model", keep, "misshapen", f"{Q0}.lora_A.weight", stage="score",
            edit=lambda values: values.update({f"{Q0}.lora_A.weight": np.ones((2, 99), "f4")})),
    adapter("an adapter with a tensor more", keep, "surplus", "base_model.model.lm_head.lora_A",
            edit=lambda values: values.update(
                {"base_model.model.lm_head.lora_A.weight": np.ones((2, 16), "f4")})),
    adapter("an adapter that is not finite", keep, "NaN or infinite", "q_proj_a", stage="evaluate",
            edit=lambda values: values[f"{Q0}.lora_A.weight"].fill(np.nan)),
    adapter("an adapter of another base", trained_on_another, "another model", "000000000000"),
    adapter("an adapter that was changed", damaged, CONFIG, "damaged or changed", stage="evaluate"),
    adapter("a pickled adapter", to_pickle, TENSORS, "Pickled"),
    adapter("a folder without an adapter", lambda folder: (folder / CONFIG).unlink(), CONFIG),
    adapter("another rank than that of the adapter", keep, "lora.rank", "lora.rank=2",
            arguments=("lora.rank=3", "lora.alpha=4")),
    adapter("another alpha than that of the adapter", keep, "lora.alpha", "lora.alpha=4",
            arguments=("lora.rank=2",)),
    adapter("other targets than those of the adapter", keep, "lora.targets", "down_proj",
            arguments=(*LORA, "lora.targets=[q_proj]")),
    Case("an adapter where all weights are trained",
         settings("policy", "model.adapter=a"), ("model.adapter", "lora.rank=N")),
    Case("an empty path of an adapter", settings("evaluate", "model.adapter=' '"),
         ("model.adapter",)),
    Case("a rank of 0", settings("sft", "lora.rank=0"), ("lora.rank", ">= 1")),
    Case("a negative alpha", settings("reward", "lora.alpha=-1"), ("lora.alpha", "> 0")),
    Case("a rank as large as a matrix", runs("sft", "lora.rank=8"), ("lora.rank", "k_proj", "8")),
    Case("a target that there is not", runs("policy", "lora.targets=[q_prj]"),
         ("lora.targets", "q_prj", "q_proj", "down_proj")),
    Case("adapters in a run that trained all weights",
         resumed(lambda here: None, "sft", "lora.rank=2"), ("run", "lora")),
    Case("no target", runs("reward", "lora.targets=[]"), ("lora.targets", "none")),
]  # fmt: skip
