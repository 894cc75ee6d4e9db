"""One frozen config per stage, composed of sections.

Defaults are the paper's settings; the files of `configs/` list only what differs. Fields that only
say where and how a run executes (`MAY_DIFFER`) may change when it is resumed; any other change is
another run.
"""

import math
from dataclasses import dataclass
from typing import Any

from copg_jax.config.checks import (
    require,
    require_one_of,
    require_path,
    require_positive,
    require_seed,
    require_size,
)
from copg_jax.config.options import option, section
from copg_jax.config.policy_data import GeneratorConfig, OfflineConfig, PolicyDataConfig
from copg_jax.config.reward_spec import RewardSpec
from copg_jax.config.sections import (
    DISTRIBUTED_MODES,
    POLICY_LOSSES,
    DataConfig,
    GenerationConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    SamplingConfig,
    StepsConfig,
    TrainingConfig,
)
from copg_jax.errors import InputError

MAY_DIFFER = (
    "output_dir",  # a folder may be moved
    "distributed",
    "mesh",
    "model.attention",
    "reference.attention",
    "batch_size",  # of sampling and scoring; that of training is training.batch_size
    "evaluation.generation.batch_size",  # samples do not depend on it
    "evaluation.generation.num_texts",
    "training.eval_every",  # best/ is then the best of the steps that were evaluated
    "training.save_every",
    "training.log_every",
    "training.tracker",
    "training.num_microbatches",
    "training.remat",
    "logits_chunk",
    "rewards[i].num_workers",
    "rewards[i].batch_size",
    "evaluation.rewards[i].num_workers",
    "evaluation.rewards[i].batch_size",
    "keep_rounds",
    "generator.timeout_sec",
)
"""Config fields that do not define a run: resuming with another value of them is allowed."""


def _distributed() -> Any:
    return option(
        "auto",
        "join other processes: auto (TPU pod, SLURM, Open MPI, Kubernetes, or "
        "JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID), on (or fail) or off",
    )


def _logits_chunk() -> Any:
    return option(None, "completion positions whose logits exist at a time; null = all")


@dataclass(frozen=True)
class RunConfig:
    """What every stage that trains has."""

    output_dir: str = option(help="folder of the run: checkpoints, metrics.jsonl, model/")
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    lora: LoraConfig | None = option(None, "train adapters alone; null = all weights")
    optim: OptimConfig = section(OptimConfig)
    training: StepsConfig = section(StepsConfig)
    mesh: MeshConfig = section(MeshConfig)
    distributed: str = _distributed()
    seed: int = option(0, "seed of the data order, and of a new score head or adapter")

    def __post_init__(self):
        require_path("output_dir", self.output_dir)
        require_one_of(self, DISTRIBUTED_MODES, "distributed")
        require_seed(self)
        if self.model.adapter is not None and self.lora is None:
            raise InputError(
                "model.adapter: wanted the lora section beside it, whose rank and alpha are the "
                "adapter's, got none: all weights are trained from a whole model. Fix: "
                "lora.rank=N, which trains the adapter further; or model.path=the folder in which "
                "it is merged."
            )


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """What every stage has that trains on stored data."""

    training: TrainingConfig = section(TrainingConfig)
    validation: DataConfig | None = option(None, "held-out data; null = none")


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning on the author's summaries: gives π_ref."""

    optim: OptimConfig = section(lambda: OptimConfig(learning_rate=2e-5, decay="cosine"))
    logits_chunk: int | None = _logits_chunk()

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "logits_chunk")


@dataclass(frozen=True)
class RewardModelConfig(TrainConfig):
    """Bradley–Terry reward model on human comparisons."""


