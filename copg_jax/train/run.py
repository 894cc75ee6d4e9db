"""One training stage, from its config to exported Hugging Face folders.

1. Everything that can be wrong is checked before anything long begins; the run then claims its
   output folder.
2. The newest checkpoint is restored, or the run starts from the model's weights.
3. `loop.run` trains; held-out loss and generation are evaluated on the way.
4. The best and the last parameters are exported, the last one last: it marks the run as complete.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import optax
from etils import epath

from copg_jax import checksums, flops, reuse, run_folder, runtime, sharding
from copg_jax.config.schema import as_stored
from copg_jax.config.stages import MAY_DIFFER, RunConfig
from copg_jax.data.dataset import GroupDataset
from copg_jax.evaluate import GenerationEvaluator, make_loss_evaluator
from copg_jax.hf.pretrained import PretrainedModel, open_model
from copg_jax.objective import LossFn
from copg_jax.trackers import require_tracker
from copg_jax.tracking import MetricsLogger, warn_of_lost_lines
from copg_jax.train import loop, optim
from copg_jax.train.checkpoint import Checkpoints
from copg_jax.train.compiled import CompiledStep, as_arguments
from copg_jax.train.exports import bytes_to_write, export, is_exported
from copg_jax.train.metrics import LateMetrics
from copg_jax.train.run_card import run_card
from copg_jax.train.state import (
    TrainState,
    abstract_state,
    create_state,
    joined,
    state_shardings,
)
from copg_jax.train.step import make_loss_step, make_train_step

log = logging.getLogger(__name__)


class Feed(Protocol):
    """What a run trains on: opened and checked."""

    @property
    def num_steps(self) -> int:
        """Of the whole run."""
        ...

    @property
    def hashes(self) -> Mapping[str, str]:
        """Of all that is read, by name."""
        ...

    @property
    def card(self) -> Mapping[str, str]:
        """What the model card says of it, by name."""
        ...

    @property
    def held_out(self) -> GroupDataset | None:
        """Whose loss is measured on the way."""
        ...

    def begin(
        self,
        run: "Run",
        start: int,
        logger: MetricsLogger,
        checkpoints: Checkpoints,
        frozen: Mapping[str, Any] | None,
    ) -> "Fed":
        """The batches after step `start`, and what is to be done beside the steps to have them.

        Args:
            run: the run.
            start: steps that are done.
            logger: an entered MetricsLogger.
            checkpoints: entered Checkpoints.
            frozen: weights that are not trained; None where all are.
        """
        ...


class Fed(NamedTuple):
    """A feed that has begun."""

    batches: loop.Batches
    reports: Sequence[loop.Hook] = ()  # before a step is evaluated and saved
    makers: Sequence[loop.Hook] = ()  # after that, and before the first step of a resumed run


@dataclass(frozen=True)
class Stage:
    """What sets one training stage apart from another."""

    head: str  # "lm" or "score"
    make_loss: Callable[[PretrainedModel], LossFn]
    # (model, bytes that a run writes beside its data) → what it trains on. Raises InputError for
    # data that does not fit the stage.
    open_feed: Callable[[PretrainedModel, int], Feed]
    # Share of the steps that are done → numbers of the loss; those of 1 are of its evaluations.
    coefficients: Callable[[float], Mapping[str, float]] = lambda done: {}
    # (model, output folder) → the evaluation by generation, and hashes of what it reads.
    open_evaluation: (
        Callable[[PretrainedModel, epath.Path], tuple[GenerationEvaluator, dict[str, str]]] | None
    ) = None
    best_metric: str | None = None  # whose best trained step is exported to best/


@dataclass(frozen=True)
class Run:
    """What a run is made of, once its inputs are checked."""

    config: RunConfig
    folder: epath.Path
    mesh: jax.sharding.Mesh
    model: PretrainedModel
    feed: Feed
    optimizer: optax.GradientTransformation
    shapes: TrainState
    shardings: TrainState

    @property
    def num_steps(self) -> int:
        """Of the whole run."""
        return self.feed.num_steps

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of what is read, by name."""
        return {"model": self.model.hash, **self.feed.hashes}


