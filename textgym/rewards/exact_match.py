"""Whether a response is exactly one of the references."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from textgym.rewards.base import Example, Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.errors import check_column
from textgym.rewards.token_f1 import squad_words


class ExactMatch(Reward):
    """1 if the response is one of the references, else 0; space around either is ignored.

    Columns: `references`, a string or a number, or a list of them. Statuses: none. Cost: linear
    in the text.

    Args:
        column: The column of the references.
        lowercase: Ignore case.
        squad: Compare the words that are left by SQuAD's normalisation (Rajpurkar et al. 2016):
            without case, ASCII punctuation and English articles.
    """

    cheap = True
    reads_only = True

    def __init__(
        self, column: str = "references", *, lowercase: bool = False, squad: bool = False
    ) -> None:
        self.name = "exact_match"
        self.column, self.lowercase, self.squad = column, lowercase, squad

    def check(self, columns: Collection[str]) -> None:
        """Check that the references are there."""
        check_column(f"reward {self.name!r}", self.column, columns)

    def score(self, batch: TextBatch) -> list[Any]:
        """Compare each text with its references."""
        return [
            self._match(text, value)
            for text, value in zip(batch.texts, batch.column(self.column), strict=True)
        ]

    def _match(self, text: str, value: Any) -> Any:
        references = value if isinstance(value, list | tuple) else [value]
        if not references or not all(isinstance(r, str | int | float) for r in references):
            return ValueError(
                f"reward {self.name!r} expected a string or a number, or a non-empty list of them, "
                f"in the column {self.column!r}, got {value!r:.200}"
            )
        written = self._plain(text)
        return float(any(written == self._plain(str(reference)) for reference in references))

    def _plain(self, text: str) -> str:
        if self.squad:
            return " ".join(squad_words(text))
        return text.strip().lower() if self.lowercase else text.strip()

    def examples(self) -> tuple[Example, ...]:
        """Give an answer with space around it, one in another case, and a wrong one."""
        row = {self.column: ["Paris", "paris, France"]}
        other_case = float(self.lowercase or self.squad)
        return (
            Example(row, " Paris\n", 1.0),
            Example(row, "PARIS", other_case),
            Example(row, "Rome", 0.0),
        )
