"""`check_reward`: does a reward keep its word, also when texts are hostile?

Everything that scores runs in a forked child under limits (`textgym.checks.guard`), so that a
reward that hangs, crashes or eats memory is reported and the check goes on. A reward that runs on a
GPU is checked in a process that has not used the GPU yet: a fork cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from textgym.checks import probes
from textgym.checks.guard import Limits, guarded
from textgym.checks.hostile import HOSTILE
from textgym.checks.report import Report
from textgym.checks.verdicts import EMPTY, GARBAGE, Verdicts
from textgym.rewards.base import Example, Reward
from textgym.rewards.functions import as_reward

HOSTILE_DENSE = 2000  # characters of them that cursors get
CHECKS = (
    "columns",
    "examples",
    "oracle",
    "empty",
    "garbage",
    "other answers",
    "deterministic",
    "order",
    "batch",
    "range",
    "hostile",
    "hostile paid",
    "dense",
    "cursor",
    "hostile cursor",
    "reads only",
    "pickle",
    "deepcopy",
    "cost",
)
"""Names of all checks, in the order of a report."""


def check_reward(
    reward: Any,
    examples: Sequence[Example] | None = None,
    *,
    limits: Limits | None = None,
    tolerance: float = 1e-9,
    max_cpu_us: float | None = None,
    max_memory_mb: float | None = None,
    skip: Collection[str] = (),
) -> Report:
    """Check that a reward does what rewards promise.

    Args:
        reward: Anything that `as_reward` takes.
        examples: Texts with what they earn, the best first; by default `reward.examples()`. Where
            there are none, one empty row stands in and what needs them is skipped.
        limits: Of each call of the reward.
        tolerance: By which values may differ that should be equal; about 1e-5 for networks, whose
            rounding depends on the batch.
        max_cpu_us: Microseconds of CPU that one example may cost; None measures only.
        max_memory_mb: Megabytes by which scoring may raise the peak memory; None measures only.
        skip: Names of checks (`CHECKS`) that are not to be done.

    Returns:
        The report; `report.ok` says whether all is well.

    Raises:
        ValueError: If a check is to be skipped that there is not, or examples are missing and the
            reward reads columns.
        TypeError: If `reward` is not a reward.
    """
    unknown = sorted(set(skip) - set(CHECKS))
    if unknown:
        raise ValueError(f"there is no check {unknown[0]!r} to skip; there are {', '.join(CHECKS)}")
    checked = as_reward(reward)
    given = tuple(checked.examples() if examples is None else examples)
    if not given:
        try:
            checked.check(())
        except ValueError as error:
            raise ValueError(f"{error} Give examples, whose rows have it (`--data`).") from error
    checked = checked.fitted([example.row for example in given])
    limits = limits or Limits()
    jobs = _jobs(checked, given, tolerance, skip)
    prepare = partial(probes.together, checked, _known(given))
    ran = guarded(list(jobs.values()), limits, prepare=prepare)
    outcomes = dict(zip(jobs, ran, strict=True))
    judge = Verdicts(checked, given, outcomes, tolerance, max_cpu_us, max_memory_mb)
    checks = sorted(judge.checks(skip), key=lambda check: CHECKS.index(check.name))
    statuses = tuple(sorted(judge.statuses))
    return Report(checked.name, checked.low, checked.high, tuple(checks), judge.cost, statuses)


def _known(examples: tuple[Example, ...]) -> tuple[Example, ...]:
    """Stand in for examples where there are none."""
    return examples or (Example({}, "a b c", math.nan),)


def _jobs(
    reward: Reward, examples: tuple[Example, ...], tolerance: float, skip: Collection[str]
) -> dict[Any, Callable[[], Any]]:
    """What is asked of the reward, by the keys that `Verdicts` knows."""
    known = _known(examples)
    rows, texts = [e.row for e in known], [e.text for e in known]
    jobs: dict[Any, Callable[[], Any]] = {
        "together": partial(probes.together, reward, known),
        "deterministic": partial(probes.together, reward, known),
        "order": partial(probes.reversed_order, reward, known),
        "batch": partial(probes.one_by_one, reward, known),
        "dense": partial(probes.dense_sums, reward, known),
        "reads only": partial(probes.changes_its_batch, reward, known),
        "pickle": partial(probes.pickled, reward, known),
        "deepcopy": partial(probes.deepcopied, reward, known),
        "cost": partial(probes.cost, reward, known),
        "other answers": partial(probes.scored, reward, texts[1:] + texts[:1], rows),
    }
    for i, example in enumerate(known):
        jobs["cursor", i] = partial(probes.cursor_errors, reward, example, tolerance)
    for text in (*EMPTY, *GARBAGE):
        jobs["nonsense", text] = partial(probes.scored, reward, [text] * len(rows), rows)
    for name, text in HOSTILE.items():
        jobs["hostile", name] = partial(probes.scored, reward, [text], rows[:1])
        short = text[:HOSTILE_DENSE]
        jobs["hostile cursor", name] = partial(probes.hostile_cursor, reward, rows[0], short)
    return {
        key: job
        for key, job in jobs.items()
        if (key if isinstance(key, str) else key[0]) not in skip
    }