def train(config: RunConfig, stage: Stage) -> None:
    """Runs one training stage, or what is left of it."""
    runtime.setup(config.distributed)
    require_tracker(config.training.tracker)
    with run_folder.claim(config.output_dir, config, may_differ=MAY_DIFFER):
        _run_stage(config, stage)


def _run_stage(config: RunConfig, stage: Stage) -> None:
    run = _prepare(config, stage)
    generation, hashes = None, {}
    if stage.open_evaluation is not None:
        generation, hashes = stage.open_evaluation(run.model, run.folder)
    # Before a run that is complete says so, too: it may be asked of other inputs.
    run_folder.check_inputs(run.folder, run.inputs | hashes)
    with Checkpoints(run.folder / "checkpoints", best_metric=stage.best_metric) as checkpoints:
        start = checkpoints.latest_step or 0
        if start >= run.num_steps and is_exported(
            run.folder, run.model, has_best=checkpoints.best() is not None
        ):
            warn_of_lost_lines(run.folder, range(1, run.num_steps + 1))
            log.info("%s: already complete (%d steps)", run.folder, run.num_steps)
            return
        run_folder.write_run_header(run.folder, config, run.inputs | hashes)
        with MetricsLogger(
            run.folder,
            total_steps=run.num_steps,
            log_every=config.training.log_every,
            tracker=config.training.tracker,
            settings=as_stored(config),
            resume_step=start or None,
            logged=range(1, start + 1),
        ) as logger:
            trained = _train(run, stage, checkpoints, logger, generation, start)
        _export_all(run, checkpoints, trained)


def _train(
    run: Run,
    stage: Stage,
    checkpoints: Checkpoints,
    logger: MetricsLogger,
    generation: GenerationEvaluator | None,
    start: int,
) -> Any:
    """Trains from step `start` to the last; returns the parameters, without the optimiser's state,
    to make room for those of the best step.
    """
    training, loss_fn = run.config.training, stage.make_loss(run.model)
    frozen = None if run.model.lora is None else run.model.load_frozen()
    fed = run.feed.begin(run, start, logger, checkpoints, frozen)
    hooks: list[loop.Hook] = [*fed.reports]
    evaluate, evaluation = _evaluation(run, stage, loss_fn, generation, frozen), None
    if evaluate is not None:
        evaluation = loop.EvaluationHook(
            training, run.num_steps, evaluate, logger, stage.best_metric
        )
        hooks.append(evaluation)
    hooks.append(loop.CheckpointHook(training, run.num_steps, checkpoints, logger, evaluation))
    hooks += fed.makers
    # An evaluation that was due where the run was left is made up for.
    is_evaluated = start > 0 and checkpoints.is_evaluated(start)
    useful_flops = lambda batch: flops.useful_flops(
        run.model.arch,
        batch.prompt_length,
        batch.completion_length,
        head=stage.head,
        lora_parameters=run.model.lora_parameters,
    )
    return loop.run(
        _step(run, stage, loss_fn, frozen),
        _initial_state(run, checkpoints, start),
        fed.batches,
        range(start + 1, run.num_steps + 1),
        mesh=run.mesh,
        metrics=LateMetrics(logger, checkpoints.folder, run.mesh, useful_flops),
        hooks=hooks,
        first_hooks=fed.makers if is_evaluated else hooks,
    ).params


def _step(
    run: Run, stage: Stage, loss_fn: LossFn, frozen: Mapping[str, Any] | None
) -> CompiledStep:
    """The step of a run, with its optimiser, mesh and learning rate."""
    training = run.config.training
    step_fn = make_train_step(
        loss_fn,
        run.optimizer,
        mesh=run.mesh,
        state_shardings=run.shardings,
        num_microbatches=training.num_microbatches,
    )
    # The learning rate is an argument.
    alike = replace(run.config.optim, learning_rate=1.0, warmup_fraction=0.0, decay="constant")
    made_of = stage.make_loss, run.model.arch, run.mesh, training.num_microbatches, alike
    learning_rate = partial(optim.learning_rate, run.config.optim, run.num_steps)
    last = run.num_steps - 1
    coefficients = lambda taken: stage.coefficients(taken / last if last else 1.0)
    return CompiledStep(step_fn, made_of, coefficients, learning_rate, frozen)


