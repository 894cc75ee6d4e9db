"""The section of a reward function: which one, how it is called, and its share in the total."""

import re
from dataclasses import dataclass
from typing import Any

from copg_jax.config.checks import (
    require,
    require_path,
    require_positive,
    require_size,
)
from copg_jax.config.options import option
from copg_jax.errors import InputError


@dataclass(frozen=True)
class OverlongPenalty:
    """What a long completion costs: `penalty`·min(1, max(0, n − `max_tokens` + `buffer_tokens`) /
    `buffer_tokens`) for n tokens, as in DAPO (arXiv 2503.14476, Eq. 13).
    """

    max_tokens: int = option(
        help="a completion of more tokens, end token included, costs all of it"
    )
    buffer_tokens: int = option(0, "it begins so many tokens before, and grows linearly")
    penalty: float = option(1.0, "what is taken off the reward at most")

    def __post_init__(self):
        require_positive(self, "max_tokens")
        require(self, ">= 0", lambda number: number >= 0, "buffer_tokens", "penalty")
        require(self, "<= max_tokens", lambda size: size <= self.max_tokens, "buffer_tokens")


_REWARD_NAME = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)


@dataclass(frozen=True)
class RewardSpec:
    """One reward function and its share in the total."""

    function: str = option(help="dotted path of the function, e.g. copg_jax.rewards.rouge_l")
    arguments: dict[str, Any] = option(
        {}, "if given, the path names a factory that is called with these and returns the function"
    )
    weight: float = option(
        1.0, "factor of this reward in the sum; 0 = it is stored and logged, and decides nothing"
    )
    name: str | None = option(
        None, "by which it is stored and logged; null = the last part of `function`"
    )
    clip: list[float] | None = option(
        None, "[lo, hi]: values outside are set to the nearer; null = none"
    )
    overlong: OverlongPenalty | None = option(
        None, "what a long completion costs, after clipping; null = nothing"
    )
    num_workers: int = option(
        0, "processes that call the function; 0 = the run's own, where nothing can stop it"
    )
    timeout_sec: float | None = option(
        None, "longest time for a completion in a worker; then it is dropped and counted"
    )
    batch_size: int | None = option(
        None, "completions that a call gets; null = all of them, in a worker 1"
    )

    def __post_init__(self):
        if isinstance(path := self.arguments.get("path"), str):
            require_path("arguments: path", path)
        require(self, "in [0, 1024]", lambda count: 0 <= count <= 1024, "num_workers")
        require(self, "> 0", lambda seconds: seconds > 0, "timeout_sec")
        require_size(self, "batch_size")
        if self.timeout_sec is not None and not self.num_workers:
            raise InputError(
                f"timeout_sec is {self.timeout_sec:g} but num_workers is 0: nothing can stop a "
                "function in the run's own process. Set num_workers to 1 or more."
            )
        wanted = "made of letters, digits, _ and -, the first no digit or -"
        require(self, wanted, lambda name: _REWARD_NAME.fullmatch(name) is not None, "name")
        wanted = "two numbers [lo, hi], lo < hi"
        require(self, wanted, lambda clip: len(clip) == 2 and clip[0] < clip[1], "clip")

    @property
    def label(self) -> str:
        """The name by which it is stored and logged."""
        return self.name or self.function.rpartition(".")[2]
