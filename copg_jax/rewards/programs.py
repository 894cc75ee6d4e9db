"""Programs as completions: `unit_tests` runs them with the tests of their row.

The limits catch what goes wrong in programs that a model writes: endless loops, forks, floods of
memory, files and output, an early exit. They are **not a security boundary**: a program that is
meant to do harm may get out. Run what you do not trust on a machine that you can lose.
"""

import ast
import functools
import json
import logging
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from copg_jax.data.formats.texts import Text, content
from copg_jax.errors import InputError
from copg_jax.rewards.protocol import Missing, RewardFn, reading

log = logging.getLogger(__name__)

_RUNNER = Path(__file__).with_name("program_runner.py")
# Namespaces of its own: no network, no other process in sight, and all of them end with the first.
_ISOLATE = "unshare --user --map-root-user --net --mount --pid --fork --kill-child"
_MAX_REPORT = 1 << 20  # bytes; what is more is no report
_FENCE = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.M | re.S)
_PYTHON = ("", "py", "python", "python3")  # what a block of it says behind its fence
_DEFINES = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom),
    *(ast.Assign, ast.AnnAssign),
)


class ProgramLimits(NamedTuple):
    """What a program may use, its tests included."""

    cpu_sec: int = 4
    wall_sec: int = 20
    memory_mb: int = 1024  # address space, MiB
    folder_mb: int = 16  # largest file, MiB; where there are namespaces, all files together
    num_threads: int = 64  # threads; counted where there are namespaces


class Outcome(NamedTuple):
    """What became of a program: the tests that passed, by index, and how it ended."""

    passed: frozenset[int]
    ended: str  # "whole", "killed" or "timeout"


def unit_tests(
    column: str,
    *,
    strip_fence: bool = False,
    with_prompt: bool = False,
    all_or_nothing: bool = False,
    **limits: int,
) -> RewardFn:
    """Makes the reward *share of the row's tests that the completion passes*, in [0, 1].

    As in Chen et al. 2021, "Evaluating Large Language Models Trained on Code": a completion is
    right if it does what its tests ask. Each one runs with its tests in a process of its own
    (`python -I`), in a folder that is removed afterwards. A test passes if it runs to its end; one
    that raises, that exits, or that a limit ends does not, nor do those behind it that it keeps
    from running. Only a program that waits until `wall_sec` is over has no reward (`timeout`),
    since that may be the machine's fault. So has a row without tests (`no_tests`). A security
    boundary this is not.

    Args:
        column: of the tests: a list of Python texts, one a test, such as `assert add(1, 2) == 3`,
            or one text.
        strip_fence: the program is the last fenced block of the completion, where it has one.
        with_prompt: the program is the prompt with the completion behind it.
        all_or_nothing: 1 if all tests pass, else 0.
        limits: fields of `ProgramLimits`.

    Raises:
        InputError: limits that there are not, or that are no whole number of at least 1.
    """
    chosen = _limits(limits)

    def score(
        prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | Missing]:
        tests = map(_tests, columns[column])
        rewards: list[float | Missing] = []
        for prompt, completion, own in zip(prompts, completions, tests, strict=True):
            program = content(completion)
            program = last_fenced(program) if strip_fence else program
            program = content(prompt) + program if with_prompt else program
            if not own:
                rewards.append(Missing("no_tests"))
                continue
            outcome = run_tests(program, own, chosen)
            share = len(outcome.passed) / len(own)
            share = float(share == 1) if all_or_nothing else share
            rewards.append(Missing("timeout") if outcome.ended == "timeout" else share)
        return rewards

    return reading(column, score, _tests)


def _limits(given: dict[str, int]) -> ProgramLimits:
    for name, value in given.items():
        if name not in ProgramLimits._fields:
            wanted = ", ".join(ProgramLimits._fields)
            raise InputError(f"{name}: no limit of programs; wanted one of {wanted}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name}: wanted a whole number of at least 1, got {value!r:.80}")
    return ProgramLimits(**given)


