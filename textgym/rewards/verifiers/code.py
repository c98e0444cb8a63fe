"""Whether the program in a response passes its tests, run in the sandbox."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from textgym.rewards.base import Example
from textgym.rewards.batch import TextBatch
from textgym.rewards.errors import TextFailure
from textgym.rewards.verifiers.base import Verifier
from textgym.rewards.verifiers.code_task import Task, Verdict, Verdicts, find_code
from textgym.sandbox.plain import NotPlainError, to_json
from textgym.sandbox.runner import CodeRunner, Job, shared_runner

LONGEST = 65_536


class UnitTests(Verifier):
    """1 if the program in the response passes all tests, else 0; or the share that it passes.

    **Accepts** Python: the last fenced block marked as such, else the last unmarked one, else the
    whole text; the standard library only. It runs in the sandbox (docs/security.md).

    **The column** holds a list of tests, all of one kind: `{"args": [...], "expected": ...}` calls
    the function with the arguments, `{"stdin": "...", "stdout": "..."}` runs the whole program.
    What a function returns must be the expected value, type and all, but a tuple will do for a list
    and an integer for a float, floats may differ by `tolerance`, relative to the expected one. What
    a program writes is compared line by line, without spaces at the ends of lines and empty lines
    at the end. The function is the one that the column `entry_point` names (`f`, or `Solution.f`),
    if there is such a column; else the last one of the program.

    The expected values stay in this process. The tests of a text share its budget and, where they
    are calls, one process; each run of a program has its own.

    **Range** 0 to 1. **Cost** some 5 ms a text, and what the program takes. **Statuses** `timeout`,
    `memory`, `output`, `syntax`, `recursion`, `exception`, `crash`, `no entry point`, `not plain`
    (the value returned is none that can be compared), `too long` (more than 65,536 characters).
    With `partial`, a text that passes some tests has its share whatever became of the others.

    Args:
        column: The column of the tests.
        entry_point: The function, for every row.
        partial: Pay the share of the tests that pass.
        tolerance: Relative tolerance of floats.
        cpu_seconds: CPU time of a text, all of its tests together.
        wall_seconds: Time on the clock of a text; ten times the CPU time by default.
        memory_mb: Address space of a program, MiB.
        workers: How many programs run at a time.
        require: The least level of the sandbox: `"limited"`, `"contained"`, `"full"`.
        allow_unsandboxed_code: Run programs below that level too.

    Raises:
        ValueError: If an argument is out of range.
    """

    column: str
    cheap = False
    transient = ("_verdicts",)

    def __init__(
        self,
        column: str = "tests",
        *,
        entry_point: str | None = None,
        partial: bool = False,
        tolerance: float = 1e-6,
        cpu_seconds: float = 2.0,
        wall_seconds: float | None = None,
        memory_mb: int = 512,
        workers: int = 2,
        require: str = "contained",
        allow_unsandboxed_code: bool = False,
    ) -> None:
        super().__init__("code", column)
        wall_seconds = 10.0 * cpu_seconds if wall_seconds is None else wall_seconds
        if not 0.0 < cpu_seconds <= wall_seconds < math.inf:
            raise ValueError(
                "expected 0 < cpu_seconds <= wall_seconds, both finite, "
                f"got {cpu_seconds} and {wall_seconds}"
            )
        if memory_mb < 64 or not 0.0 <= tolerance < math.inf:
            raise ValueError(
                "expected memory_mb >= 64 (Python itself takes some 40) and a finite tolerance >= 0"
                f", got {memory_mb} and {tolerance}"
            )
        self.entry_point, self.partial, self.tolerance = entry_point, partial, tolerance
        self.cpu_seconds, self.wall_seconds, self.memory_mb = cpu_seconds, wall_seconds, memory_mb
        self.sandbox: dict[str, Any] = {
            "workers": workers,
            "require": require,
            "allow_unsandboxed_code": allow_unsandboxed_code,
        }
        CodeRunner(**self.sandbox)  # checks them
        self._verdicts = Verdicts()

    def check(self, columns: Collection[str]) -> None:
        """Check that the tests are there, and that the sandbox is good enough.

        Raises:
            RewardColumnError: If there is no such column.
            SandboxError: If the level required is not reached here; says what is missing.
        """
        super().check(columns)
        _ = shared_runner(**self.sandbox).report

    def score(self, batch: TextBatch) -> list[Any]:
        """Run the programs that are not known yet, equal ones once."""
        batch.column(self.column)
        items: list[Any] = [None] * len(batch)
        keys: dict[int, bytes] = {}
        found: dict[bytes, Verdict] = {}
        todo: dict[bytes, Task] = {}
        for i, (text, row) in enumerate(zip(batch.texts, batch.rows, strict=True)):
            try:
                task = self._task(text, row)
            except (TextFailure, ValueError) as error:
                items[i] = error
                continue
            keys[i] = key = task.key()
            known = self._verdicts.get(key)
            if known is None:
                todo[key] = task
            else:
                found[key] = known
        self._run(list(todo.values()))
        for key, task in todo.items():
            found[key] = verdict = task.verdict()
            if verdict.lasting:
                self._verdicts.put(key, verdict)
        for i, key in keys.items():
            items[i] = found[key].item(self.partial)
        return items

    def examples(self) -> tuple[Example, ...]:
        """Give a program that passes, one that passes half its tests, and one that passes none."""
        tests = [{"args": [[3, 1, 2]], "expected": 3}, {"args": [[-2, -5]], "expected": -2}]
        row = {self.column: tests}
        half = "def largest(xs):\n    best = 0\n    for x in xs:\n        best = max(best, x)\n"
        return (
            Example(row, "```python\ndef largest(xs):\n    return max(xs)\n```", 1.0),
            Example(row, f"{half}    return best", 0.5 if self.partial else 0.0),
            Example(row, "```python\ndef largest(xs):\n    return min(xs)\n```", 0.0),
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _verdicts=Verdicts())

    def _task(self, text: str, row: Mapping[str, Any]) -> Task:
        tests = row[self.column]
        is_list = isinstance(tests, list | tuple) and len(tests) > 0
        for kind in (("args", "expected"), ("stdin", "stdout")) if is_list else ():
            if all(isinstance(test, Mapping) and set(test) == set(kind) for test in tests):
                break
        else:
            raise ValueError(
                f"reward {self.name!r} expected a list of tests in the column {self.column!r}, all "
                '{"args": [...], "expected": ...} or all {"stdin": "...", "stdout": "..."}, '
                f"got {tests!r:.200}"
            )
        given, expected = [test[kind[0]] for test in tests], [test[kind[1]] for test in tests]
        calls: list[Any] | None = None
        try:
            if kind[0] == "args":
                if not all(isinstance(arguments, list | tuple) for arguments in given):
                    raise NotPlainError("expected a list of arguments as args")
                calls = [to_json(list(arguments)) for arguments in given]
                for value in expected:
                    to_json(value)
            elif not all(isinstance(value, str) for value in [*given, *expected]):
                raise NotPlainError("expected strings as stdin and stdout")
        except NotPlainError as error:
            raise ValueError(f"the column {self.column!r} cannot be used: {error}") from None
        code = find_code(text)
        if len(code) > LONGEST:
            raise TextFailure("too long")
        entry_point = self.entry_point or row.get("entry_point")
        if not (entry_point is None or isinstance(entry_point, str)):
            raise ValueError(f"expected the name of a function as entry_point, got {entry_point!r}")
        job = Job(
            code=code,
            entry_point=entry_point,
            calls=calls,
            cpu_seconds=self.cpu_seconds,
            wall_seconds=self.wall_seconds,
            memory_mb=self.memory_mb,
        )
        return Task(job, given, expected, self.tolerance, self.partial)

    def _run(self, tasks: Sequence[Task]) -> None:
        """Run tasks to their ends: calls all at once, programs a test a round."""
        runner = shared_runner(**self.sandbox)
        while waiting := [(task, job) for task in tasks if (job := task.next()) is not None]:
            outcomes = runner.map([job for _, job in waiting])
            for (task, job), outcome in zip(waiting, outcomes, strict=True):
                task.take(job, outcome)
