"""Reward functions that a case names, each bad in its own way."""

import asyncio
from decimal import Decimal
from typing import Any


class Unspeakable(Exception):
    """An exception without a text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def nan(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A number that is none."""
    return [float("nan")] * len(completions)


def stops(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Ends an iteration that is not its own."""
    return [next(iter([])) for _ in completions]


def takes_all_memory(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Asks for more memory than there is."""
    raise MemoryError


def goes_round(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Calls itself for ever."""
    return goes_round(prompts, completions, **columns)


def says_nothing(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Raises what cannot be printed."""
    raise Unspeakable


def asserts(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Claims what does not hold."""
    assert not completions
    return []


def leaves(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Ends the process as if all were well."""
    raise SystemExit(0)


def is_cancelled(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Raises what is no Exception."""
    raise asyncio.CancelledError


async def is_awaited(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Has to be awaited."""
    return [0.0] * len(completions)


def exact(prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
    """Gives numbers of another sort."""
    return [Decimal("0.5")] * len(completions)


def huge(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Gives numbers whose double is none in float32."""
    return [3e38] * len(completions)


def none_at_all(prompts: list[str], completions: list[str], **columns: Any) -> list[None]:
    """Gives no reward to any."""
    return [None] * len(completions)


def without_columns(prompts: list[str], completions: list[str]) -> list[float]:
    """Takes no columns."""
    return [0.0] * len(completions)


def of_one_text(text: str) -> float:
    """Takes one text at a time."""
    return float(len(text))


def five(**arguments: Any) -> int:
    """A factory of something else."""
    return 5


def nothing(**arguments: Any) -> None:
    """A factory that forgets to return."""


def nested(**arguments: Any) -> Any:
    """A factory of functions that take something else."""
    return of_one_text


def fails(**arguments: Any) -> Any:
    """A factory that fails."""
    raise KeyError("no such judge")


def ends(**arguments: Any) -> Any:
    """A factory that ends the process as if all were well."""
    raise SystemExit(0)


class Judge:
    """An object whose method takes a name that a column may have."""

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)


judge = Judge()
NOT_CALLABLE = 3
