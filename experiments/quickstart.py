"""The whole pipeline on generated data and a tiny Llama, on CPU, in minutes.

    python -m experiments.quickstart configs/quickstart.yaml

SFT → reward model (where a reward of the task is one) → score → CoPG, DPO and IPO at several β
each, on the same scored completions → evaluation of all on the same prompts, through the same
stages, file formats and configs as the 7B runs, with configs/sizes/quickstart.yaml. A task is a
module of `experiments.generated` and, but for TL;DR, a file of configs/tasks. Prints tables and
writes summary.json and frontier.png: reward over steps beside reward against KL. Finished stages
are not run again.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from copg_jax import run_folder, runtime
from copg_jax.config.checks import require, require_one_of, require_positive, require_seed
from copg_jax.config.load import load_config, run_main
from copg_jax.config.options import option
from copg_jax.config.reward_spec import RewardSpec
from copg_jax.config.stages import (
    EvaluateConfig,
    PolicyConfig,
    RewardModelConfig,
    ScoreConfig,
    SFTConfig,
)
from copg_jax.data.reader import GroupReader
from copg_jax.data.tokenizer import load_tokenizer
from copg_jax.errors import InputError
from copg_jax.hf import weights as hf_weights
from copg_jax.models.params import Architecture, init_params
from copg_jax.rewards.functions import load_reward
from experiments import evaluate, score, train_policy, train_reward, train_sft
from experiments.generated import TASKS, write_generated
from experiments.generated.labels import write_parts, write_turned
from experiments.studies.comparison import (
    TIE_STDERRS,
    Policy,
    Trained,
    best_of_each,
    differences,
    estimate,
    measure,
    pairwise_accuracy,
    read_points,
    read_policy,
)
from experiments.studies.quickstart_figure import LABELS, reward_and_frontier, save

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = [CONFIGS / "tldr.yaml", CONFIGS / "sizes" / "quickstart.yaml"]
METHODS = ("copg", "dpo", "ipo")
OVERRIDDEN = ("sft", "reward", "score", *METHODS, "evaluate")


@dataclass(frozen=True)
class QuickstartConfig:
    """The whole pipeline on generated data and a tiny Llama, on CPU, in minutes."""

    output_dir: str = option("runs/quickstart", "folder of all its runs")
    task: str = option("tldr", f"what is learnt: {', '.join(TASKS)}")
    seed: int = option(0, "seed of data, initialisation and data order")
    num_examples: int = option(4000, "generated prompts with one completion, for SFT")
    num_comparisons: int = option(3000, "generated prompts with several completions")
    vocab_size: int = option(700, "size of the tokenizer that is trained on them")
    hidden_size: int = option(128, "width of the tiny Llama")
    num_layers: int = option(3, "its depth")
    beta_factors: list[float] = option(
        [0.1, 1.0, 5.0], "each method is trained at its β times each of these"
    )
    overrides: dict[str, list[str]] = option(
        {}, "stage (sft, reward, score, copg, dpo, ipo, evaluate) -> list of key=value"
    )

    def __post_init__(self):
        require_seed(self)
        require_one_of(self, list(TASKS), "task")
        require_positive(self, "num_examples", "num_comparisons")
        require(self, "at least 259, as there are bytes", lambda size: size >= 259, "vocab_size")
        require(self, "a multiple of 8", lambda size: size > 0 and size % 8 == 0, "hidden_size")
        require(self, ">= 2", lambda layers: layers >= 2, "num_layers")
        factors = {factor for factor in self.beta_factors if factor > 0}
        if len(factors) != len(self.beta_factors) or not 1 <= len(factors) <= 4:
            raise InputError(
                f"beta_factors: wanted one to four different numbers > 0, got {self.beta_factors}"
            )


class Stages:
    """Configs of the stages: those of the files, for this folder, with the user's overrides."""

    def __init__(self, config: QuickstartConfig) -> None:
        unknown = [name for name in config.overrides if name not in OVERRIDDEN]
        if unknown:
            raise InputError(
                f"overrides: wanted stages among {', '.join(OVERRIDDEN)}, got {', '.join(unknown)}"
            )
        own = CONFIGS / "tasks" / f"{config.task}.yaml"  # TL;DR is what the others differ from
        self._files = [str(file) for file in (*FILES, own) if file.exists()]
        self._folder, self._overrides = f"shared.folder={config.output_dir}", config.overrides
        self._console = Console(highlight=False, soft_wrap=True)

    def head(self, text: str) -> None:
        """Says which stage begins."""
        self._console.print(f"\n[bold]{text}[/bold]")

    def config(self, cls: type, name: str, *arguments: str, loss: str = "") -> Any:
        """Config of the stage whose overrides are called `name`; a policy needs its loss."""
        files = [*self._files, *([str(CONFIGS / "losses" / f"{loss}.yaml")] if loss else [])]
        # One process, even where a cluster would be detected.
        overrides = ("distributed=off", *self._overrides.get(name, []))
        return load_config(cls, [*files, self._folder, *arguments, *overrides])

    def reward_model(self) -> RewardSpec | None:
        """Of the task's rewards, the one that `train_reward` makes."""
        made = f"{self.config(RewardModelConfig, 'reward').output_dir}/model"
        specs = self.config(ScoreConfig, "score").rewards
        return next((spec for spec in specs if spec.arguments.get("path") == made), None)

    def policies(self, factors: Sequence[float]) -> Iterator[tuple[str, PolicyConfig]]:
        """Folder names and configs of the policies: each method at its β times each factor."""
        for method in METHODS:
            beta = self.config(PolicyConfig, method, loss=method).loss.beta
            for factor in sorted(factors):
                scaled = f"{beta * factor:.3g}"  # 0.3, not 0.30000000000000004
                name = f"{method}_beta_{scaled}"
                config = self.config(PolicyConfig, method, f"shared.run={name}", loss=method)
                yield name, replace(config, loss=replace(config.loss, beta=float(scaled)))


