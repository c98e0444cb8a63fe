"""The inside of a worker process: a guard that forks a child, and the child, which scores.

The guard imports the function once and then only waits. The child has the limits; when an item
kills it, the guard says so and forks the next one, in milliseconds, with everything imported.

Frames from the pool are chunks: lists of argument lists. Frames to it are

| frame | from | meaning |
|---|---|---|
| `"ready"` | child | the limits hold; written once by every child |
| `"read"` | child | the chunk has arrived; what dies from now on dies of an item |
| `[value, status]` | child | the verdict on the next item |
| `["died", status]` | guard | the next item killed the child: `timeout`, `memory`, `killed`, ... |
| `["failed", reason]` | both | there can be no worker: the function cannot be imported, ... |

Linux only. `textgym.sandbox.workers` starts it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from textgym.sandbox.frames import LARGEST, read_frame, write_frame

MEMORY_EXIT = 77
BROKEN_EXIT = 78
PR_SET_PDEATHSIG = 1

DEATHS = {
    signal.SIGPROF: "timeout",
    signal.SIGXCPU: "timeout",
    signal.SIGKILL: "killed",
    signal.SIGTERM: "killed",
    signal.SIGINT: "killed",
}


def main(config: dict[str, Any]) -> None:
    """Serve chunks until the pipe is closed.

    Args:
        config: `setup`, `"module:function"`; `cpu_seconds`; `memory_mb`; `parent`, the caller's
            process id.
    """
    inbox, outbox = _private_pipes()
    _die_with_parent(config["parent"])
    try:
        function = load(config["setup"])
    except BaseException as error:
        write_frame(outbox, ["failed", f"{type(error).__name__}: {error}\n{_tail(error)}"])
        os._exit(BROKEN_EXIT)
    gc.collect()
    gc.freeze()  # the children share these pages; a collection would copy them
    while True:
        guard, child = os.getpid(), os.fork()
        if child == 0:
            _serve(function, inbox, outbox, config, guard)
        _, ended = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(ended)
        if code in (0, BROKEN_EXIT):
            os._exit(code)
        status = "memory" if code == MEMORY_EXIT else "crash"
        if code < 0:
            status = DEATHS.get(signal.Signals(-code), "crash")
        write_frame(outbox, ["died", status])


def load(setup: str) -> Callable[..., Any]:
    """Import the function that `"module:function"` names.

    Raises:
        TypeError: If it is not callable.
    """
    module, _, name = setup.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"expected {setup!r} to be a function, got {function!r:.200}")
    return function  # type: ignore[no-any-return]


def _serve(
    function: Callable[..., Any], inbox: int, outbox: int, config: dict[str, Any], guard: int
) -> None:
    """Be the child: never returns."""
    try:
        _limit(config["memory_mb"] << 20, guard)
        write_frame(outbox, "ready")
        while True:
            chunk = read_frame(inbox, LARGEST)
            write_frame(outbox, "read")
            for arguments in chunk:
                write_frame(outbox, _score(function, arguments, config["cpu_seconds"]))
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the pool is gone
    except MemoryError:
        os._exit(MEMORY_EXIT)
    except BaseException as error:
        write_frame(outbox, ["failed", f"{type(error).__name__}: {error}"])
        os._exit(BROKEN_EXIT)


def _score(
    function: Callable[..., Any], arguments: list[Any], cpu_seconds: float
) -> list[float | str | None]:
    """Call the function within its CPU time; SIGPROF's default action ends this process."""
    try:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        value = function(*arguments)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    except MemoryError:
        os._exit(MEMORY_EXIT)  # what is left of the heap is not to be trusted
    except RecursionError:
        return [None, "recursion"]
    except BaseException as error:
        try:
            words = f"{type(error).__name__}: {error}".splitlines()[0]
        except BaseException:
            words = type(error).__name__
        return [None, f"error: {words[:200]}"]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    if isinstance(value, str):
        return [None, value[:200]]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        kind = type(value).__name__
        return [None, f"error: ValueError: expected a finite number or a status, got a {kind}"]
    return [number, "ok"]


def _limit(memory: int, guard: int) -> None:
    """Put the limits on this process and see that they hold."""
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError("the kernel does not let a process end with its parent")
    if os.getppid() != guard:
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGPROF, signal.SIGXCPU, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    sys.dont_write_bytecode = True
    signal.setitimer(signal.ITIMER_PROF, 1000.0)
    if not signal.setitimer(signal.ITIMER_PROF, 0.0)[0] > 0.0:
        raise OSError("the kernel does not count the CPU time of a process (ITIMER_PROF)")


def _private_pipes() -> tuple[int, int]:
    """Move the pipes out of the way of what the function may print or read."""
    inbox, outbox = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    return inbox, outbox


def _die_with_parent(parent: int) -> None:
    """End this process when the caller ends, however it ends.

    The signal also comes when only the *thread* of the caller ends that started this process, so a
    handler looks who the parent is.
    """

    def look(*_: Any) -> None:
        if os.getppid() != parent:
            os._exit(0)

    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, look)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    look()


def _tail(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-3000:]
