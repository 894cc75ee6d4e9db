"""What the stage scripts share: a model, its data, and a training run around them.

1. `load_model` reads weights straight into their shards, with the tokenizer that belongs to them.
2. `open_data` tokenises a data set once and reports what was kept, cut and dropped.
3. `train` checks everything that can be wrong, then restores or starts a run, loops, and exports
   Hugging Face folders.
"""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from copg_jax import checkpoint, loop, optim, runtime, sharding, step, train_state
from copg_jax.config import (
    MAY_DIFFER,
    ModelConfig,
    PolicyConfig,
    PolicyEvaluationConfig,
    RewardModelConfig,
    ScoreConfig,
    SFTConfig,
)
from copg_jax.data import scored
from copg_jax.data.dataset import GroupDataset, format_stats, prepare
from copg_jax.data.groups import TokenGroup
from copg_jax.data.stream import GroupStream, num_steps
from copg_jax.data.tldr import DataConfig, GroupReader
from copg_jax.data.tokenizer import load_tokenizer, tokenizer_hash
from copg_jax.errors import InputError
from copg_jax.evaluate import GenerationEvaluator, make_loss_evaluator
from copg_jax.metrics import MetricsLogger
from copg_jax.models import functional, hf_weights
from copg_jax.models.llama import LlamaConfig
from copg_jax.rewards import WeightedRewards
from copg_jax.sampling import make_sampler
from copg_jax.step import LossFn

log = logging.getLogger(__name__)

TrainConfig = SFTConfig | RewardModelConfig | PolicyConfig


@dataclass(frozen=True)
class Model:
    """An architecture with its tokenizer, the folder of its weights, and where each weight lies."""

    config: LlamaConfig
    tokenizer: Any
    folder: Path
    head: str
    shardings: Any

    def load(self, *, score_key: jax.Array | None = None) -> Any:
        """Reads the float32 weights into their shards; `score_key` draws a score head the folder
        lacks.
        """
        return hf_weights.load_params(
            self.folder,
            self.config,
            head=self.head,
            shardings=self.shardings,
            init_missing_score=score_key,
        )

    def load_frozen(self) -> Any:
        """Weights that are only read (π_ref), stored in the compute dtype."""
        cast = partial(functional.cast_matrices, self.config)
        return jax.jit(cast, out_shardings=self.shardings)(self.load())


def open_model(section: ModelConfig, mesh: jax.sharding.Mesh, *, head: str = "lm") -> Model:
    """Reads everything about a model but its weights, and checks that the parts fit.

    Raises:
        InputError: no such folder, not a Llama, a tokenizer with more ids than the model has, or a
            mesh that does not divide it.
    """
    folder = hf_weights.resolve(section.path, section.revision)
    config = replace(hf_weights.read_config(folder), dtype=section.dtype, remat=section.remat)
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {len(tokenizer)} ids, the model only {config.vocab_size} "
            "(vocab_size in config.json): they do not belong together. Fix: use the tokenizer "
            "files that came with these weights."
        )
    axes = functional.logical_axes(config, head=head)
    shapes = functional.abstract_params(config, head=head)
    return Model(config, tokenizer, folder, head, sharding.shardings(mesh, axes, shapes))


def open_data(section: DataConfig, model: Model, folder: Path, name: str) -> GroupDataset:
    """Tokenises a data set into `folder`/tokens (once) and logs what was kept, cut and dropped."""
    dataset = prepare(
        GroupReader(section),
        model.tokenizer,
        path=folder / "tokens" / f"{name}.arrow",
        limits=section.limits,
        vocab_size=model.config.vocab_size,
    )
    log.info("%s: %s\n%s", name, section.path, format_stats(dataset.stats))
    return dataset


def require_rewards(dataset: GroupDataset, *, at_least: int) -> None:
    """Raises InputError unless all groups have rewards and some have `at_least` completions."""
    _, num_completions, _ = dataset.shape()
    if not dataset.has_rewards or num_completions < at_least:
        raise InputError(
            f"data: wanted {at_least} or more completions with a reward or a human choice for "
            f"every prompt, got at most {num_completions} completion(s), rewards "
            f"{'present' if dataset.has_rewards else 'missing'}. Fix: point "
            "data.path at comparisons or at a folder that experiments.score wrote."
        )


