"""What rewards share that compare a text with references."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from textgym.rewards.base import Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.errors import check_column


class TextMetric(Reward):
    """Compares each text by itself with the references in a column of its row.

    Subclasses implement `value`, or `begin` where a cursor scores a whole text as cheaply.

    Attributes:
        column: The column of the references, a string or a list of strings.
    """

    reads_only = True
    column: str

    def check(self, columns: Collection[str]) -> None:
        """Check that the references are there."""
        check_column(f"reward {self.name!r}", self.column, columns)

    def references(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Give the references of a row.

        Raises:
            ValueError: If the row has none, or they are not strings.
        """
        value = row.get(self.column)
        texts = (value,) if isinstance(value, str) else value
        if isinstance(texts, list | tuple) and texts and all(isinstance(t, str) for t in texts):
            return tuple(texts)
        raise ValueError(
            f"reward {self.name!r} expected a string or a non-empty list of strings in the column "
            f"{self.column!r}, got {value!r:.200}"
        )

    def score(self, batch: TextBatch) -> list[Any]:
        """Score each text."""
        return batch.each(self.value)

    def value(self, text: str, row: Mapping[str, Any]) -> float:
        """Score one text, by a new cursor.

        Raises:
            ValueError: If the references of the row cannot be used.
        """
        cursor = self.begin(row)
        if cursor is None:
            raise NotImplementedError(f"{type(self).__name__} implements neither value nor begin")
        return cursor.push(text)
