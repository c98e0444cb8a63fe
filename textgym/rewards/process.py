"""Process rewards: a response is split into steps, and each step is paid on its last token.

    r_t = φ_k − φ_(k−1)   where token t ends step k, else 0,   φ_0 := 0,

with `v_k` the value of step k and, by `total`,

| total | φ_k | what an episode earns |
|---|---|---|
| `"sum"` | `v_1 + … + v_k` | the sum of its steps' values (Uesato et al. 2022) |
| `"mean"` | `(v_1 + … + v_k) / k` | their mean: each step moves the running mean |
| `"growth"` | `v_k`, of the text so far | the whole text's value, by the steps that raised it |

A step ends where a separator ends, on the token that completes it. White space alone is no step. A
policy that is paid a sum is paid for writing steps: give a step without merit 0 or less, or pay the
mean. What an unfinished step is worth is not known: a truncated episode is not paid for it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from textgym.rewards.base import Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.functions import as_reward
from textgym.rewards.payers import Paid, Payer, failures, settled
from textgym.rewards.schedules import Schedule
from textgym.rewards.verifiers.pattern import compile_re2, encodable

Total = Literal["sum", "mean", "growth"]
Sees = Literal["step", "prefix"]

FIELDS = ("step", "prefix", "step_number")
"""The columns that a step's scorer finds in its row besides those of the table."""


def steps(
    reward: Any,
    separator: str = "\n\n",
    *,
    pattern: str | re.Pattern[str] | None = None,
    sees: Sees = "step",
    total: Total = "sum",
) -> Schedule:
    r"""Split a response into steps, score each, and pay it on the step's last token.

    The scorer is asked once a step of the environment, about the steps of all rows that ended in
    it. Its columns are those of the table and `step` (without the separator), `prefix` (the
    response up to the end of the step) and `step_number` (from 1), so that
    `def f(prompt, step, prefix, step_number, answer)` gets all there is. Where it fails, the
    episode is unscored, as with every reward.

    Args:
        reward: The scorer; anything that `as_reward` takes: a callable, a verifier, a model.
        separator: What stands between two steps.
        pattern: A regular expression in its place. A string is matched in linear time (by
            google-re2, which knows neither look-around nor back-references); a compiled
            `re.Pattern` is matched as it is: only for patterns of your own that cannot explode. A
            match counts as soon as it is there, so end a pattern in something definite: `Step \d+:`
            and not `Step \d+`. A match of no characters parts nothing.
        sees: What the scorer gets as `text`: the step, or the response up to the end of the step.
        total: What the payments of an episode add up to: the `"sum"` of its steps' values, their
            `"mean"`, or, by `"growth"`, the value of the whole response (`sees="prefix"`): so a
            score of the whole response is credited to the steps that raised it.

    Returns:
        A schedule. Its `low` and `high` are those of one step.

    Raises:
        ValueError: If there is nothing to split at, or the arguments contradict each other.
        ImportError: If the pattern is a string and google-re2 is not installed.
    """
    if sees not in ("step", "prefix"):
        raise ValueError(f"sees must be 'step' or 'prefix', got {sees!r}")
    if total not in ("sum", "mean", "growth"):
        raise ValueError(f"total must be 'sum', 'mean' or 'growth', got {total!r}")
    if total == "growth" and sees != "prefix":
        raise ValueError(
            "total='growth' pays the growth of the value of the text so far: say sees='prefix'"
        )
    parting = FixedSeparator(separator) if pattern is None else PatternSeparator(pattern)
    parts = as_reward(reward).parts()
    return Schedule([(weight, Steps(part, parting, sees, total)) for weight, part in parts])


@dataclass(frozen=True)
class Step:
    """One step of a response: its number from 1, its text, and the response up to its end."""

    number: int
    text: str
    prefix: str


class Separator(Protocol):
    """What finds the ends of steps."""

    def find(self, text: str, start: int) -> Iterator[tuple[int, int]]:
        """Where the separators begin and end, from `start` on; in linear time for all of them."""


class FixedSeparator:
    """A fixed string between two steps."""

    def __init__(self, separator: str) -> None:
        if not separator:
            raise ValueError("the separator of steps must not be empty")
        self.separator = separator

    def find(self, text: str, start: int) -> Iterator[tuple[int, int]]:
        """Find the string."""
        while (at := text.find(self.separator, start)) >= 0:
            start = at + len(self.separator)
            yield at, start


class PatternSeparator:
    """A regular expression between two steps: RE2's, or one of `re` that the user vouches for."""

    def __init__(self, pattern: str | re.Pattern[str]) -> None:
        self.pattern: Any = compile_re2(pattern) if isinstance(pattern, str) else pattern

    def find(self, text: str, start: int) -> Iterator[tuple[int, int]]:
        """Find the matches that are not empty."""
        # By one iterator: each search of RE2's reads the text anew from its beginning.
        for match in self.pattern.finditer(encodable(text), start):
            if match.start() < match.end():
                yield match.start(), match.end()


