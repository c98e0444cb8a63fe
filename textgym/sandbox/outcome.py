"""What is asked of the sandbox and what comes of it: jobs, outcomes, errors."""

from __future__ import annotations

import signal
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from textgym.sandbox.job import EXIT_STATUS
from textgym.sandbox.plain import parse_answer

_LENGTH = struct.Struct("<I")


class SandboxError(RuntimeError):
    """The sandbox failed, or is not good enough; no program is to blame."""


class ZygoteDiedError(SandboxError):
    """The zygote is gone, or does not answer."""


@dataclass(frozen=True)
class Job:
    """A program to run, with its budget.

    Attributes:
        code: The source.
        entry_point: The function to call, `name` or `Class.name`; None for the last one defined.
        calls: Its arguments, call by call, as the JSON of `textgym.sandbox.plain`; None for a
            program that reads `stdin` and writes its output.
        stdin: What a program reads.
        cpu_seconds: CPU time for all of it.
        wall_seconds: Time on the clock for all of it, waiting for the CPU included.
        memory_mb: Address space in MiB, some 60 of them Python's own.
    """

    code: str
    entry_point: str | None = None
    calls: Sequence[Any] | None = None
    stdin: str = ""
    cpu_seconds: float = 2.0
    wall_seconds: float = 20.0
    memory_mb: int = 512


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: `"ok"`: it ended by itself, every call answered. Else `"timeout"`, `"memory"`,
            `"output"` (more than 1 MiB), `"syntax"`, `"recursion"`, `"exception"`, `"no entry
            point"` or `"crash"`.
        answers: What was said of each call, until it ended: `["ok", JSON]` or `[reason]`. A claim.
        output: What a program wrote.
        cpu_seconds: The CPU time that it took, by the kernel's account.
        memory_mb: Its largest resident size, MiB.
        wall_seconds: The time that it took on the clock.
    """

    status: str
    answers: list[list[Any]] = field(default_factory=list)
    output: bytes = b""
    cpu_seconds: float = 0.0
    memory_mb: float = 0.0
    wall_seconds: float = 0.0


def status_of(end: dict[str, Any], cpu_seconds: float) -> str:
    """Say how a job ended, from what the zygote saw."""
    code = end["exit"]
    if code >= 0:
        return EXIT_STATUS.get(code, "crash")
    if code in (-signal.SIGXCPU, -signal.SIGKILL) and end["cpu"] >= 0.9 * cpu_seconds:
        return "timeout"
    # Nothing else kills it but the kernel, for want of memory.
    return "memory" if code == -signal.SIGKILL else "crash"


def answers_in(data: bytes, n: int) -> list[list[Any]]:
    """Read at most `n` frames; what is not one ends the list, for it may be forged."""
    answers: list[list[Any]] = []
    at = 0
    while len(answers) < n and at + 4 <= len(data):
        (size,) = _LENGTH.unpack_from(data, at)
        at += 4 + size
        if at > len(data):
            break
        try:
            answer = parse_answer(data[at - size : at])
        except ValueError:
            break
        if type(answer) is not list or not 1 <= len(answer) <= 2:
            break
        answers.append(answer)
    return answers