def main(config: QuickstartConfig) -> None:
    """Runs every stage, then summarises."""
    runtime.setup()
    with run_folder.claim(config.output_dir, config, may_differ=["output_dir"]):
        _run_stages(config)


def _run_stages(config: QuickstartConfig) -> None:
    folder = Path(config.output_dir)
    run_folder.write_run_header(folder, config, inputs={})
    stages = Stages(config)
    stages.head(f"1/7 Inputs: generated data of the task {config.task}, an untrained tiny Llama")
    make_inputs(
        folder,
        task=config.task,
        num_examples=config.num_examples,
        num_comparisons=config.num_comparisons,
        seed=config.seed,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
    )
    stages.head("2/7 SFT: a tiny Llama learns from examples and becomes the reference")
    train_sft.main(stages.config(SFTConfig, "sft"))
    if stages.reward_model() is None:
        stages.head("3/7 Reward model: none, since the rewards of the task are programs")
    else:
        stages.head("3/7 Reward model: learns from comparisons which completion is preferred")
        train_reward.main(stages.config(RewardModelConfig, "reward"))
    stages.head("4/7 Score: rewards and reference log-probabilities, once for all")
    score.main(stages.config(ScoreConfig, "score"))
    policies = dict(stages.policies(config.beta_factors))
    for i, policy in enumerate(policies.values(), 1):
        stages.head(f"5/7 Policy {i} of {len(policies)}: {label(policy)}")
        train_policy.main(policy)
    for i, name in enumerate(("sft", *policies), 1):
        about = label(policies[name]) if name in policies else LABELS[name]
        stages.head(f"6/7 Evaluation {i} of {1 + len(policies)}: {about}")
        evaluate.main(stages.config(EvaluateConfig, "evaluate", f"shared.run={name}"))
    stages.head("7/7 Tables and picture")
    summarize(stages, folder, policies)


def reward_accuracy(stages: Stages, spec: RewardSpec) -> float:
    """Share of held-out choices that the exported reward model predicts."""
    held_out = stages.config(RewardModelConfig, "reward").validation
    return pairwise_accuracy(load_reward(spec), GroupReader(held_out))


def label(config: PolicyConfig) -> str:
    """Name of a policy for people."""
    return f"{LABELS[config.loss.name]}, β = {config.loss.beta:g}"


def make_inputs(
    folder: Path,
    *,
    task: str = "tldr",
    num_examples: int = 4000,
    num_comparisons: int = 3000,
    seed: int = 0,
    vocab_size: int = 700,
    hidden_size: int = 128,
    num_layers: int = 3,
    turned: Sequence[int] = (),
    parts: int = 0,
) -> None:
    """Writes data, tokenizer and an untrained model, once; see `QuickstartConfig`. The comparisons
    also with per cents of their labels turned round (`turned`), and parted (`parts`).
    """
    if not (folder / "base" / "config.json").exists():
        write_generated(
            folder / "data",
            task=task,
            num_examples=num_examples,
            num_comparisons=num_comparisons,
            seed=seed,
            vocab_size=vocab_size,
        )
        write_base(folder, seed=seed, hidden_size=hidden_size, num_layers=num_layers)
    write_turned(folder / "data", turned)
    write_parts(folder / "data", parts)


def write_base(folder: Path, *, seed: int, hidden_size: int, num_layers: int) -> None:
    """Writes an untrained Llama for the tokenizer of data/ to base/."""
    tokenizer = load_tokenizer(folder / "data" / "tokenizer")
    model = Architecture(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        tie_word_embeddings=True,
    )
    params = init_params(model, jax.random.key(seed))
    hf_weights.save_pretrained(folder / "base", model, params, head="lm", tokenizer=tokenizer)


