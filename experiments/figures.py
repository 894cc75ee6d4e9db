"""Pictures and tables from what runs wrote."""

import json
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"sft": "#666666", "copg": "#0072B2", "dpo": "#D55E00", "ipo": "#009E73"}
LABELS = {"sft": "SFT", "copg": "CoPG", "dpo": "DPO", "ipo": "IPO"}


def read_metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl that have the metric `name`."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row.get(name) is not None]


def reward_curves(folders: dict[str, Path], path: Path, *, title: str) -> None:
    """Generation reward against the training step, with standard errors (paper Figs. 2-4 and 6)."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, folder in folders.items():
        rows = read_metrics(folder, "eval/reward_mean")
        steps = [row["step"] for row in rows]
        mean = [row["eval/reward_mean"] for row in rows]
        error = [row["eval/reward_stderr"] or 0.0 for row in rows]
        low = [m - e for m, e in zip(mean, error, strict=True)]
        high = [m + e for m, e in zip(mean, error, strict=True)]
        axes.plot(steps, mean, color=COLOURS[name], label=LABELS[name], marker="o", markersize=3)
        axes.fill_between(steps, low, high, color=COLOURS[name], alpha=0.2, linewidth=0)
    axes.set(xlabel="training step", ylabel="reward of generations (± standard error)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def summarize_quickstart(
    folder: Path, accuracy: dict[str, float], results: dict[str, dict[str, float]]
) -> None:
    """Writes summary.json and reward_curves.png and prints the table."""
    keys = ("reward_mean", "reward_stderr", "kl", "objective", "length", "eos_rate", "num_prompts")
    names = {"length": "length_mean"}
    policies = {
        policy: {names.get(key, key): metrics[f"eval/{key}"] for key in keys}
        for policy, metrics in results.items()
    }
    summary = {"reward_model": accuracy, "policies": policies}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    curves = {name: folder / name for name in policies if name != "sft"}
    reward_curves(curves, folder / "reward_curves.png", title="Quickstart: reward of generations")

    table = Table(title="Quickstart: generations on held-out posts", title_justify="left")
    for column in ("policy", "reward", "KL (nats)", "objective", "length", "EOS rate"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for policy, row in policies.items():
        table.add_row(
            LABELS[policy],
            f"{row['reward_mean']:.3f} ± {row['reward_stderr']:.3f}",
            f"{round(row['kl'], 2) + 0.0:.2f}",  # no "-0.00" from rounding
            f"{row['objective']:.3f}",
            f"{row['length_mean']:.1f}",
            f"{row['eos_rate']:.2f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"reward model accuracy: {accuracy['train_accuracy']:.3f} on its training comparisons, "
        f"{accuracy['validation_accuracy']:.3f} on held-out posts",
        soft_wrap=True,
    )
    console.print(f"wrote {folder / 'summary.json'} and {folder / 'reward_curves.png'}")
