"""What scoring came to: values, what went wrong, and one more try for what failed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from textgym.rewards.errors import RewardError, shown

FloatArray = NDArray[np.float64]

NO_VALUE = "none"
TEXT_FAULT = "text: "


def text_at_fault(status: str | None) -> bool:
    """Tell whether a status says that the text is at fault, which then has the worst value."""
    return status is not None and status.startswith(TEXT_FAULT)


@dataclass
class Scores:
    """The outcome of scoring `n` texts.

    Attributes:
        values: float64 `[n]`; NaN where there is no value.
        status: None where the value is good; `"none"` where the reward gave none; `"text: ..."`
            where the text is at fault and the value is the worst one; else what failed.
        traceback: The first traceback, or a sentence if nothing was raised; None if all is good.
    """

    values: FloatArray
    status: list[str | None]
    traceback: str | None = None

    def failed(self, *, optional: bool) -> list[int]:
        """List the texts that failed; with `optional`, giving no value is not a failure."""
        return [
            i
            for i, status in enumerate(self.status)
            if status is not None
            and not text_at_fault(status)
            and not (optional and status == NO_VALUE)
        ]


def with_retry(
    attempt: Callable[[Sequence[int]], Scores], n: int, name: str, *, optional: bool, strict: bool
) -> Scores:
    """Score `n` texts, and those that failed once more.

    Args:
        attempt: Scores the texts of the given indices.
        n: How many texts there are.
        name: The reward, for the error.
        optional: No value means "does not apply" and is not a failure.
        strict: Raise the first failure at once.

    Raises:
        RewardError: If `strict` and a text could not be scored.
    """
    scores = attempt(range(n))
    failed = scores.failed(optional=optional)
    if not failed:
        return scores
    if strict:
        raise strict_error(name, scores.status[failed[0]], scores.traceback)
    again = attempt(failed)
    scores.values[failed] = again.values
    for i, status in zip(failed, again.status, strict=True):
        scores.status[i] = status
    return scores


def strict_error(name: str, status: str | None, traceback: str | None) -> RewardError:
    """Make the error that `strict=True` raises for a failed reward."""
    return RewardError(
        f"reward {name!r} failed ({status}), and strict=True raises failures.\n{traceback or ''}"
    )


def is_number(value: Any) -> bool:
    """Tell whether a value is a real number: Python's, or a NumPy scalar."""
    return isinstance(value, numbers.Real | np.bool_)


def as_number(item: Any) -> tuple[float, str | None]:
    """Read one returned value as (float, status)."""
    if item is None:
        return math.nan, NO_VALUE
    if not is_number(item):
        if getattr(item, "ndim", None) == 0 and callable(getattr(item, "item", None)):
            return as_number(item.item())
        return math.nan, f"type: {type(item).__name__}"
    try:
        value = float(item)
    except OverflowError:
        value = math.inf
    if math.isfinite(value):
        return value, None
    return math.nan, "nan" if math.isnan(value) else "inf"


def as_items(returned: Any, n: int) -> list[Any]:
    """Read what a batch reward returned as a list of `n` items.

    Raises:
        TypeError: If it is not a list, a tuple or an array.
        ValueError: If its length is not `n`.
    """
    if isinstance(returned, list | tuple):
        items = list(returned)
    elif callable(getattr(returned, "tolist", None)) and getattr(returned, "ndim", 1) > 0:
        items = returned.tolist()
    else:
        raise TypeError(
            f"a reward over a batch must return a list of {n} values, one per text, "
            f"got {type(returned).__name__}: {shown(returned)}"
        )
    if len(items) != n:
        raise ValueError(f"a reward returned {len(items)} values for {n} texts")
    return items
