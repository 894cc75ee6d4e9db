"""`unit_tests`: what passes, what does not, and that no program gets beyond its limits."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from copg_jax.errors import InputError
from copg_jax.rewards import Missing, programs, unit_tests
from copg_jax.rewards.protocol import score_texts
from tests.toys import names_all

TESTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
GOOD = "def add(a, b):\n    return a + b\n"


def share(program: Any, tests: Any = TESTS, prompt: Any = "p", **arguments: Any) -> Any:
    """The reward of one completion."""
    (reward,) = unit_tests("tests", **arguments)([prompt], [program], tests=[tests], other=[1])
    return reward


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        (GOOD, 1.0),
        ("def add(a, b):\n    return 0\n", 0.5),
        ("def add(a, b):\n    return 3\n", 0.5),
        ("def add(a, b:\n", 0.0),
        ("", 0.0),
        ("1 / 0\n" + GOOD, 0.0),
        (GOOD + "if __name__ == '__main__':\n    1 / 0\n", 1.0),
        ("print(input())\n" + GOOD, 0.0),
        ([{"role": "assistant", "content": GOOD}], 1.0),
    ],
)
def test_the_reward_is_the_share_of_tests_that_run_to_their_end(program, wanted):
    assert share(program) == wanted
    assert share(program, all_or_nothing=True) == float(wanted == 1)


def test_a_test_sees_the_program_s_names_and_not_those_of_another_test():
    tests = [
        "x = add(1, 1)\nassert x == 2",
        "assert 'x' not in globals()",
        "def add(*_): ...\nadd()",
    ]
    assert share(GOOD, [*tests, "assert add(1, 2) == 3"]) == 1.0
    assert share(GOOD, "assert add(1, 2) == 3") == 1.0


OTHERS = (
    f"```Python\n{GOOD}```\nRun it:\n```bash\npython a.py\n```\n```json\n{{}}\n```\nThat is all.\n"
)
FENCED = f"Let me think.\n```python\nadd = None\n```\nBetter:\n```python\n{GOOD}```\nDone."


@pytest.mark.parametrize(
    "text",
    [
        FENCED,
        OTHERS,
        f"```json\n[]\n```\n```py\n{GOOD}```",
        f"```\n{GOOD}```",
        f"``` py \n{GOOD}",
        f"  ```python3\n{GOOD}  ```",
        GOOD,
    ],
)
def test_a_fence_is_stripped_on_request_only(text):
    assert share(text, strip_fence=True) == 1.0
    assert share(text) == float(text == GOOD)


def test_a_completion_may_go_on_where_the_prompt_ends():
    assert share("    return a + b", prompt="def add(a, b):\n", with_prompt=True) == 1.0
    assert share("    return a + b", prompt="def add(a, b):\n") == 0.0


def test_a_row_without_tests_has_no_reward():
    assert share(GOOD, None) == share(GOOD, []) == Missing("no_tests")


EXITS = [
    "def add(a, b):\n    exit(0)\n",
    "def add(a, b):\n    raise SystemExit(0)\n",
    "import os\ndef add(a, b):\n    os._exit(0)\n",
    "import sys\nsys.exit(0)\n",
    "import os\nos._exit(0)\n",
    "import os, signal\ndef add(a, b):\n    signal.raise_signal(signal.SIGTERM)\n    os._exit(0)\n",
    "import ctypes\ndef add(a, b):\n    ctypes.string_at(0)\n",
    "def add(a, b):\n    return add(a, b)\n",
]


@pytest.mark.parametrize("program", EXITS)
def test_a_program_that_ends_early_has_passed_nothing(program):
    assert share(program) == 0.0


def test_what_passed_before_the_end_counts():
    assert share(GOOD, [TESTS[0], "import os\nos._exit(0)", TESTS[1]]) == pytest.approx(1 / 3)


FLOODS = {
    "a loop without end": "while True: pass",
    "output without end": "while True: print('x' * 100_000)",
    "memory without end": "x = [0]\nwhile True: x += x",
    "one file without end": "f = open('x', 'wb')\nwhile True: f.write(bytes(1_000_000))",
    "threads without end": "import threading, time\n"
    "while True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "forks without end": "import os\nwhile True: os.fork()",
    "a process": "import subprocess\nsubprocess.run(['true'])",
    "a shell": "import os\nos.system('true')",
    "a signal": "import os\nos.kill(os.getppid(), 9)",
}


@pytest.mark.parametrize("name", FLOODS)
def test_what_a_program_takes_is_limited_and_it_does_not_pass(name):
    begin = time.monotonic()
    assert share(FLOODS[name] + "\n" + GOOD, cpu_sec=1, wall_sec=60, memory_mb=256) == 0.0
    assert time.monotonic() - begin < 50  # it did not wait for the clock


def test_a_program_that_waits_has_no_reward_since_that_may_be_the_machine_s_fault():
    program = "import time\ndef add(a, b):\n    time.sleep(999)\n"
    assert share(program, wall_sec=1) == Missing("timeout")


@pytest.fixture(params=["as this machine allows", "without namespaces"])
def isolation(request, monkeypatch):
    """With and without namespaces."""
    if request.param == "without namespaces":
        monkeypatch.setattr(programs, "_isolation", tuple)
    return request.param


def test_a_program_writes_to_a_folder_of_its_own_that_is_gone_afterwards(
    isolation, tmp_path, monkeypatch
):
    monkeypatch.setattr(programs.tempfile, "tempdir", str(tmp_path))
    program = "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('d')\nos.chmod('a', 0)\n"
    assert share(program + GOOD) == 1.0
    assert list(tmp_path.iterdir()) == []


def test_a_program_does_not_reach_a_network(isolation):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        program = f"import socket\nsocket.create_connection({address}, 5)\n"
        assert share(program + GOOD) == 0.0


def test_a_program_sees_nothing_of_the_environment(isolation, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    program = (
        "import os, sys\nassert 'HF_TOKEN' not in os.environ\nassert '/somewhere' not in sys.path\n"
    )
    assert share(program + GOOD) == 1.0


WAITS = """import sys
from copg_jax.rewards import programs
if sys.argv[1] == "without namespaces":
    programs._isolation = tuple
