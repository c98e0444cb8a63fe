"""How well a machine can confine a program: layers, breaches, levels."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

# The layers of a job, as `textgym.sandbox.harden` puts them on, the outermost first.
LAYERS = (
    "unprivileged user",
    "user namespace",
    "process namespace",
    "network namespace",
    "ipc namespace",
    "resource limits",
    "cpu timer",
    "no new privileges",
    "no capabilities",
    "landlock",
    "seccomp",
)
# What the self-test tries, and what it means that it succeeds.
BREACHES = {
    "time": "runs longer than its budget of CPU time",
    "memory": "takes more memory than its limit",
    "write": "changes files",
    "network": "reaches a socket outside",
    "processes": "starts other processes",
    "programs": "executes other programs",
    "signals": "sends signals to other processes",
    "read": "reads files of the user",
}
# How the self-test exits where it could execute another program.
EXIT_EXECUTED = 7
# Without these a level is not reached.
UNLIMITED = ("time", "memory")
HARMFUL = ("write", "network", "processes", "programs", "signals")
NOT_NEEDED = ("unprivileged user",)


class Level(enum.IntEnum):
    """What a sandbox is worth; each level includes those before it."""

    NONE = 0
    """A program can run and grow for ever."""
    LIMITED = 1
    """Time, memory and output are limited, but a program can change the machine."""
    CONTAINED = 2
    """It can change nothing outside itself and reach nobody; it may read files of the user."""
    FULL = 3
    """It reads nothing but Python and system libraries, and every layer is there."""


@dataclass(frozen=True)
class Report:
    """What the self-test of a sandbox found.

    Attributes:
        missing: The layers that could not be put on, with the reasons.
        breaches: What a program succeeded in doing; keys of `BREACHES`.
    """

    missing: Mapping[str, str]
    breaches: frozenset[str]

    @property
    def level(self) -> Level:
        """The level that this machine reaches."""
        if self.breaches & set(UNLIMITED):
            return Level.NONE
        if self.breaches & set(HARMFUL) or "no new privileges" in self.missing:
            return Level.LIMITED
        if self.breaches or set(self.missing) - set(NOT_NEEDED):
            return Level.CONTAINED
        return Level.FULL

    def shortfall(self) -> str:
        """Say in a few lines what is missing, and why; empty if nothing is."""
        lines = [f"a program {BREACHES[b]}" for b in BREACHES if b in self.breaches]
        lines += [f"no layer {n!r}: {self.missing[n]}" for n in LAYERS if n in self.missing]
        return "\n".join(f"  - {line}" for line in lines)

    def table(self) -> str:
        """Give a table of layers and attempts, and the level."""
        rows = [
            (name, f"absent: {self.missing[name]}" if name in self.missing else "on")
            for name in LAYERS
        ]
        tried = [
            (meaning, "SUCCEEDS" if name in self.breaches else "refused")
            for name, meaning in BREACHES.items()
        ]
        lines = [f"{'layer':<20} state"]
        lines += [f"{name:<20} {state}" for name, state in rows]
        lines += ["", f"{'a program that ...':<45} is"]
        lines += [f"{name:<45} {state}" for name, state in tried]
        return "\n".join([*lines, "", f"level: {self.level.name.lower()}"])