def last_fenced(text: str) -> str:
    """The content of the last fenced block of Python, or the text where it has none."""
    named = [(info.split() or [""], block) for info, block in _FENCE.findall(text)]
    fenced = [block for (language, *_), block in named if language.lower() in _PYTHON]
    return fenced[-1] if fenced else text


def _tests(value: Any) -> list[str]:
    """The tests of a row; none where it has null.

    Raises:
        InputError: what is no Python, or what tests nothing.
    """
    tests = [] if value is None else [value] if isinstance(value, str) else value
    wanted = "wanted a text of Python, or a list of such texts"
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise InputError(f"{wanted}, got {value!r:.80} ({type(value).__name__})")
    for number, test in enumerate(tests):
        if (fault := _fault_of_test(test)) is not None:
            raise InputError(f"{wanted}; test {number} {fault}: {test!r:.80}")
    return tests


@functools.cache
def _fault_of_test(test: str) -> str | None:
    """What is wrong with a test; None if nothing is."""
    try:
        with warnings.catch_warnings(action="ignore"):
            body = ast.parse(test).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"is no Python ({error})"
    return "tests nothing" if all(map(_only_defines, body)) else None


def _only_defines(node: ast.stmt) -> bool:
    """Whether a statement can hardly fail: a definition, an import, a name, a docstring."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_text or isinstance(node, _DEFINES)


def run_tests(program: str, tests: Sequence[str], limits: ProgramLimits) -> Outcome:
    """Runs a program, and then its tests one after the other, in a process of its own.

    Args:
        program: Python.
        tests: Python; each sees the program's names.
        limits: what it may use.
    """
    return _run(program, tests, limits, _isolation())


@functools.cache
def _isolation() -> tuple[str, ...]:
    """What starts a process in namespaces of its own; nothing where this machine cannot."""
    start = tuple(_ISOLATE.split())
    if sys.platform == "linux" and _run("", [""], ProgramLimits(), start).ended == "whole":
        return start
    log.warning(
        "programs run without namespaces, which this machine does not allow: they are stopped by "
        "their limits, and from using the network by Python alone"
    )
    return ()


def _run(
    program: str, tests: Sequence[str], limits: ProgramLimits, isolation: tuple[str, ...]
) -> Outcome:
    secret = secrets.token_hex(16)
    task = limits._asdict() | {"program": program, "tests": list(tests), "secret": secret}
    line = json.dumps(task | {"is_isolated": bool(isolation)}).encode() + b"\n"
    with tempfile.TemporaryDirectory(prefix="copg-", ignore_cleanup_errors=True) as folder:
        report, write_end = os.pipe()
        try:
            process = subprocess.Popen(
                [*isolation, sys.executable, "-I", str(_RUNNER), str(write_end)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=_environment(folder),
                pass_fds=(write_end,),
                start_new_session=True,
            )
        except OSError:  # no such program as unshare
            os.close(report)
            return Outcome(frozenset(), "killed")
        finally:
            os.close(write_end)
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
            lines, is_late = _read(report, f"{secret} end", time.monotonic() + limits.wall_sec)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()
            os.close(report)
    names = {f"{secret} {index}": index for index in range(len(tests))}
    passed = frozenset(names[line] for line in lines if line in names)
    is_whole = f"{secret} end" in lines
    return Outcome(passed, "whole" if is_whole else "timeout" if is_late else "killed")


def _environment(folder: str) -> dict[str, str]:
    """Nothing of the run's own, such as tokens; one thread for NumPy, whose pool is large."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.environ.get("PATH", os.defpath)
    return threads | {"PATH": path, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}


def _read(pipe: int, last: str, deadline: float) -> tuple[list[str], bool]:
    """The lines of a report up to the last one or its end, and whether it was late."""
    report = b""
    while len(report) < _MAX_REPORT and not report.endswith(f"{last}\n".encode()):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            return report.decode(errors="replace").split("\n"), True
        if not (piece := os.read(pipe, 1 << 16)):
            break
        report += piece
    return report.decode(errors="replace").split("\n"), False
