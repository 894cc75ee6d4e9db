"""The runs that the grid of a study asks for.

1. A grid has an axis for each setting that varies, see `axes`; a `Values` is one combination.
2. `Grid.point` turns one into the `Job`s of its stages. A stage that a setting does not reach is
   the same job at all points and runs once; which settings reach a stage follows from whose
   setting it is, and from the folders that the stage reads.
3. A job's folder is named after the settings that reach it.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from copg_jax.config.load import read_settings
from copg_jax.config.schema import EnvironmentText, leaves
from copg_jax.config.settings import SHARED
from copg_jax.config.stages import STAGES
from copg_jax.config.variants import is_related, load_with, shared_reads
from copg_jax.errors import InputError
from experiments.studies.axes import (
    BETA,
    LOSSES,
    SEED,
    Values,
    argument,
    expand,
    named,
    part,
    stage_of,
)
from experiments.studies.roles import require_roles
from experiments.studies.study_config import TRAINERS, InputsRun, StudyConfig


@dataclass(frozen=True)
class Job:
    """One run of one stage."""

    name: str  # of its folder
    stage: str
    config: Any
    needs: tuple[str, ...] = ()  # names of the jobs whose folders it reads


@dataclass(frozen=True)
class Point:
    """One point of the grid: a policy, and all that it needs."""

    name: str
    values: Values
    jobs: tuple[Job, ...]  # each after those that it needs

    @property
    def policy(self) -> Job:
        """Its training."""
        return next(job for job in self.jobs if job.stage in TRAINERS)

    @property
    def evaluation(self) -> Job:
        """The evaluation of what it trained."""
        return next(
            job for job in self.jobs if job.stage == "evaluate" and self.policy.name in job.needs
        )

    @property
    def baseline(self) -> Job:
        """The evaluation of π_ref on the same prompts."""
        return next(j for j in self.jobs if j.stage == "evaluate" and j != self.evaluation)

    @property
    def group(self) -> str:
        """What else varies than the loss, its β and the seed; runs that differ in it are not
        compared.
        """
        axes = [axis for axis in self.values if axis not in (BETA, SEED, *LOSSES)]
        stage = self.policy.stage
        return "-".join(part(axis, self.values[axis], stage, stage) for axis in axes)


class Grid:
    """The points of a study.

    Args:
        study: the config.

    Raises:
        InputError: a config of a stage that does not load at some point, stages that do not read
            each other as a study needs, two runs of one name, or runs whose axes do not tell them
            apart.
    """

    def __init__(self, study: StudyConfig) -> None:
        self._study = study
        self._trainer = study.trainer
        self._axes = named(study.grid, self._trainer)
        self._values = expand(self._axes)
        self._varying = [
            axis for axis in self._axes if len({json.dumps(v[axis]) for v in self._values}) > 1
        ]
        self._load = functools.cache(self._load_stage)
        given = [*study.configs, *study.settings]
        self._settings = {stage: read_settings(STAGES[stage], given) for stage in study.stages}
        self._reads = {
            stage: shared_reads(own, self._may_set(stage)) for stage, own in self._settings.items()
        }
        self._require_read()
        self._reach = self._find_reach()
        self.points = [self.point(values) for values in self._values]
        _require_told_apart(self.points)
        _require_distinct(self.points)
        self.best_points(self._values[:1])  # what is wrong there is refused before all runs

    def best_points(self, chosen: Sequence[Values]) -> list[Point]:
        """The second look at these values, see `BestConfig`; each with all seeds."""
        best = self._study.best
        if best is None:
            return []
        seeds = best.seeds or sorted({point.policy.config.seed for point in self.points})
        points = []
        for own in ({**values, SEED: seed} for values in chosen for seed in seeds):
            points.append(self.point(own, "best", best.settings))
            wanted, got = (
                _identity(self._config(self._trainer, own)),
                _identity(points[-1].policy.config),
            )
            if got != wanted:
                raise InputError(
                    f"best.settings: wanted the loss, β and seed of the run, {wanted}, got "
                    f"{got}. Fix: best.seeds for other seeds; β and loss are those of the grid."
                )
        return points

    @property
    def has_second_look(self) -> bool:
        """Whether runs at the best β are asked for."""
        return self._study.best is not None

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds of the policies."""
        best = self._study.best
        own = {point.policy.config.seed for point in self.points}
        return tuple(sorted(own | set(best.seeds if best else ())))

    def point(self, values: Values, prefix: str = "", more: Sequence[str] = ()) -> Point:
        """The jobs of one combination.

        Args:
            values: one value for each axis.
            prefix: of the names of its own runs.
            more: further settings of its policy and evaluation.
        """
        configs = {stage: self._config(stage, values, more) for stage in self._study.stages}
        require_roles(self._trainer, configs[self._trainer], configs["evaluate"])
        folders = {
            config.output_dir: self._name(stage, values, prefix)
            for stage, config in configs.items()
        }
        if len(folders) < len(configs):
            raise InputError(
                "configs: wanted an output_dir for each stage, got the same for two of "
                f"{', '.join(f'{s}: {c.output_dir}' for s, c in configs.items())}"
            )
        whole = {old: f"{self._study.output_dir}/{name}" for old, name in folders.items()}
        jobs = self._inputs()
        for stage, config in configs.items():
            needs = tuple(folders[old] for old in _read_by(config, folders))
            job = Job(folders[config.output_dir], stage, _moved(config, whole), needs)
            jobs.append(job)
            if stage == "evaluate":
                jobs.insert(-2, self._baseline(job, jobs, values, prefix))
        return Point(self._name(self._trainer, values, prefix), values, tuple(jobs))

    def _inputs(self) -> list[Job]:
        inputs = self._study.inputs
        if inputs is None:
            return []
        config = InputsRun(inputs.function, inputs.arguments, self._study.output_dir)
        return [Job("inputs", "inputs", config)]

    def _baseline(self, job: Job, jobs: Sequence[Job], values: Values, prefix: str) -> Job:
        """The evaluation of π_ref on the same prompts, the same job at many points."""
        above = [one for one in jobs if one.name in job.needs and one.stage != self._trainer]
        axes = {axis for one in above for axis in self._reach.get(one.stage, ())}
        axes |= {axis for axis in self._axes if self._changes(axis, "evaluate", _of_reference)}
        parts = self._parts("evaluate", values, axes)
        name = "-".join(["evaluate", *([prefix] if prefix else []), "reference", *parts])
        folder = f"{self._study.output_dir}/{name}"
        config = dataclasses.replace(_of_reference(job.config), output_dir=folder)
        return Job(name, "evaluate", config, tuple(one.name for one in above))

    def _config(self, stage: str, values: Values, more: Sequence[str] = ()) -> Any:
        reaching = [axis for axis in values if self._may_reach(axis, stage)]
        own = [argument(axis, values[axis], self._trainer) for axis in reaching]
        return self._load(stage, (*own, *(more if self._is_own(stage) else ())))

    def _load_stage(self, stage: str, arguments: tuple[str, ...]) -> Any:
        return load_with(self._settings[stage], arguments)

    def _may_set(self, stage: str) -> list[Any]:
        """What the grid, and the second look, may set in a stage beside the study's settings."""
        axes = [v for axis, v in self._axes.items() if self._stage_of(axis) in (stage, SHARED)]
        best = self._study.best
        return axes + [text for text in (best.settings if best else ()) if text.startswith(stage)]

    def _require_read(self) -> None:
        """Raises InputError for an axis that no stage can read: its runs would be one run."""
        for axis in self._axes:
            if not any(self._may_reach(axis, stage) for stage in self._study.stages):
                raise InputError(
                    f"grid: {axis}: wanted a setting of a stage of this study, or one of shared "
                    f"that a field reads as ${{{axis}}}, got one that nothing reads. Fix: correct "
                    "the name, or add the file of configs that reads it."
                )

    def _stage_of(self, axis: str) -> str:
        return stage_of(axis, self._trainer)

    def _may_reach(self, axis: str, stage: str) -> bool:
        """Whether it can change anything there: a grid has many points, and few need a config of
        their own.
        """
        if self._stage_of(axis) == SHARED:
            return any(is_related(axis, read) for read in self._reads[stage])
        return self._stage_of(axis) == stage

    def _is_own(self, stage: str) -> bool:
        """Whether a second look has a run of its own of it."""
        return stage in (self._trainer, "evaluate")

    def _find_reach(self) -> dict[str, list[str]]:
        """The axes that reach each stage: its own, and those of the stages that it reads."""
        stages, first = self._study.stages, self._values[0]
        outputs = {self._config(stage, first).output_dir: stage for stage in stages}
        reach: dict[str, list[str]] = {}
        for stage in stages:
            own = {axis for axis in self._axes if self._changes(axis, stage)}
            above = [outputs[old] for old in _read_by(self._config(stage, first), outputs)]
            own |= {axis for other in above for axis in reach.get(other, ())}
            reach[stage] = [axis for axis in self._axes if axis in own]
        return reach

    def _changes(
        self, axis: str, stage: str, view: Callable[[Any], Any] = lambda config: config
    ) -> bool:
        """Whether the values of an axis give a stage different configs, looked at by `view`."""
        if self._stage_of(axis) != SHARED or not self._may_reach(axis, stage):
            return self._stage_of(axis) == stage
        by_value = {json.dumps(values[axis]): values for values in self._values}
        found = {repr(view(self._config(stage, v))) for v in by_value.values()}
        return len(found) > 1

    def _name(self, stage: str, values: Values, prefix: str) -> str:
        parts = self._parts(stage, values, self._reach[stage])
        own = [prefix] if prefix and self._is_own(stage) else []
        if own and SEED not in self._varying:  # a second look has seeds of its own
            parts.append(part(SEED, values[SEED], stage, self._trainer))
        head = [] if stage == self._trainer and (parts or own) else [stage]
        return "-".join([*head, *own, *parts])

    def _parts(self, stage: str, values: Values, axes: Collection[str]) -> list[str]:
        """What a name says of the settings that vary, e.g. `beta_0.3`."""
        found = [axis for axis in self._varying if axis in axes]
        return [part(axis, values[axis], stage, self._trainer) for axis in found]


