"""Evaluation on held-out data: the average over the whole set, whatever the batches."""

import os
import signal
from typing import Any

import numpy as np
import pytest

from copg_jax import evaluate
from copg_jax.data.groups import TokenGroup
from copg_jax.runtime import GracefulExit, LeaveRequest
from copg_jax.train import step
from tests.toys import Toy, toy_loss


class Rows(list):
    """A held-out set in memory."""

    def shape(self) -> tuple[int, int, int]:
        return 8, 3, 8

    def num_tokens(self, indices):
        rows = [self[i] for i in indices]
        return np.array([(len(r.prompt_tokens), sum(map(len, r.completion_tokens))) for r in rows])


def held_out_rows(sizes: list[int]) -> Rows:
    """A group of each of these numbers of completions."""
    rng = np.random.default_rng(0)
    return Rows(
        TokenGroup(
            id=str(i),
            where="",
            prompt="",
            prompt_tokens=np.ones(2, np.int32),
            completions=("",) * k,
            completion_tokens=(np.ones(3, np.int32),) * k,
            rewards=rng.normal(size=k).astype(np.float32),
        )
        for i, k in enumerate(sizes)
    )


def test_a_signal_ends_an_evaluation_after_the_batch_that_runs():
    toy, begun = Toy(), []
    loss_step = step.make_loss_step(toy_loss, mesh=toy.mesh)

    def signalled(params: Any, batch: Any) -> Any:
        begun.append(batch)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_step(params, batch)

    held_out = evaluate.make_loss_evaluator(
        signalled, held_out_rows([1] * 9), batch_size=1, mesh=toy.mesh
    )
    with GracefulExit(), pytest.raises(LeaveRequest, match="SIGTERM"):
        held_out(toy.state.params)
    assert len(begun) == 2


def test_held_out_averages_do_not_depend_on_the_batch_size():
    rows = held_out_rows([1, 2, 3, 1, 2, 3, 2])
    every = np.concatenate([row.rewards for row in rows])
    toy = Toy()
    loss_step = step.make_loss_step(toy_loss, mesh=toy.mesh)
    for batch_size in (1, 3, 7, 16):
        held_out = evaluate.make_loss_evaluator(
            loss_step, rows, batch_size=batch_size, mesh=toy.mesh
        )
        wanted = ((1.0 - every) ** 2).mean()
        assert held_out(toy.state.params) == pytest.approx({"eval/loss": wanted}, rel=1e-5)