def require_scored(config: PolicyConfig, model: Model, dataset: GroupDataset) -> None:
    """Raises InputError unless the data was scored with this reference model and tokenizer."""
    require_rewards(dataset, at_least=2)
    if not dataset.has_ref_logps:
        raise InputError(
            f"data.path {config.data.path}: has rewards but no ref_logps, the log-probabilities "
            "under the reference. Fix: run experiments.score on it and point data.path at the "
            "folder that writes."
        )
    for section in filter(None, (config.data, config.validation)):
        scored.verify(
            Path(section.path),
            tokenizer_hash=tokenizer_hash(model.tokenizer),
            reference_hash=hf_weights.params_hash(model.folder),
        )


def side_car(config: ScoreConfig, reference: Model, rewards: WeightedRewards) -> scored.SideCar:
    """What a scored folder is made of, before its first part is written."""
    return scored.SideCar(
        tokenizer_hash=tokenizer_hash(reference.tokenizer),
        reference_hash=hf_weights.params_hash(reference.folder),
        rewards=rewards.provenance,
        limits=config.data.limits._asdict(),
        complete=False,
    )


def open_evaluation(
    section: PolicyEvaluationConfig,
    model: Model,
    mesh: jax.sharding.Mesh,
    folder: Path,
    *,
    beta: float,
    reference: Model | None,
) -> GenerationEvaluator:
    """Builds the evaluation by generation: prompts, sampler, reward functions, π_ref.

    Args:
        section: data, rewards and sizes.
        model: the policy's architecture and tokenizer.
        mesh: the device mesh.
        folder: where the tokenised prompts are kept.
        beta: β of the reported objective.
        reference: π_ref, loaded here and held; None for no KL.

    Raises:
        InputError: fewer different prompts than asked for, or unusable rewards.
    """
    generation = section.generation
    prompts: dict[str, TokenGroup] = {}
    for group in open_data(section.data, model, folder, "prompts"):
        prompts.setdefault(group.prompt, group)
        if len(prompts) == generation.num_prompts:
            break
    if len(prompts) < generation.num_prompts:
        raise InputError(
            f"evaluation.data: wanted {generation.num_prompts} different prompts, got "
            f"{len(prompts)} from {section.data.path}. Fix: more data, or "
            f"evaluation.generation.num_prompts={len(prompts)}."
        )
    sampler = make_sampler(
        model.config,
        eos_id=model.tokenizer.eos_token_id,
        max_new_tokens=generation.max_new_tokens,
        num_samples=generation.num_samples,
        temperature=generation.sampling_temperature,
        mesh=mesh,
        param_shardings=model.shardings,
    )
    return GenerationEvaluator(
        model.config,
        sampler=sampler,
        prompts=list(prompts.values()),
        tokenizer=model.tokenizer,
        rewards=WeightedRewards(section.rewards),
        generation=generation,
        beta=beta,
        mesh=mesh,
        ref_params=reference and reference.load_frozen(),
    )