def summarize(stages: Stages, folder: Path, configs: Mapping[str, PolicyConfig]) -> None:
    """Writes summary.json and frontier.png and prints the tables.

    Args:
        stages: gives what was evaluated how.
        folder: of the quickstart.
        configs: of the policies, by the name of their folder.
    """
    beta = stages.config(EvaluateConfig, "evaluate", "shared.run=sft").beta
    sft = read_policy(folder / "evaluate_sft")
    trained = [
        Trained(
            config.loss.name,
            config.loss.beta,
            read_points(folder / name),
            read_policy(folder / f"evaluate_{name}"),
        )
        for name, config in configs.items()
    ]
    console = Console(highlight=False)
    console.print(policies_table(trained, sft, beta))
    console.print(differences_table(trained, beta))
    console.print(
        f"* the best of its method. Rewards are above the SFT model's mean on the same "
        f"{len(sft.reward)} held-out prompts (here {estimate(sft.reward)}). ± is the standard "
        "error of paired differences over prompts; it does not cover another training seed. Less "
        f"than {TIE_STDERRS:g} standard errors are called a tie; each method's best β is chosen on "
        "these same prompts."
    )
    summary = summary_of(trained, sft, beta)
    if (model := stages.reward_model()) is not None:
        accuracy = reward_accuracy(stages, model)
        console.print(
            f"The reward model predicts {accuracy:.3f} of held-out choices. Its rewards are "
            "defined up to a constant, and their level differs from processor to processor."
        )
        summary |= {"reward_model": {"validation_accuracy": accuracy}}
    picture, numbers = folder / "frontier.png", folder / "summary.json"
    save(reward_and_frontier(trained, sft, beta=beta), picture)
    numbers.write_text(json.dumps(summary, indent=2) + "\n")
    console.print(f"wrote {numbers} and {picture}", soft_wrap=True)


def summary_of(trained: Sequence[Trained], sft: Policy, beta: float) -> dict[str, Any]:
    """What the tables show, for summary.json."""
    policies = [
        {"method": one.method, "beta": one.beta, **numbers_of(one.policy, sft, beta)}
        for one in trained
    ]
    gaps = [
        {
            "of": what,
            "first": {"method": gap.first.method, "beta": gap.first.beta},
            "second": {"method": gap.second.method, "beta": gap.second.beta},
            "difference": gap.gap._asdict() | {"is_tie": gap.gap.is_tie},
        }
        for what, value in compared(beta).items()
        for gap in differences(trained, value)
    ]
    return {
        "num_prompts": len(sft.reward),
        "objective_beta": beta,
        "sft_reward": estimate(sft.reward)._asdict(),
        "policies": [{"method": "sft", "beta": None, **numbers_of(sft, sft, beta)}, *policies],
        "differences_at_best_beta": gaps,
    }


def numbers_of(policy: Policy, sft: Policy, beta: float) -> dict[str, Any]:
    """One row of the table: means with standard errors, rewards above those of the SFT model."""
    measured = measure(policy, sft, beta=beta)
    return {name: value._asdict() for name, value in measured.items()} | {
        "length": float(policy.length.mean()),
        "eos_rate": float(policy.eos_rate.mean()),
    }


def compared(beta: float) -> dict[str, Callable[[Policy], np.ndarray]]:
    """By what methods are compared: functions of a policy → [N], one number a prompt."""
    return {
        "reward": lambda policy: policy.reward,
        "objective": lambda policy: policy.regularized(beta),
    }


def policies_table(trained: Sequence[Trained], sft: Policy, beta: float) -> Table:
    """Every policy against the SFT model; the best β of each method has a star."""
    title = "Generations on held-out prompts: reward above SFT, KL in nats, EOS rate"
    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    for column in ("β", "reward", "KL", f"E[R] − {beta:g}·KL", "length", "EOS"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row(LABELS["sft"], "", "0 ", "0.00", "0 ", *ends(sft))
    best = {what: best_of_each(trained, value) for what, value in compared(beta).items()}
    for one in trained:
        measured = measure(one.policy, sft, beta=beta)
        reward, objective = (
            f"{measured[what]}{'*' if best[what][one.method] is one else ' '}" for what in best
        )
        kl = f"{round(measured['kl'].mean, 2) + 0.0:.2f}"  # no "-0.00" from rounding
        table.add_row(LABELS[one.method], f"{one.beta:g}", reward, kl, objective, *ends(one.policy))
    return table


def ends(policy: Policy) -> tuple[str, str]:
    """Length and share of ended completions, as the table shows them."""
    return f"{policy.length.mean():.1f}", f"{policy.eos_rate.mean():.2f}"


def differences_table(trained: Sequence[Trained], beta: float) -> Table:
    """Methods against each other, each at its best β."""
    table = Table(title="Paired differences, each method at its best β", title_justify="left")
    for column in ("of", "methods at β", "difference", "told apart"):
        table.add_column(column, no_wrap=True)
    names = {"reward": "reward", "objective": f"E[R] − {beta:g}·KL"}
    for what, value in compared(beta).items():
        for first, second, gap in differences(trained, value):
            methods = (f"{LABELS[one.method]} {one.beta:g}" for one in (first, second))
            apart = "tie" if gap.is_tie else f"by {abs(gap.mean) / gap.stderr:.1f} standard errors"
            table.add_row(names[what], " − ".join(methods), str(gap), apart)
    return table


if __name__ == "__main__":
    run_main(main, QuickstartConfig, description=__doc__)
