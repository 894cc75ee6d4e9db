"""Made-up word problems of two steps, whose answers are exact.

1. A problem names a person, a thing, a number of it and two changes of that number. Its rows are
   `prompt` and `completion`, byte for byte, with the column `answer`.
2. A solution has one line a step and ends in a line of `#### ` and the answer, as GSM8K's do.
3. Solutions are written with a random mixture of mistakes (a slip, the wrong operation, a step left
   out, a guess), so that a model trained on them makes as many.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from experiments.generated.writing import Row, Task, different

PEOPLE = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lena", "Max", "Ida")
THINGS = ("pens", "books", "coins", "cards", "apples", "stamps")
GAINS = ("gets {} more", "finds {}", "buys {}")
LOSSES = ("loses {}", "sells {}", "gives {} away")

# Share of solutions with each mistake.
MISTAKES = {
    "none": 0.45,
    "slip": 0.15,
    "wrong operation": 0.15,
    "step left out": 0.1,
    "guess": 0.15,
}
COMPLETIONS = 4
"""Solutions of a problem that are compared."""
_FEWEST, _MOST = 1, 10  # of the things, at every step


class Problem(NamedTuple):
    """A number, and what is added to it, step by step; the words around them."""

    start: int
    changes: tuple[int, ...]
    prompt: str

    @property
    def answer(self) -> int:
        """What is right."""
        return self.start + sum(self.changes)


def make_problem(rng: random.Random) -> Problem:
    """Draws a problem of two steps, whose numbers stay small."""
    person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    number = start = rng.randint(2, 6)
    changes, sentences = [], [f"{person} has {start} {thing}."]
    for _ in range(2):
        change = 0
        while change == 0 or not _FEWEST <= number + change <= _MOST:
            change = rng.randint(-4, 4)
        number += change
        changes.append(change)
        words = rng.choice(GAINS if change > 0 else LOSSES).format(abs(change))
        sentences.append(f"{person} {words}.")
    sentences.append(f"How many {thing} are left?\n")
    return Problem(start, tuple(changes), " ".join(sentences))


def solution(start: int, changes: Sequence[int], slip: tuple[int, int] = (0, 0)) -> str:
    """One line a step and the answer in the last one; the step slip[0] is wrong by slip[1]."""
    lines, number = [], start
    for index, change in enumerate(changes):
        before, number = number, number + change + slip[1] * (index == slip[0])
        lines.append(f"{before} {'+' if change > 0 else '-'} {abs(change)} = {number}")
    return "\n".join([*lines, f"#### {number}"])


def make_solution(rng: random.Random, problem: Problem) -> str:
    """Draws a solution from the mixture of mistakes."""
    start, changes = problem.start, problem.changes
    wrong = rng.randrange(len(changes))
    match rng.choices(list(MISTAKES), list(MISTAKES.values()))[0]:
        case "slip":
            return solution(start, changes, (wrong, rng.choice((-2, -1, 1, 2))))
        case "wrong operation":
            flipped = [-change if i == wrong else change for i, change in enumerate(changes)]
            return solution(start, flipped)
        case "step left out":
            return solution(start, [change for i, change in enumerate(changes) if i != wrong])
        case "guess":
            return f"#### {rng.randint(_FEWEST, _MOST)}"
    return solution(start, changes)


def _examples(count: int, rng: random.Random) -> Iterator[Row]:
    for index in range(count):
        problem = make_problem(rng)
        yield {
            "id": f"e{index}",
            "prompt": problem.prompt,
            "completion": make_solution(rng, problem),
            "answer": str(problem.answer),
        }


def _comparisons(count: int, rng: random.Random) -> Iterator[Row]:
    for index in range(count):
        problem = make_problem(rng)
        yield {
            "id": f"c{index}",
            "prompt": problem.prompt,
            "completions": different(partial(make_solution, rng, problem), COMPLETIONS),
            "answer": str(problem.answer),
        }


ARITHMETIC = Task(_examples, _comparisons, lambda row: row["prompt"] + row["completion"])
