"""ROUGE-N and ROUGE-L of texts that grow, against several references at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Self

Words = Sequence[str]
Split = Callable[[str], Words]
"""Gives the word that a run of lower-case ASCII letters and digits is, or no word."""

_RUN = re.compile("[a-z0-9]+")


def split_text(text: str, split: Split) -> list[str]:
    """Split a text into words as rouge-score does: lower case, ASCII letters and digits."""
    return [word for run in _RUN.findall(text.lower()) for word in split(run)]


def f_measure(precision: float, recall: float) -> float:
    """Give the harmonic mean of precision and recall; 0 if both are 0."""
    if precision + recall > 0:
        return 2 * precision * recall / (precision + recall)
    return 0.0


class GramTarget:
    """The n-grams of references.

    Args:
        references: The words of each reference.
        order: The n.

    Attributes:
        limits: For each n-gram (reference, how often it has it), where it has it.
        sizes: How many n-grams each reference has.
    """

    def __init__(self, references: Sequence[Words], order: int) -> None:
        self.order = order
        self.sizes = [max(0, len(words) - order + 1) for words in references]
        counts: dict[tuple[str, ...], dict[int, int]] = {}
        for i, words in enumerate(references):
            for start in range(self.sizes[i]):
                of = counts.setdefault(tuple(words[start : start + order]), {})
                of[i] = of.get(i, 0) + 1
        self.limits = {gram: tuple(of.items()) for gram, of in counts.items()}


class LcsTarget:
    """The words of references, as bits of one integer with an empty bit after each reference.

    Args:
        references: The words of each reference.

    Attributes:
        bits: For each word the set of its positions.
        full: All positions.
        fields: Where each reference begins, and its positions shifted to bit 0.
        sizes: How many words each reference has.
    """

    def __init__(self, references: Sequence[Words]) -> None:
        self.sizes = [len(words) for words in references]
        self.bits: dict[str, int] = {}
        self.fields: list[tuple[int, int]] = []
        self.full = start = 0
        for words in references:
            for i, word in enumerate(words, start):
                self.bits[word] = self.bits.get(word, 0) | 1 << i
            field = (1 << len(words)) - 1
            self.fields.append((start, field))
            self.full |= field << start
            start += len(words) + 1

    def extend(self, row: int, word: str) -> int:
        """Append a word to the text whose row of the dynamic program is `row`.

        A bit of a row is 0 where the longest common subsequence of the text grows from the
        reference's words before that position to those with it (Hyyrö 2004, "Bit-parallel
        LCS-length computation revisited"). The empty bits take up the carries.
        """
        here = row & self.bits.get(word, 0)
        return ((row + here) | (row - here)) & self.full if here else row


class RougeCursor:
    """The F-measure of a text that grows.

    The counts cover the whole text. A letter may still be added to its last word: the *open* one.
    When it changes, what it had added is taken back; when a separator follows, it stays.

    Args:
        sizes: How many n-grams or words each reference has.
        split: Gives the words of runs.
        mean: Average over the references; else take the best.
    """

    __slots__ = ("length", "mean", "sizes", "split", "tail", "value")

    def __init__(self, sizes: list[int], split: Split, mean: bool) -> None:
        self.sizes, self.split, self.mean = sizes, split, mean
        self.tail = ""  # the run that makes the open word
        self.length = 0
        self.value = 0.0

    def push(self, piece: str) -> float:
        """Append `piece` and give the F-measure of the text so far, from 0 to 1."""
        # A word is ASCII letters and digits, so lowering piece by piece changes nothing.
        piece = piece.lower()
        if piece.isascii():
            if piece.isalnum():
                self.tail += piece
                return self._reopen(self.split(self.tail))
            if piece[1:].isalnum():
                self._close()
                self.tail = piece[1:]
                return self._reopen(self.split(self.tail))
        text = self.tail + piece
        runs = _RUN.findall(text)
        self.tail = runs.pop() if runs and text.endswith(runs[-1]) else ""
        if runs:
            self._reopen([word for run in runs for word in self.split(run)])
            self._close()
        return self._reopen(self.split(self.tail) if self.tail else ())

    def _close(self) -> None:
        """Count the open word for good."""
        raise NotImplementedError

    def _reopen(self, words: Words) -> float:
        """Let `words` be the open ones; give the value."""
        raise NotImplementedError

    def _score(self, hits: Sequence[int], total: int) -> float:
        """Give the F-measure for what is matched of each reference, out of `total` of the text."""
        best = summed = 0.0
        for hit, size in zip(hits, self.sizes, strict=True):
            if hit:
                value = f_measure(hit / total, hit / size)
                summed += value
                if value > best:
                    best = value
        return summed / len(self.sizes) if self.mean else best

    def copy(self) -> Self:
        """Give an independent copy."""
        twin = object.__new__(type(self))
        for cls in type(self).__mro__:
            for name in getattr(cls, "__slots__", ()):
                value = getattr(self, name)
                # Lists and dicts are this text's own; targets are shared and not changed.
                setattr(twin, name, value.copy() if isinstance(value, list | dict) else value)
        return twin


class GramCursor(RougeCursor):
    """ROUGE-N of a text that grows.

    Args:
        target: The references, shared; not changed.
        split: Gives the words of runs.
        mean: Average over the references; else take the best.
    """

    __slots__ = ("added", "context", "hits", "seen", "start", "target", "width")

    def __init__(self, target: GramTarget, split: Split, mean: bool) -> None:
        super().__init__(target.sizes, split, mean)
        self.target = target
        self.seen: dict[tuple[str, ...], int] = {}  # n-grams that a reference has
        self.hits = [0] * len(target.sizes)
        self.context: tuple[str, ...] = ()  # the last n - 1 words
        self.start: tuple[str, ...] = ()  # ... before the open one
        self.added: list[tuple[str, ...]] = []  # the n-grams that end with the open word
        self.width = 0

    def _close(self) -> None:
        self.added, self.start, self.width = [], self.context, 0

    def _reopen(self, words: Words) -> float:
        limits, seen, hits = self.target.limits, self.seen, self.hits
        before, width = self.added, self.width
        for gram in before:
            count = seen[gram]
            seen[gram] = count - 1
            for i, limit in limits[gram]:
                hits[i] -= count <= limit
        added = []
        context, order = self.start, self.target.order
        for word in words:
            gram = (*context, word)
            found = limits.get(gram)
            if found is not None:
                seen[gram] = count = seen.get(gram, 0) + 1
                added.append(gram)
                for i, limit in found:
                    hits[i] += count <= limit
            context = gram[1:] if len(gram) == order else gram
        self.context, self.added, self.width = context, added, len(words)
        self.length += len(words) - width
        if added or before or width != len(words):
            self.value = self._score(hits, self.length - order + 1)
        return self.value


class LcsCursor(RougeCursor):
    """ROUGE-L of a text that grows.

    Args:
        target: The references, shared; not changed.
        split: Gives the words of runs.
        mean: Average over the references; else take the best.
    """

    __slots__ = ("common", "row", "start", "target", "width")

    def __init__(self, target: LcsTarget, split: Split, mean: bool) -> None:
        super().__init__(target.sizes, split, mean)
        self.target = target
        self.row = target.full
        self.start = target.full  # the row before the open word
        self.common = [0] * len(target.sizes)
        self.width = 0

    def _close(self) -> None:
        self.start, self.width = self.row, 0

    def _reopen(self, words: Words) -> float:
        target, row, width = self.target, self.start, self.width
        for word in words:
            row = target.extend(row, word)
        changed = row != self.row
        if changed:
            self.row = row
            self.common = [
                size - (row >> start & field).bit_count()
                for size, (start, field) in zip(self.sizes, target.fields, strict=True)
            ]
        if changed or width != len(words):
            self.width = len(words)
            self.length += len(words) - width
            self.value = self._score(self.common, self.length)
        return self.value
