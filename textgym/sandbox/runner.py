"""The code runner: programs by a model, run in zygotes and told about.

The runner starts zygotes, tests what they confine, refuses to work below the level asked for, and
then runs jobs. Whatever a program does ends as an `Outcome` within its budget; only what is not the
program's doing is raised.
"""

from __future__ import annotations

import os
import queue
import threading
import warnings
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from textgym.sandbox.levels import Level, Report
from textgym.sandbox.outcome import Job, Outcome, SandboxError, ZygoteDiedError
from textgym.sandbox.process import Zygote
from textgym.sandbox.selftest import self_test

__all__ = ["CodeRunner", "Job", "Outcome", "SandboxError", "shared_runner"]

HONEST = Job(code="def f():\n    return 1", entry_point="f", calls=[[]])


@dataclass
class _State:
    """What runs."""

    report: Report
    idle: queue.SimpleQueue[Zygote]
    zygotes: list[Zygote]
    threads: ThreadPoolExecutor


class CodeRunner:
    """Runs programs that nobody has read; usable from any thread, and after a fork.

    The zygotes start with the first job, with the self-test (some 0.3 s).

    Args:
        workers: How many jobs run at a time.
        require: The least level: `"limited"`, `"contained"` or `"full"`.
        allow_unsandboxed_code: Work below that level too, with one warning that says what a program
            could do.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        require: str = "contained",
        allow_unsandboxed_code: bool = False,
    ) -> None:
        names = [level.name.lower() for level in Level if level is not Level.NONE]
        if require not in names:
            raise ValueError(f"require must be one of {', '.join(names)}, got {require!r}")
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.workers, self.require = workers, Level[require.upper()]
        self.allow_unsandboxed_code = allow_unsandboxed_code
        self._lock = threading.Lock()
        self._state: _State | None = None
        _RUNNERS.add(self)

    @property
    def report(self) -> Report:
        """What the self-test found; starts the zygotes if need be.

        Raises:
            SandboxError: As `map`.
        """
        return self._ready().report

    def map(self, jobs: Sequence[Job]) -> list[Outcome | SandboxError]:
        """Run jobs, several at a time.

        Returns:
            An outcome for each, in order; an error where the sandbox, not the program, failed.

        Raises:
            SandboxError: If there is no sandbox of the level required; says what is missing.
        """
        state = self._ready()
        if len(jobs) == 1:
            return [self._run(state, jobs[0])]
        return list(state.threads.map(lambda job: self._run(state, job), jobs))

    def close(self) -> None:
        """End the zygotes; a later job starts new ones."""
        with self._lock:
            state, self._state = self._state, None
        if state is None:
            return
        state.threads.shutdown(wait=True)
        for zygote in state.zygotes:
            zygote.kill()

    def _ready(self) -> _State:
        with self._lock:
            if self._state is None:
                self._state = self._start()
            return self._state

    def _after_fork(self) -> None:
        """Leave the zygotes, in the child of a fork, to the parent."""
        self._lock = threading.Lock()
        state, self._state = self._state, None
        for zygote in state.zygotes if state else []:
            zygote.forget()

    def _start(self) -> _State:
        first = Zygote()
        try:
            report = self_test(first)
            self._judge(report)
        except BaseException:
            first.kill()
            raise
        zygotes = [first, *(Zygote() for _ in range(self.workers - 1))]
        idle: queue.SimpleQueue[Zygote] = queue.SimpleQueue()
        for zygote in zygotes:
            zygote.missing = tuple(report.missing)
            idle.put(zygote)
        threads = ThreadPoolExecutor(self.workers, thread_name_prefix="textgym-sandbox")
        return _State(report, idle, zygotes, threads)

    def _judge(self, report: Report) -> None:
        if report.level >= self.require:
            return
        found = (
            f"the sandbox for model-written code reaches the level {report.level.name.lower()!r} "
            f"here, below {self.require.name.lower()!r}:\n{report.shortfall()}\n"
        )
        if not self.allow_unsandboxed_code:
            raise SandboxError(
                f"{found}Run on a machine that offers more (see docs/security.md), or, where a "
                "program can do no harm, pass allow_unsandboxed_code=True."
            )
        _warn_once(f"{found}Programs run all the same (allow_unsandboxed_code=True).")

    def _run(self, state: _State, job: Job) -> Outcome | SandboxError:
        zygote = state.idle.get()
        try:
            for _ in range(2):
                try:
                    return zygote.run(job)
                except ZygoteDiedError:
                    zygote.restart()
            # Twice with this job. If a harmless job runs, the program did it.
            zygote.run(HONEST)
            return Outcome("crash")
        except SandboxError as error:
            if isinstance(error, ZygoteDiedError):
                zygote.kill()  # what it has still to say belongs to no one
            return error
        except BaseException:  # Ctrl-C: the job goes on, and its end would pass for the next one's
            zygote.kill()
            raise
        finally:
            state.idle.put(zygote)


_RUNNERS: weakref.WeakSet[CodeRunner] = weakref.WeakSet()
_WARNED: set[str] = set()
_SHARED: dict[tuple[int, str, bool], CodeRunner] = {}
_SHARED_LOCK = threading.Lock()


def _warn_once(text: str) -> None:
    if text not in _WARNED:
        _WARNED.add(text)
        warnings.warn(text, UserWarning, stacklevel=2)


def shared_runner(
    *, workers: int = 2, require: str = "contained", allow_unsandboxed_code: bool = False
) -> CodeRunner:
    """Give the runner of this process for these arguments, which are those of `CodeRunner`."""
    key = (workers, require, allow_unsandboxed_code)
    with _SHARED_LOCK:
        if key not in _SHARED:
            _SHARED[key] = CodeRunner(
                workers=workers, require=require, allow_unsandboxed_code=allow_unsandboxed_code
            )
        return _SHARED[key]


def _after_fork_in_child() -> None:
    global _SHARED_LOCK
    _SHARED_LOCK = threading.Lock()
    for runner in list(_RUNNERS):
        runner._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
