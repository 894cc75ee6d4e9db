"""One training stage, from its config to exported Hugging Face folders.

1. Everything that can be wrong is checked before anything long begins; the run then claims its
   output folder.
2. The newest checkpoint is restored, or the run starts from the model's weights.
3. `loop.run` trains; held-out loss and generation are evaluated on the way.
4. The best and the last parameters are exported, the last one last: it marks the run as complete.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from etils import epath

from copg_jax import distributed, flops, loop, optim, runtime, sharding, stages, step, train_state
from copg_jax.checkpoint import Checkpoints
from copg_jax.config import MAY_DIFFER, TrainConfig
from copg_jax.data.dataset import GroupDataset
from copg_jax.data.stream import GroupStream, num_steps
from copg_jax.data.tldr import DataConfig
from copg_jax.evaluate import GenerationEvaluator, make_loss_evaluator
from copg_jax.metrics import MetricsLogger
from copg_jax.models import functional, hf_weights
from copg_jax.models.llama import LlamaConfig
from copg_jax.stages import Model
from copg_jax.step import LossFn
from copg_jax.train_state import TrainState

log = logging.getLogger(__name__)

MakeEvaluation = Callable[[Model, jax.sharding.Mesh, epath.Path], GenerationEvaluator]


@dataclass(frozen=True)
class _Run:
    """What a run is made of, once its inputs are checked."""

    config: TrainConfig
    folder: epath.Path
    mesh: jax.sharding.Mesh
    model: Model
    data: GroupDataset
    held_out: GroupDataset | None
    num_steps: int
    optimizer: optax.GradientTransformation
    shapes: TrainState
    layout: TrainState

    @property
    def inputs(self) -> dict[str, str]:
        found = {"model": self.model.hash, "data": self.data.fingerprint}
        return found | ({"validation": self.held_out.fingerprint} if self.held_out else {})


def train(
    config: TrainConfig,
    *,
    head: str,
    make_loss: Callable[[LlamaConfig], LossFn],
    make_evaluation: MakeEvaluation | None = None,
    check_data: Callable[[DataConfig, Model, GroupDataset], None] | None = None,
    best_metric: str | None = None,
) -> None:
    """Runs one training stage.

    Args:
        config: the stage's config.
        head: "lm" or "score".
        make_loss: from the architecture to the loss function.
        make_evaluation: builds the evaluation by generation, beside the held-out loss.
        check_data: raises InputError where a data set does not fit the stage.
        best_metric: metric whose best trained step is exported to best/.
    """
    runtime.setup(config.distributed)
    run = _prepare(config, head, check_data)
    with Checkpoints(run.folder / "checkpoints", best_metric=best_metric) as checkpoints:
        start = checkpoints.latest_step or 0
        exported = (run.folder / "model" / "config.json").exists()
        if distributed.from_main(start >= run.num_steps and exported):
            log.info("%s: already complete (%d steps)", run.folder, run.num_steps)
            return
        loss_fn = make_loss(run.model.config)
        generation = make_evaluation and make_evaluation(run.model, run.mesh, run.folder)
        inputs = run.inputs | (generation.inputs if generation else {})
        runtime.write_run_header(run.folder, config, inputs)
        with MetricsLogger(
            run.folder,
            total_steps=run.num_steps,
            log_every=config.training.log_every,
            tensorboard=config.training.tensorboard,
            resume_step=start or None,
        ) as logger:
            trained = loop.run(
                step_fn=_train_step(run, loss_fn),
                state=_initial_state(run, checkpoints, start),
                start_step=start,
                num_steps=run.num_steps,
                batches=iter(_stream(run, start)),
                mesh=run.mesh,
                logger=logger,
                checkpoints=checkpoints,
                eval_every=config.training.eval_every,
                save_every=config.training.save_every,
                evaluate=_evaluation(run, loss_fn, generation),
                best_metric=best_metric,
                useful_flops=lambda batch: flops.useful_flops(
                    run.model.config, batch.prompt_length, batch.completion_length, head=head
                ),
            ).params  # without the optimiser's state, to make room for the best step's parameters
        _export_all(run, checkpoints, trained)


def _prepare(
    config: TrainConfig,
    head: str,
    check_data: Callable[[DataConfig, Model, GroupDataset], None] | None,
) -> _Run:
    """Opens model and data and checks that they fit the config, the mesh and each other."""
    folder, training = epath.Path(config.output_dir), config.training
    runtime.check_run_folder(folder, config, may_differ=MAY_DIFFER)
    mesh = sharding.make_mesh(config.mesh)
    loop.check_batch(training.batch_size, training.num_microbatches, mesh)
    model = stages.open_model(config.model, mesh, head=head, remat=training.remat)
    datasets = []
    for name, section in (("train", config.data), ("validation", config.validation)):
        if section is None:
            continue
        dataset = stages.open_data(section, model, folder, name)
        if check_data is not None:
            check_data(section, model, dataset)
        datasets.append(dataset)
    total = num_steps(len(datasets[0]), training.batch_size, training.num_epochs)
    total = total if training.max_steps is None else min(total, training.max_steps)
    optimizer = optim.make_optimizer(config.optim, total)
    axes = functional.logical_axes(model.config, head=head)
    shapes = functional.abstract_params(model.config, head=head)
    return _Run(
        config=config,
        folder=folder,
        mesh=mesh,
        model=model,
        data=datasets[0],
        held_out=datasets[1] if len(datasets) > 1 else None,
        num_steps=total,
        optimizer=optimizer,
        shapes=train_state.abstract_state(optimizer, shapes),
        layout=train_state.state_shardings(mesh, optimizer, shapes, axes),
    )


def _train_step(run: _Run, loss_fn: LossFn) -> loop.StepFn:
    """The compiled step of this run's optimiser, mesh and learning-rate schedule."""
    return step.make_train_step(
        loss_fn,
        run.optimizer,
        mesh=run.mesh,
        state_shardings=run.layout,
        num_microbatches=run.config.training.num_microbatches,
        schedule=optim.make_schedule(run.config.optim, run.num_steps),
    )


