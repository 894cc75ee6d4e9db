"""Runs a program and its tests under limits: the child process of `programs.run_tests`.

A script for `python -I`, which needs the standard library only. It reads one line of JSON, the
task, and writes a line for each test that passed, and one at the end, to the file descriptor that
its argument names. It ends when its standard input does, so that it never outlives who waits.
"""

import ctypes
import json
import os
import resource
import sys
import threading
import types
from typing import Any

_MIB = 1 << 20
# What a program may not do, by Python's names of the events: start or end processes, and connect.
_REFUSED = {
    *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn"),
    *("subprocess.Popen", "os.kill", "os.killpg"),
    *("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.sendmsg", "socket.sendto"),
}
_MOUNT_SETATTR = 442  # of Linux 5.12 and later; the same on all processors
_READ_ONLY, _RECURSIVE, _HERE = 1, 0x8000, -100


def main() -> None:
    """Reads the task and runs it."""
    report = int(sys.argv[1])
    task = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with, args=(os.dup(0),), daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if task["is_isolated"]:
        _seal(os.getcwd(), task["folder_mb"])
    _limit(task)
    sys.addaudithook(_refuse)
    for index in _passed(task["program"], task["tests"]):
        os.write(report, f"{task['secret']} {index}\n".encode())
    os.write(report, f"{task['secret']} end\n".encode())
    os._exit(0)  # no threads to wait for, no functions to call at the exit


def _end_with(pipe: int) -> None:
    """Ends the process when nobody holds the other end of the pipe any more."""
    os.read(pipe, 1)
    os._exit(1)


def _seal(folder: str, size_mb: int) -> None:
    """Makes all files read-only but for a folder in memory; in a mount namespace of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    failed = libc.syscall(_MOUNT_SETATTR, _HERE, b"/", _RECURSIVE, ctypes.byref(attributes), size)
    options = f"size={size_mb}m".encode()
    if failed or libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options):
        raise OSError(ctypes.get_errno(), "the program's folder cannot be sealed off")
    os.chdir(folder)


def _limit(task: dict[str, Any]) -> None:
    """Sets the limits that the kernel keeps."""
    limits = {
        resource.RLIMIT_CPU: task["cpu_sec"],
        resource.RLIMIT_AS: task["memory_mb"] * _MIB,
        resource.RLIMIT_FSIZE: task["folder_mb"] * _MIB,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
    }
    if task["is_isolated"]:  # elsewhere it would count all processes of the user
        limits[resource.RLIMIT_NPROC] = task["num_threads"]
    for kind, wanted in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (limit, limit))


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _REFUSED:
        raise PermissionError(f"{event} is refused here")


def _passed(program: str, tests: list[str]) -> Any:
    """Yields the indices of the tests that pass.

    What ends a test early, `exit(0)` too, is a test that did not pass. Each test has names of its
    own.
    """
    module = sys.modules["completion"] = types.ModuleType("completion")
    try:
        exec(compile(program, "completion", "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        return
    for index, test in enumerate(tests):
        try:
            exec(compile(test, f"test {index}", "exec", dont_inherit=True), dict(vars(module)))
        except BaseException:
            continue
        yield index


if __name__ == "__main__":
    main()
