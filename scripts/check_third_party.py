"""What `textgym.checks` finds in verifiers of others: reasoning-gym's datasets and math-verify.

`python scripts/check_third_party.py` checks the `score_answer` of every dataset of reasoning-gym on
a few of its own entries, and math-verify as its readme calls it, with and without its timeouts. It
prints one line for each that has a finding; the last line is JSON. `--names` restricts it.
"""

from __future__ import annotations

import json
import os

os.environ["OMP_NUM_THREADS"] = "1"

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import tyro
from machine import described

from textgym.checks import Limits, check_reward
from textgym.checks.guard import guarded
from textgym.rewards import Example, as_reward

SHOWN = ("oracle", "examples", "empty", "garbage", "deterministic", "order", "batch", "range")
SHOWN += ("hostile", "reads only", "dense")
EQUAL = (
    ("$\\frac{1}{2}$", "The answer is $0.5$."),
    ("$x=3$", "So $x = 3$"),
    ("${1,2}$", "${2,1}$"),
)


@dataclass(frozen=True)
class Args:
    """What to check."""

    names: tuple[str, ...] = ()
    """Only these; default is all."""
    entries: int = 4
    """Of each dataset."""
    cpu_seconds: float = 1.0
    """Of processor that one call may take; math-verify gets 12 times as much, because its two
    timeouts are 5 s each, and 3 times without them."""
    seconds: float = 90.0
    """Of processor for one dataset, its making included; five times that of wall time."""


def reasoning_gym_report(name: str, args: Args) -> dict[str, Any]:
    """Check one dataset against its own answers."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, size=args.entries, seed=0)
    rows = [{"prompt": entry["question"], "entry": entry} for entry in dataset]

    def score_answer(text: str, entry: dict[str, Any]) -> float:
        return dataset.score_answer(text, entry)

    # Some have no answer of their own: then there is no oracle, and the rows serve all the same.
    oracle = all(row["entry"]["answer"] is not None for row in rows)
    examples = [Example(row, str(row["entry"]["answer"]), 1.0) for row in rows]
    skip = () if oracle else ("examples", "oracle")
    return checked(as_reward(score_answer, name=name), examples, args, skip)


def math_verify_report(timeouts: bool, args: Args) -> dict[str, Any]:
    """Check math-verify on answers that are equal."""
    from math_verify import parse, verify

    options: dict[str, Any] = {} if timeouts else {"parsing_timeout": None}
    more: dict[str, Any] = {} if timeouts else {"timeout_seconds": None}

    def equal(text: str, answer: str) -> float:
        return float(verify(parse(answer, **options), parse(text, **options), **more))

    examples = [Example({"prompt": "", "answer": gold}, text, 1.0) for gold, text in EQUAL]
    args = replace(args, cpu_seconds=(12 if timeouts else 3) * args.cpu_seconds)
    return checked(as_reward(equal), examples, args)


def checked(
    reward: Any, examples: list[Example], args: Args, skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Give the report as JSON values; that functions in here cannot be pickled is no matter."""
    limits = Limits(cpu_seconds=args.cpu_seconds, wall_seconds=3 + 5 * args.cpu_seconds)
    return check_reward(
        reward, examples, limits=limits, skip=("pickle", "deepcopy", *skip)
    ).as_dict()


def jobs(args: Args) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is checked, by name."""
    from reasoning_gym.factory import DATASETS

    found: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(reasoning_gym_report, name, args) for name in sorted(DATASETS)
    }
    found["math-verify"] = partial(math_verify_report, True, args)
    found["math-verify, no timeouts"] = partial(math_verify_report, False, args)
    return {name: job for name, job in found.items() if not args.names or name in args.names}


def main(args: Args) -> None:
    """Check them one after the other."""
    result: dict[str, Any] = {"benchmark": "check_third_party"}
    result |= described(("reasoning-gym", "math-verify", "sympy"))
    for key in ("processor", "python", "versions", "command", "commit"):
        print(f"{key:<10} {result[key]}")
    began, findings, not_made = time.perf_counter(), {}, {}
    limits = Limits(cpu_seconds=args.seconds, wall_seconds=5 * args.seconds, memory_mb=8192)
    todo = jobs(args)
    for name, job in todo.items():
        (outcome,) = guarded([job], limits)
        if outcome.status != "ok":
            not_made[name] = f"{outcome.status}: {outcome.detail}"
            print(f"{name}: not checked, {not_made[name]}", flush=True)
            continue
        checks = outcome.value["checks"]
        failed = {
            n: checks[n]["detail"] for n in SHOWN if n in checks and checks[n]["verdict"] == "fail"
        }
        notes = {n: checks[n]["detail"] for n in ("other answers", "hostile paid")}
        if failed:
            findings[name] = {"failed": failed, **notes}
            print(name, *(f"  {n}: {detail}" for n, detail in failed.items()), sep="\n", flush=True)
    result |= {"checked": len(todo) - len(not_made), "findings": findings, "not_made": not_made}
    result["seconds"] = round(time.perf_counter() - began)
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
