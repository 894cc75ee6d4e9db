"""Folders of models: configs, weights, and files that contradict each other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.bad_inputs.ground import (
    Act,
    Case,
    Ground,
    all_of,
    damage,
    edit_json,
    edit_tensors,
    model,
    put,
    runs,
    write,
)

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
EMBEDDINGS, NORM = "model.embed_tokens.weight", "model.norm.weight"
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


def field(name: str, value: Any) -> Case:
    """A field of config.json that describes no model of ours."""
    shown = f"{value!r:.40}"
    act = model(edit_json(CONFIG, **{name: value}))
    return Case(f"{name} of {shown} in config.json", act, (CONFIG, name))


def content(name: str, file: str, change: Callable[[bytes], bytes], *words: str) -> Case:
    """A file of the folder with other bytes."""
    return Case(name, model(damage(file, change)), (file, *words))


FIELDS = [
    ("sliding_window", 64),
    ("eos_token_id", 10**6),
    ("eos_token_id", [0, 10**6]),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", "2"),
    ("num_hidden_layers", 2.5),
    ("num_hidden_layers", None),
    ("hidden_size", 0),
    ("hidden_size", [16]),
    ("intermediate_size", -16),
    ("vocab_size", 0),
    ("vocab_size", 10**30),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 0),
    ("head_dim", 3),
    ("head_dim", "4"),
    ("max_position_embeddings", 0),
    ("max_position_embeddings", "many"),
    ("rms_norm_eps", -1e-6),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", "small"),
    ("tie_word_embeddings", "yes"),
    ("model_type", ["llama"]),
    ("model_type", "mistral"),
]


SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def rope(name: str, value: Any) -> Case:
    """A number of the rotary positions that means nothing, where older configs have it."""
    own = {name: value} if name == "rope_theta" else {"rope_scaling": SCALING | {name: value}}
    change = edit_json(CONFIG, rope_parameters=..., **own)
    return Case(f"positions with {name} of {value}", model(change), (CONFIG, name))


CONFIGS = [
    *(field(name, value) for name, value in FIELDS),
    rope("rope_theta", 0),
    rope("rope_theta", float("inf")),
    rope("rope_theta", "x"),
    rope("rope_type", "linear"),
    rope("rope_type", "yarn"),
    rope("factor", 0),
    rope("factor", float("nan")),
    rope("low_freq_factor", "x"),
    rope("high_freq_factor", 1.0),
    rope("original_max_position_embeddings", -1),
    content("an empty config.json", CONFIG, lambda old: b""),
    content("half a config.json", CONFIG, lambda old: old[: len(old) // 2]),
    content("a config.json in UTF-16", CONFIG, lambda old: old.decode().encode("utf-16")),
    content("a config.json of bytes", CONFIG, lambda old: bytes(range(256))),
    content("a config.json nested deep", CONFIG, lambda old: b"[" * 10_000),
    content("a config.json that is a text", CONFIG, lambda old: b'"llama"'),
    content("a number of 5,000 digits in config.json", CONFIG,
            lambda old: old.replace(b"{", b'{"x": ' + b"9" * 5000 + b",", 1)),
    Case("a config.json that is a folder",
         model(lambda folder: [(folder / CONFIG).unlink(), (folder / CONFIG).mkdir()]), (CONFIG,)),
    Case("the config of a wider model", model(edit_json(CONFIG, hidden_size=32)),
         ("HERE/model", EMBEDDINGS)),
    Case("the config of a deeper model", model(edit_json(CONFIG, num_hidden_layers=3)),
         ("HERE/model", "layers.2")),
]  # fmt: skip


def shards(assign: Callable[[str], str] | None = None, **more: str) -> Callable[[Path], None]:
    """Weights in two files with an index; `assign` changes what the index says of a tensor."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        names = sorted(tensors)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, held in parts.items():
            save_file({name: tensors[name] for name in held}, folder / file)
        (folder / WEIGHTS).unlink()
        weight_map = {name: file for file, held in parts.items() for name in held} | more
        if assign is not None:
            weight_map = {name: assign(file) for name, file in weight_map.items()}
        write(folder / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}))

    return change


