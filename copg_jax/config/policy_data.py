"""The data of a policy: one scored folder, or several sources with shares; or fresh samples, with a
scored folder beside them and perhaps an engine that draws them.
"""

from dataclasses import dataclass

from copg_jax.config.checks import require, require_path
from copg_jax.config.options import option
from copg_jax.config.sections import DataConfig
from copg_jax.errors import InputError


@dataclass(frozen=True)
class SourceSpec:
    """One of several scored folders that a policy is trained on, or a glob of such folders."""

    path: str = option(
        help="scored folder; a glob of folders, such as those of rounds, is one source"
    )
    share: float | None = option(
        None, "of the groups of training; null in all sources: each group once an epoch"
    )
    origin: int | None = option(None, "which µ its completions are from, 0 to 7; null = as stored")

    def __post_init__(self):
        require_path("path", self.path)
        require(self, "in (0, 1]", lambda share: 0 < share <= 1, "share")
        require(self, "in [0, 7]", lambda origin: 0 <= origin <= 7, "origin")


@dataclass(frozen=True)
class PolicyDataConfig(DataConfig):
    """The scored data of a policy: one folder, or several sources."""

    path: str | None = option(  # pyright: ignore[reportIncompatibleVariableOverride]
        help="scored folder; null where there are sources"
    )
    sources: list[SourceSpec] = option([], "several scored sources in place of path")

    def _check_place(self) -> None:
        if (self.path is None) == (not self.sources):
            raise InputError(
                "path: wanted a scored folder, or sources and no path, got "
                + (f"path={self.path} and sources: set data.path=null" if self.path else "neither")
            )
        if self.path is not None:
            require_path("path", self.path)
        if self.sources and self.combine == "standardized_sum":
            raise InputError(
                "combine: wanted sum or min with sources, got standardized_sum: means and standard "
                "deviations of each folder alone would weigh the same reward differently from "
                "folder to folder. Fix: combine=sum with weights w/s, from the log of "
                "standardized_sum on one folder or the table that experiments.score prints"
            )
        shares = [source.share for source in self.sources if source.share is not None]
        if shares and (len(shares) < len(self.sources) or abs(sum(shares) - 1) > 1e-6):
            raise InputError(
                "sources: wanted shares that sum to 1, one for each source or none at all, got "
                f"{[source.share for source in self.sources]}"
            )


@dataclass(frozen=True)
class OfflineConfig(DataConfig):
    """Scored data beside fresh samples: µ2, whose completions have origin 1; samples have 0."""

    path: str = option(help="scored folder, of the same reference")
    share: float | None = option(
        None, "of the groups of every batch; null with loss.pairs=cross, where prompts are joined"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "in (0, 1)", lambda share: 0 < share < 1, "share")


@dataclass(frozen=True)
class GeneratorConfig:
    """An engine that draws the samples of each round in place of our sampler."""

    command: list[str] = option(
        help="what is run, as a list; behind it come the policy's Hugging Face folder, the file of "
        "prompts and the file to write. {seed} in it is a number of the round"
    )
    timeout_sec: float | None = option(None, "longest time of one call; null = any")

    def __post_init__(self) -> None:
        require(self, "a program and its arguments", lambda command: len(command) > 0, "command")
        require(self, "> 0", lambda seconds: seconds > 0, "timeout_sec")
