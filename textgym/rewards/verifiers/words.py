"""Whether a response uses the words that it should, and not those that it should not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from textgym.rewards.base import Example
from textgym.rewards.errors import check_column
from textgym.rewards.verifiers.base import Verifier, check_length

LONGEST = 1_000_000
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")

Words = Sequence[str]
Counts = Mapping[str, Any]


class WordConstraints(Verifier):
    """1 if the response keeps every constraint on its words, else 0.

    Words are compared without case; a word is letters and digits, with hyphens and apostrophes
    inside, so that "cat" is not in "cats". Several words in one string are a phrase: they must come
    one after the other. A response without a word keeps nothing.

    Each constraint is given as it is, or as the name of the column that holds it.

    **Range** 0 or 1. **Cost** linear in the text, and in the number of constraints. **Statuses** of
    what could not be judged: `too long` (more than 1,000,000 characters).

    Args:
        include: Words that must be there; the column `include` by default.
        exclude: Words that must not.
        order: Words that must come in this order, others between them or not.
        counts: How often a word must come: a number, or a pair of the least and the most, as
            `{"cat": 2, "dog": (1, 3)}`.
        length: How many words there must be: a number, or a pair.

    Raises:
        ValueError: If there is no constraint, or one cannot be read.
    """

    def __init__(
        self,
        include: str | Words | None = "include",
        exclude: str | Words | None = None,
        order: str | Words | None = None,
        counts: str | Counts | None = None,
        length: str | int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__("words", None)
        given = {
            "include": include,
            "exclude": exclude,
            "order": order,
            "counts": counts,
            "length": length,
        }
        self.constraints: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        if not self.constraints:
            raise ValueError(f"expected at least one of the constraints {', '.join(given)}")
        for kind, constraint in self.constraints.items():
            if not isinstance(constraint, str):
                self._read(kind, constraint)

    def check(self, columns: Collection[str]) -> None:
        """Check that the columns are there."""
        for column in self.constraints.values():
            if isinstance(column, str):
                check_column(f"reward {self.name!r}", column, columns)

    def verify(self, text: str, row: Mapping[str, Any]) -> float:
        """Check the constraints, one after the other."""
        check_length(text, LONGEST)
        wanted = {
            kind: self._read(kind, row[given] if isinstance(given, str) else given)
            for kind, given in self.constraints.items()
        }
        words = words_of(text)
        return float(
            bool(words) and all(_keeps(kind, value, words) for kind, value in wanted.items())
        )

    def examples(self) -> tuple[Example, ...]:
        """Give texts that keep and break it, where a column of words to include is all there is."""
        column = self.constraints.get("include")
        if not isinstance(column, str) or len(self.constraints) > 1:
            return ()
        row = {column: ["dog", "frisbee", "catch"]}
        return (
            Example(row, "The dog runs to catch a frisbee.", 1.0),
            Example(row, "Catch the frisbee, dog!", 1.0),
            Example(row, "The dogs catch a frisbee.", 0.0),
            Example(row, "The dog sleeps.", 0.0),
            Example({column: ["ski", "snow"]}, "They ski in fresh snow.", 1.0),
        )

    def _read(self, kind: str, value: Any) -> Any:
        """Read a constraint: phrases as tuples of words, numbers as pairs of bounds.

        Raises:
            ValueError: If it cannot be read.
        """
        if kind == "length" and (bounds := _bounds(value)) is not None:
            return bounds
        if kind == "counts" and isinstance(value, Mapping) and value:
            counts = {tuple(words_of(str(k))): _bounds(v) for k, v in value.items()}
            if all(words and bounds for words, bounds in counts.items()):
                return counts
        if kind in ("include", "exclude", "order") and isinstance(value, list | tuple):
            phrases = [tuple(words_of(p)) if isinstance(p, str) else () for p in value]
            if all(phrases):
                return phrases
        expected = {
            "counts": "a mapping from words to numbers or pairs of numbers",
            "length": "a number of words, or a pair of the least and the most",
        }.get(kind, "a list of words")
        raise ValueError(f"reward {self.name!r} expected for {kind} {expected}, got {value!r:.200}")


def words_of(text: str) -> list[str]:
    """Give the words of a text, without case."""
    return [word.casefold().replace("\u2019", "'") for word in _WORD.findall(text)]


def _bounds(value: Any) -> tuple[int, int] | None:
    pair = (value, value) if isinstance(value, int) else value
    whole = isinstance(pair, list | tuple) and len(pair) == 2
    if whole and all(isinstance(n, int) and not isinstance(n, bool) for n in pair):
        return (pair[0], pair[1]) if 0 <= pair[0] <= pair[1] else None
    return None


def _keeps(kind: str, wanted: Any, words: list[str]) -> bool:
    if kind == "length":
        return bool(wanted[0] <= len(words) <= wanted[1])
    if kind == "order":
        at = 0
        for phrase in wanted:
            at = _find(phrase, words, at)
            if at < 0:
                return False
            at += len(phrase)
        return True
    known = Counter(words)
    if kind == "include":
        return all(_count(phrase, words, known) for phrase in wanted)
    if kind == "exclude":
        return not any(_count(phrase, words, known) for phrase in wanted)
    return all(
        low <= _count(phrase, words, known) <= high for phrase, (low, high) in wanted.items()
    )


def _count(phrase: tuple[str, ...], words: list[str], known: Counter[str]) -> int:
    """Count a phrase, overlaps too; one word is looked up."""
    if len(phrase) == 1 or not all(known[word] for word in phrase):
        return known[phrase[0]] if len(phrase) == 1 else 0
    count, at = 0, _find(phrase, words, 0)
    while at >= 0:
        count, at = count + 1, _find(phrase, words, at + 1)
    return count


def _find(phrase: tuple[str, ...], words: list[str], start: int) -> int:
    """Give the index of a phrase from `start` on; -1 if there is none."""
    while True:
        try:
            start = words.index(phrase[0], start)
        except ValueError:
            return -1
        if tuple(words[start : start + len(phrase)]) == phrase:
            return start
        start += 1