def train(
    config: TrainConfig,
    *,
    head: str,
    make_loss: Callable[[LlamaConfig], LossFn],
    make_evaluate: Callable[[Model, jax.sharding.Mesh, Path], loop.Evaluate] | None = None,
    check_data: Callable[[Model, GroupDataset], None] | None = None,
    best_metric: str | None = None,
) -> None:
    """Runs one training stage from its config to exported Hugging Face folders.

    Args:
        config: the stage's config.
        head: "lm" or "score".
        make_loss: from the architecture to the loss function.
        make_evaluate: builds a further evaluation beside the held-out loss.
        check_data: raises InputError where the data does not fit the stage.
        best_metric: metric whose best step is exported to best/ beside the last one in model/.
    """
    folder = Path(config.output_dir)
    runtime.setup()
    runtime.check_run_folder(folder, config, may_differ=MAY_DIFFER)
    mesh = sharding.make_mesh(config.mesh)
    training = config.training
    loop.check_batch(training.batch_size, training.num_microbatches, mesh)
    model = open_model(config.model, mesh, head=head)
    data = open_data(config.data, model, folder, "train")
    held_out = config.validation and open_data(config.validation, model, folder, "validation")
    if check_data is not None:
        for dataset in filter(None, (data, held_out)):
            check_data(model, dataset)
    runtime.write_run_header(folder, config)
    total = num_steps(len(data), training.batch_size, training.num_epochs)
    total = total if training.max_steps is None else min(total, training.max_steps)

    loss_fn = make_loss(model.config)
    optimizer = optim.make_optimizer(config.optim, total)
    axes = functional.logical_axes(model.config, head=head)
    shapes = functional.abstract_params(model.config, head=head)
    layout = train_state.state_shardings(mesh, optimizer, shapes, axes)
    abstract = train_state.abstract_state(optimizer, shapes)
    with checkpoint.Checkpoints(folder / "checkpoints", best_metric=best_metric) as checkpoints:
        start = checkpoints.latest_step or 0
        exports = ["model"] if checkpoints.best() is None else ["model", "best"]
        if start >= total and all((folder / name / "config.json").exists() for name in exports):
            log.info("%s: already complete (%d steps)", folder, total)
            return
        stream = GroupStream(
            data,
            batch_size=training.batch_size,
            num_epochs=training.num_epochs,
            seed=config.seed,
            start_step=start,
            host=jax.process_index(),
            num_hosts=jax.process_count(),
        )
        if start:
            log.info("%s: resuming after step %d of %d", folder, start, total)
            state = checkpoints.restore(start, abstract, layout)
        else:
            score_key = jax.random.key(config.seed) if head == "score" else None
            params = model.load(score_key=score_key)
            state = train_state.create_state(optimizer, params, layout)
            del params
        extra = make_evaluate(model, mesh, folder) if make_evaluate else None
        evaluate = _evaluation(loss_fn, held_out, extra, training.batch_size, mesh, layout)
        with MetricsLogger(
            folder,
            total_steps=total,
            log_every=training.log_every,
            tensorboard=training.tensorboard,
            resume_step=start or None,
        ) as logger:
            state = loop.run(
                step_fn=step.make_train_step(
                    loss_fn,
                    optimizer,
                    mesh=mesh,
                    state_shardings=layout,
                    num_microbatches=training.num_microbatches,
                ),
                state=state,
                start_step=start,
                num_steps=total,
                batches=iter(stream),
                mesh=mesh,
                logger=logger,
                checkpoints=checkpoints,
                eval_every=training.eval_every,
                save_every=training.save_every,
                evaluate=evaluate,
                best_metric=best_metric,
            )
        _export(model, folder / "model", state.params)
        best = checkpoints.best()
        if best is not None:
            del state
            gc.collect()  # the last state's memory, before the best one comes in
            state = checkpoints.restore(best[0], abstract, layout)
            _export(model, folder / "best", state.params)
            log.info("best/ is step %d with %s %.4f", best[0], best_metric, best[1])


def _export(model: Model, folder: Path, params: Any) -> None:
    hf_weights.save_pretrained(
        folder, model.config, params, head=model.head, tokenizer=model.tokenizer
    )
    log.info("wrote %s", folder)


def _evaluation(
    loss_fn: LossFn,
    held_out: GroupDataset | None,
    extra: loop.Evaluate | None,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    layout: train_state.TrainState,
) -> loop.Evaluate | None:
    """Joins the held-out loss and a further evaluation; None where there is neither."""
    if held_out is None and extra is None:
        return None
    held_out_loss = None
    if held_out is not None:
        loss_step = step.make_loss_step(loss_fn, mesh=mesh, param_shardings=layout.params)
        held_out_loss = make_loss_evaluator(loss_step, held_out, batch_size=batch_size, mesh=mesh)

    def evaluate(params: Any, at: int) -> tuple[dict[str, float], dict[str, str]]:
        metrics = held_out_loss(params) if held_out_loss is not None else {}
        generated, texts = extra(params, at) if extra is not None else ({}, {})
        return metrics | generated, texts

    return evaluate
