"""The sections that the configs of the stages are composed of: every field, with its default.

Defaults are the paper's settings. A range that a single value can violate is checked here; what
depends on a model, a device or the data is checked where it is used.
"""

from dataclasses import dataclass
from typing import NamedTuple

from copg_jax.config.checks import (
    require,
    require_one_of,
    require_path,
    require_positive,
    require_seed,
    require_size,
)
from copg_jax.config.options import option
from copg_jax.errors import InputError

DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("xla", "splash", "cudnn")
ATTENTION_CHOICES = ("auto", *ATTENTIONS)
DISTRIBUTED_MODES = ("auto", "on", "off")
REMATS = ("none", "dots", "mlp", "full")
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
TEXT_FORMATS = ("auto", "tldr", "text", "chat")
POLICY_LOSSES = ("copg", "dpo", "ipo", "pg", "rloo", "opmd", "oapl", "asymre", "topr")
COMBINATIONS = ("sum", "min", "standardized_sum")
BY_DIFFERENCES = ("copg", "dpo", "ipo", "rloo")
"""Losses whose gradient is 0 at the reference where all rewards of each group are equal."""


@dataclass(frozen=True)
class ModelConfig:
    """A pretrained model and how to compute with it."""

    path: str = option(help="Hugging Face folder or hub id (safetensors)")
    revision: str | None = option(None, "hub revision; a commit pins the weights")
    adapter: str | None = option(None, "PEFT folder or hub id of a LoRA on top of it; null = none")
    dtype: str = option("bfloat16", "compute dtype: bfloat16 or float32 (parameters stay float32)")
    attention: str = option(
        "auto", "what computes prompts: xla, splash (TPU), cudnn (NVIDIA) or auto, which fits"
    )

    def __post_init__(self):
        require_path("path", self.path)
        if self.adapter is not None:
            require_path("adapter", self.adapter)
        require_one_of(self, DTYPES, "dtype")
        require_one_of(self, ATTENTION_CHOICES, "attention")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters that are trained beside frozen weights: x W + alpha/rank · (x A) B."""

    rank: int = option(16, "columns of A and rows of B")
    alpha: float = option(32.0, "what an adapter adds is scaled by alpha / rank")
    targets: list[str] | None = option(
        None, "linear layers that get one, e.g. [q_proj, v_proj]; null = all but the output matrix"
    )

    def __post_init__(self):
        require_positive(self, "rank")
        require(self, "> 0", lambda number: number > 0, "alpha")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be −1 for "all remaining devices"."""

    data: int = option(1, "replicas of the model (pure data parallelism)")
    fsdp: int = option(-1, "shards of parameters, optimiser state and batch; -1 = all that remain")
    tensor: int = option(1, "shards of heads, MLP and vocabulary (tensor parallelism)")

    def __post_init__(self):
        wanted = ">= 1, or -1 for all devices that remain"
        require(self, wanted, lambda size: size == -1 or size >= 1, *vars(self))
        if (self.data, self.fsdp, self.tensor).count(-1) > 1:
            raise InputError(
                f"fsdp: wanted at most one size of the mesh that is -1, got data={self.data} "
                f"fsdp={self.fsdp} tensor={self.tensor}"
            )


class Limits(NamedTuple):
    """Most tokens of a prompt (with BOS) and a completion (with EOS); what to do with bad rows."""

    max_prompt_tokens: int = 512
    max_completion_tokens: int = 192
    invalid_rows: str = "error"


