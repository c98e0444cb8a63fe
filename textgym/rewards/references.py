"""Reading reference texts from a row of the prompt table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def references_of(row: Mapping[str, Any], column: str, asker: str) -> tuple[str, ...]:
    """Give the references of a row: a string, or a list of strings, in the column.

    Raises:
        ValueError: If the row has none, or they are not strings.
    """
    value = row.get(column)
    texts = (value,) if isinstance(value, str) else value
    if isinstance(texts, list | tuple) and texts and all(isinstance(t, str) for t in texts):
        return tuple(texts)
    raise ValueError(
        f"{asker} expected a string or a non-empty list of strings in the column {column!r}, "
        f"got {value!r:.200}"
    )