@dataclass(frozen=True)
class SampleConfig:
    """Completions of prompts by a model, as groups to score and train on."""

    output_dir: str = option(help="folder of the samples: part-*.parquet and sampled.json")
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    sampling: SamplingConfig = section(SamplingConfig)
    origin: int = option(0, "of the completions, which tells their µ from another one's")
    engine_prompts: bool = option(
        False, "draw nothing: write prompts.jsonl, with ids, for an engine (generate_vllm.py)"
    )
    batch_size: int = option(32, "prompts completed at a time")
    part_size: int = option(512, "prompts per Parquet part; an interrupted run resumes at a part")
    mesh: MeshConfig = section(MeshConfig)
    distributed: str = _distributed()

    def __post_init__(self):
        require_path("output_dir", self.output_dir)
        require_one_of(self, DISTRIBUTED_MODES, "distributed")
        require(self, "in [0, 127]", lambda origin: 0 <= origin <= 127, "origin")
        require_size(self, "batch_size")
        require_positive(self, "part_size")


@dataclass(frozen=True)
class ScoreConfig:
    """Rewards and ln π_ref of a data set, computed once."""

    output_dir: str = option(help="folder of the scored data: part-*.parquet and scored.json")
    reference: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    prompts: str | None = option(
        None, "prompts.jsonl that an engine was given: its data must answer each of them"
    )
    rewards: list[RewardSpec] = option([], "reward functions; the reward is their weighted sum")
    batch_size: int = option(64, "groups per forward pass")
    part_size: int = option(2048, "groups per Parquet part; an interrupted run resumes at a part")
    logits_chunk: int | None = _logits_chunk()
    mesh: MeshConfig = section(MeshConfig)
    distributed: str = _distributed()

    def __post_init__(self):
        require_path("output_dir", self.output_dir)
        require_one_of(self, DISTRIBUTED_MODES, "distributed")
        require_size(self, "batch_size")
        require_positive(self, "part_size", "logits_chunk")


@dataclass(frozen=True)
class PolicyEvaluationConfig:
    """Evaluation by generation while a policy trains."""

    data: DataConfig = section(DataConfig)
    rewards: list[RewardSpec] = option([], "reward functions; the reward is their weighted sum")
    generation: GenerationConfig = section(GenerationConfig)


@dataclass(frozen=True)
class PolicyConfig(TrainConfig):
    """CoPG, DPO, IPO, PG or RLOO on scored groups; `model` is the first policy and π_ref, `data` a
    scored folder.
    """

    data: PolicyDataConfig = section(PolicyDataConfig)
    loss: LossConfig = section(LossConfig)
    evaluation: PolicyEvaluationConfig | None = option(
        None, "generation every training.eval_every steps; null = none"
    )
    logits_chunk: int | None = _logits_chunk()

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "logits_chunk")
        for name in ("rewards", "combine"):
            own, held_out = (getattr(x, name, None) for x in (self.data, self.validation))
            if self.validation is not None and own != held_out:
                raise InputError(
                    f"validation.{name} must be data.{name}, {own}, got {held_out}: else the "
                    "held-out loss is that of another reward"
                )
        is_another = self.validation is not None and self.validation.path != self.data.path
        if is_another and self.data.combine == "standardized_sum":
            raise InputError(
                "validation.combine: wanted sum or min with held-out data of another folder, got "
                "standardized_sum, whose means and standard deviations would be those of that "
                "folder, and the held-out loss that of another reward. Fix: combine=sum with "
                "weights w/s, from the log of standardized_sum"
            )
        if self.loss.pairs == "cross" and self.validation is not None:
            raise InputError(
                "validation: wanted none with loss.pairs=cross, since held-out data is one folder "
                "and has no pairs across origins; got "
                f"{self.validation.path}. Fix: validation=null"
            )
        shares = [source.share for source in self.data.sources if source.share is not None]
        if self.loss.pairs == "cross" and shares:
            raise InputError(
                f"data.sources: got shares {shares} with loss.pairs=cross, which joins the "
                "completions of a prompt from all sources into one group: leave the shares out"
            )