def stale_index(folder: Path) -> None:
    """New weights in one file beside the index and the shards of older ones."""
    newest = {name: 2 * value for name, value in load_file(folder / WEIGHTS).items()}
    shards()(folder)
    save_file(newest, folder / WEIGHTS)


def outside(path: str) -> Callable[[Path], None]:
    """An index whose second file lies somewhere else."""

    def change(folder: Path) -> None:
        shards(
            lambda file: file.replace("b.safetensors", path.replace("HERE", str(folder.parent)))
        )(folder)
        target = folder / path.replace("HERE", str(folder.parent))
        target.parent.mkdir(exist_ok=True)
        (folder / "b.safetensors").rename(target)

    return change


def twice(folder: Path) -> None:
    """A tensor that both files hold, with other values in each."""
    shards()(folder)
    held = {file: load_file(folder / file) for file in ("a.safetensors", "b.safetensors")}
    name = next(iter(held["a.safetensors"]))
    other = held["b.safetensors"] | {name: held["a.safetensors"][name] + 1}
    save_file(other, folder / "b.safetensors")


def wrong_file(folder: Path) -> None:
    """An index that looks for each tensor in the other file."""
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}
    shards(other.__getitem__)(folder)


def named(files: dict[str, bytes]) -> Callable[[Path], None]:
    """A folder whose weights are these files instead."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        for name, data in files.items():
            write(folder / name, data)

    return change


def header(text: bytes, length: int | None = None) -> bytes:
    """A safetensors file with this header."""
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(64)


def with_tensor(name: str, value: Any) -> Callable[[Path], None]:
    """Weights with one tensor more, or another in its place; a function makes it of all."""
    make = value if callable(value) else lambda tensors: value
    return edit_tensors(lambda tensors: tensors.update({name: make(tensors)}))


OTHER_OUTPUT = with_tensor("lm_head.weight", lambda tensors: tensors[EMBEDDINGS] + 1)
FOLDER = lambda folder: [(folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()]
FILES = [
    Case("new weights beside an older index", model(stale_index), (WEIGHTS, INDEX)),
    Case("tied embeddings beside another output", model(OTHER_OUTPUT), (WEIGHTS, "lm_head.weight")),
    Case("rotary frequencies of other positions",
         model(with_tensor(FREQUENCIES, np.full(2, 9, np.float32))), (WEIGHTS, FREQUENCIES)),
    Case("a tensor in two files", model(twice), ("a.safetensors", "b.safetensors")),
    Case("an index of the wrong files", model(wrong_file), (INDEX,)),
    Case("an index with a tensor too many", model(shards(ghost="a.safetensors")), ("ghost",)),
    Case("an index into the folder above", model(outside("../outside.safetensors")),
         ("../outside.safetensors",)),
    Case("an index into a folder below", model(outside("below/b.safetensors")),
         ("below/b.safetensors",)),
    Case("an index with a whole path", model(outside("HERE/elsewhere/b.safetensors")),
         ("elsewhere/b.safetensors",)),
    Case("an empty index", model(put(model__safetensors__index__json="")), (INDEX,)),
    Case("an index of numbers",
         model(put(model__safetensors__index__json='{"weight_map": {"a": 1}}')), (INDEX,)),
    Case("an index that is a list", model(put(model__safetensors__index__json="[]")), (INDEX,)),
    Case("an index that is no text", model(put(model__safetensors__index__json=b"\xff")), (INDEX,)),
    content("empty weights", WEIGHTS, lambda old: b""),
    content("a pointer in place of weights", WEIGHTS, lambda old: b"version https://git-lfs.com/"),
    content("weights with a header without end", WEIGHTS, lambda old: header(b"{}", 2**62)),
    content("weights with a header that is no JSON", WEIGHTS, lambda old: header(b"{a: 1}  ")),
    content("weights with an entry without shape", WEIGHTS, lambda old: header(b'{"a": {"x": 1}}')),
    content("weights cut at the end", WEIGHTS, lambda old: old[:-1]),
    content("weights with bytes behind", WEIGHTS, lambda old: old + b"0000"),
    Case("weights that are a folder", model(FOLDER), (WEIGHTS,)),
    Case("weights in whole numbers", model(with_tensor(NORM, np.ones(16, np.int32))),
         (WEIGHTS, NORM)),
    Case("weights of Meta's own release", model(named({"consolidated.00.pth": b"PK"})), (WEIGHTS,)),
    Case("pickled weights", model(named({"pytorch_model.bin": b"PK"})), (WEIGHTS, "never read")),
    Case("an adapter alone",
         model(named({"adapter_config.json": b"{}", "adapter_model.safetensors": header(b"{}")})),
         ("HERE/model", "adapter")),
    Case("an adapter without a config of the base",
         model(all_of([named({"adapter_config.json": b"{}"}), lambda f: (f / CONFIG).unlink()])),
         ("HERE/model", "adapter")),
]  # fmt: skip


def spoilt(name: str, value: float) -> Callable[[Path], None]:
    """A tensor with one value that is no number."""

    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].flat[0] = value

    return edit_tensors(change)


NAN, INF = float("nan"), float("inf")
TWO_SCORES = with_tensor("score.weight", np.ones((2, 16), np.float32))
FEWER = [edit_json(CONFIG, vocab_size=100), with_tensor(EMBEDDINGS, np.ones((100, 16), np.float32))]


def copied(name: str, change: Callable[[Path], object] | None = None) -> Act:
    """A copy of one of the models, HERE/m, perhaps with a change."""

    def make(ground: Ground, here: Path) -> None:
        shutil.copytree(getattr(ground, name), here / "m")
        if change is not None:
            change(here / "m")

    return make


JUDGE = "rewards=[{function: copg_jax.rewards.RewardModel, arguments: {path: HERE/m}}]"


def judge(name: str, change: Callable[[Path], object], *words: str) -> Case:
    """A copy of the reward model scores, after a change of it."""
    return Case(name, runs("score", JUDGE, make=copied("reward_model", change)), ("HERE/m", *words))


def reference(name: str, dtype: str, change: Callable[[Path], object] | None, word: str) -> Case:
    """A policy is evaluated beside a reference that is another."""
    given = ["reference.path=HERE/m", f"reference.dtype={dtype}"]
    return Case(name, runs("evaluate", *given, make=copied("base", change)), ("HERE/m", word))


PLACES = [
    Case("NaN in weights that score", model(spoilt(NORM, NAN), "score"), ("HERE/model",)),
    Case("infinity in weights that score", model(spoilt(NORM, INF), "score"), ("HERE/model",)),
    Case("NaN in weights to train", model(spoilt(EMBEDDINGS, NAN)), ("HERE/model",)),
    Case("infinity in weights to evaluate", model(spoilt(NORM, -INF), "evaluate"), ("HERE/model",)),
    judge("NaN in a reward model", spoilt("score.weight", NAN)),
    judge("a reward model of two labels", TWO_SCORES, "score.weight"),
    judge("a reward model with fewer embeddings than ids", all_of(FEWER), "vocab_size"),
    Case("a language model as a reward model", runs("score", JUDGE, make=copied("base")),
         ("HERE/m", "score.weight")),
    Case("a reward model as a policy",
         runs("sft", "model.path=HERE/m",
              make=copied("reward_model", edit_json(CONFIG, tie_word_embeddings=False))),
         ("HERE/m", "lm_head.weight")),
    Case("an empty folder", runs("sft", "model.path=HERE"), ("HERE", CONFIG)),
    Case("a file as a model", runs("sft", "model.path=HERE/m/config.json", make=copied("base")),
         ("HERE/m/config.json",)),
    Case("a folder that is not there", runs("score", "reference.path=HERE/nowhere"), ("nowhere",)),
    reference("a reference of another sort", "float32", edit_json(CONFIG, rms_norm_eps=0.5),
              "rms_norm_eps"),
    reference("a reference in another dtype", "bfloat16", None, "dtype"),
]  # fmt: skip

CASES = [*CONFIGS, *FILES, *PLACES]
