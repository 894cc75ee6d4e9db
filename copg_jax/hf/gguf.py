"""GGUF files (llama.cpp) of Llama models: read, or convert to a Hugging Face folder.

1. The metadata give the Architecture.
2. Tensors are dequantised one by one; q and k rows are brought back from llama.cpp's rotary order.
3. The byte-level BPE vocabulary and merges become a `transformers` tokenizer.

`python -m copg_jax.hf.gguf FILE.gguf OUT_FOLDER` converts. Needs the `gguf` extra.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from copg_jax.errors import InputError
from copg_jax.hf.names import assemble, check_fit, hf_tensors
from copg_jax.hf.weights import save_pretrained
from copg_jax.models.params import Architecture, Params

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF


def load(path: str | Path) -> tuple[Architecture, Params]:
    """Read a GGUF file into an architecture and float32 parameters (head "lm").

    Raises:
        InputError: not a GGUF file, not a plain Llama, or tensors that do not fit its metadata.
    """
    with _errors(path):
        reader = _open(path)
        tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
        arch = _architecture(_Metadata(reader, path), tied)
        source = _GgufTensors(reader, arch)
        tensors = hf_tensors(arch, head="lm")
        check_fit(source, tensors, str(path))
        return arch, assemble(source, tensors)


def write_tokenizer(path: str | Path, folder: str | Path) -> None:
    """Write the file's byte-level BPE tokenizer as a folder that AutoTokenizer loads."""
    _read_tokenizer(path).save_pretrained(folder)


def convert(path: str | Path, folder: str | Path) -> None:
    """Write a Hugging Face folder (config, float32 safetensors, tokenizer) from a GGUF file."""
    arch, params = load(path)
    tokenizer = _read_tokenizer(path)
    save_pretrained(folder, arch, params, head="lm", tokenizer=tokenizer)


class _Metadata:
    """The key-value part of a file; a missing key is an InputError that names it."""

    def __init__(self, reader: Any, path: str | Path):
        self.path = path
        self._fields = reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        return self._fields[key].contents() if key in self._fields else default

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise InputError(f"{self.path}: metadata lacks {key!r}; use a complete GGUF file")
        return self._fields[key].contents()

    def require(self, key: str, wanted: Sequence[Any], default: Any, hint: str) -> Any:
        got = self.get(key, default)
        if got not in wanted:
            choices = " or ".join(repr(value) for value in wanted)
            raise InputError(f"{self.path}: {key}: wanted {choices}, got {got!r}; {hint}")
        return got


class _GgufTensors:
    """The file's tensors under Hugging Face names, dequantised on reading."""

    def __init__(self, reader: Any, arch: Architecture):
        self._arch = arch
        self._tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
        self._last: tuple[str, np.ndarray] = "", np.empty(0)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        # GGUF stores dimensions fastest first.
        return {n: tuple(int(d) for d in t.shape[::-1]) for n, t in self._tensors.items()}

    def read(self, name: str, index: Sequence[slice]) -> np.ndarray:
        if self._last[0] != name:
            self._last = name, self._dequantise(name)
        return self._last[1][tuple(index)]

    def _dequantise(self, name: str) -> np.ndarray:
        from gguf import quants

        tensor = self._tensors[name]
        value = quants.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("q_proj.weight"):
            return _unpermute(value, self._arch.num_attention_heads)
        if name.endswith("k_proj.weight"):
            return _unpermute(value, self._arch.num_key_value_heads)
        return value


def _unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows from llama.cpp's order (rotary pairs adjacent) to Hugging Face's (halves): [out, D]."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _hf_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".", 3)
        return f"model.layers.{layer}.{_LAYER_NAMES.get(part, part)}.{kind}"
    return _TOP_NAMES.get(name, name)


@contextmanager
def _errors(path: str | Path) -> Iterator[None]:
    """Turns whatever a damaged file makes of its readers into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path}: wanted a GGUF file of a Llama, got one that cannot be read "
            f"({type(error).__name__}: {error}); copy it again"
        ) from error


def _open(path: str | Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise InputError(
            "reading GGUF needs the package gguf: pip install 'copg_jax[gguf]'"
        ) from error
    return gguf.GGUFReader(path)


def _architecture(metadata: _Metadata, tied: bool) -> Architecture:
    hint = "only plain Llama models are supported"
    metadata.require("general.architecture", ["llama"], None, hint)
    metadata.require("llama.expert_count", [0], 0, hint)
    metadata.require(
        "llama.rope.scaling.type", ["none"], "none", "load the Hugging Face folder instead"
    )
    heads, width = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
    head_dim = metadata.get("llama.attention.key_length", width // heads)
    metadata.require("llama.rope.dimension_count", [head_dim], head_dim, hint)
    return Architecture(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=width,
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=metadata.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        # Stored as float32: the shortest decimal is the number that was meant.
        rms_norm_eps=_shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
        rope_theta=_shortest(metadata.get("llama.rope.freq_base", 10000.0)),
        max_position_embeddings=metadata["llama.context_length"],
        tie_word_embeddings=tied,
    )


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


def _read_tokenizer(path: str | Path) -> transformers.PreTrainedTokenizerFast:
    with _errors(path):
        return _make_tokenizer(_Metadata(_open(path), path))


def _make_tokenizer(metadata: _Metadata) -> transformers.PreTrainedTokenizerFast:
    hint = "take the tokenizer of the original model instead"
    metadata.require("tokenizer.ggml.model", ["gpt2"], None, hint)
    kind = metadata.require("tokenizer.ggml.pre", ["smollm", "gpt-2"], None, hint)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=of_type == _CONTROL, normalized=False)
            for token, of_type in zip(tokens, types, strict=True)
            if of_type in (_CONTROL, _USER_DEFINED)
        ]
    )

    def special(name: str) -> str | None:
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if number is None else tokens[number]

    # Files name a BOS even where none is ever put in front; then it is not a BOS for us.
    bos = special("bos") if metadata.get("tokenizer.ggml.add_bos_token", False) else None
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
        )
    eos, pad = special("eos"), special("padding")
    names = {
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": special("unknown"),
        # Padding that equals EOS would hide the EOS from a reward model: see `weights._pad_id`.
        "pad_token": None if pad == eos else pad,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=metadata["llama.context_length"],
        **{name: value for name, value in names.items() if value is not None},
    )


def _main() -> None:
    parser = argparse.ArgumentParser(description="Convert a GGUF Llama to a Hugging Face folder.")
    parser.add_argument("gguf", help="GGUF file of a Llama model")
    parser.add_argument("folder", help="Hugging Face folder to write")
    arguments = parser.parse_args()
    try:
        convert(arguments.gguf, arguments.folder)
    except InputError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    _main()
