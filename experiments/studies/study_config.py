"""The config of a study."""

from dataclasses import dataclass
from typing import Any

from copg_jax.config.checks import require_path
from copg_jax.config.options import option
from copg_jax.config.stages import STAGES
from copg_jax.errors import InputError

TRAINERS = ("policy", "online")
"""The stages that make a policy, of which a study has one."""
FIGURES = ("curves", "beta", "best", "frontier", "held_out", "named", "residual")


@dataclass(frozen=True)
class InputsConfig:
    """What makes the data or models of a study, before its first stage."""

    function: str = option(help="dotted path of a function of a folder and of the arguments")
    arguments: dict[str, Any] = option({}, "what it is called with besides")


@dataclass(frozen=True)
class InputsRun(InputsConfig):
    """The same with the folder of the study."""

    output_dir: str = option(help="folder that the function gets")


@dataclass(frozen=True)
class BestConfig:
    """A second look at the best β of each method (paper: Fig. 6)."""

    settings: list[str] = option([], "further key=value, of training and evaluate, for these runs")
    seeds: list[int] = option([], "seeds of these runs; none = those of the grid")

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds: wanted different ones, got {self.seeds}: a run once")


@dataclass(frozen=True)
class StudyConfig:
    """Runs over a grid of settings, and what is drawn of them."""

    output_dir: str = option(help="folder of the study: a folder for each run, and figures/")
    configs: list[str] = option([], "YAML files of the stages, from left to right")
    settings: list[str] = option([], "key=value of all runs, as on the command line of a stage")
    stages: list[str] = option(
        [stage for stage in STAGES if stage not in ("sample", "online")],
        "stages to run, in their order",
    )
    inputs: InputsConfig | None = option(None, "what is made before the stages; null = nothing")
    grid: dict[str, Any] = option(
        {},
        "setting -> its values, or value of an earlier setting -> values there; a setting of no "
        "stage is one of policy, or of online where that is the stage that trains",
    )
    best: BestConfig | None = option(None, "runs at the best beta of each method; null = none")
    figures: list[str] = option(list(FIGURES), f"what to draw: {', '.join(FIGURES)}")

    def __post_init__(self) -> None:
        require_path("output_dir", self.output_dir)
        for name, known in (("stages", tuple(STAGES)), ("figures", FIGURES)):
            found = getattr(self, name)
            ordered = [one for one in known if one in found]
            if sorted(found) != sorted(ordered) or (name == "stages" and found != ordered):
                raise InputError(
                    f"{name}: wanted some of {', '.join(known)}, each once"
                    f"{' and in this order' * (name == 'stages')}, got {', '.join(found)}"
                )
        trainers = [stage for stage in TRAINERS if stage in self.stages]
        if len(trainers) != 1 or "evaluate" not in self.stages:
            raise InputError(
                f"stages: wanted evaluate and one of {' and '.join(TRAINERS)} among them, got "
                f"{', '.join(self.stages)}"
            )
        if not self.grid:
            raise InputError("grid: wanted at least one setting with its values, got none")

    @property
    def trainer(self) -> str:
        """The stage that makes a policy."""
        return next(stage for stage in TRAINERS if stage in self.stages)
