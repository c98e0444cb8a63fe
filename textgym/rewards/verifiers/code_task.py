"""The program of one text and its tests: what to run next, and what came of it."""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

from textgym.rewards.errors import TextFailure
from textgym.sandbox.plain import same, to_json
from textgym.sandbox.runner import Job, Outcome, SandboxError

REMEMBERED = 65_536
# Enough to start a program: one that is killed before would count as a failure of the sandbox.
LEAST_CPU_SECONDS = 0.02
PYTHON = ("", "python", "python3", "py")
# Three backticks or tildes, and what may come before the name of a language: "{.", a space.
_FENCE = re.compile(r"\s*(`{3}|~{3})[`~]*\s*\{?\.?([\w.+#-]*)")
REASONS = ("memory", "recursion", "exception", "not plain")


@dataclass(frozen=True)
class Verdict:
    """How many tests passed, and what went wrong.

    Attributes:
        passed: Tests passed.
        total: All of them.
        status: `"ok"`, or the first trouble that the program had.
        error: The failure of the sandbox, where it was that.
        lasting: The program would fare the same again.
    """

    passed: int
    total: int
    status: str = "ok"
    error: SandboxError | None = None
    lasting: bool = True

    def item(self, partial: bool) -> Any:
        """Give what `score` gives for the text."""
        if self.error is not None:
            return self.error
        if self.passed == self.total:
            return 1.0
        if partial and self.passed:
            return self.passed / self.total
        return 0.0 if self.status == "ok" else TextFailure(self.status)


class Verdicts:
    """The verdicts that were asked for last; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, Verdict] = OrderedDict()

    def get(self, key: bytes) -> Verdict | None:
        """Give the verdict, now the youngest."""
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def put(self, key: bytes, verdict: Verdict) -> None:
        """Keep a verdict, and forget the one that was not asked for the longest."""
        with self._lock:
            self._known[key] = verdict
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)


@dataclass
class Task:
    """The tests of one text, and how far they are.

    Attributes:
        job: The program, with the budget of all tests; for calls, the calls.
        given: The arguments or the stdin of each test.
        expected: The value or the stdout that each should give.
        tolerance: Relative tolerance of floats.
        partial: Tests go on after one has failed.
    """

    job: Job
    given: list[Any]
    expected: list[Any]
    tolerance: float
    partial: bool
    done: int = 0
    passed: int = 0
    status: str = "ok"
    error: SandboxError | None = None
    cpu_left: float = field(init=False)
    wall_left: float = field(init=False)
    over: bool = False

    def __post_init__(self) -> None:
        self.cpu_left, self.wall_left = self.job.cpu_seconds, self.job.wall_seconds

    def key(self) -> bytes:
        """Give a digest of everything that decides the verdict."""
        given = self.given if self.job.calls is None else self.job.calls
        content = [self.job.code, self.job.entry_point, given, to_json(self.expected)]
        return hashlib.blake2b(json.dumps(content).encode()).digest()

    def next(self) -> Job | None:
        """Give the next job, with what is left of the budget; None if there is none."""
        if self.over or self.done == len(self.expected):
            return None
        if self.job.calls is not None:
            return self.job
        # The budget's last millisecond is still a budget; a start counts as CPU time too.
        cpu, wall = max(self.cpu_left, LEAST_CPU_SECONDS), max(self.wall_left, 0.001)
        stdin = self.given[self.done]
        return replace(self.job, stdin=stdin, cpu_seconds=cpu, wall_seconds=wall)

    def take(self, job: Job, outcome: Outcome | SandboxError) -> None:
        """Take the outcome of the job."""
        if isinstance(outcome, SandboxError):
            self.error, self.over = outcome, True
            return
        self.cpu_left -= outcome.cpu_seconds
        self.wall_left -= outcome.wall_seconds
        if job.calls is not None:
            self.over = True
            for answer, value in zip(outcome.answers, self.expected, strict=False):
                self._take_answer(answer, value)
        else:
            self.done += 1
            good = outcome.status == "ok" and _lines(outcome.output) == _lines(
                self.expected[self.done - 1].encode("utf-8", "surrogatepass")
            )
            self.passed += good
            spent = outcome.status == "timeout" or min(self.cpu_left, self.wall_left) <= 0
            self.over = spent or not (good or self.partial)
            if spent and outcome.status == "ok" and self.done < len(self.expected):
                self.status = "timeout"
        if outcome.status != "ok" and self.status == "ok":
            self.status = outcome.status

    def _take_answer(self, answer: list[Any], value: Any) -> None:
        if len(answer) == 2 and answer[0] == "ok":
            self.passed += same(value, answer[1], self.tolerance)
        elif self.status == "ok":
            # The reason is a claim of the program; those that are none of ours are not repeated.
            known = isinstance(answer[0], str) and answer[0] in REASONS
            self.status = answer[0] if known else "crash"

    def verdict(self) -> Verdict:
        """Give the verdict, once nothing is left to run."""
        # On the clock a program may be slow because the machine is; such a timeout is not kept.
        lasting = self.error is None and (
            self.status != "timeout" or self.cpu_left <= 0.1 * self.job.cpu_seconds
        )
        return Verdict(self.passed, len(self.expected), self.status, self.error, lasting)


def find_code(text: str) -> str:
    """Give the last fenced block marked as Python, else the last unmarked one, else the whole text.

    A fence is a line that begins with three backticks or tildes, perhaps indented as the block is.
    One that is not closed goes to the end.
    """
    found: dict[bool, list[str]] = {}  # the last block, marked or not
    inside: list[str] | None = None
    fence = ""
    for line in text.split("\n"):
        opening = _FENCE.match(line)
        if inside is not None and (opening is None or opening[1] != fence):
            inside.append(line)
        elif inside is not None:
            inside, fence = None, ""
        elif opening is not None:
            fence, language, inside = opening[1], opening[2].lower(), []
            if language in PYTHON or language.startswith("python3."):
                found[bool(language)] = inside
    block = found.get(True, found.get(False))
    return text if block is None else textwrap.dedent("\n".join(block))


def _lines(output: bytes) -> list[bytes]:
    return [line.rstrip() for line in output.rstrip().split(b"\n")]
