"""One of the processes of a distributed test: runs stages, and breaks off where it is told to.

    python -m tests.worker '{"stages": [["policy", [ARGUMENT, ...]]], "signal": ["SIGKILL", 5]}'

The signal, if any, goes to this process itself while the batch of that step is fetched; of rounds,
at a moment of `interrupted.watch_all`, such as ["SIGTERM", "judged a part 2"].
"""

import faulthandler
import json
import os
import signal
import sys

import pytest

from copg_jax.config.load import load_config
from copg_jax.data.stream import GroupStream
from copg_jax.errors import InputError
from tests.interrupted import watch_all
from tests.workplace import MAINS

LIMIT_SEC = 200  # they need a tenth of it on an idle machine


def break_off(name: str, at_moment: int | str) -> None:
    """Sends this process a signal when a stream yields the batch of a step, or at a moment."""
    if isinstance(at_moment, str):
        end = lambda now: os.kill(os.getpid(), signal.Signals[name]) if now == at_moment else None
        watch_all(pytest.MonkeyPatch(), end)
        return
    batches = GroupStream.__iter__

    def interrupted(stream: GroupStream):
        for at, batch in enumerate(batches(stream), stream._start_step + 1):
            if at == at_moment:
                os.kill(os.getpid(), signal.Signals[name])
            yield batch

    GroupStream.__iter__ = interrupted


def main(job: dict) -> None:
    """Runs the stages of a job."""
    if "signal" in job:
        break_off(*job["signal"])
    for stage, arguments in job["stages"]:
        run, cls = MAINS[stage]
        run(load_config(cls, arguments))


if __name__ == "__main__":
    # A process that hangs says where, and ends.
    faulthandler.dump_traceback_later(LIMIT_SEC, exit=True)
    try:
        main(json.loads(sys.argv[1]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
