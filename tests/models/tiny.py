"""Tiny models of every supported family, written as the checkpoints that the world publishes.

Weights come from RandomState, whose stream NumPy guarantees for ever, so that golden arrays do not
need to carry them. Names, shapes and config keys are spelled out here a second time on purpose.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from copg_jax.data.groups import GroupBatch
from copg_jax.models.decoder import Decoder
from copg_jax.models.forward import predictive_hidden
from copg_jax.models.layout import Capacity, GroupPacking, Shape
from copg_jax.models.params import Architecture, Params

VOCAB = 61
PAD = 2  # of the tiny tokenizer; EOS is 1
_BASE = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": 1,
}
_SCALING = {  # frequencies 1, 0.1, 0.01, 0.001 fall on both sides of, and into, the smooth band
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LLAMA_ONLY = ("attention_bias", "rope_scaling")
_RELATIVE = {name: value for name, value in _BASE.items() if name not in _LLAMA_ONLY} | {
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 2,
}
KINDS = {
    "llama2": _BASE,
    "llama3": _BASE | {"num_key_value_heads": 2, "rope_scaling": _SCALING},
    "tied": _BASE | {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True},
    "smollm2": _BASE
    | {
        "hidden_size": 48,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    # Its window holds the longest text of the tests, and no token more.
    "mistral": _RELATIVE | {"model_type": "mistral", "sliding_window": 20},
    "qwen2": _RELATIVE
    | {
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": _RELATIVE
    | {
        "model_type": "qwen3",
        "head_dim": 16,
        "rope_theta": 1000000.0,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "qwen3_tied": _RELATIVE
    | {"model_type": "qwen3", "head_dim": 6, "tie_word_embeddings": True, "num_hidden_layers": 3},
    "smollm3": _RELATIVE
    | {
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "no_rope_layers": [1, 0, 1, 0],
        "use_sliding_window": False,
    },
}
_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
}
_HEADS = {"lm": "ForCausalLM", "score": "ForSequenceClassification"}


def class_name(kind: str, head: str) -> str:
    """The class of transformers that such a checkpoint names."""
    return _CLASSES[KINDS[kind]["model_type"]] + _HEADS[head]


def hf_tensors(kind: str, head: str) -> dict[str, np.ndarray]:
    """Random float32 weights under Hugging Face names."""
    c = KINDS[kind]
    d, f = c["hidden_size"], c["intermediate_size"]
    head_dim = c.get("head_dim", d // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": (VOCAB, d), "model.norm.weight": (d,)}
    for i in range(c["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (d,),
                "post_attention_layernorm": (d,),
                "self_attn.q_proj": (q, d),
                "self_attn.k_proj": (kv, d),
                "self_attn.v_proj": (kv, d),
                "self_attn.o_proj": (d, q),
                "mlp.gate_proj": (f, d),
                "mlp.up_proj": (f, d),
                "mlp.down_proj": (d, f),
            }.items()
        }
        attention = f"model.layers.{i}.self_attn"
        if c["model_type"] == "qwen2":
            widths = {"q": q, "k": kv, "v": kv}
            shapes |= {f"{attention}.{name}_proj.bias": (w,) for name, w in widths.items()}
        if c["model_type"] == "qwen3":
            shapes |= {f"{attention}.{name}_norm.weight": (head_dim,) for name in "qk"}
    if head == "score":
        shapes["score.weight"] = (1, d)
    elif not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, d)
    draw = np.random.RandomState(list(KINDS).index(kind))
    return {
        name: (len(shape) == 1 and "bias" not in name)
        + 0.2 * draw.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_checkpoint(folder: Path, kind: str, head: str = "lm", dtype: type = np.float32) -> Path:
    """Write config.json (the form of transformers 4) and model.safetensors."""
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} if head == "score" else {}
    config = KINDS[kind] | {"architectures": [class_name(kind, head)]} | labels
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: value.astype(dtype) for name, value in hf_tensors(kind, head).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tokenizer() -> transformers.PreTrainedTokenizerBase:
    """A word-level tokenizer with EOS = 1 and padding = 2."""
    words = ["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(VOCAB - 3))]
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )


def logits(hidden: jax.Array, output_matrix: jax.Array) -> np.ndarray:
    """Logits of any hidden states."""
    return np.asarray(hidden) @ np.asarray(output_matrix)


def group_of(tokens: np.ndarray, cut: int, length: np.ndarray | None = None) -> GroupBatch:
    """Rows of ids [B, T] as groups of one completion, which begins at `cut`."""
    b, size = tokens.shape
    length = np.full(b, size) if length is None else length
    return GroupBatch(
        prompt_tokens=tokens[:, :cut],
        prompt_length=np.full(b, cut),
        completion_tokens=tokens[:, None, cut:],
        completion_length=(length - cut)[:, None],
        reward=np.zeros((b, 1), np.float32),
        ref_logp=np.zeros((b, 1), np.float32),
    )


def deeper(arch: Architecture, num_layers: int) -> Architecture:
    """The architecture with so many layers, of the same kinds in turn."""
    flags = arch.rotary_layers and (arch.rotary_layers * num_layers)[:num_layers]
    return dataclasses.replace(arch, num_hidden_layers=num_layers, rotary_layers=flags)


def shape_of(
    group: GroupBatch, num_bins: int, spare: tuple[int, int] = (0, 0), *, buckets: bool = False
) -> Shape:
    """The shape that the groups need in so many bins, in their order.

    Args:
        group: its lengths are read.
        num_bins: R, divides B.
        spare: capacity beyond what the fullest bin needs: all tokens, and those of completions.
        buckets: each place is as narrow as the longest prompt in it, which no run would cut so
            fine; else all are as wide as the batch.
    """
    in_place = group.prompt_length.reshape(num_bins, -1)
    own = group.completion_length.reshape(num_bins, -1).sum(1)
    both = in_place.sum(1) + own
    size = group.prompt_tokens.shape[1]
    widths = in_place.max(0).tolist() if buckets else [size] * in_place.shape[1]
    capacity = Capacity(int(both.max()) + spare[0], int(own.max()) + spare[1])
    return Shape(num_bins, tuple(widths), size, *group.completion_tokens.shape[1:], capacity)


def laid_out(
    group: GroupBatch, num_bins: int, spare: tuple[int, int] = (0, 0), *, buckets: bool = False
) -> GroupBatch:
    """The batch with the layout of `shape_of`."""
    shape = shape_of(group, num_bins, spare, buckets=buckets)
    return group._replace(layout=shape.layout(group.prompt_length, group.completion_length))


@functools.partial(jax.jit, static_argnums=0)
def predictive(arch: Architecture, params: Params, group: GroupBatch) -> jax.Array:
    """The states that predict each completion token, padded: [B, K, C, D]; 0 if not computed."""
    packing = GroupPacking.of(group)
    hidden = predictive_hidden(Decoder(arch), params, group, packing)
    return packing.completions.unpack(hidden).reshape(*group.completion_tokens.shape, -1)


def sequences(group: Any) -> jax.Array:
    """Each completion after its prompt, without a gap: ids [B * K, P + C], right-padded with 0."""
    b, k, c = group.completion_tokens.shape
    rows = np.zeros((b, k, group.prompt_tokens.shape[1] + c), np.int32)
    for i, j in np.ndindex(b, k):
        length = group.prompt_length[i]
        rows[i, j, :length] = group.prompt_tokens[i, :length]
        rows[i, j, length : length + c] = group.completion_tokens[i, j]
    return jnp.asarray(rows.reshape(b * k, -1))


@functools.partial(jax.jit, static_argnums=0)
def plain_hidden(arch: Architecture, params: Params, tokens: jax.Array) -> jax.Array:
    """The model on rows of ids [N, T] -> [N, T, D]: no groups, no scan, kv heads repeated."""
    return jax.vmap(lambda row: _plain_row(arch, params, row))(tokens)


def _plain_row(arch: Architecture, params: Params, tokens: jax.Array) -> jax.Array:

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + arch.rms_norm_eps) * scale[None]

    half = arch.head_dim // 2
    frequency = 1 / arch.rope_theta ** (jnp.arange(half) / half)
    angle = jnp.outer(jnp.arange(len(tokens)), frequency)[:, None, :]

    def rotary(x):
        pairs = jax.lax.complex(x[..., :half], x[..., half:]) * jnp.exp(1j * angle)
        return jnp.concatenate([pairs.real, pairs.imag], -1)

    x = params["embed_tokens"][tokens]
    repeats = arch.num_attention_heads // arch.num_key_value_heads
    for i in range(arch.num_hidden_layers):
        stacks = params["layers"], params["last_layer"]
        w = {name: jnp.concatenate([s[name] for s in stacks])[i] for name in stacks[0]}
        y = norm(x, w["input_layernorm"])
        q, k, v = (jnp.tensordot(y, w[f"{name}_proj"], 1) for name in "qkv")
        if "q_bias" in w:
            q, k, v = (
                x + w[f"{name}_bias"].reshape(1, *x.shape[1:])
                for name, x in zip("qkv", (q, k, v), strict=True)
            )
        if "q_norm" in w:
            q, k = norm(q, w["q_norm"][None]), norm(k, w["k_norm"][None])
        if arch.rotary_layers is None or arch.rotary_layers[i]:
            q, k = rotary(q), rotary(k)
        k, v = jnp.repeat(k, repeats, axis=1), jnp.repeat(v, repeats, axis=1)
        scores = jnp.einsum("qhe,khe->hqk", q, k) / arch.head_dim**0.5
        future = jnp.triu(jnp.ones(scores.shape[1:], bool), 1)[None]
        weights = jax.nn.softmax(jnp.where(future, -jnp.inf, scores), -1)
        x = x + jnp.tensordot(jnp.einsum("hqk,khe->qhe", weights, v), w["o_proj"], 2)
        y = norm(x, w["post_attention_layernorm"])
        x = x + (jax.nn.silu(y @ w["gate_proj"]) * (y @ w["up_proj"])) @ w["down_proj"]
    return norm(x, params["norm"])
