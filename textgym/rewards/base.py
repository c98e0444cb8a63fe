"""The reward protocol: what a reward returns, and what happens when it fails.

A `Reward` gives a value to a text; `textgym.rewards.schedules` says when the value is paid. Rewards
are shared: they deep-copy as themselves and pickle by recipe (arguments, never caches or weights).

A failure is never a score that can be sought:

- *the text's fault* (`TextFailure`): the worst value of the reward, `low`, or `high` where the
  reward counts negatively;
- *the fault of a service or of the code* (an exception, None where a value is due, NaN, infinity, a
  wrong type, a wrong number of values): tried once more; then the text has no value, and a status
  says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from textgym.rewards.batch import TextBatch
from textgym.rewards.errors import TextFailure, describe, shown, trace
from textgym.rewards.scores import (
    NO_VALUE,
    TEXT_FAULT,
    FloatArray,
    Scores,
    as_items,
    as_number,
    is_number,
    with_retry,
)


class Cursor(Protocol):
    """The value of a text that grows, kept up to date piece by piece."""

    def push(self, piece: str) -> float:
        """Append `piece` and give the value of the text so far."""

    def copy(self) -> Cursor:
        """Give an independent copy."""


@dataclass(frozen=True)
class Corpus:
    """A score of n texts together, as a function of sums over them.

    Attributes:
        statistics: float64 `[n, k]`, sufficient statistics of each text.
        score: From sums `[..., k]` to scores `[...]`.
    """

    statistics: FloatArray
    score: Callable[[FloatArray], FloatArray]


@dataclass(frozen=True)
class Example:
    """What a reward thinks of a text: shown in the gallery, checked by `textgym.checks`."""

    row: Mapping[str, Any]
    """A row of a prompt table."""
    text: str
    """A response to it."""
    value: float
    """What it earns, to within 1e-9."""


class Reward:
    """Gives a value to each text of a batch.

    Subclasses implement `score` and may implement `check`, `begin`, `corpus` and `examples`. The
    bounds are finite and clip nothing: `low` is what a text gets that is itself at fault for a
    failure.

    Attributes:
        name: The name of the component in `info["reward"]` and in logs.
        low: The worst value.
        high: The best value.
        cheap: Scoring a whole text costs so little that a dense schedule needs no cursor.
        reads_only: `score` changes nothing in its batch, so it is not given a copy.
        per_text: The value of a text does not depend on the other texts of its batch.
        reads_tokens: It needs the token ids of responses, not only their texts.
        judges_content: Nonsense earns little. A reward of form alone, such as a length, says False.
    """

    name: str = "reward"
    low: float = 0.0
    high: float = 1.0
    reads_tokens: bool = False
    cheap: ClassVar[bool] = False
    reads_only: ClassVar[bool] = False
    per_text: ClassVar[bool] = True
    judges_content: ClassVar[bool] = True
    # Attributes that are left out of pickles and made anew where they are needed.
    transient: ClassVar[tuple[str, ...]] = ()
    # A NumPy scalar on the left leaves the operation to __rmul__ and __radd__.
    __array_ufunc__ = None

    def score(self, batch: TextBatch) -> Sequence[Any] | FloatArray:
        """Give for each text a number, None for no value, or the exception that befell it."""
        raise NotImplementedError(f"{type(self).__name__} does not implement score(batch)")

    def check(self, columns: Collection[str]) -> None:
        """Check that the prompt table has the columns that this reward reads.

        Raises:
            RewardColumnError: If one is missing; the message suggests the nearest.
        """

    def begin(self, row: Mapping[str, Any]) -> Cursor | None:
        """Begin a cursor at the empty response to a prompt row; None if the reward has none."""
        return None

    def fitted(self, rows: Sequence[Mapping[str, Any]]) -> Reward:
        """Give the reward with what it takes from the rows of the training split; mostly itself.

        A task calls it once with the first table of its prompts' family; what it gives is frozen.
        """
        return self

    def keep(self, folder: Path) -> None:
        """Write what `fitted` froze into the folder of a run, which is made if need be."""

    def corpus(self, batch: TextBatch) -> Corpus:
        """Score the batch as a whole: the mean of its values, where nothing better is defined."""
        values = self.evaluate(batch).values
        known = np.isfinite(values)
        statistics = np.stack([np.where(known, values, 0.0), known.astype(np.float64)], axis=1)
        return Corpus(statistics, mean_of_sums)

    def examples(self) -> tuple[Example, ...]:
        """Give texts with what they earn, the best first; nothing where there is no such text."""
        return ()

    def parts(self) -> tuple[tuple[float, Reward], ...]:
        """Split into (weight, reward) pairs, reported one by one, whose sum is this reward."""
        return ((1.0, self),)

    def named(self, name: str) -> Self:
        """Give the same reward under another name; a sum that is named is one component."""
        if not name:
            raise ValueError("a reward's name must not be empty")
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, name=name)
        return twin

    def trl(self) -> Callable[..., list[float | None]]:
        """Give the reward as a TRL reward function, `f(prompts, completions, **columns)`."""
        from textgym.rewards.interop import TRLFunction

        return TRLFunction(self)

    def evaluate(self, batch: TextBatch, *, optional: bool = False, strict: bool = False) -> Scores:
        """Score a batch; failures become statuses after one retry of the texts that failed.

        Args:
            batch: The texts.
            optional: No value means "does not apply" and is not a failure.
            strict: Raise the first failure at once.

        Raises:
            RewardError: If `strict` and a text could not be scored.
        """

        def attempt(rows: Sequence[int]) -> Scores:
            part = batch if len(rows) == len(batch) else batch.take(rows)
            try:
                returned = self.score(part if self.reads_only else part.private())
                items = as_items(returned, len(part))
            except Exception as error:
                n = len(part)
                return Scores(np.full(n, np.nan), [describe(error)] * n, trace(error))
            return self.read(items, part.texts, optional=optional)

        return with_retry(attempt, len(batch), self.name, optional=optional, strict=strict)

    def read(self, items: Sequence[Any], texts: Sequence[str], *, optional: bool) -> Scores:
        """Read what `score` or cursors gave for `n` texts, item by item."""
        if all(type(item) is float for item in items):
            values = np.array(items, np.float64)
            if np.isfinite(values).all():  # nearly always, and ten times faster
                return Scores(values, [None] * len(items))
        scores = Scores(np.full(len(items), np.nan), [None] * len(items))
        for i, item in enumerate(items):
            status: str | None
            if isinstance(item, TextFailure):
                scores.values[i], status = self.low, f"{TEXT_FAULT}{item}"
            elif isinstance(item, BaseException):
                status = describe(item)
                scores.traceback = scores.traceback or trace(item)
            else:
                scores.values[i], status = as_number(item)
                if status is not None and not (optional and status == NO_VALUE):
                    scores.traceback = scores.traceback or (
                        f"Reward {self.name!r} returned {shown(item)} for the text "
                        f"{texts[i]!r:.200}: expected a finite number."
                    )
            scores.status[i] = status
        return scores

    def __add__(self, other: Any) -> Reward:
        from textgym.rewards.compose import add

        return add(self, other)

    def __radd__(self, other: Any) -> Reward:
        from textgym.rewards.compose import add

        return add(self, other, reverse=True)

    def __neg__(self) -> Reward:
        from textgym.rewards.compose import multiply

        return multiply(self, -1.0)

    def __sub__(self, other: Any) -> Reward:
        from textgym.rewards.compose import add

        return add(self, other, sign=-1.0)

    def __rsub__(self, other: Any) -> Reward:
        return (-self).__radd__(other)

    def __mul__(self, other: Any) -> Reward:
        from textgym.rewards.compose import multiply

        return multiply(self, other)

    def __rmul__(self, other: Any) -> Reward:
        from textgym.rewards.compose import multiply

        return multiply(self, other, reverse=True)

    def __truediv__(self, other: Any) -> Reward:
        return self * (1.0 / other) if is_number(other) else NotImplemented

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in self.transient}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} in [{self.low:g}, {self.high:g}]>"


def mean_of_sums(sums: FloatArray) -> FloatArray:
    """Divide sums of values by how many there are, `[..., 2]`; NaN where there is none."""
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def check_bounds(low: float, high: float) -> tuple[float, float]:
    """Give the bounds of a reward as finite floats in order.

    Raises:
        ValueError: If they are not.
    """
    low, high = float(low), float(high)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"a reward's bounds must be finite with low <= high, got [{low}, {high}]")
    return low, high
