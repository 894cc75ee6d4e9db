"""Made-up programming tasks: functions of two steps, with unit tests.

1. A specification names a function and says in words what it does to its argument. Its rows are
   `prompt` and `completion`, byte for byte, with the column `tests`, a list of assertions.
2. A program is a whole function, one line a step.
3. Programs are written with a random mixture of bugs (another operator or number, a step left out,
   the steps swapped, no `return`, no indentation), so that a model trained on them makes as many.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from experiments.generated.writing import Row, Task, different

NAMES = (
    "change",
    "convert",
    "compute",
    "solve",
    "step",
    "score",
    "apply",
    "shift",
    "work",
    "count",
)
OPERATORS = {
    "adds {}": "+",
    "subtracts {}": "-",
    "multiplies by {}": "*",
    "takes the remainder by {}": "%",
}

# Share of programs with each bug.
BUGS = {
    "none": 0.4,
    "operator": 0.14,
    "number": 0.14,
    "step left out": 0.08,
    "swapped": 0.08,
    "no return": 0.08,
    "no indentation": 0.08,
}
COMPLETIONS = 2
"""Programs of a specification that are compared."""
MOST = 9  # of the numbers
_ARGUMENTS = (0, 1, 5, 12)  # of the tests


class Step(NamedTuple):
    """One operation with a number."""

    words: str
    operator: str
    number: int

    @property
    def line(self) -> str:
        """The step as a line of a program."""
        return f"x = x {self.operator} {self.number}"


class Specification(NamedTuple):
    """A function in words."""

    name: str
    steps: tuple[Step, ...]

    @property
    def prompt(self) -> str:
        """What is asked for."""
        what = ", then ".join(step.words.format(step.number) for step in self.steps)
        return f"Write a function {self.name}(x) that {what}.\n"

    @property
    def tests(self) -> list[str]:
        """Assertions that hold for a right program."""
        return [f"assert {self.name}({x}) == {self.value(x)}" for x in _ARGUMENTS]

    def value(self, x: int) -> int:
        """What a right program returns."""
        for step in self.steps:
            match step.operator:
                case "+":
                    x = x + step.number
                case "-":
                    x = x - step.number
                case "*":
                    x = x * step.number
                case "%":
                    x = x % step.number
        return x


def make_step(rng: random.Random) -> Step:
    """Draws an operation."""
    words, operator = rng.choice(list(OPERATORS.items()))
    return Step(words, operator, rng.randint(2, MOST))


def make_specification(rng: random.Random) -> Specification:
    """Draws a function of two steps whose operators differ."""
    first = second = make_step(rng)
    while second.operator == first.operator:
        second = make_step(rng)
    return Specification(rng.choice(NAMES), (first, second))


def program(name: str, lines: Sequence[str], indentation: str = "    ") -> str:
    """A function of these lines."""
    return "\n".join([f"def {name}(x):", *(f"{indentation}{line}" for line in lines)])


def make_program(rng: random.Random, specification: Specification) -> str:
    """Draws a program from the mixture of bugs."""
    name, steps = specification.name, list(specification.steps)
    at, indentation, last = rng.randrange(len(steps)), "    ", ["return x"]
    match rng.choices(list(BUGS), list(BUGS.values()))[0]:
        case "operator":
            others = [sign for sign in OPERATORS.values() if sign != steps[at].operator]
            steps[at] = steps[at]._replace(operator=rng.choice(others))
        case "number":
            others = [n for n in range(2, MOST + 1) if n != steps[at].number]
            steps[at] = steps[at]._replace(number=rng.choice(others))
        case "step left out":
            del steps[at]
        case "swapped":
            steps.reverse()
        case "no return":
            last = []
        case "no indentation":
            indentation = ""
    return program(name, [*(step.line for step in steps), *last], indentation)


def _examples(count: int, rng: random.Random) -> Iterator[Row]:
    for index in range(count):
        specification = make_specification(rng)
        yield {
            "id": f"e{index}",
            "prompt": specification.prompt,
            "completion": make_program(rng, specification),
            "tests": specification.tests,
        }


def _comparisons(count: int, rng: random.Random) -> Iterator[Row]:
    for index in range(count):
        specification = make_specification(rng)
        yield {
            "id": f"c{index}",
            "prompt": specification.prompt,
            "completions": different(partial(make_program, rng, specification), COMPLETIONS),
            "tests": specification.tests,
        }


CODE = Task(_examples, _comparisons, lambda row: row["prompt"] + row["completion"])