@dataclass(frozen=True)
class DataConfig:
    """Where the rows are and which of them to use."""

    path: str = option(
        help="file, folder or glob of .jsonl/.json (.gz, .zst)/.parquet, scored folder, or hub id"
    )
    split: str = option(
        "train", "hub split, or the files or rows of this split where they name one"
    )
    revision: str | None = option(None, "hub revision; a commit pins the contents")
    subset: str | None = option(None, "which of a hub data set's configurations, such as main")
    format: str = option(
        "auto",
        "tldr (posts in their frame), text (prompt and completion, byte for byte), chat (messages, "
        "by the tokenizer's template) or auto, which the first row decides",
    )
    columns: dict[str, str] = option(
        {}, "fields that have other names in the data, e.g. {prompt: question, completion: answer}"
    )
    max_prompt_tokens: int = option(512, "longer posts are cut at a newline until the prompt fits")
    max_completion_tokens: int = option(
        192, "longer completions (EOS included) are dropped and counted"
    )
    holdout_fraction: float = option(0.0, "share of posts (not rows) in the validation part")
    part: str = option("all", "all, train or validation: which side of the split by post to read")
    invalid_rows: str = option(
        "error", "error: stop at the first bad row; drop: leave out and count"
    )
    max_rows: int | None = option(None, "stop after this many rows of the part")
    rewards: dict[str, float] = option(
        {},
        "scored data: weights of its stored rewards by name, in place of those it was scored with; "
        "0 leaves one out",
    )
    combine: str = option(
        "sum",
        "what becomes of the weighted rewards: sum, min or standardized_sum (each by its mean and "
        "standard deviation over the whole data set)",
    )

    def __post_init__(self) -> None:
        self._check_place()
        names = ("max_prompt_tokens", "max_completion_tokens", "max_rows")
        require(self, "at least 1", lambda count: count >= 1, *names)
        require(self, "in [0, 1)", lambda share: 0 <= share < 1, "holdout_fraction")
        require_one_of(self, TEXT_FORMATS, "format")
        if len(set(self.columns.values())) < len(self.columns):
            raise InputError(
                f"columns must name a field of the data once, got {self.columns}: each of them is "
                "read as one thing"
            )
        require_one_of(self, ("all", "train", "validation"), "part")
        require_one_of(self, ("error", "drop"), "invalid_rows")
        require_one_of(self, COMBINATIONS, "combine")
        if self.rewards and not any(self.rewards.values()):
            raise InputError(f"rewards must have a weight other than 0, got {self.rewards}")
        if not self.rewards and self.combine != "sum":
            raise InputError(
                f"combine is {self.combine} but rewards is empty: set the weights of the stored "
                "rewards that it combines, such as rewards={length: 0.01}"
            )
        if self.part == "validation" and self.holdout_fraction == 0.0:
            raise InputError(
                "part is validation but holdout_fraction is 0, which holds no post out: set it "
                "above 0."
            )

    def _check_place(self) -> None:
        require_path("path", self.path)

    @property
    def limits(self) -> Limits:
        """The token limits, as plain values for `dataset.prepare`."""
        return Limits(self.max_prompt_tokens, self.max_completion_tokens, self.invalid_rows)


@dataclass(frozen=True)
class OptimConfig:
    """Adam and its learning-rate schedule; the defaults are the paper's for CoPG, DPO, IPO and the
    reward model.
    """

    learning_rate: float = option(1e-6, "peak learning rate")
    warmup_fraction: float = option(0.1, "share of all steps spent on linear warm-up")
    decay: str = option("constant", "after warm-up: 'constant' or 'cosine' (to 0)")
    b1: float = option(0.9, "Adam's first-moment decay")
    b2: float = option(0.999, "Adam's second-moment decay")
    eps: float = option(1e-8, "Adam's denominator offset")
    weight_decay: float = option(
        0.0, "decoupled weight decay, of norms and biases too (the paper uses none)"
    )
    clip_norm: float | None = option(None, "clip the global gradient norm; null = no clipping")

    def __post_init__(self):
        require(self, "> 0", lambda number: number > 0, "learning_rate", "eps", "clip_norm")
        require(self, ">= 0", lambda number: number >= 0, "weight_decay")
        require(self, "in [0, 1]", lambda share: 0 <= share <= 1, "warmup_fraction")
        # What is more than that rounds to 1 in float32.
        require(self, "in [0, 1)", lambda decay: 0 <= decay < 1 - 2.0**-25, "b1", "b2")
        require_one_of(self, ("constant", "cosine"), "decay")


@dataclass(frozen=True)
class StepsConfig:
    """The optimiser steps and what is written on the way; the defaults are the paper's."""

    batch_size: int = option(128, "groups per optimiser step, over all devices")
    num_microbatches: int = option(1, "pieces a batch is processed in (gradient accumulation)")
    remat: str = option(
        "full", "what the backward pass recomputes: none, dots (all but products), mlp or full"
    )
    eval_every: int = option(50, "steps between evaluations; one also runs before the first step")
    save_every: int = option(500, "steps between checkpoints (best and last are always saved)")
    log_every: int = option(10, "steps between console lines (metrics.jsonl has every step)")
    tracker: str = option(
        "none",
        "service that shows the metrics: none, tensorboard, wandb or trackio (each an extra)",
    )

    def __post_init__(self):
        require_size(self, "batch_size", "num_microbatches")
        require_positive(self, "eval_every", "save_every", "log_every")
        require_one_of(self, REMATS, "remat")
        require_one_of(self, TRACKERS, "tracker")
        if self.batch_size % self.num_microbatches:
            raise InputError(
                f"batch_size must be a multiple of num_microbatches, got {self.batch_size} and "
                f"{self.num_microbatches}"
            )


