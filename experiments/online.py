"""CoPG on fresh samples: rounds of sampling, scoring and training, in one process group.

    python -m experiments.online configs/tldr.yaml configs/sizes/llama2_7b.yaml \\
        configs/losses/copg.yaml configs/online.yaml

`steps_per_round` says how fresh they are: 1 is online, many is offline. Writes rounds/ (samples and
scores of each, as `experiments.sample` and `experiments.score` do), metrics.jsonl, checkpoints/,
model/ (the last step) and best/ (the step of the highest generation reward), and prints a table of
the rounds.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from etils import epath
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from copg_jax import reuse
from copg_jax.config.load import run_main
from copg_jax.config.stages import OnlineConfig
from copg_jax.distributed import is_main_process
from copg_jax.files import read_json_lines
from copg_jax.objective import batch_arguments, find_coefficients, find_objective
from copg_jax.tracking import FILE_NAME
from copg_jax.train.online import open_online
from copg_jax.train.run import Stage, train
from experiments.train_policy import make_loss, open_own_evaluation

COLUMNS = {
    "reward": "reward",
    "kl": "KL",
    "objective": "J",
    "ties": "ties",
    "eos_rate": "EOS",
    "staleness": "stale",
}
SECONDS = ("sample", "score", "train")
MOST_ROWS = 20


def main(config: OnlineConfig) -> None:
    """Trains the model on samples of its own."""
    objective, evaluation = find_objective(config.loss), config.evaluation
    train(
        config,
        Stage(
            head="lm",
            make_loss=reuse.once(
                "loss",
                (objective, config.logits_chunk),
                lambda: partial(make_loss, objective=objective, chunk=config.logits_chunk),
            ),
            open_feed=partial(
                open_online, config, needs_mu="mu_log_ratio" in batch_arguments(objective)
            ),
            coefficients=partial(find_coefficients, config.loss),
            open_evaluation=evaluation and partial(open_own_evaluation, evaluation, config),
            best_metric="eval/reward_mean" if evaluation else None,
        ),
    )
    if is_main_process():
        path = epath.Path(config.output_dir) / FILE_NAME
        rows = [row for _, row in read_json_lines(path) if "online/round" in row]
        Console(highlight=False).print(rounds_table(rows))


def rounds_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What each round was like, J = E[R] − β·KL; of many, some that are equally far apart.

    Args:
        rows: lines of metrics.jsonl, one a round.
    """
    title = "Samples of the policy that began each round; J = reward − β·KL"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("round", *COLUMNS.values(), *(f"{part} s" for part in SECONDS)):
        table.add_column(name, justify="right", no_wrap=True)
    indices = np.unique(np.linspace(0, len(rows) - 1, MOST_ROWS).round().astype(int))
    for index in indices if rows else ():
        names = (*(f"online/{name}" for name in COLUMNS), *(f"perf/{part}_sec" for part in SECONDS))
        numbers = (rows[index].get(name) for name in names)
        shown = ("" if value is None else f"{value:.3g}" for value in numbers)
        table.add_row(f"{rows[index]['online/round']:.0f}", *shown)
    return table


if __name__ == "__main__":
    run_main(main, OnlineConfig, description=__doc__)
