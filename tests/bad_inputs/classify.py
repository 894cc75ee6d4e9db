"""Counts how the cases of the matrix end: `python -m tests.bad_inputs.classify [SECTION ...]`.

| outcome | meaning |
|---|---|
| named | an InputError with the file, line or field at fault |
| misnamed | an InputError without it |
| traceback | another exception, or the process dies |
| accepted | the input is taken as if it were good |
| hang | nothing in a minute |

Cases run in a process of their own, which is started again where one hangs.
"""

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import tests.conftest  # noqa: F401  (sets the environment of tests)
from copg_jax.errors import InputError
from tests.bad_inputs.ground import Case, Ground
from tests.bad_inputs.table import SECTIONS

TIMEOUT_SEC = 60.0
DIED = "the process died"
CASES = [(section, case) for section, cases in SECTIONS.items() for case in cases]


def outcome(case: Case, ground: Ground, here: Path) -> tuple[str, str]:
    """How a case ends, and the text that says so."""
    try:
        case.act(ground, here)
    except InputError as error:
        text = str(error)
        missing = [word for word in case.words if word.replace("HERE", str(here)) not in text]
        return ("misnamed", f"without {missing}: {text}") if missing else ("named", text)
    except SystemExit as error:
        return "accepted" if error.code in (0, None) else "traceback", repr(error)
    except BaseException as error:  # what is counted
        return "traceback", "".join(traceback.format_exception_only(error))
    return "accepted", ""


def work(pipe: Connection, folder: Path) -> None:
    """Answers each number of a case with its outcome, in a process of its own."""
    with open(os.devnull, "w") as nowhere:  # what stages print
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere.fileno(), stream.fileno())
    ground = Ground(folder / "ground")
    pipe.send(None)
    while (number := pipe.recv()) is not None:
        here = folder / str(number)
        here.mkdir()
        pipe.send(outcome(CASES[number][1], ground, here))


def outcomes(numbers: list[int], folder: Path) -> Iterator[tuple[int, str, str]]:
    """Yields number, outcome and text of cases; ends with the first that hangs or kills."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=work, args=(theirs, folder))
    process.start()
    theirs.close()
    try:
        ours.recv()
        for number in numbers:
            ours.send(number)
            try:
                how, text = ours.recv() if ours.poll(TIMEOUT_SEC) else ("hang", "")
            except EOFError:
                how, text = "traceback", DIED
            yield number, how, text
            if how == "hang" or text == DIED:
                return
        ours.send(None)
        process.join()
    finally:
        process.kill()


def main(sections: list[str]) -> None:
    """Prints the outcome of every case of some sections (all without any), and the counts."""
    left = [i for i, (section, _) in enumerate(CASES) if not sections or section in sections]
    counts: Counter[str] = Counter()
    while left:
        with tempfile.TemporaryDirectory() as folder:
            for number, how, text in outcomes(list(left), Path(folder)):
                section, case = CASES[number]
                counts[how] += 1
                left.remove(number)
                short = " ".join(text.replace(f"{folder}/{number}", "HERE").split())[:160]
                print(f"{how:9} | {section}: {case.name} | {short}", flush=True)
    print(f"{counts.total()} cases: " + ", ".join(f"{n} {how}" for how, n in counts.most_common()))


if __name__ == "__main__":
    main(sys.argv[1:])
