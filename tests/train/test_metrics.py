"""The rates of training steps."""

import numpy as np

from copg_jax.train import metrics
from tests.toys import group_batch, mesh


def test_the_rates_of_a_step_count_pairs_tokens_and_useful_operations(monkeypatch):
    batch = group_batch(np.ones((4, 2)), length=[[1, 2], [3, 0], [0, 0], [5, 5]])
    tokens = int(batch.prompt_length.sum()) + 16
    work = {"perf/pairs_per_sec": 3, "perf/tokens_per_sec": tokens}
    flops = lambda batch: 1e12 * len(batch.prompt_length)
    assert metrics.work_of(batch, mesh(1, 4), flops) == work  # the peak of a CPU is not known
    monkeypatch.setitem(metrics.PEAK_TFLOPS, "cpu", 10.0)
    assert metrics.work_of(batch, mesh(1, 4), flops) == work | {"perf/mfu": 0.1}
    assert metrics.work_of(batch, mesh(1, 4)) == work
