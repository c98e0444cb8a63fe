"""Run functions that may hang, exhaust memory or crash, in a forked child that can be killed.

One child runs job after job and tells each outcome through a pipe. Before each job it sets a timer
of CPU time, on which the kernel ends it: loops in C end too. A child that dies, or that says
nothing within the wall limit, costs the one job that it was at: a fresh child goes on with the
next.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from textgym.rewards.errors import describe
from textgym.sandbox.frames import FrameError, read_frame, write_frame

Job = Callable[[], Any]
Status = Literal["ok", "raised", "timeout", "killed"]

_LARGEST_ANSWER = 1 << 28
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Limits:
    """What one job may take; of the first job of a child, the imports and caches too."""

    cpu_seconds: float = 5.0
    """Processor time of the child, kept by the kernel."""
    wall_seconds: float = 30.0
    """Time until the child is killed, also where it sleeps, or waits for a process of its own."""
    memory_mb: int = 2048
    """Address space on top of what the parent has; kept on Linux."""


@dataclass(frozen=True)
class Outcome:
    """What became of one job."""

    status: Status
    """`"ok"`; `"raised"` an exception; `"timeout"` of CPU or wall time; `"killed"`, or exited."""
    value: Any = None
    """What the job returned, as JSON brings it."""
    detail: str = ""
    """What was raised, which limit was met, or which signal killed it."""
    cpu_seconds: float = 0.0
    """Of the child; processes that it waits for are not in it."""
    wall_seconds: float = 0.0
    """From the start of the job to its answer or its end."""
    memory_mb: float = 0.0
    """By how much the job raised the child's peak of resident memory."""


def guarded(jobs: Sequence[Job], limits: Limits, *, prepare: Job | None = None) -> list[Outcome]:
    """Run jobs one after the other in a child.

    Args:
        jobs: Functions that return what JSON can hold. They are forked, not pickled.
        limits: Of each job.
        prepare: Run first in every child, with four times the limits, to fill caches; what it
            raises is ignored, and that it hangs is the outcome of the job that follows.

    Returns:
        The outcomes, in order.
    """
    outcomes: list[Outcome] = []
    while len(outcomes) < len(jobs):
        outcomes += _one_child(jobs[len(outcomes) :], limits, prepare)
    return outcomes


def _one_child(jobs: Sequence[Job], limits: Limits, prepare: Job | None) -> list[Outcome]:
    """Run jobs until all are done, or one takes the child with it; gives at least one outcome."""
    answers, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads, whose locks the child may find held. Then it would hang,
        # and be killed.
        warnings.simplefilter("ignore", DeprecationWarning)
        parent = os.getpid()
        pid = os.fork()
    if pid == 0:
        try:
            os.close(answers)
            _be_the_child(jobs, limits, prepare, write_end, parent)
        finally:
            os._exit(0)  # never back into the caller's code
    os.close(write_end)
    outcomes: list[Outcome] = []
    began = time.monotonic()
    patience = limits.wall_seconds * (5 if prepare else 1)
    ended = ""
    try:
        while len(outcomes) < len(jobs):
            found = read_frame(answers, _LARGEST_ANSWER, time.monotonic() + patience)
            outcomes.append(Outcome(**found))
            began, patience = time.monotonic(), limits.wall_seconds
    except TimeoutError:
        ended = f"no answer within {patience:g} s"
    except (EOFError, FrameError, TypeError):
        pass  # what ended it is asked below
    finally:
        os.close(answers)
        if ended or len(outcomes) == len(jobs):
            _kill_group(pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        _kill_group(pid)
    if len(outcomes) < len(jobs):
        outcomes.append(_ending(code, ended, limits, time.monotonic() - began))
    return outcomes


def _ending(code: int, ended: str, limits: Limits, wall_seconds: float) -> Outcome:
    if ended:
        return Outcome("timeout", detail=ended, wall_seconds=wall_seconds)
    if code == -signal.SIGPROF:
        detail = f"more than {limits.cpu_seconds:g} s of CPU"
        return Outcome("timeout", detail=detail, wall_seconds=wall_seconds)
    detail = signal.Signals(-code).name if code < 0 else f"the process exited with {code}"
    return Outcome("killed", detail=detail, wall_seconds=wall_seconds)


def _kill_group(pid: int) -> None:
    """Kill the child with the processes that it started and that stayed in its group."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _be_the_child(
    jobs: Sequence[Job], limits: Limits, prepare: Job | None, answers: int, parent: int
) -> None:
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return
    faulthandler.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(limits.memory_mb)
    gc.collect()
    if prepare is not None:
        _limit_cpu(4 * limits.cpu_seconds)
        try:
            prepare()
        except Exception:
            pass
    for job in jobs:
        _limit_cpu(limits.cpu_seconds)
        write_frame(answers, _outcome(job))


def _outcome(job: Job) -> dict[str, Any]:
    peak, cpu, wall = _peak_mb(), time.process_time(), time.perf_counter()
    found: dict[str, Any]
    try:
        found = {"status": "ok", "value": job()}
    except BaseException as error:
        found = {"status": "raised", "detail": describe(error)}
    found["cpu_seconds"] = time.process_time() - cpu
    found["wall_seconds"] = time.perf_counter() - wall
    found["memory_mb"] = _peak_mb() - peak
    return found


def _limit_cpu(seconds: float) -> None:
    # Not RLIMIT_CPU, which the workers of a pool would inherit.
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory(megabytes: int) -> None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
    except OSError:
        return  # not Linux: there is no telling what the parent has
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = pages * resource.getpagesize() + (megabytes << 20)
    if hard == resource.RLIM_INFINITY or wanted < hard:
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def _peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
