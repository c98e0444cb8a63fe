"""What `check_reward` found, as an object, as text and as JSON values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["pass", "fail", "skip", "note"]


@dataclass(frozen=True)
class Check:
    """One property, and whether it holds."""

    name: str
    verdict: Verdict
    """`"skip"`: it cannot be asked of this reward; `"note"`: it is told and not judged."""
    detail: str = ""
    """For a failure what was expected and what came; else what was looked at."""


@dataclass(frozen=True)
class Report:
    """What was found about one reward."""

    reward: str
    """Its name."""
    low: float
    high: float
    checks: tuple[Check, ...]
    cost: dict[str, float]
    """`cpu_us` and `wall_us` an item, in microseconds, of the examples scored together, and
    `memory_mb`, by how much scoring raised the peak of resident memory; NaN where unknown."""
    statuses: tuple[str, ...]
    """Every status that was met, `"ok"` among them, without what differs from text to text."""

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.verdict == "fail")

    def check(self, name: str) -> Check:
        """Give the check of that name."""
        return next(check for check in self.checks if check.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Give JSON values; NaN becomes null."""
        found = asdict(self)
        found["ok"] = self.ok
        found["cost"] = {n: v if math.isfinite(v) else None for n, v in self.cost.items()}
        found["checks"] = {c.name: {"verdict": c.verdict, "detail": c.detail} for c in self.checks}
        return found

    def __str__(self) -> str:
        lines = [f"{self.reward} in [{self.low:g}, {self.high:g}]"]
        lines += [f"  {c.verdict:<4}  {c.name:<14} {c.detail}".rstrip() for c in self.checks]
        return "\n".join(lines)
