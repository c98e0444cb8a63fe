"""ROUGE, by rouge-score.

Lin 2004. `Rouge(kind).score` *is* rouge-score's `score_multi`, with the words of the references
cached. The cursor equals it at every prefix of every text. Its longest common subsequence is kept
in the bits of an integer (Hyyrö 2004, "Bit-parallel LCS-length computation revisited").
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from textgym.rewards.base import Cursor, Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.errors import check_column
from textgym.rewards.references import references_of

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

CACHED_PROMPTS = 1024
CACHED_TEXTS = 16384

Gram = tuple[str, ...]


class Rouge(Reward):
    """F-measure of n-grams (1, 2) or the longest common subsequence (L), best reference: 0 to 1.

    Args:
        kind: `"rouge1"` to `"rouge9"` (n-grams), `"rougeL"` (longest common subsequence) or
            `"rougeLsum"` (the same, line by line).
        column: The column of the references, a string or a list of strings.
        use_stemmer: Compare the stems of words (Porter).
    """

    reads_only = True
    transient = ("scorer", "words", "targets")

    def __init__(
        self, kind: str = "rougeL", column: str = "references", *, use_stemmer: bool = False
    ) -> None:
        if not re.fullmatch(r"rouge([1-9]|L|Lsum)", kind):
            raise ValueError(
                f"expected 'rouge1' to 'rouge9', 'rougeL' or 'rougeLsum', got {kind!r}"
            )
        self.name = self.kind = kind
        self.column, self.use_stemmer = column, use_stemmer

    def check(self, columns: Collection[str]) -> None:
        """Check that the references are there."""
        check_column(f"reward {self.name!r}", self.column, columns)

    @functools.cached_property
    def scorer(self) -> RougeScorer:
        """Give rouge-score's scorer, on a tokenizer that remembers its last texts."""
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer([self.kind], tokenizer=_Tokenizer(self.words))

    @functools.cached_property
    def words(self) -> Callable[[str], list[str]]:
        """Give rouge-score's tokenizer behind a cache, where references stay and texts pass."""
        from rouge_score.tokenizers import DefaultTokenizer

        return functools.lru_cache(CACHED_TEXTS)(DefaultTokenizer(self.use_stemmer).tokenize)

    @functools.cached_property
    def targets(self) -> Callable[[tuple[str, ...]], list[Target]]:
        """Give what cursors share for a tuple of references."""
        order = 0 if self.kind == "rougeL" else int(self.kind[5:])
        return functools.lru_cache(CACHED_PROMPTS)(
            lambda references: [Target(self.words(reference), order) for reference in references]
        )

    def begin(self, row: Mapping[str, Any]) -> Cursor | None:
        """Begin a cursor; there is none for `rougeLsum`."""
        if self.kind == "rougeLsum":
            return None
        targets = self.targets(references_of(row, self.column, f"reward {self.name!r}"))
        if self.kind == "rougeL":
            return LcsCursor(targets, self.words)
        return GramCursor(targets, self.words, int(self.kind[5:]))

    def score(self, batch: TextBatch) -> list[Any]:
        """Score each text with rouge-score."""
        values: list[Any] = []
        for text, row in zip(batch.texts, batch.rows, strict=True):
            try:
                references = references_of(row, self.column, f"reward {self.name!r}")
                values.append(self.scorer.score_multi(references, text)[self.kind].fmeasure)
            except Exception as error:
                values.append(error)
        return values


class _Tokenizer:
    """What rouge-score calls to split a text."""

    def __init__(self, words: Callable[[str], list[str]]) -> None:
        self.tokenize = words


class Target:
    """One reference, ready to be compared with.

    Args:
        words: Its words.
        order: The n of its n-grams; 0 for the longest common subsequence.

    Attributes:
        length: How many n-grams (of order 0: words) it has.
        grams: How often it has each n-gram.
        bits: For each word the set of its positions, as bits.
    """

    def __init__(self, words: list[str], order: int) -> None:
        self.length = len(words) if order == 0 else max(0, len(words) - order + 1)
        self.grams: Counter[Gram] = Counter()
        self.bits: dict[str, int] = {}
        if order:
            self.grams.update(tuple(words[i : i + order]) for i in range(self.length))
        else:
            for i, word in enumerate(words):
                self.bits[word] = self.bits.get(word, 0) | (1 << i)


