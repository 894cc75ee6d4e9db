"""What the runs of one process have in common, made once: for studies, which do many runs.

Inside of `shared_by_runs` a second run finds the compiled functions, data sets and frozen models of
the first. Outside of it nothing is kept. No number depends on it, so it is not among the arguments
that every stage passes on.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class _Shared:
    """What is there, by its kind and by what it is made of."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(seeds)
        self.found: dict[str, dict[Hashable, Any]] = {}


_shared: _Shared | None = None


@contextmanager
def shared_by_runs(seeds: Sequence[int] = ()) -> Iterator[None]:
    """In the body, runs of this process share what `once` makes.

    Args:
        seeds: of all runs. Batches get a shape that fits the orders of all of them, so that their
            steps share one compilation, and a run has the same shape in whichever process.
    """
    global _shared
    before, _shared = _shared, _Shared(seeds)
    try:
        yield
    finally:
        _shared = before


def once(kind: str, key: Hashable, make: Callable[[], T], *, only_newest: bool = False) -> T:
    """What `make` returns; inside of `shared_by_runs`, what it returned for this key before.

    Args:
        kind: what it is.
        key: all that it is made of.
        make: makes it.
        only_newest: forget others of this kind, as they hold a model's weights.
    """
    if _shared is None:
        return make()
    found = _shared.found.setdefault(kind, {})
    if key not in found:
        if only_newest:
            found.clear()  # before the next is made: there may be no room for both
        found[key] = make()
    return found[key]


def seeds_of_runs() -> tuple[int, ...]:
    """The seeds that runs of this process share a shape of batches for; none outside of a study."""
    return () if _shared is None else _shared.seeds
