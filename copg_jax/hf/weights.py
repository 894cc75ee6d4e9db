"""Hugging Face model folders: read and write, without torch and without pickle.

1. `resolve` finds a local folder, or downloads one of a bucket or the hub.
2. `read_architecture` turns config.json into an Architecture, or says why it cannot
   (`families`).
3. `load_params` reads safetensors (one file or sharded) into float32 leaves, shard by shard.
4. `save_pretrained` writes a folder that `transformers` loads with the same logits or rewards.
5. `params_hash` identifies a folder's weights.
"""

import copy
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import transformers
from etils import epath
from jax.experimental import multihost_utils

from copg_jax import checksums, distributed
from copg_jax.errors import InputError
from copg_jax.files import is_remote, local_copy
from copg_jax.hf.card import CARD_NAME, model_card
from copg_jax.hf.config_json import read_config
from copg_jax.hf.families import to_architecture, to_config
from copg_jax.hf.names import (
    HfTensor,
    assemble,
    check_fit,
    check_ignored,
    hf_tensors,
    to_hf,
)
from copg_jax.hf.tensor_files import (
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsFolder,
    write_safetensors,
)
from copg_jax.models.params import Architecture, Params, param_specs

_WRITTEN = re.compile(  # into a model's folder, by `save_pretrained`
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|chat_template\.jinja|"
    r"(config|checksums|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json|README\.md"
)
RESTORE = (
    "Fix: copy the folder again, or let the run that wrote it export it anew (the same command); "
    f"where it was changed on purpose, delete {checksums.NAME} there."
)
_SNAPSHOT_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md"]


def resolve(path_or_id: str, revision: str | None = None) -> Path:
    """Give the local folder of a model: the folder itself, or a downloaded hub snapshot.

    Args:
        path_or_id: folder, URL of one in a bucket, or hub id "owner/name".
        revision: hub branch, tag or commit; only for hub ids.
    """
    if is_remote(path_or_id):
        return Path(local_copy(path_or_id, [pattern[1:] for pattern in _SNAPSHOT_FILES]))
    folder = Path(path_or_id)
    try:
        is_folder, is_there = folder.is_dir(), folder.exists()
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise InputError(
            f"{path_or_id:.200}: wanted a model folder, got: {error.strerror}"
        ) from error
    if is_folder:
        return folder
    if is_there or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path_or_id):
        raise InputError(
            f"{path_or_id}: wanted a model folder (config.json, *.safetensors) or a hub id "
            f"'owner/name', got {'a file' if is_there else 'a path that does not exist'}"
        )
    # Imported here because it pulls in an HTTP client that local folders do not need.
    import huggingface_hub

    try:
        snapshot = huggingface_hub.snapshot_download(
            path_or_id, revision=revision, allow_patterns=_SNAPSHOT_FILES
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path_or_id}: no such folder, and the hub did not give it "
            f"(revision {revision or 'main'}): {error}\n"
            "Check the spelling, log in if the model is gated, or give a local folder."
        ) from error
    return Path(snapshot)


def read_architecture(folder: str | Path) -> Architecture:
    """Reads config.json of a model folder; the families are those of `families.FAMILIES`.

    Raises:
        InputError: the file is missing or broken, or describes something this decoder cannot do.
    """
    raw = read_config(folder)
    try:
        return to_architecture(raw)
    except InputError as error:
        raise InputError(f"{Path(folder) / 'config.json'}: {error}") from error