def _of_reference(config: Any) -> Any:
    """An evaluation as one of its π_ref, folder aside."""
    return dataclasses.replace(config, model=config.reference, output_dir="reference")


def _identity(config: Any) -> str:
    """What tells a run of a study from others of its group."""
    return f"{config.loss.name}, β={config.loss.beta}, seed={config.seed}"


def _read_by(config: Any, folders: Mapping[str, Any]) -> list[str]:
    """The folders of stages that a config reads."""
    paths = [
        v for n, v in leaves(dataclasses.asdict(config)) if isinstance(v, str) and n != "output_dir"
    ]
    return [
        old for old in folders if any(path == old or path.startswith(f"{old}/") for path in paths)
    ]


def _moved(value: Any, folders: Mapping[str, str]) -> Any:
    """A config that reads and writes other folders, old ones by new ones."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(
            value, **{name: _moved(getattr(value, name), folders) for name in names}
        )
    if isinstance(value, dict):
        return {key: _moved(child, folders) for key, child in value.items()}
    if isinstance(value, list):
        return [_moved(child, folders) for child in value]
    if isinstance(value, str) and not isinstance(value, EnvironmentText):
        for old, new in folders.items():
            if value == old or value.startswith(f"{old}/"):
                return new + value[len(old) :]
    return value


def _require_told_apart(points: Sequence[Point]) -> None:
    """Raises InputError where loss, β or seed changes with another setting than its own: what is
    over β, or over seeds, would be one run a group.
    """
    owners = {SEED: (SEED,), BETA: (BETA, *LOSSES), "loss.name": LOSSES}
    for axis in points[0].values:
        firsts: dict[str, dict[str, Any]] = {}
        for point in points:
            rest = json.dumps({one: v for one, v in point.values.items() if one != axis})
            config = point.policy.config
            found = {SEED: config.seed, BETA: config.loss.beta, "loss.name": config.loss.name}
            first = firsts.setdefault(rest, found)
            for name, value in found.items():
                if value != first[name] and axis not in owners[name]:
                    raise InputError(
                        f"grid: {axis}: wanted a setting that leaves {name} as it is, got {name} = "
                        f"{first[name]} and {value} by it. Fix: give the values to {name}, a "
                        "setting of the grid by itself."
                    )


def _require_distinct(points: Sequence[Point]) -> None:
    """Raises InputError where two different runs would have one name."""
    configs: dict[str, Job] = {}
    for job in itertools.chain.from_iterable(point.jobs for point in points):
        other = configs.setdefault(job.name, job)
        if other.config != job.config:
            raise InputError(
                f"grid: two runs would be called {job.name}. Fix: values that differ in their "
                "letters and digits."
            )


def jobs_of(points: Sequence[Point]) -> Iterator[Job]:
    """Each job once, in the order in which they are run."""
    yield from {job.name: job for point in points for job in point.jobs}.values()