def _stream(run: _Run, start: int) -> GroupStream:
    """This host's share of the batches after step `start`."""
    training = run.config.training
    host, num_hosts = sharding.batch_share(run.mesh)
    return GroupStream(
        run.data,
        batch_size=training.batch_size,
        num_epochs=training.num_epochs,
        seed=run.config.seed,
        num_blocks=sharding.num_batch_shards(run.mesh) * training.num_microbatches,
        start_step=start,
        host=host,
        num_hosts=num_hosts,
    )


def _initial_state(run: _Run, checkpoints: Checkpoints, start: int) -> TrainState:
    """The newest checkpoint, or the model's weights with a fresh optimiser."""
    if start:
        log.info("%s: resuming after step %d of %d", run.folder, start, run.num_steps)
        return checkpoints.restore(start, run.shapes, run.layout)
    score_key = jax.random.key(run.config.seed) if run.model.head == "score" else None
    params = run.model.load(score_key=score_key)
    return train_state.create_state(run.optimizer, params, run.layout)


def _evaluation(
    run: _Run, loss_fn: LossFn, generation: GenerationEvaluator | None
) -> loop.Evaluate | None:
    """Joins the held-out loss and the evaluation by generation; None where there is neither."""
    if run.held_out is None and generation is None:
        return None
    held_out_loss = None
    if run.held_out is not None:
        held_out_loss = make_loss_evaluator(
            step.make_loss_step(loss_fn, mesh=run.mesh, param_shardings=run.layout.params),
            run.held_out,
            # What fits a training step fits here.
            batch_size=run.config.training.batch_size // run.config.training.num_microbatches,
            mesh=run.mesh,
        )

    def evaluate(params: Any, at: int) -> tuple[dict[str, float], dict[str, str]]:
        metrics = held_out_loss(params) if held_out_loss is not None else {}
        generated, texts = generation(params, at) if generation is not None else ({}, {})
        return metrics | generated, texts

    return evaluate


def _export_all(run: _Run, checkpoints: Checkpoints, last: Any) -> None:
    """Writes best/ and then model/, of the `last` parameters; the two are all that is in memory."""
    best = checkpoints.best()
    if best is not None:
        is_last = best[0] == run.num_steps
        params = last if is_last else checkpoints.restore_params(best[0], run.shapes, run.layout)
        _export(run, "best", params)
        log.info("best/ is step %d, value %.4f", *best)
    _export(run, "model", last)


def _export(run: _Run, name: str, params: Any) -> None:
    hf_weights.save_pretrained(
        run.folder / name,
        run.model.config,
        params,
        head=run.model.head,
        tokenizer=run.model.tokenizer,
    )
    log.info("wrote %s", run.folder / name)
