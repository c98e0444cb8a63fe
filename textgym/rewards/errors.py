"""What can go wrong with a reward, and how it is put into words."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Collection, Iterable
from typing import Any


class RewardError(RuntimeError):
    """A reward failed, and `strict=True` asked for failures to be raised."""


class RewardColumnError(ValueError):
    """A reward asks for a column that the prompt table does not have."""


class TextFailure(Exception):
    """The text itself makes scoring impossible: it does not parse, it takes too long.

    Raise it in a per-item reward, or return it as one item of a batch. The text gets the worst
    value that its reward declares and is not tried again.
    """


def check_column(asker: str, column: str, columns: Collection[str]) -> None:
    """Check that `column` is among `columns`.

    Raises:
        RewardColumnError: If not; says which columns exist and suggests the nearest.
    """
    if column not in columns:
        raise missing_column(asker, column, columns)


def missing_column(
    asker: str, column: str, columns: Iterable[str], also: Iterable[str] = ()
) -> RewardColumnError:
    """Make the error for a missing column; `also` are other names that could have been meant."""
    have = sorted(columns)
    near = difflib.get_close_matches(column, [*have, *also], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return RewardColumnError(
        f"{asker} needs the column {column!r}, which the prompt table does not have.{hint} "
        f"Its columns are: {', '.join(have) if have else '(none)'}."
    )


def describe(error: BaseException) -> str:
    """Put an exception into one short line, as `error: ValueError: boom`."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # an exception of the user's, which may have no words
        lines = []
    return f"error: {type(error).__name__}" + (f": {lines[0][:200]}" if lines else "")


def shown(value: Any) -> str:
    """Give the start of a value's `repr`, or its type where it has none."""
    try:
        return f"{value!r:.200}"
    except Exception:  # an integer of 5,000 digits, a class whose `__repr__` raises
        return f"<{type(value).__name__} that cannot be shown>"


def trace(error: BaseException) -> str:
    """Format an exception with its traceback."""
    return "".join(traceback.format_exception(error))