class Written:
    """How far a response has been split and paid."""

    __slots__ = ("known", "number", "phi", "settled", "values")

    def __init__(self) -> None:
        self.settled = ""  # the steps that have ended, with their separators
        self.number = 0  # how many they are
        self.known = 0  # how many of them have a value
        self.values = 0.0  # the sum of those
        self.phi = 0.0  # what has been paid

    def advance(self, text: str, separator: Separator, *, over: bool, whole: bool) -> list[Step]:
        """Give the steps that have ended since the last call.

        A text that was withdrawn into steps that had ended goes on from where it differs; what was
        paid stays paid.

        Args:
            text: The response so far.
            separator: What ends a step.
            over: There is no more to come, so the rest is a step as well.
            whole: The last of all is a step even where nothing is left for it.
        """
        start = len(self.settled)
        if not text.startswith(self.settled):
            pairs = zip(text, self.settled, strict=False)
            start = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(text), start))
        ended: list[Step] = []
        for stop, after in separator.find(text, start):
            self._end(ended, text, start, stop)
            start = after
        self.settled = text[:start]
        if over and (not self._end(ended, text, start, len(text)) and whole):
            self.number += 1
            ended.append(Step(self.number, text[start:], text))
        return ended

    def _end(self, ended: list[Step], text: str, start: int, stop: int) -> bool:
        step = text[start:stop]
        if not step.strip():
            return False
        self.number += 1
        ended.append(Step(self.number, step, text[:stop]))
        return True

    def gain(self, value: float, total: Total) -> float:
        """Take in the value of the next step; gives what it is paid."""
        self.known += 1
        self.values += value
        if total == "sum":
            return value
        phi = value if total == "growth" else self.values / self.known
        gain, self.phi = phi - self.phi, phi
        return gain

    def copy(self) -> Written:
        """Give an exact, independent copy."""
        twin = Written()
        twin.settled, twin.number, twin.known = self.settled, self.number, self.known
        twin.values, twin.phi = self.values, self.phi
        return twin


class Steps(Payer):
    """Pay each step on its last token."""

    every_step = True

    def __init__(self, reward: Reward, separator: Separator, sees: Sees, total: Total) -> None:
        super().__init__(reward)
        self.separator, self.sees, self.total = separator, sees, total

    def check(self, columns: Collection[str]) -> None:
        """Check that the scorer's columns are there, and that none hides what it is given.

        Raises:
            ValueError: If the table has a column of the name of a field.
        """
        taken = [field for field in FIELDS if field in columns]
        if taken:
            raise ValueError(
                f"steps gives its scorer the columns {', '.join(FIELDS)}, but the prompt table has "
                f"{', '.join(taken)} already: rename it"
            )
        self.reward.check([*columns, *FIELDS])

    def begin(self, row: Mapping[str, Any]) -> Written:
        """Begin before the first step."""
        return Written()

    def pay(
        self,
        states: list[Any],
        batch: TextBatch,
        terminated: NDArray[np.bool_],
        *,
        worst: Literal["low", "high"],
        optional: bool,
        strict: bool,
    ) -> Paid:
        """Pay the steps that ended, scored in one batch; nothing applies to the other rows."""
        n, growth = len(batch), self.total == "growth"
        ended: list[tuple[int, Step]] = []
        for i, state in enumerate(states):
            over = bool(terminated[i])
            new = state.advance(batch.texts[i], self.separator, over=over, whole=growth)
            ended += ((i, step) for step in new)
        gain = np.full(n, np.nan)
        status: list[str | None] = [None] * n
        traceback = None
        if ended:
            asked = self._ask(batch, ended)
            scores = self.reward.evaluate(asked, optional=optional, strict=strict)
            values = settled(scores, self.reward, worst)
            traceback = scores.traceback
            failed = failures(scores, optional)
            for (i, _), value, failure in zip(ended, values, failed, strict=True):
                status[i] = status[i] or failure
                if not np.isnan(value):
                    earned = states[i].gain(float(value), self.total)
                    gain[i] = earned if np.isnan(gain[i]) else gain[i] + earned
        silent = np.array([state.known == 0 for state in states], np.bool_)
        for i, state in enumerate(states):
            if status[i] is not None:
                gain[i] = np.nan
            elif terminated[i] and not state.number:
                # No step at all: a sum of nothing; in a mean it is the fault of the text.
                gain[i] = 0.0 if self.total == "sum" else getattr(self.reward, worst)
                silent[i] = False
        return Paid(gain, silent, status, traceback)

    def _ask(self, batch: TextBatch, ended: list[tuple[int, Step]]) -> TextBatch:
        """The batch of steps: their rows as the table has them, with what a step adds."""
        asked = batch.take(i for i, _ in ended)
        rows: list[Mapping[str, Any]] = [
            {**row, "step": step.text, "prefix": step.prefix, "step_number": step.number}
            for row, (_, step) in zip(asked.rows, ended, strict=True)
        ]
        texts = [step.text if self.sees == "step" else step.prefix for _, step in ended]
        return replace(asked, texts=texts, rows=rows)
