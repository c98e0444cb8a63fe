"""Write docs/rewards.md: every registered reward, what it costs, and what its tokens earn.

`python scripts/make_gallery.py` measures on this machine and overwrites the page.
"""

from __future__ import annotations

import functools
import inspect
import os

os.environ["OMP_NUM_THREADS"] = "1"

import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from machine import ROOT, described

import textgym.rewards
from textgym.checks import Report, check_reward
from textgym.checks.probes import as_batch
from textgym.rewards import REWARDS, Example, Reward, Schedule, dense, make_reward, terminal

PAGE = ROOT / "docs" / "rewards.md"
TOKENS = 8  # of a picture
BARS = " ▁▂▃▄▅▆▇█"
INTRODUCTION = """# The rewards

Written by `python scripts/make_gallery.py`, which measured on {machine}, {cores} cores (shared),
Python {python}, commit {commit}. All are imported from
`textgym.rewards`; their docstrings explain the arguments, and [conformance.md](conformance.md)
says how rewards are checked.

- **µs a text**: CPU time of one thread to score the examples shown here, caches filled. Verifiers
  that ask a worker pool or the sandbox remember verdicts, so theirs is the cost of a text seen
  before; a new one costs a call of a worker.
- **µs a word**: CPU time of a cursor for one more word of these texts; `–` where there is no
  cursor and a dense schedule scores the whole text again.
- **statuses**: what the examples and the hostile texts of `textgym check reward` met besides
  a value. A text that is itself at fault (`text: ...`) earns the worst value of the range.
- In the pictures a token is a word, or some words where there are many. `terminal` pays the last
  one, `dense` pays each for what it adds; both add up to the value. A bar is as high as the amount.
"""


@dataclass(frozen=True)
class Args:
    """Where to write."""

    output: Path = PAGE
    """The page."""
    names: tuple[str, ...] = ()
    """Only these rewards, to try it out; default is all."""