limits = programs.ProgramLimits(wall_sec=99)
programs.run_tests("import time\\ntime.sleep(99)", ["assert 1"], limits)
"""


def running(home: Path) -> list[str]:
    """Processes whose environment names a folder in this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if f"HOME={home}".encode() in (process / "environ").read_bytes():
                found.append(process.name)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_a_program_whose_caller_is_killed_ends_too(isolation, tmp_path):
    wait = [sys.executable, "-c", WAITS, isolation]
    with subprocess.Popen(wait, env=os.environ | {"TMPDIR": str(tmp_path)}) as caller:
        until(lambda: running(tmp_path))
        caller.kill()
    until(lambda: not running(tmp_path))
    assert running(tmp_path) == []


def until(holds: Callable[[], Any]) -> None:
    """Waits for something, a minute at most."""
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        ("assert add(", ["is no Python", "'assert add('"]),
        (["assert 1", "a\0b"], ["test 1", "is no Python"]),
        (["assert 1", 5], ["list of such texts", "(list)"]),
        ({"a": 1}, ["(dict)"]),
        ([""], ["test 0", "tests nothing"]),
        ("def check(f):\n    assert f(1) == 1\n", ["tests nothing"]),
    ],
)
def test_tests_that_are_none_are_named_with_row_and_column(tests, words):
    with pytest.raises(InputError) as caught:
        score_texts(
            unit_tests("checks"),
            ["p"] * 2,
            [GOOD] * 2,
            {"checks": [TESTS, tests]},
            name="unit_tests",
            where=["f:1", "f:2"],
        )
    names_all(str(caught.value), ["f:2: ", "unit_tests", "column 'checks'", *words])


def test_a_column_that_the_data_lacks_is_named_with_those_that_it_has():
    with pytest.raises(InputError) as caught:
        score_texts(unit_tests("checks"), ["p"], ["c"], {"tests": [TESTS]}, name="unit_tests")
    names_all(str(caught.value), ["unit_tests", "'checks'", "['tests']", "Fix"])


@pytest.mark.parametrize(
    "limits", [{"cpu_sec": 0}, {"memory_mb": True}, {"wall_sec": 1.5}, {"seconds": 3}]
)
def test_limits_that_cannot_be_are_refused(limits):
    with pytest.raises(InputError, match=next(iter(limits))):
        unit_tests("tests", **limits)