def _prepare(config: RunConfig, stage: Stage) -> Run:
    """Opens model and data and checks that they fit the config, the mesh and each other."""
    folder, training = epath.Path(config.output_dir), config.training
    mesh = sharding.make_mesh(config.mesh)
    loop.check_batch(training.batch_size, training.num_microbatches, mesh)
    model = open_model(config.model, mesh, head=stage.head, remat=training.remat, lora=config.lora)
    optimizer = optim.make_optimizer(config.optim)
    shapes = abstract_state(optimizer, model.shapes)
    is_complete = checksums.is_sealed(folder / "model")
    keeps_best = stage.best_metric is not None
    to_write = 0 if is_complete else bytes_to_write(model, shapes, keeps_best=keeps_best)
    feed = stage.open_feed(model, to_write)
    warmup = optim.warmup_steps(config.optim, feed.num_steps)
    log.info("%d steps; the learning rate rises over the first %d", feed.num_steps, warmup)
    return Run(
        config=config,
        folder=folder,
        mesh=mesh,
        model=model,
        feed=feed,
        optimizer=optimizer,
        shapes=shapes,
        shardings=state_shardings(mesh, optimizer, model.shapes, model.axes),
    )


def _initial_state(run: Run, checkpoints: Checkpoints, start: int) -> TrainState:
    """The newest checkpoint, or the model's weights with a fresh optimiser."""
    if start:
        log.info("%s: resuming after step %d of %d", run.folder, start, run.num_steps)
        return checkpoints.restore(start, run.shapes, run.shardings)
    params = run.model.load(key=jax.random.key(run.config.seed))
    return create_state(run.optimizer, params, run.shardings)


def _evaluation(
    run: Run,
    stage: Stage,
    loss_fn: LossFn,
    generation: GenerationEvaluator | None,
    frozen: Mapping[str, Any] | None,
) -> loop.Evaluate | None:
    """Joins the held-out loss and the evaluation by generation; None where there is neither."""
    if run.feed.held_out is None and generation is None:
        return None
    held_out_loss = None
    if run.feed.held_out is not None:
        loss_step = reuse.once(
            "held-out step",
            (stage.make_loss, run.model.arch, run.mesh),
            lambda: make_loss_step(loss_fn, mesh=run.mesh),
        )
        held_out_loss = make_loss_evaluator(
            partial(loss_step, **as_arguments(stage.coefficients(1.0))),
            run.feed.held_out,
            # What fits a training step fits here.
            batch_size=run.config.training.batch_size // run.config.training.num_microbatches,
            mesh=run.mesh,
        )

    def evaluate(params: Any, at: int) -> tuple[dict[str, float], dict[str, str]]:
        log.info("evaluating at step %d", at)
        params = joined(frozen, params)
        metrics = held_out_loss(params) if held_out_loss is not None else {}
        generated, texts = generation(params, at) if generation is not None else ({}, {})
        return metrics | generated, texts

    return evaluate


def _export_all(run: Run, checkpoints: Checkpoints, last: Any) -> None:
    """Writes best/ and then model/, of the `last` parameters; the two are all that is in memory."""
    best = checkpoints.best()
    if best is not None:
        is_last = best[0] == run.num_steps
        params = last if is_last else checkpoints.restore_params(best[0], run.shapes, run.shardings)
        _export(run, "best", params, best[0])
        log.info("best/ is step %d, value %.4f", *best)
    _export(run, "model", last, run.num_steps)


def _export(run: Run, name: str, params: Any, step: int) -> None:
    card = partial(run_card, run.config, run.model.head, run.feed.card, step)
    export(run.folder, name, run.model, params, base=run.config.model, card=card)
