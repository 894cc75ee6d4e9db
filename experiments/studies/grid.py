"""The runs that the grid of a study asks for.

1. A grid has an axis for each setting that varies. `expand` gives every combination, a `Values`.
2. `Grid.point` turns one into the `Job`s of its stages. A stage that a setting does not reach is
   the same job at all points and runs once; which settings reach a stage follows from whose
   setting it is, and from the folders that the stage reads.
3. A job's folder is named after the settings that reach it.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from copg_jax.config.load import load_config
from copg_jax.config.schema import EnvironmentText, leaves
from copg_jax.config.settings import SHARED
from copg_jax.config.stages import STAGES
from copg_jax.errors import InputError
from experiments.studies.study_config import InputsRun, StudyConfig

Values = dict[str, Any]
"""One value for each axis of the grid."""

BETA, SEED = "loss.beta", "seed"
_LOSSES = ("loss.name", "shared.loss")  # axes whose values need no name beside them
_MOST_POINTS = 10_000


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
        return next(job for job in self.jobs if job.stage == "policy")

    @property
    def evaluation(self) -> Job:
        """The evaluation of what it trained."""
        return next(job for job in self.jobs if self.policy.name in job.needs)

    @property
    def baseline(self) -> Job:
        """The evaluation of π_ref on the same prompts."""
        return next(j for j in self.jobs if j.stage == "evaluate" and j != self.evaluation)

    @property
    def group(self) -> str:
        """What else varies than the loss, its β and the seed; runs that differ in it are not
        compared.
        """
        axes = [axis for axis in self.values if axis not in (BETA, SEED, *_LOSSES)]
        return "-".join(_part(axis, self.values[axis], "policy") for axis in axes)


def expand(grid: Mapping[str, Any]) -> list[Values]:
    """Every combination of the values of a grid, the last axis moving fastest.

    Raises:
        InputError: an axis without values, with a value twice, or by a value that no earlier axis
            has.
    """
    found: list[Values] = [{}]
    for axis, given in grid.items():
        if isinstance(given, Mapping):
            found = [{**v, axis: one} for v in found for one in _values(axis, _own(axis, given, v))]
        else:
            found = [{**v, axis: one} for v in found for one in _values(axis, given)]
        if len(found) > _MOST_POINTS:
            raise InputError(f"grid: wanted at most {_MOST_POINTS} points, got more by {axis}")
    return found


def _own(axis: str, given: Mapping[Any, Any], values: Values) -> Any:
    """The values of an axis that depend on an earlier one's value."""
    keys = {str(key): value for key, value in given.items()}
    hits = [str(value) for value in values.values() if str(value) in keys]
    if len(hits) != 1:
        raise InputError(
            f"grid: {axis}: wanted values for one value of an earlier setting, got some for "
            f"{', '.join(keys)} where the earlier settings are "
            f"{', '.join(f'{k}={v}' for k, v in values.items()) or 'none'}"
        )
    return keys[hits[0]]


def _values(axis: str, given: Any) -> list[Any]:
    values = given if isinstance(given, list) else [given]
    texts = [json.dumps(value) for value in values]
    if not values or len(set(texts)) < len(texts):
        raise InputError(f"grid: {axis}: wanted different values, got {', '.join(texts) or 'none'}")
    return values