def load_params(
    folder: str | Path,
    arch: Architecture,
    *,
    head: str,
    shardings: Params | None = None,
    init_missing_score: jax.Array | None = None,
) -> Params:
    """Load a folder's safetensors into float32 parameters.

    Args:
        folder: local model folder, see `resolve`.
        arch: from `read_architecture` of that folder.
        head: "lm" for a causal language model, "score" for a one-label sequence classifier.
        shardings: tree of shardings like the parameters; each device reads its own slices only.
        init_missing_score: key that draws the score head when the folder is a language model.

    Raises:
        InputError: no safetensors, or missing, surplus and misshapen tensors, listed together.
    """
    may_lack_score = init_missing_score is not None
    source, tensors = open_tensors(folder, arch, head=head, may_lack_score=may_lack_score)
    params = assemble(source, tensors, shardings)
    if head == "score" and "score.weight" not in tensors:
        spec = param_specs(arch, head=head)["score"]
        params["score"] = spec.init(init_missing_score, spec.shape, np.float32)
        if shardings is not None:
            params["score"] = jax.device_put(params["score"], shardings["score"])
    return params


def open_tensors(
    folder: str | Path, arch: Architecture, *, head: str, may_lack_score: bool = False
) -> tuple[SafetensorsFolder, dict[str, HfTensor]]:
    """The tensors of a folder, checked, and where each lies in our tree.

    Args:
        folder: local model folder.
        arch: of that folder.
        head: "lm" or "score".
        may_lack_score: whether a language model will do where a score head is wanted.

    Raises:
        InputError: as `load_params`.
    """
    source = SafetensorsFolder(Path(folder))
    tensors = hf_tensors(arch, head=head)
    optional = []
    if head == "score" and may_lack_score and "score.weight" not in source.shapes():
        del tensors["score.weight"]
        optional.append("lm_head.weight")
    if arch.tie_word_embeddings:
        optional.append("lm_head.weight")  # some writers store the tied copy
    check_fit(source, tensors, str(folder), optional=optional)
    check_ignored(source, tensors, arch, str(folder))
    return source, tensors


