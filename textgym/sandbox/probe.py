"""The self-test: a job of our own that tries, inside the sandbox, what must not be possible.

It knows a folder that its scorer made for it, with a file to read and change and a socket that
listens. What succeeds is a *breach*; `textgym.sandbox.levels` says what each costs.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from textgym.sandbox.frames import write_frame
from textgym.sandbox.levels import EXIT_EXECUTED


def run_probe(job: dict[str, Any], result: int, missing: dict[str, str]) -> NoReturn:
    """Try what `job["probe"]` names, report, and exit.

    Args:
        job: `probe`: `"attempts"`, `"signal"` or `"spin"`; for the first `folder`, with a file
            `secret` and a listening socket `socket`, and `scorer`, a process.
        result: Where to write the report, a frame `[missing layers, breaches]`.
        missing: The layers that could not be put on.
    """
    os.set_inheritable(result, False)
    if job["probe"] == "spin":
        for which in (signal.SIGPROF, signal.SIGXCPU):
            signal.signal(which, signal.SIG_IGN)
        while True:
            pass
    if job["probe"] == "signal":
        # Whether the zygote survives is the answer.
        _works(lambda: os.kill(os.getppid(), signal.SIGKILL))
        os._exit(0)
    attempts = _attempts(job["folder"], job["scorer"], job["memory_mb"])
    write_frame(
        result, [missing, [name for name, tries in attempts.items() if any(map(_works, tries))]]
    )
    _works(
        lambda: os.execv(
            sys.executable, [sys.executable, "-S", "-c", f"raise SystemExit({EXIT_EXECUTED})"]
        )
    )
    os._exit(0)


def _attempts(folder: str, scorer: int, memory_mb: int) -> dict[str, list[Callable[[], object]]]:
    secret, new = os.path.join(folder, "secret"), os.path.join(folder, "new")
    write = os.O_WRONLY | os.O_CREAT
    return {
        "read": [
            lambda: open(secret).close(),
            lambda: open("/etc/passwd").close(),
            lambda: open(f"/proc/{scorer}/environ").close(),
            lambda: os.listdir(folder),
        ],
        "write": [
            lambda: os.chmod(secret, 0o600),
            lambda: os.utime(secret),
            lambda: os.truncate(secret, 0),
            lambda: os.open(secret, os.O_RDWR),
            lambda: os.open(new, write),
            lambda: os.mkdir(new),
            lambda: os.symlink(secret, new),
            lambda: os.link(secret, new),
            lambda: os.rename(secret, new),
            lambda: os.unlink(secret),
        ],
        "network": [
            lambda: _connect(socket.AF_INET, ("127.0.0.1", 9)),
            lambda: _connect(socket.AF_UNIX, os.path.join(folder, "socket")),
        ],
        "processes": [_fork],
        "signals": [lambda: os.kill(scorer, 0)],
        "memory": [lambda: bytearray(memory_mb << 20), _raise_limit],
    }


def _works(action: Callable[[], object]) -> bool:
    try:
        action()
    except (OSError, MemoryError, ValueError):
        return False
    return True


def _connect(family: int, address: Any) -> None:
    """Connect; a refusal by the other end means that this one could get there."""
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(address)
        except OSError as error:
            if error.errno != errno.ECONNREFUSED:
                raise


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _raise_limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
