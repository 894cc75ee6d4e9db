"""The generation benchmark: the sampler's own tokens, exactly as many as asked."""

import json

import jax
import numpy as np
import pytest

from copg_jax import sampling
from copg_jax.errors import InputError
from copg_jax.flops import CHIPS
from copg_jax.models.params import abstract_params
from experiments.benchmark import generate
from experiments.benchmark.__main__ import main
from experiments.benchmark.workload import Workload
from tests.toys import LLAMA, mesh


def test_a_run_prints_one_line_of_numbers_that_fit_together(
    toy_model, rows, write, capsys, monkeypatch
):
    chip = CHIPS["NVIDIA H200"]._replace(hbm_gb_per_sec=1.0)
    monkeypatch.setitem(CHIPS, jax.devices()[0].device_kind, chip)
    where = ("--workload", str(write(rows)), "--shape", "tiny", "--mesh", "data=2,fsdp=2,tensor=2")
    main(["generate", *where, "--batch", "8", "--new", "5", "--samples", "2"])
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["tokens_per_s"] * found["seconds"] == pytest.approx(8 * 2 * 5)
    assert found["prefill_s"] + found["decode_s"] == pytest.approx(found["seconds"])
    assert found["decode_tokens_per_s"] * found["decode_s"] == pytest.approx(8 * 2 * 4)
    prompts = sum(len(row["prompt_ids"]) for row in rows[:8])
    cached = 2 * 2 * 2 * 4 * (prompts + 8 * 2 * 5 / 2)  # layers, k and v, heads, width
    weights = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(LLAMA)))
    weights -= 64 * 16 + (2 * 2 + 1) * 16  # without embedding and norms
    # Each of the two replicas of the model reads all weights, a quarter on each of its four chips.
    wanted = 8 * 2 * 1e9 * 8 / (4 * (2 * weights + cached))
    assert found["decode_bound_tokens_per_s"] == pytest.approx(wanted)
    assert (found["new"], found["samples"]) == (5, 2)


def test_it_is_the_sampler_of_evaluation_greedy_and_to_the_last_token(groups, monkeypatch):
    made = []

    def recorded(arch, **options):
        sample = make_sampler(arch, **options)
        return lambda *args: made.append((options, args, sample(*args))) or made[-1][2]

    make_sampler = sampling.make_sampler
    monkeypatch.setattr(sampling, "make_sampler", recorded)
    on = mesh()
    sizes = {"batch_size": 4, "num_new": 6, "num_samples": 1}
    found = generate.measure(LLAMA, Workload(groups), mesh=on, **sizes)
    assert found["decode_bound_tokens_per_s"] is None
    options, (_, tokens, length, *_), samples = made[-1]
    assert options["temperature"] == 0
    assert {o["max_new_tokens"] for o, _, _ in made} == {1, 6}
    np.testing.assert_array_equal(samples.length, np.full((4, 1), 6))
    assert len(tokens) == 4
    rows = zip(np.asarray(tokens), np.asarray(length), strict=True)
    got = [row[:size].tolist() for row, size in rows]
    assert sorted(got) == sorted(group.prompt_tokens.tolist() for group in groups[:4])


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ({"num_new": 1}, "--new >= 2"),
        ({"num_samples": 0}, "--samples >= 1"),
        ({"batch_size": 3}, "multiple of data x fsdp = 2"),
        ({"batch_size": 12}, "at most the 10 prompts of the workload, got 12"),
    ],
    ids=str,
)
def test_numbers_that_cannot_be_run_are_refused(groups, sizes, wanted):
    sizes = {"batch_size": 4, "num_new": 2, "num_samples": 1} | sizes
    with pytest.raises(InputError, match=wanted):
        generate.measure(LLAMA, Workload(groups), mesh=mesh(2), **sizes)