def save_pretrained(
    folder: epath.PathLike,
    arch: Architecture,
    params: Params | Callable[[str], np.ndarray],
    *,
    head: str,
    tokenizer: transformers.PreTrainedTokenizerBase,
    end_ids: Sequence[int] = (),
    source: Mapping[str, Any] | None = None,
    card: str | None = None,
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Write config.json, safetensors (float32), tokenizer, model card (README.md) and, last, the
    checksums of all but the card, which mark the folder as complete.

    Every process calls it, to gather each tensor in turn; process 0 writes.

    Args:
        folder: target; replaced where it holds such an export and no other file.
        arch: sizes of the model.
        params: tree of `init_params`, any sharding; or what gives a tensor by its name.
        head: "lm" -> the family's ForCausalLM, "score" -> ForSequenceClassification of one label.
        tokenizer: gives BOS, EOS and padding ids; saved beside the weights.
        end_ids: all ids at which a generation ends, for whoever generates with the export; none:
            the tokenizer's EOS.
        source: config.json of the folder that the model came from; what it says besides is kept.
        card: text of the model card; None says no more than what kind of model it is.
        max_shard_bytes: size at which the next safetensors file begins.
    """
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": list(end_ids) if len(end_ids) > 1 else tokenizer.eos_token_id,
        "pad_token_id": _pad_id(tokenizer),
    }
    config = to_config(arch, head=head, special=special, source=source or {})
    tensors = hf_tensors(arch, head=head)
    of_tree = lambda name: to_hf(tensors[name], fetch(params, tensors[name]))
    value = params if callable(params) else of_tree
    folder = epath.Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    with distributed.main_first(folder.parent):
        if distributed.is_main_process():
            check_replaceable(folder)
            temporary.rmtree(missing_ok=True)
            temporary.mkdir(parents=True)
            padded = copy.deepcopy(tokenizer)  # the caller's tokenizer stays as it is
            if (pad_id := _pad_id(tokenizer)) is not None:
                padded.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
            _save_tokenizer(padded, temporary)
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            text = model_card(head) if card is None else card
            (temporary / CARD_NAME).write_bytes(text.encode())
    try:
        _write_weights(temporary, tensors, value, max_shard_bytes)
        with distributed.main_first(folder / checksums.NAME):
            if distributed.is_main_process():
                folder.rmtree(missing_ok=True)
                temporary.rename(folder)
                checksums.seal(folder, leave_out=CARD_NAME)
    finally:
        if distributed.is_main_process():
            temporary.rmtree(missing_ok=True)


def _save_tokenizer(tokenizer: Any, folder: epath.Path) -> None:
    """Saves a tokenizer of transformers, which only knows files of this machine."""
    with tempfile.TemporaryDirectory() as local:
        tokenizer.save_pretrained(local)
        for file in Path(local).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())


def check_replaceable(folder: epath.Path, written: Collection[str] | None = None) -> None:
    """Raises InputError unless a folder is new, empty, or holds what is written there and no more:
    all of it, or what an interrupted removal has left.

    Args:
        folder: an export.
        written: names of its files; None = those of a model.
    """
    names = sorted(item.name for item in folder.iterdir()) if folder.exists() else []
    is_ours = _WRITTEN.fullmatch if written is None else written.__contains__
    if others := [name for name in names if not is_ours(name)]:
        raise InputError(
            f"{folder}: wanted a new folder or an older export to replace, got other files "
            f"({', '.join(others[:5])}), which would be lost; choose another folder"
        )


def _pad_id(tokenizer: transformers.PreTrainedTokenizerBase) -> Any:
    """The id of a special token to pad with that is not EOS; None where there is no such token.

    ForSequenceClassification of transformers reads the last token that differs from pad_token_id:
    with padding equal to EOS it would read the token before the EOS. Without pad_token_id it takes
    batches of one text and refuses larger ones. An ordinary token is no substitute: as padding it
    would count as special, and decoding would leave it out of texts.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    return next((i for i in candidates if i is not None and i != tokenizer.eos_token_id), None)


def _write_weights(
    folder: epath.Path,
    tensors: Mapping[str, HfTensor],
    value: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in tensors.items():
        num_bytes = 4 * int(np.prod(tensor.hf_shape))
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + num_bytes, total + num_bytes
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = SINGLE_NAME
        _write_file(folder / file, {name: tensors[name] for name in names}, value)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1 and distributed.is_main_process():
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(
    path: epath.Path, tensors: Mapping[str, HfTensor], value: Callable[[str], np.ndarray]
) -> None:
    # Other processes take part in the gathering, and throw away what they get.
    with path.open("wb") if distributed.is_main_process() else open(os.devnull, "wb") as stream:
        write_safetensors(
            stream, {name: tensor.hf_shape for name, tensor in tensors.items()}, value
        )


@jax.jit
def _take_layer(leaf: jax.Array, layer: int) -> jax.Array:
    # Jitted with a traced layer: one program a leaf, and the host never holds all layers of it.
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def fetch(params: Any, tensor: HfTensor) -> np.ndarray:
    """A leaf, or one layer of it, whole and in float32 on every host."""
    if tensor.stack is None:
        value = params[tensor.leaf]
    else:
        value = _take_layer(params[tensor.stack][tensor.leaf], tensor.layer)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True), np.float32)


def params_hash(folder: str | Path, config: str = "config.json") -> str:
    """SHA-256 (hex) over the config and the weight files of a folder: names and contents.

    Raises:
        InputError: a file that cannot be read, or that has changed since the folder was sealed.
    """
    digest = hashlib.sha256()
    wanted = checksums.sealed_sums(folder, fix=RESTORE)
    sealed = [Path(folder) / name for name in wanted if name.endswith(".safetensors")]
    weights = {*Path(folder).glob("*.safetensors"), *sealed}
    for file in sorted([Path(folder) / config, *weights]):
        found = checksums.file_sum(file, fix=RESTORE)
        checksums.expect_sum(file, found, wanted.get(file.name, found), fix=RESTORE)
        digest.update(file.name.encode() + bytes.fromhex(found))
    return digest.hexdigest()