def pieces_of(text: str) -> list[str]:
    """Split a text into words with the space before each, joined evenly where there are many."""
    words = re.findall(r"\s*\S+|\s+\Z", text) or [text]
    size = -(-len(words) // TOKENS)
    return ["".join(words[i : i + size]) for i in range(0, len(words), size)]


def paid(schedule: Schedule, example: Example, pieces: list[str]) -> list[float]:
    """What a schedule pays for each piece of an example."""
    track, text, amounts = schedule.begin(example.row, ""), "", []
    for k, piece in enumerate(pieces):
        text += piece
        last = np.array([k == len(pieces) - 1])
        if last[0] or schedule.every_step:
            batch = as_batch([text], [example.row])
            amounts.append(float(schedule.pay([track], batch, last, ~last).reward[0]))
        else:
            amounts.append(0.0)
    return amounts


def picture(reward: Reward, example: Example) -> str:
    """Three rows: the tokens, and what each earns under both schedules, with a bar."""
    pieces = pieces_of(example.text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rewards without a cursor
        rows = {
            "terminal": paid(terminal(reward), example, pieces),
            "dense": paid(dense(reward), example, pieces),
        }
    largest = max((abs(v) for amounts in rows.values() for v in amounts), default=0.0) or 1.0
    shown = [shortened(" ".join(piece.split()), 16) or "·" for piece in pieces]
    cells = {name: [amount(value, largest) for value in amounts] for name, amounts in rows.items()}
    widths = [
        max(len(shown[k]), *(len(row[k]) for row in cells.values())) for k in range(len(pieces))
    ]
    lines = [
        f"{name:<9}" + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        for name, row in {"": shown, **cells}.items()
    ]
    return "\n".join(line.rstrip() for line in lines)


def amount(value: float, largest: float) -> str:
    """A number with a bar as high as its share of the largest."""
    if abs(value) < 5e-4:
        return "·"
    height = max(1, round(abs(value) / largest * (len(BARS) - 1)))
    return f"{value:+.3g}".replace("-", "−") + BARS[height]


def shortened(text: str, longest: int) -> str:
    """Cut a long text."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def push_cost(reward: Reward, examples: tuple[Example, ...]) -> float | None:
    """Microseconds of CPU for one more token; None without a cursor."""
    if reward.begin(examples[0].row) is None:
        return None
    count, began = 0, time.process_time()
    while time.process_time() - began < 0.2:
        for example in examples:
            cursor = reward.begin(example.row)
            assert cursor is not None
            for piece in re.findall(r"\s*\S+", example.text):
                cursor.push(piece)
                count += 1
    return (time.process_time() - began) / max(1, count) * 1e6


def section(name: str, reward: Reward, report: Report, push_us: float | None) -> str:
    """Everything about one reward."""
    made = REWARDS[name]
    kind = made.func if isinstance(made, functools.partial) else made
    doc = inspect.getdoc(kind) or ""
    paragraph = doc.split("\n\n", 1)[0].replace("\n", " ")
    lines = [f"## `{name}`", "", paragraph, ""]
    lines += ["```python", signature(made), "```", ""]
    examples = reward.examples()
    columns = sorted({column for example in examples for column in example.row})
    facts = [
        f"range [{reward.low:g}, {reward.high:g}]",
        f"columns of the examples: {', '.join(f'`{c}`' for c in columns) or 'none'}",
        f"{report.cost['cpu_us']:.3g} µs a text",
        "no cursor" if push_us is None else f"cursor, {push_us:.3g} µs a word",
        f"statuses: {statuses(report)}",
    ]
    lines.append(" · ".join(facts))
    row = None
    for example in examples:
        if example.row != row:
            row = example.row
            given = ", ".join(f"`{n}`: {code(v, 160)}" for n, v in row.items())
            first = f"Given {given}:" if given else "Given nothing:"
            lines += ["", first, "", "| value | text |", "|---|---|"]
        lines.append(f"| {example.value:.4g} | {code(example.text, 120)} |")
    if examples and reward.per_text:
        between = [e for e in examples if reward.low < e.value < reward.high]
        shown = (between or list(examples))[0]
        lines += ["", "```text", picture(reward, shown), "```"]
    elif examples:
        lines += ["", "It looks at the whole batch: the examples are scored together."]
    return "\n".join(lines)


def signature(made: Callable[..., Reward]) -> str:
    """What makes a reward, with its arguments: those of a registered name, else the defaults."""
    given: dict[str, object] = {}
    kind: Any = made
    if isinstance(made, functools.partial):
        kind = made.func
        given = inspect.signature(kind).bind_partial(*made.args, **made.keywords).arguments
    parts, starred = [], False
    for parameter in inspect.signature(kind).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        default = given.get(parameter.name, parameter.default)
        shown = "" if default is parameter.empty else f"={default!r}".replace("'", '"')
        parts.append(parameter.name + shown)
    return f"{kind.__name__}({', '.join(parts)})"


def statuses(report: Report) -> str:
    """What was met that is not a value."""
    return ", ".join(f"`{s}`" for s in report.statuses if s != "ok") or "none"


def code(value: object, longest: int) -> str:
    """A value as Markdown code that fits into a table."""
    text = shortened(repr(value), longest).replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def others() -> list[str]:
    """The rewards that are not registered, most of which need arguments."""
    known = {type(make_reward(name)).__name__ for name in REWARDS}
    lines = [
        "## Not registered",
        "",
        "The command line knows no name of these; it takes an object of yours, as `module:object`.",
        "",
    ]
    for name in textgym.rewards.__all__:
        kind = getattr(textgym.rewards, name)
        if isinstance(kind, type) and issubclass(kind, Reward) and name not in known | {"Reward"}:
            lines.append(f"- `{signature(kind)}`: {(inspect.getdoc(kind) or '').splitlines()[0]}")
    return lines


def main(args: Args) -> None:
    """Measure and write."""
    about = described(("textgym",))
    head = INTRODUCTION.format(machine=about["processor"], **about)
    table = ["| reward | range | µs a text | µs a word | statuses |", "|---|---|---|---|---|"]
    sections = []
    for name in args.names or REWARDS:
        reward = make_reward(name)
        reward = reward.fitted([example.row for example in reward.examples()])
        report = check_reward(reward)
        push_us = push_cost(reward, reward.examples())
        pushed = "–" if push_us is None else f"{push_us:.3g}"
        bounds = f"[{reward.low:g}, {reward.high:g}]"
        cost = f"{report.cost['cpu_us']:.3g}"
        table.append(
            f"| [`{name}`](#{name.lower()}) | {bounds} | {cost} | {pushed} | {statuses(report)} |"
        )
        sections.append(section(name, reward, report, push_us))
        print(name, "ok" if report.ok else f"\n{report}", flush=True)
    parts = [head, "\n".join(table), *sections, "\n".join(others())]
    args.output.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args))
