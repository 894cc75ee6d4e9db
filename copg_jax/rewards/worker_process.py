"""One worker of `workers.WorkerPool`: the process in which a reward function is called.

It gets a spec, makes the function and says "ready"; then it gets a batch and answers, until nobody
holds the other end any more.
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from copg_jax.config.reward_spec import RewardSpec
from copg_jax.errors import InputError
from copg_jax.rewards.functions import load_reward
from copg_jax.rewards.protocol import FunctionFailed, ask

_GRACE_SEC = 60


def serve() -> None:
    """Serves the connection that the first argument names."""
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(name, lambda *_: None)  # meant for the run, which ends its workers
    threading.Thread(target=_end_with_the_run, args=(os.dup(0),), daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    connection = Connection(int(sys.argv[1]))
    spec, is_first = connection.recv()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # What each of them would say, one says.
    logging.getLogger("copg_jax").setLevel(logging.INFO if is_first else logging.ERROR)
    try:
        function = load_reward(spec)
    except InputError as error:
        connection.send(("refused", str(error)))
        return
    connection.send(("ready", None))
    while True:
        try:
            batch = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(_answer(function, spec, *batch))


def _end_with_the_run(pipe: int) -> None:
    os.read(pipe, 1)
    os.killpg(0, signal.SIGKILL)  # those that the function started too


def _answer(
    function: Any,
    spec: RewardSpec,
    prompts: list[Any],
    completions: list[Any],
    columns: dict[str, list[Any]],
    where: list[str],
) -> tuple[str, Any]:
    if spec.timeout_sec is not None:
        # Should the run be gone, and the function never let another thread of Python have a turn.
        limit = spec.timeout_sec * len(completions) + _GRACE_SEC
        faulthandler.dump_traceback_later(limit, exit=True)
    try:
        return "answer", ask(
            function, prompts, completions, columns, name=spec.function, where=where
        )
    except FunctionFailed as error:
        return "failed", str(error)
    except InputError as error:
        return "refused", str(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
