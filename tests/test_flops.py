"""The count of useful operations: against XLA's count of a plain model, enumeration and by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax import flops
from copg_jax.models.params import Architecture, abstract_params
from tests import toys
from tests.models import tiny

LLAMA2_7B = Architecture(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
)
# What families have and Llama has not: it costs no products.
EVERYTHING = {"qkv_bias": True, "qk_norm": True, "rotary_layers": (True, False, True)}


def of_one_group(arch: Architecture, prompt: int, *completions: int, **options: Any) -> float:
    return flops.useful_flops(arch, np.array([prompt]), np.array([completions]), **options)


def test_llama2_7b_on_a_mean_tldr_pair_costs_16_2_tflop():
    assert flops.block_parameters(LLAMA2_7B) == pytest.approx(6.476e9, rel=1e-4)
    assert of_one_group(LLAMA2_7B, 343, 34, 34) == pytest.approx(16.2e12, rel=0.005)


@pytest.mark.parametrize("particular", [{}, EVERYTHING], ids=["llama", "everything"])
@pytest.mark.parametrize("training", [True, False])
def test_the_count_is_that_of_xla_for_a_plain_model_on_one_sequence(
    training: bool, particular: dict[str, Any]
):
    arch = Architecture(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        **particular,
    )
    prompt, completion = 24, 8

    def loss(params, tokens):
        hidden = tiny.plain_hidden(arch, params, tokens)[:, prompt - 1 : -1]
        logits = hidden @ params["lm_head"]
        chosen = jnp.take_along_axis(logits, tokens[:, prompt:, None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - chosen).sum()

    tokens = jax.ShapeDtypeStruct((1, prompt + completion), jnp.int32)
    function = jax.value_and_grad(loss) if training else loss
    costs = jax.jit(function).lower(abstract_params(arch), tokens).cost_analysis()
    counted = of_one_group(arch, prompt, completion, training=training)
    # XLA adds elementwise work and the masked half of attention, both small at these sizes.
    assert costs["flops"] == pytest.approx(counted, rel=0.05)


def test_attention_counts_the_pairs_that_see_each_other_and_no_more():
    arch, prompt, completions = toys.LLAMA, 5, (3, 0, 2)
    rows = [(query, key) for query in range(prompt) for key in range(prompt)]
    visible = sum(key <= query for query, key in rows)
    for size in completions:
        rows = [(query, key) for query in range(size) for key in range(-prompt, size)]
        visible += sum(key <= query for query, key in rows)
    linear = 2 * flops.block_parameters(arch) * (prompt + sum(completions))
    counted = of_one_group(arch, prompt, *completions, training=False, head="score")
    width = arch.num_attention_heads * arch.head_dim
    assert counted == linear + 4 * width * arch.num_hidden_layers * visible


def test_groups_add_padding_costs_nothing_and_only_a_language_model_has_logits():
    both = flops.useful_flops(toys.LLAMA, np.array([5, 7]), np.array([[3, 2], [4, 0]]))
    assert both == of_one_group(toys.LLAMA, 5, 3, 2) + of_one_group(toys.LLAMA, 7, 4)
    logits = of_one_group(toys.LLAMA, 5, 3) - of_one_group(toys.LLAMA, 5, 3, head="score")
    assert logits == 6 * toys.LLAMA.hidden_size * toys.LLAMA.vocab_size * 3


def test_int32_lengths_do_not_overflow():
    lengths = np.full(128, 4096, np.int32), np.full((128, 2), 4096, np.int32)
    assert flops.useful_flops(LLAMA2_7B, *lengths) > 128 * 6 * 6.476e9 * 3 * 4096
