"""`textgym check reward <name or module:object>`: does a reward keep its word?

Oracle answers earn the most, nonsense does not, values repeat and stay in their range, hostile
texts neither hang nor crash it, dense pays what terminal pays. Exit status 1 if a check fails.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from textgym.checks import Limits, Report, check_reward
from textgym.commands.errors import UsageError, reported
from textgym.commands.setup import reward_of
from textgym.prompts import Prompts
from textgym.rewards import Example, Reward

COLORS = {"pass": "green", "fail": "red", "skip": "dim", "note": "cyan"}


@dataclass(frozen=True)
class CheckArgs:
    """Check that a reward keeps its word."""

    reward: tyro.conf.Positional[str]
    """A name (`textgym list`), a `module:object`, or a sum of products of them."""
    data: Path | None = None
    """Prompts with oracle answers (.jsonl, .json, .csv, .tsv, .parquet), each of which must earn
    the most; default is the reward's own examples."""
    prompt: str = "prompt"
    """Column of the prompts."""
    answer: str = "answer"
    """Column of the oracle answers; of a list the first is taken."""
    count: int = 16
    """Rows of the data that are used."""
    cpu_seconds: float = 5.0
    """Of processor that one call may take before it counts as hanging."""
    wall_seconds: float = 30.0
    """Of time that one call may take."""
    memory_mb: int = 2048
    """That one call may take."""
    tolerance: float = 1e-9
    """By which values may differ that should be equal; 1e-5 for networks."""
    max_cpu_us: float | None = None
    """Microseconds of processor that an item may cost; default is no limit."""
    max_memory_mb: float | None = None
    """Megabytes that scoring may add to the peak of memory; default is no limit."""
    skip: tuple[str, ...] = ()
    """Checks that are not done."""
    json: bool = False
    """Print JSON and no table."""


def run(arguments: Sequence[str]) -> int:
    """Check, and print what was found."""
    options = list(arguments)
    if options[:1] == ["reward"]:
        del options[0]
    elif options and options[0] not in ("-h", "--help"):
        raise UsageError(f"write `textgym check reward {options[0]}`: rewards are what it checks")
    args = tyro.cli(CheckArgs, args=options, prog="textgym check reward", description=__doc__)
    with reported():
        reward = reward_of(args.reward)
        if not isinstance(reward, Reward):
            raise UsageError(
                f"{args.reward!r} is a schedule, which says when a reward is paid: check the "
                "reward that is inside it"
            )
        report = check_reward(
            reward,
            None if args.data is None else oracle_answers(args, reward),
            limits=Limits(args.cpu_seconds, args.wall_seconds, args.memory_mb),
            tolerance=args.tolerance,
            max_cpu_us=args.max_cpu_us,
            max_memory_mb=args.max_memory_mb,
            skip=args.skip,
        )
    if args.json:
        print(json.dumps(report.as_dict()))
    else:
        console = Console(highlight=False)
        console.print(table(report))
        console.print(f"statuses met: {escape(', '.join(report.statuses))}", style="dim")
        if report.failures:
            console.print(f"[red]failed:[/] {', '.join(check.name for check in report.failures)}")
    return 0 if report.ok else 1


def oracle_answers(args: CheckArgs, reward: Reward) -> list[Example]:
    """Read the rows of `--data`, whose answers are worth the reward's best value.

    Raises:
        ValueError: If there is no such file or column, or a row has no answer.
    """
    prompts = Prompts.load(args.data, prompt=args.prompt)
    if args.answer not in prompts.columns:
        raise ValueError(
            f"--answer: {args.data} has no column {args.answer!r}; it has "
            f"{', '.join(prompts.columns)}"
        )
    examples = []
    for number, row in enumerate(list(prompts)[: args.count]):
        answer: Any = row[args.answer]
        if isinstance(answer, list | tuple):
            answer = answer[0] if answer else None
        if answer is None:
            raise ValueError(f"{args.data}: row {number} has no {args.answer!r}")
        examples.append(Example(row, str(answer), reward.high))
    return examples


def table(report: Report) -> Table:
    """One row a check."""
    title = f"{report.reward} in [{report.low:g}, {report.high:g}]"
    found = Table(
        title=escape(title), title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    found.add_column("check", no_wrap=True)
    found.add_column("result", no_wrap=True)
    found.add_column("what was found", overflow="fold")
    for check in report.checks:
        color = COLORS[check.verdict]
        found.add_row(check.name, f"[{color}]{check.verdict}[/]", escape(check.detail))
    return found