class Grid:
    """The points of a study.

    Args:
        study: the config.

    Raises:
        InputError: a config of a stage that does not load at some point, or two runs of one name.
    """

    def __init__(self, study: StudyConfig) -> None:
        self._study = study
        self._values = expand(study.grid)
        self._stage_of = {axis: _stage_of(axis) for axis in study.grid}
        self._load = functools.cache(self._load_stage)
        self._reach = self._find_reach()
        self.points = [self.point(values) for values in self._values]
        _require_distinct(self.points)

    def best_points(self, chosen: Sequence[Values]) -> list[Point]:
        """The second look at these values, see `BestConfig`; each with all seeds."""
        best = self._study.best
        if best is None:
            return []
        points = []
        for values in chosen:
            for seed in best.seeds or self.seeds:
                own = values | ({SEED: seed} if SEED in self._study.grid else {})
                points.append(self.point(own, "best", best.settings))
        return points

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds of the policies."""
        return tuple(sorted({point.policy.config.seed for point in self.points}))

    def point(self, values: Values, prefix: str = "", more: Sequence[str] = ()) -> Point:
        """The jobs of one combination.

        Args:
            values: one value for each axis.
            prefix: of the names of its own runs.
            more: further settings of its policy and evaluation.
        """
        configs = {stage: self._config(stage, values, more) for stage in self._study.stages}
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
        return Point(self._name("policy", values, prefix), values, tuple(jobs))

    def _inputs(self) -> list[Job]:
        inputs = self._study.inputs
        if inputs is None:
            return []
        config = InputsRun(inputs.function, inputs.arguments, self._study.output_dir)
        return [Job("inputs", "inputs", config)]

    def _baseline(self, job: Job, jobs: Sequence[Job], values: Values, prefix: str) -> Job:
        """The evaluation of π_ref on the same prompts, the same job at many points."""
        if job.config.reference is None:
            raise InputError(
                "evaluate.reference: wanted the model that policies start from, for their KL and "
                "as the zero of their rewards, got null"
            )
        above = [one for one in jobs if one.name in job.needs and one.stage != "policy"]
        axes = {axis for one in above for axis in self._reach.get(one.stage, ())}
        axes |= {axis for axis in self._study.grid if self._stage_of[axis] == "evaluate"}
        parts = self._parts("evaluate", values, axes)
        name = "-".join(["evaluate", *([prefix] if prefix else []), "reference", *parts])
        config = dataclasses.replace(
            job.config,
            model=dataclasses.replace(job.config.model, path=job.config.reference.path),
            output_dir=f"{self._study.output_dir}/{name}",
        )
        return Job(name, "evaluate", config, tuple(one.name for one in above))

    def _config(self, stage: str, values: Values, more: Sequence[str] = ()) -> Any:
        own = [_argument(axis, values[axis]) for axis in values if self._may_reach(axis, stage)]
        return self._load(stage, (*own, *(more if stage in ("policy", "evaluate") else ())))

    def _load_stage(self, stage: str, arguments: tuple[str, ...]) -> Any:
        files, settings = self._study.configs, self._study.settings
        return load_config(STAGES[stage], [*files, *settings, *arguments])

    def _may_reach(self, axis: str, stage: str) -> bool:
        return self._stage_of[axis] in (stage, SHARED)

    def _find_reach(self) -> dict[str, list[str]]:
        """The axes that reach each stage: its own, and those of the stages that it reads."""
        stages, first = self._study.stages, self._values[0]
        outputs = {self._config(stage, first).output_dir: stage for stage in stages}
        reach: dict[str, list[str]] = {}
        for stage in stages:
            own = {axis for axis in self._study.grid if self._changes(axis, stage)}
            above = [outputs[old] for old in _read_by(self._config(stage, first), outputs)]
            own |= {axis for other in above for axis in reach.get(other, ())}
            reach[stage] = [axis for axis in self._study.grid if axis in own]
        return reach

    def _changes(self, axis: str, stage: str) -> bool:
        """Whether the values of an axis give a stage different configs."""
        if self._stage_of[axis] != SHARED:
            return self._stage_of[axis] == stage
        by_value = {json.dumps(values[axis]): values for values in self._values}
        # Folders aside: what else differs is what the stage computes.
        found = {repr(_moved(self._config(stage, v), {})) for v in by_value.values()}
        return len(found) > 1

    def _name(self, stage: str, values: Values, prefix: str) -> str:
        parts = self._parts(stage, values, self._reach[stage])
        own = [prefix] if prefix and stage in ("policy", "evaluate") else []
        head = [] if stage == "policy" and (parts or own) else [stage]
        return "-".join([*head, *own, *parts])

    def _parts(self, stage: str, values: Values, axes: Collection[str]) -> list[str]:
        """What a name says of the settings that vary, e.g. `beta_0.3`."""
        return [
            _part(axis, values[axis], stage)
            for axis in self._study.grid
            if axis in axes and len({json.dumps(v[axis]) for v in self._values}) > 1
        ]


def _stage_of(axis: str) -> str:
    """Whose setting it is; SHARED for one that all may read."""
    top = axis.partition(".")[0]
    return top if top in STAGES or top == SHARED else "policy"


def _argument(axis: str, value: Any) -> str:
    top = axis.partition(".")[0]
    name = axis if top in STAGES or top == SHARED else f"policy.{axis}"
    return f"{name}={_as_text(value)}"


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _part(axis: str, value: Any, stage: str) -> str:
    text = f"{value:g}" if isinstance(value, float) else _as_text(value)
    text = re.sub(r"[^\w.+-]+", "_", text).strip("_")[:40]
    if axis in _LOSSES:
        return text.rpartition(".")[2]
    named = f"{axis.rpartition('.')[2]}_{text}"
    return named if _stage_of(axis) in (stage, "policy", SHARED) else f"{_stage_of(axis)}.{named}"


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