class _RougeCursor:
    """The words of a text that grows: those that are finished, and the last one that may not be.

    Args:
        targets: The references, shared and not changed.
        split: rouge-score's tokenizer.
    """

    __slots__ = ("length", "split", "tail", "targets")

    def __init__(self, targets: list[Target], split: Callable[[str], list[str]]) -> None:
        self.targets, self.split = targets, split
        self.tail = ""
        self.length = 0

    def _advance(self, piece: str) -> tuple[list[str], list[str]]:
        """Give the words that `piece` finishes, and the unfinished one, each as a list."""
        text = self.tail + piece.lower()
        found = _WORD.findall(text)
        # A word is runs of ASCII letters and digits, so lowering piece by piece changes nothing.
        self.tail = found.pop() if found and text.endswith(found[-1]) else ""
        finished = [word for run in found for word in self.split(run)]
        return finished, self.split(self.tail) if self.tail else []


class GramCursor(_RougeCursor):
    """ROUGE-N of a text that grows.

    Args:
        targets: The references, shared and not changed.
        split: rouge-score's tokenizer.
        order: The n of the n-grams.
    """

    __slots__ = ("context", "hits", "order", "seen")

    def __init__(
        self, targets: list[Target], split: Callable[[str], list[str]], order: int
    ) -> None:
        super().__init__(targets, split)
        self.order = order
        self.context: Gram = ()
        self.seen: Counter[Gram] = Counter()
        self.hits = [0] * len(targets)

    def push(self, piece: str) -> float:
        """Append `piece` and give the F-measure of the text so far."""
        finished, unfinished = self._advance(piece)
        self._count(finished)
        context, hits = self.context, list(self.hits)
        grams = self._count(unfinished)
        total = max(0, self.length - self.order + 1)
        value = max(
            f_measure(hit / max(total, 1), hit / max(target.length, 1))
            for hit, target in zip(self.hits, self.targets, strict=True)
        )
        self.length -= len(unfinished)
        self.context, self.hits = context, hits
        for gram in grams:
            self.seen[gram] -= 1
        return value

    def _count(self, words: list[str]) -> list[Gram]:
        grams = []
        for word in words:
            self.context = (*self.context, word)[-self.order :]
            if len(self.context) == self.order:
                grams.append(self.context)
                self.seen[self.context] += 1
                count = self.seen[self.context]
                for i, target in enumerate(self.targets):
                    self.hits[i] += count <= target.grams.get(self.context, 0)
        self.length += len(words)
        return grams

    def copy(self) -> GramCursor:
        """Give an independent copy."""
        twin = GramCursor(self.targets, self.split, self.order)
        twin.tail, twin.length, twin.context = self.tail, self.length, self.context
        twin.seen, twin.hits = self.seen.copy(), list(self.hits)
        return twin


class LcsCursor(_RougeCursor):
    """ROUGE-L of a text that grows.

    Args:
        targets: The references, shared and not changed.
        split: rouge-score's tokenizer.
    """

    __slots__ = ("rows",)

    def __init__(self, targets: list[Target], split: Callable[[str], list[str]]) -> None:
        super().__init__(targets, split)
        # One row of the table of the dynamic program per reference: bit i is 0 where the longest
        # common subsequence grows from the reference's first i words to its first i + 1.
        self.rows = [(1 << target.length) - 1 for target in targets]

    def push(self, piece: str) -> float:
        """Append `piece` and give the F-measure of the text so far."""
        finished, unfinished = self._advance(piece)
        self.rows = self._extended(finished)
        self.length += len(finished)
        length = self.length + len(unfinished)
        value = 0.0
        for target, row in zip(self.targets, self._extended(unfinished), strict=True):
            if length and target.length:
                common = target.length - row.bit_count()
                value = max(value, f_measure(common / length, common / target.length))
        return value

    def _extended(self, words: list[str]) -> list[int]:
        rows = []
        for target, row in zip(self.targets, self.rows, strict=True):
            full = (1 << target.length) - 1
            for word in words:
                here = row & target.bits.get(word, 0)
                if here:
                    row = ((row + here) | (row - here)) & full
            rows.append(row)
        return rows

    def copy(self) -> LcsCursor:
        """Give an independent copy."""
        twin = LcsCursor(self.targets, self.split)
        twin.tail, twin.length, twin.rows = self.tail, self.length, list(self.rows)
        return twin


_WORD = re.compile("[a-z0-9]+")


def f_measure(precision: float, recall: float) -> float:
    """Give the harmonic mean of precision and recall; 0 if both are 0."""
    if precision + recall > 0:
        return 2 * precision * recall / (precision + recall)
    return 0.0