@dataclass(frozen=True)
class OnlineConfig(RunConfig):
    """Rounds of sampling, scoring and training; `model` is the first policy and π_ref, `data` the
    prompts.
    """

    rounds: int = option(100, "rounds of sampling, scoring and training")
    steps_per_round: int = option(1, "optimiser steps of a round; 1 = online, many = offline")
    prompts_per_round: int = option(128, "prompts that a round draws completions of")
    sampling: SamplingConfig = section(SamplingConfig)
    rewards: list[RewardSpec] = option([], "reward functions; the reward is their weighted sum")
    loss: LossConfig = section(LossConfig)
    replay_rounds: int = option(
        1, "train on the samples of so many rounds; 1 = those of the newest alone"
    )
    offline: OfflineConfig | None = option(
        None, "scored data that is trained on beside the samples; null = none"
    )
    reference_every: int | None = option(
        None, "rounds after which the policy of the moment becomes π_ref; null = never"
    )
    keep_rounds: int | None = option(
        None, "delete folders of rounds that neither these newest nor a resumed run need; null = no"
    )
    generator: GeneratorConfig | None = option(
        None, "an engine that draws the samples; null = our sampler"
    )
    evaluation: PolicyEvaluationConfig | None = option(
        None, "generation every training.eval_every steps; null = none"
    )
    batch_size: int = option(32, "prompts completed, and groups scored, at a time")
    part_size: int = option(512, "prompts per Parquet part; an interrupted round resumes at a part")
    logits_chunk: int | None = _logits_chunk()

    def __post_init__(self):
        super().__post_init__()
        counts = ("rounds", "steps_per_round", "prompts_per_round", "replay_rounds")
        require_positive(self, *counts, "reference_every", "keep_rounds", "part_size")
        require_positive(self, "logits_chunk")
        require_size(self, "batch_size")
        if self.loss.name in POLICY_LOSSES and self.sampling.num_samples < 2:
            raise InputError(
                f"sampling.num_samples: wanted 2 or more, as loss.name={self.loss.name} leaves out "
                f"prompts with a single completion, got {self.sampling.num_samples}"
            )
        self._check_offline()
        fresh = 1 - ((self.offline and self.offline.share) or 0)
        if self.prompts_per_round < (least := math.ceil(fresh * self.training.batch_size)):
            raise InputError(
                f"prompts_per_round: wanted at least {least}, the fresh groups of a batch of "
                f"training.batch_size={self.training.batch_size}, got {self.prompts_per_round}"
            )

    def _check_offline(self) -> None:
        is_cross, offline = self.loss.pairs == "cross", self.offline
        if is_cross and offline is None:
            raise InputError(
                "loss.pairs=cross: wanted completions of two origins, got fresh samples alone. "
                "Fix: offline.path=a scored folder of the same prompts; or loss.pairs=all"
            )
        if offline is not None and is_cross == (offline.share is not None):
            raise InputError(
                f"offline.share: wanted {'none' if is_cross else 'one'} with "
                f"loss.pairs={self.loss.pairs}, "
                + (
                    f"which joins the completions of a prompt, got {offline.share}"
                    if is_cross
                    else "which is that of the scored data in every batch, e.g. offline.share=0.5"
                )
            )
        if offline is not None and self.reference_every is not None:
            raise InputError(
                "reference_every: wanted none with offline data, whose ln π_ref is that of the "
                f"first reference, got {self.reference_every}"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """Rewards of a model's generations on fixed prompts."""

    output_dir: str = option(help="folder of evaluation.json and generations.jsonl")
    model: ModelConfig = section(ModelConfig)
    reference: ModelConfig | None = option(None, "π_ref for the KL; null = no KL, no objective")
    evaluation: PolicyEvaluationConfig = section(PolicyEvaluationConfig)
    beta: float = option(0.06, "β of the reported objective E[R] − β·KL")
    logits_chunk: int | None = _logits_chunk()
    mesh: MeshConfig = section(MeshConfig)
    distributed: str = _distributed()

    def __post_init__(self):
        require_path("output_dir", self.output_dir)
        require_one_of(self, DISTRIBUTED_MODES, "distributed")
        require(self, "> 0", lambda beta: beta > 0, "beta")
        require_positive(self, "logits_chunk")


STAGES: dict[str, type] = {
    "sft": SFTConfig,
    "reward": RewardModelConfig,
    "sample": SampleConfig,
    "score": ScoreConfig,
    "policy": PolicyConfig,
    "online": OnlineConfig,
    "evaluate": EvaluateConfig,
}
"""The stages of the pipeline by the names that sections of config files have."""
