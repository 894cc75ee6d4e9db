"""Parameters are as the table describes them."""

import dataclasses

import jax
import numpy as np
import pytest

from copg_jax.errors import InputError
from copg_jax.models.params import Architecture, abstract_params, init_params, logical_axes


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("tied", [False, True])
def test_one_table_describes_shapes_axes_and_initialisation(arch, head, tied):
    arch = dataclasses.replace(arch, tie_word_embeddings=tied)
    drawn = init_params(arch, jax.random.key(0), head=head)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), drawn)
    abstract = abstract_params(arch, head=head)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    axes = logical_axes(arch, head=head)
    ranks = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(lambda x: x.ndim, drawn)
    assert ("lm_head" in drawn) == (head == "lm" and not tied)
    assert ("score" in drawn) == (head == "score")


def test_score_head_is_drawn_with_the_published_scale():
    arch = Architecture(8, 4000, 2, 2, 1, 1, 2)
    score = init_params(arch, jax.random.key(0), head="score")["score"]
    np.testing.assert_allclose(np.std(score), 4001**-0.5, rtol=0.05)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"dtype": "float16"}, "dtype"),
        ({"remat": "some"}, "remat"),
        ({"rotary_layers": (True,)}, "rotary_layers"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": "all"}, "sliding_window"),
    ],
)
def test_impossible_sizes_are_refused_by_name(arch, change, field):
    with pytest.raises(InputError, match=field):
        dataclasses.replace(arch, **change)
