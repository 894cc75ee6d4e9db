"""Figure 1's training: faithful sampling, one jit over seeds, the recorded end, and the script's
files."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from copg_jax.bandit import exact, train
from copg_jax.bandit.train import BanditConfig
from copg_jax.errors import InputError
from experiments import bandit


def test_sampled_pairs_follow_mu1_mu2_and_bradley_terry(paper_bandit):
    pairs = train.distinct_pairs(paper_bandit)
    rows = train.sample_pairs(jax.random.key(0), paper_bandit, 200_000)
    arm = np.asarray(pairs.arm)[rows]
    for side, mu in ((0, paper_bandit.mu1), (1, paper_bandit.mu2)):
        np.testing.assert_allclose(np.bincount(arm[:, side], minlength=3) / 200_000, mu, atol=5e-3)
    first_wins = np.asarray(pairs.preference)[rows][:, 0]
    for a, b in ((0, 2), (1, 2), (2, 0)):
        met = (arm[:, 0] == a) & (arm[:, 1] == b)
        win = jax.nn.sigmoid(paper_bandit.reward[a] - paper_bandit.reward[b])
        np.testing.assert_allclose(first_wins[met].mean(), win, atol=0.02)


def test_a_histogram_of_a_batch_has_the_gradient_of_its_rows(paper_bandit):
    pairs = train.distinct_pairs(paper_bandit)
    rows = train.sample_pairs(jax.random.key(1), paper_bandit, 64)
    by_row = jax.tree.map(lambda x: x[rows], pairs)
    weight = jnp.bincount(rows, length=18) / 64
    logits = jnp.array([0.2, -0.3, 0.5])
    for objective in train.OBJECTIVES.values():
        slope = jax.jit(
            jax.grad(lambda z, p, w, f=objective: train.table_loss(z, p, w, paper_bandit, f))
        )
        np.testing.assert_allclose(
            slope(logits, pairs, weight), slope(logits, by_row, jnp.full(64, 1 / 64)), atol=1e-12
        )


def test_figure_1_ends_where_recorded_and_rloo_is_copg():
    config = BanditConfig(num_seeds=2)
    keys = jax.random.split(jax.random.key(0), config.num_seeds)
    regret = np.asarray(jax.jit(jax.vmap(train.make_train(config)))(keys))
    assert regret.shape == (2, 1901, 6)
    np.testing.assert_allclose(regret[:, 0], 0.29187, atol=5e-6)
    final = dict(zip(train.OBJECTIVES, regret[:, -1].mean(0), strict=True))
    np.testing.assert_allclose(regret[:, :, 0], regret[:, :, 1], atol=1e-10)  # Property 2
    assert 0.010 < final["copg"] < 0.020  # still falling
    assert regret[:, -1, 0].max() < regret[:, -200, 0].min()
    assert final["copg"] < final["pg_value"] < final["ipo"] < 0.29187 < final["pg_none"]
    np.testing.assert_allclose(final["ipo"], 0.1525, atol=0.015)
    np.testing.assert_allclose(final["pg_none"], 0.638, atol=0.03)


def test_continued_copg_reaches_zero_regret_from_finite_data(paper_bandit):
    run = train.make_run(
        optax.adam(1e-2), algorithms=("copg", "pg_value"), batch_size=256, num_epochs=800
    )
    pairs = train.distinct_pairs(paper_bandit)
    rows = train.sample_pairs(jax.random.key(3), paper_bandit, 1024)
    path = jax.jit(run)(jax.random.key(4), pairs, rows, paper_bandit)
    regret = [exact.regret(jax.nn.log_softmax(z), paper_bandit) for z in path[-1]]
    assert abs(regret[0]) < 1e-9
    assert regret[1] > 5e-3


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"batch_size": 20_000}, "batch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_settings_out_of_range_are_refused(change, word):
    with pytest.raises(InputError, match=word):
        BanditConfig(**change)


def test_the_script_writes_figure_table_and_summary(tmp_path):
    config = BanditConfig(
        num_pairs=200, batch_size=50, num_epochs=3, num_seeds=2, long_num_epochs=5,
        long_num_seeds=1, output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    bandit.main(config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    names = {"copg", "rloo", "pg_none", "pg_value", "ipo", "dpo"}
    assert {"pi_star", "J_star", "regret_uniform", "steps"} <= set(summary)
    assert summary["steps"] == 12
    assert set(summary["final_regret"]) == set(summary["fixed_point_regret"]) == names
    assert set(summary["final_regret"]["copg"]) == {"mean", "std"}
    np.testing.assert_allclose(summary["fixed_point_regret"]["ipo"], 0.15253, atol=5e-6)
    with (tmp_path / "run" / "regret.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13 and float(rows[0]["copg_mean"]) == pytest.approx(0.291867, abs=1e-6)
    for picture in ("figure1.png", "off_policy.png"):
        assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")
