"""Sums and products of rewards, which are rewards."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from textgym.rewards.base import Cursor, Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.scores import NO_VALUE, FloatArray, Scores, is_number, text_at_fault


def add(left: Reward, right: Any, *, sign: float = 1.0, reverse: bool = False) -> Reward:
    """Give `left + sign * right` (or, with `reverse`, `right + left`) as a reward."""
    if is_number(right):
        if right == 0:  # what sum() starts from
            return left
        raise TypeError(
            f"a reward plus the number {right} is not a reward: a constant changes no policy. "
            "To scale a reward, multiply it."
        )
    other = _operand(right)
    if other is None:
        return NotImplemented  # type: ignore[no-any-return]
    terms = [*left.parts(), *((sign * weight, part) for weight, part in other.parts())]
    if reverse:
        terms = [*other.parts(), *left.parts()]
    return Sum(terms)


def multiply(left: Reward, right: Any, *, reverse: bool = False) -> Reward:
    """Give a reward times a number, or times a gate."""
    if is_number(right):
        return Sum([(float(right) * weight, part) for weight, part in left.parts()])
    other = _operand(right)
    if other is None:
        return NotImplemented  # type: ignore[no-any-return]
    factors = (other, left) if reverse else (left, other)
    # Numbers are taken out of the product, so that the component is reported without its weight.
    weight, bare = 1.0, []
    for factor in factors:
        parts = factor.parts()
        weight *= parts[0][0] if len(parts) == 1 else 1.0
        bare.append(parts[0][1] if len(parts) == 1 else factor)
    product = Product(*bare)
    return product if weight == 1.0 else Sum([(weight, product)])


def _operand(value: Any) -> Reward | None:
    if isinstance(value, Reward):
        return value
    if callable(value):
        from textgym.rewards.functions import as_reward

        return as_reward(value)
    return None


class Sum(Reward):
    """A weighted sum of rewards. A part of weight 0 is a metric: it is reported and pays nothing.

    Args:
        terms: (weight, reward) pairs.
    """

    reads_only = True

    def __init__(self, terms: list[tuple[float, Reward]]) -> None:
        for weight, part in terms:
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {part.name!r} must be finite, got {weight}")
        self.terms = tuple(terms)
        self.name = _sum_name(self.terms)
        self.low, self.high = weighted_bounds(self.terms)
        self.reads_tokens = any(part.reads_tokens for _, part in terms)
        self._is_named = False

    def named(self, name: str) -> Sum:
        """Give the sum as one component of this name."""
        twin = super().named(name)
        twin._is_named = True
        return twin

    def parts(self) -> tuple[tuple[float, Reward], ...]:
        """Give the terms; a sum that was named is one part."""
        return ((1.0, self),) if self._is_named else self.terms

    def check(self, columns: Collection[str]) -> None:
        """Check every part."""
        for _, part in self.terms:
            part.check(columns)

    def fitted(self, rows: Sequence[Mapping[str, Any]]) -> Reward:
        """Give the sum of the fitted parts."""
        terms = [(weight, part.fitted(rows)) for weight, part in self.terms]
        if all(new is old for (_, new), (_, old) in zip(terms, self.terms, strict=True)):
            return self
        return Sum(terms).named(self.name) if self._is_named else Sum(terms)

    def keep(self, folder: Path) -> None:
        """Write what the parts froze."""
        for _, part in self.terms:
            part.keep(folder)

    def begin(self, row: Mapping[str, Any]) -> Cursor | None:
        """Begin a cursor if every part that counts has one."""
        counting = [(weight, part) for weight, part in self.terms if weight]
        cursors = [part.begin(row) for _, part in counting]
        found = [cursor for cursor in cursors if cursor is not None]
        if len(found) < len(cursors):
            return None
        return _Combined(found, [weight for weight, _ in counting])

    def score(self, batch: TextBatch) -> FloatArray:
        """Give the values of the sum, NaN where there is none."""
        return self.evaluate(batch).values

    def evaluate(self, batch: TextBatch, *, optional: bool = False, strict: bool = False) -> Scores:
        """Score every part that counts; parts without a value do not apply and count 0."""
        counting = [(weight, part) for weight, part in self.terms if weight]
        several = len(counting) > 1
        scored = [
            part.evaluate(batch, optional=optional or several, strict=strict)
            for _, part in counting
        ]
        values = np.zeros(len(batch))
        for (weight, _), scores in zip(counting, scored, strict=True):
            values += weight * np.nan_to_num(scores.values)
        return merge(self, values, scored, all_needed=False)


class Product(Reward):
    """The product of two rewards; a gate is a reward of 0 or 1. No value in either is no value.

    Args:
        left: The one factor.
        right: The other.
    """

    reads_only = True

    def __init__(self, left: Reward, right: Reward) -> None:
        self.left, self.right = left, right
        self.name = "*".join(_bracketed(factor) for factor in (left, right))
        self.reads_tokens = left.reads_tokens or right.reads_tokens
        corners = [a * b for a in (left.low, left.high) for b in (right.low, right.high)]
        self.low, self.high = min(corners), max(corners)

    def check(self, columns: Collection[str]) -> None:
        """Check both factors."""
        self.left.check(columns)
        self.right.check(columns)

    def fitted(self, rows: Sequence[Mapping[str, Any]]) -> Reward:
        """Give the product of the fitted factors."""
        left, right = self.left.fitted(rows), self.right.fitted(rows)
        if left is self.left and right is self.right:
            return self
        return Product(left, right).named(self.name)

    def keep(self, folder: Path) -> None:
        """Write what the factors froze."""
        self.left.keep(folder)
        self.right.keep(folder)

    def begin(self, row: Mapping[str, Any]) -> Cursor | None:
        """Begin a cursor if both factors have one."""
        left, right = self.left.begin(row), self.right.begin(row)
        return None if left is None or right is None else _Combined([left, right], None)

    def score(self, batch: TextBatch) -> FloatArray:
        """Give the values of the product, NaN where there is none."""
        return self.evaluate(batch).values

    def evaluate(self, batch: TextBatch, *, optional: bool = False, strict: bool = False) -> Scores:
        """Score both factors."""
        scored = [
            factor.evaluate(batch, optional=optional, strict=strict)
            for factor in (self.left, self.right)
        ]
        return merge(self, scored[0].values * scored[1].values, scored, all_needed=True)


class _Combined:
    """The cursor of a weighted sum, or, without weights, of a product."""

    __slots__ = ("cursors", "weights")

    def __init__(self, cursors: list[Cursor], weights: list[float] | None) -> None:
        self.cursors, self.weights = cursors, weights

    def push(self, piece: str) -> float:
        values = [cursor.push(piece) for cursor in self.cursors]
        if self.weights is None:
            return math.prod(values)
        return sum(w * value for w, value in zip(self.weights, values, strict=True))

    def copy(self) -> _Combined:
        return _Combined([cursor.copy() for cursor in self.cursors], self.weights)


def merge(whole: Reward, values: FloatArray, scored: list[Scores], *, all_needed: bool) -> Scores:
    """Give the scores of a composition from those of its parts.

    A failure of any part is the failure of the whole; else a fault of the text gives the worst
    value of the whole, whatever the sign of the part.

    Args:
        whole: The composition.
        values: float64 `[n]`, its values where all is good.
        scored: The scores of its parts.
        all_needed: One part without a value leaves the whole without one.
    """
    result = Scores(values, [None] * len(values))
    result.traceback = next((s.traceback for s in scored if s.traceback is not None), None)
    for i in range(len(values)):
        statuses = [s.status[i] for s in scored]
        reasons = [status for status in statuses if status is not None]
        if not reasons and scored:
            continue
        missing = sum(reason == NO_VALUE for reason in reasons)
        faults = [reason for reason in reasons if text_at_fault(reason)]
        failures = [r for r in reasons if r != NO_VALUE and not text_at_fault(r)]
        if failures:
            values[i], result.status[i] = math.nan, failures[0]
        elif (missing and all_needed) or missing == len(scored):
            values[i], result.status[i] = math.nan, NO_VALUE
        elif faults:
            values[i], result.status[i] = whole.low, faults[0]
    return result


def weighted_bounds(terms: Any) -> tuple[float, float]:
    """Give the bounds of a weighted sum from those of its (weight, reward) terms."""
    corners = [(weight * part.low, weight * part.high) for weight, part in terms]
    return sum(min(pair) for pair in corners), sum(max(pair) for pair in corners)


def _sum_name(terms: tuple[tuple[float, Reward], ...]) -> str:
    return "+".join(
        part.name if weight == 1.0 else f"{weight:g}*{part.name}" for weight, part in terms
    ).replace("+-", "-")


def _bracketed(factor: Reward) -> str:
    return f"({factor.name})" if len(factor.parts()) > 1 else factor.name
