"""CIDEr-D: agreement with the consensus of the references, rare n-grams weighing more.

Vedantam, Zitnick & Parikh 2015 ("CIDEr: consensus-based image description evaluation"), in its -D
variant and on coco-caption's scale of 0 to 10. With g_n(x) the tf-idf vector of the n-grams of x,
l(x) its length, σ = 6, and m references s_j of the text c (eq. 3 and 4):

    CIDEr-D_n = 10/m Σ_j exp(−(l(c) − l(s_j))² / 2σ²) · min(g_n(c), g_n(s_j)) · g_n(s_j)
                                                        / (‖g_n(c)‖ ‖g_n(s_j)‖)
    CIDEr-D   = 1/4 Σ_n CIDEr-D_n,   n = 1 … 4.

The idf of an n-gram is log(documents / documents with it), a document being all references of one
input. coco-caption takes the documents from the very texts that it scores; a reward must not change
with its batch, so here they are frozen: `Frequencies`, counted once over the references of the
training prompts. As coco-caption does, l counts bigrams.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from textgym.rewards.base import Cursor, Example
from textgym.rewards.batch import TextBatch
from textgym.rewards.frequencies import ORDER, Frequencies, Gram, Words, grams_of, splitter
from textgym.rewards.text_metric import TextMetric
from textgym.rewards.words import GrowingText

CACHED_PROMPTS = 1024
SIGMA = 6.0


class Cider(TextMetric):
    """CIDEr-D against all references, from 0 to 10.

    It needs the document frequencies of the training references: `Cider.from_references(lists)`,
    `Cider.load(path)`, or `Cider()` in a task, which counts them over the training split of its
    prompts (`fitted`). Columns: `references`, a string or a list of strings. Statuses: none.
    Cost: linear in the text and in the number of references; a cursor costs four look-ups a word.

    Args:
        frequencies: The document frequencies; None for those of the task's training split.
        column: The column of the references.
        words: How texts are split where the task counts: `"caption"` or `"space"`.

    Raises:
        ValueError: If the frequencies were counted over other words.
    """

    high = 10.0
    transient = ("last_fit", "targets")

    def __init__(
        self,
        frequencies: Frequencies | None = None,
        column: str = "references",
        *,
        words: Words = "caption",
    ) -> None:
        self.name = "cider"
        self.column, self.frequencies = column, frequencies
        self.words: Words = words if frequencies is None else frequencies.words
        splitter(self.words)  # refuses others

    @classmethod
    def from_references(
        cls,
        references: Iterable[Sequence[str]],
        column: str = "references",
        *,
        words: Words = "caption",
    ) -> Self:
        """Freeze the document frequencies of lists of references, a list an input."""
        return cls(Frequencies.count(references, words), column)

    @classmethod
    def load(cls, path: str | os.PathLike[str], column: str = "references") -> Self:
        """Read the document frequencies from a file."""
        return cls(Frequencies.load(path), column)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the document frequencies to a file."""
        self._frequencies().save(path)

    def fitted(self, rows: Sequence[Mapping[str, Any]]) -> Cider:
        """Freeze the document frequencies of training rows, unless there are some already."""
        if self.frequencies is not None:
            return self
        if not self.last_fit or self.last_fit[0] is not rows:  # tasks of one table count once
            references = [self.references(row) for row in rows]
            frequencies = Frequencies.count(references, self.words)
            self.last_fit[:] = rows, type(self)(frequencies, self.column).named(self.name)
        fitted: Cider = self.last_fit[1]
        return fitted

    def keep(self, folder: Path) -> None:
        """Write the document frequencies, as `cider.json` if that is the reward's name."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / f"{self.name}.json")

    @functools.cached_property
    def last_fit(self) -> list[Any]:
        """Remember the rows of the last fit, and what it gave."""
        return []

    def _frequencies(self) -> Frequencies:
        if self.frequencies is None:
            raise ValueError(
                "CIDEr needs the document frequencies of the training references: make it with "
                "Cider.from_references(lists of references) or Cider.load(path); a task counts "
                "them over its training split"
            )
        return self.frequencies

    @functools.cached_property
    def targets(self) -> Callable[[tuple[str, ...]], list[Target]]:
        """Give the tf-idf vectors of a tuple of references."""
        frequencies, split = self._frequencies(), splitter(self.words)
        return functools.lru_cache(CACHED_PROMPTS)(
            lambda references: [Target(split(text), frequencies) for text in references]
        )

    def begin(self, row: Mapping[str, Any]) -> Cursor:
        """Begin a cursor."""
        references = self.references(row)
        return CiderCursor(self.targets(references), self._frequencies(), splitter(self.words))

    def examples(self) -> tuple[Example, ...]:
        """Give a copy of the reference, a text near it, and one of none of its words.

        Where there are no frequencies yet, the values are those after `fitted` on the rows.
        """
        rows = [
            {self.column: [text]}
            for text in ("a cat sat on the mat", "two dogs run fast in rain", "he sells red apples")
        ]
        fitted = self.fitted(rows)
        texts = (rows[0][self.column][0], "two dogs run in the rain", "nothing else matters today")
        values = fitted.score(TextBatch.from_texts(texts, rows))
        return tuple(Example(r, t, v) for r, t, v in zip(rows, texts, values, strict=True))


class Target:
    """The tf-idf vector of one reference.

    Args:
        words: Its words.
        frequencies: The document frequencies.

    Attributes:
        weights: For each n-gram its component.
        norms: The length of the vector of each order.
        bigrams: How many bigrams it has.
    """

    def __init__(self, words: list[str], frequencies: Frequencies) -> None:
        counts = Counter(grams_of(words))
        self.weights = {gram: n * frequencies.idf(gram) for gram, n in counts.items()}
        squares = [0.0] * ORDER
        for gram, weight in self.weights.items():
            squares[len(gram) - 1] += weight * weight
        self.norms = [math.sqrt(square) for square in squares]
        self.bigrams = max(0, len(words) - 1)


class CiderCursor:
    """CIDEr-D of a text that grows.

    Args:
        targets: The references, shared and not changed.
        frequencies: The document frequencies.
        split: Splits a text into words.
    """

    __slots__ = (
        "context",
        "dots",
        "frequencies",
        "length",
        "seen",
        "split",
        "squares",
        "targets",
        "text",
    )

    def __init__(
        self,
        targets: list[Target],
        frequencies: Frequencies,
        split: Callable[[str], list[str]],
    ) -> None:
        self.targets, self.frequencies, self.split = targets, frequencies, split
        self.text = GrowingText()
        self.context: Gram = ()
        self.length = 0
        self.seen: dict[Gram, int] = {}
        self.squares = [0.0] * ORDER  # of the lengths of the text's vectors
        self.dots = [[0.0] * ORDER for _ in targets]

    def push(self, piece: str) -> float:
        """Append `piece` and give the CIDEr-D of the text so far, from 0 to 10."""
        self._count(self.split(self.text.push(piece)))
        kept = self.context, self.length, list(self.squares), [list(dots) for dots in self.dots]
        added = self._count(self.split(self.text.tail))
        value = self._value()
        self.context, self.length, self.squares, self.dots = kept
        for gram in added:
            self.seen[gram] -= 1
        return value

    def _count(self, words: list[str]) -> list[Gram]:
        added = []
        for word in words:
            self.context = (*self.context[1 - ORDER :], word)
            for n in range(1, len(self.context) + 1):
                gram = self.context[-n:]
                idf = self.frequencies.idf(gram)
                count = self.seen.get(gram, 0)
                self.seen[gram] = count + 1
                added.append(gram)
                before, after = count * idf, (count + 1) * idf
                self.squares[n - 1] += after * after - before * before
                for target, dots in zip(self.targets, self.dots, strict=True):
                    weight = target.weights.get(gram)
                    if weight is not None and before < weight:
                        dots[n - 1] += (min(after, weight) - before) * weight
        self.length += len(words)
        return added

    def _value(self) -> float:
        bigrams = max(0, self.length - 1)
        total = 0.0
        for target, dots in zip(self.targets, self.dots, strict=True):
            gap = bigrams - target.bigrams
            similar = 0.0
            for dot, square, norm in zip(dots, self.squares, target.norms, strict=True):
                if square > 0 and norm > 0:
                    similar += dot / (math.sqrt(square) * norm)
            total += similar * math.exp(-(gap * gap) / (2 * SIGMA * SIGMA))
        return 10.0 * total / (ORDER * len(self.targets))

    def copy(self) -> CiderCursor:
        """Give an independent copy."""
        twin = CiderCursor(self.targets, self.frequencies, self.split)
        twin.text, twin.context = GrowingText(self.text.tail), self.context
        twin.length, twin.seen = self.length, dict(self.seen)
        twin.squares, twin.dots = list(self.squares), [list(dots) for dots in self.dots]
        return twin