@dataclass(frozen=True)
class TrainingConfig(StepsConfig):
    """How long to train on stored data; the defaults are the paper's."""

    num_epochs: int = option(2, "passes over the data")
    max_steps: int | None = option(None, "stop after this many steps; null = all epochs")

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "num_epochs", "max_steps")
        require(self, "< 2**63", lambda count: count < 2**63, "num_epochs")


@dataclass(frozen=True)
class LossConfig:
    """Which policy objective, and its numbers."""

    name: str = option(
        "copg", f"one of {', '.join(POLICY_LOSSES)}, or the dotted path of a function of yours"
    )
    beta: float = option(0.06, "KL coefficient (Fig. 6: copg 0.06, dpo 0.1, ipo 0.01)")
    first_beta: float | None = option(
        None, "beta of the first step, from which it goes to beta by equal factors; null = beta"
    )
    pairs: str = option(
        "all",
        "all pairs of a group, or cross: those of completions of different origins (Eq. 6 with "
        "µ1 ≠ µ2; copg only)",
    )
    arguments: dict[str, float] = option({}, "further numbers that it takes, e.g. {baseline: 0.5}")

    def __post_init__(self):
        if self.name not in POLICY_LOSSES and "." not in self.name:
            raise InputError(
                f"name must be one of {', '.join(POLICY_LOSSES)}, or the dotted path of a function "
                f"such as my_module.my_loss, got {self.name!r}"
            )
        if not self.beta > 0:
            raise InputError(
                f"beta must be > 0, got {self.beta}: it weighs the KL to the reference, without "
                "which offline learning has no optimum"
            )
        require(self, "> 0", lambda beta: beta > 0, "first_beta")
        require_one_of(self, ("all", "cross"), "pairs")
        if self.pairs == "cross" and self.name != "copg":
            raise InputError(
                f"pairs=cross is for name=copg, got name={self.name!r}: set pairs=all. (A loss of "
                "yours that has a parameter `origin` is given the origins, whatever pairs is.)"
            )
        if taken := {"beta", "first_beta"} & set(self.arguments):
            name = min(taken)
            raise InputError(f"arguments: {name} is a field of its own, loss.{name}")


@dataclass(frozen=True)
class GenerationConfig:
    """How completions are generated and judged."""

    num_prompts: int = option(
        128, "fixed prompts, the first ones of the data (paper: 128; Fig. 6: 1024)"
    )
    num_samples: int = option(1, "completions per prompt")
    max_new_tokens: int = option(53, "longest completion, EOS included")
    sampling_temperature: float = option(
        1.0, "1 estimates J(pi), an expectation under pi; 0 is greedy decoding"
    )
    missing_eos_reward: float | None = option(
        None, "reward of a completion without EOS; null = that of its text, like any other"
    )
    batch_size: int = option(32, "prompts generated at a time")
    num_texts: int = option(4, "generations shown and logged as text")
    seed: int = option(0, "seed of the sampling; the step is folded in")

    def __post_init__(self):
        require_size(self, "num_samples", "batch_size")
        require_positive(self, "num_prompts", "max_new_tokens")
        require(self, ">= 0", lambda n: n >= 0, "sampling_temperature", "num_texts")
        require_seed(self)


@dataclass(frozen=True)
class SamplingConfig:
    """What completions of a prompt are drawn, for training."""

    num_samples: int = option(2, "completions of each prompt")
    max_new_tokens: int = option(53, "longest completion, EOS included; one that is cut has no EOS")
    temperature: float = option(1.0, "1 is the model itself; 0 is greedy decoding")
    top_k: int | None = option(None, "draw from so many most likely tokens; null = all")
    top_p: float | None = option(
        None, "draw from the most likely tokens that this total takes; null = all"
    )
    seed: int = option(0, "of all draws")

    def __post_init__(self):
        require_size(self, "num_samples")
        require_positive(self, "max_new_tokens", "top_k")
        require(self, ">= 0", lambda number: number >= 0, "temperature")
        require(self, "in (0, 1)", lambda share: 0 < share < 1, "top_p")
        require_seed(self)
        if self.temperature == 0 and (self.num_samples > 1 or self.top_k or self.top_p):
            raise InputError(
                "temperature=0 is greedy decoding, which gives one completion: set num_samples=1, "
                "and no top_k or top_p; or a temperature above 0"
            )

    @property
    def is_whole_model(self) -> bool:
        """Whether µ is the model itself: temperature 1, and nothing cut off."""
        return self.temperature == 1 and not (self.top_k or self.top_p)
