"""Figure 1: `python -m experiments.bandit [configs/bandit.yaml] [key=value ...]`.

Trains every algorithm over seeds, finds where relatives of CoPG end off-policy, and writes
figure1.png, off_policy.png, regret.csv and summary.json to `output_dir`.
"""

import csv
import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from copg_jax import run_folder
from copg_jax.bandit import exact, population, train
from copg_jax.config.load import run_main
from experiments.studies import off_policy, regret_figure

ALGORITHMS = tuple(train.OBJECTIVES)


def fixed_point_regrets(bandit: exact.Bandit) -> dict[str, float]:
    """Regret where the expected update of each algorithm settles, from π_ref."""

    def regret(name: str) -> float:
        end = population.end_of(population.GRADIENTS[name], bandit)
        return max(0.0, float(exact.regret(end, bandit)))  # rounding may leave −1e-17

    return {name: regret(name) for name in ALGORITHMS}


def train_seeds(config: train.BanditConfig) -> np.ndarray:
    """Regret over training, [seeds, steps + 1, algorithms]."""
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    return np.asarray(jax.jit(jax.vmap(train.make_train(config)))(keys))


@contextmanager
def said(what: str) -> Iterator[None]:
    """Says that something begins, and how long it took; each of these is one compiled call."""
    print(f"{what} ...", flush=True)
    begin = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - begin:.0f} s", flush=True)


def write_csv(path: Path, regret: np.ndarray) -> None:
    """One row per step: mean and standard deviation over seeds of each algorithm."""
    header = ["step", *(f"{name}_{what}" for name in ALGORITHMS for what in ("mean", "std"))]
    values = np.stack([regret.mean(0), regret.std(0)], axis=-1).reshape(regret.shape[1], -1)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([step, *(f"{v:.6g}" for v in row)] for step, row in enumerate(values))


def write_figure(path: Path, short: np.ndarray, long: np.ndarray, ends: dict[str, float]) -> None:
    """Left: the paper's figure 1. Right: the same runs continued, towards their fixed points."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    regret_figure.draw_regret(left, short, ALGORITHMS, ends=ends)
    left.set_title(f"the paper's {short.shape[1] - 1:,} steps, {short.shape[0]} seeds", fontsize=10)
    regret_figure.draw_regret(right, np.maximum(long, 1e-9), ALGORITHMS, ends=ends, log=True)
    right.set_title(f"continued to {long.shape[1] - 1:,} steps, {long.shape[0]} seeds", fontsize=10)
    right.set(xlim=(10, long.shape[1] - 1), ylim=(1e-6, 1))
    right.legend(frameon=False, fontsize=9, loc="lower left")
    figure.savefig(path, dpi=160)
    plt.close(figure)


def write_off_policy(path: Path, bandit: exact.Bandit) -> None:
    """How far from π* each loss ends: over samplers, and over the size of groups."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    off_policy.draw(axes, bandit)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main(config: train.BanditConfig) -> None:
    """Runs the experiment of a config."""
    with run_folder.claim(config.output_dir, config):
        _run(config, Path(config.output_dir))


def _run(config: train.BanditConfig, output: Path) -> None:
    with jax.enable_x64(True):
        bandit = train.bandit_from_config(config)
        with said(f"fixed points of {len(ALGORITHMS)} algorithms"):
            ends = fixed_point_regrets(bandit)
        with said(f"training {len(ALGORITHMS)} algorithms, {config.num_seeds} seeds"):
            short = train_seeds(config)
        with said(f"the same for longer, {config.long_num_seeds} seeds"):
            long = train_seeds(
                dataclasses.replace(
                    config, num_epochs=config.long_num_epochs, num_seeds=config.long_num_seeds
                )
            )
        with said("ends of losses on data of other samplers"):
            write_off_policy(output / "off_policy.png", bandit)
        summary = {
            "pi_star": np.exp(exact.optimal_policy(bandit)).tolist(),
            "J_star": float(exact.optimal_value(bandit)),
            "regret_uniform": float(
                exact.regret(jnp.full_like(bandit.ref, -jnp.log(bandit.ref.size)), bandit)
            ),
        }
    last = {"final_regret": short[:, -1], "long_run_regret": long[:, -1]}
    for key, values in last.items():
        summary[key] = {
            name: {"mean": float(values[:, i].mean()), "std": float(values[:, i].std())}
            for i, name in enumerate(ALGORITHMS)
        }
    summary |= {"fixed_point_regret": ends, "steps": short.shape[1] - 1}
    summary |= {"long_run_steps": long.shape[1] - 1}
    write_csv(output / "regret.csv", short)
    write_figure(output / "figure1.png", short, long, ends)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for name in ALGORITHMS:
        final = summary["final_regret"][name]
        print(
            f"{name:9s} regret {final['mean']:.4f} ± {final['std']:.4f}, ends at {ends[name]:.5f}"
        )
    print(f"wrote {output}/figure1.png, off_policy.png, regret.csv, summary.json")


if __name__ == "__main__":
    run_main(main, train.BanditConfig, description="Figure 1: the bandit of Sec. 5")
