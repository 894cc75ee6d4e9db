"""Every shell script parses, may be executed, and shellcheck has nothing to say of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [*ROOT.glob("*.sh"), *ROOT.glob("experiments/*.sh")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_parses_may_be_executed_and_shellcheck_finds_nothing(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    command = [Path(sys.executable).with_name("shellcheck"), script]
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""
