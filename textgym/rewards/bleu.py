"""Sentence BLEU, by sacrebleu.

Papineni et al. 2002, with the smoothing and the effective order that sacrebleu recommends for
sentences (Chen & Cherry 2014; Post 2018). `Bleu().score` *is* sacrebleu, with the n-grams of the
references cached. The cursor equals it bit for bit at every prefix of every text: it counts with
sacrebleu's tokenizer and computes with sacrebleu's formula, and tokenizes only the unfinished word.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from textgym.rewards.base import Cursor, Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.errors import check_column
from textgym.rewards.references import references_of

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

CACHED_PROMPTS = 1024
ORDER = 4

Gram = tuple[str, ...]


class Bleu(Reward):
    """Sentence BLEU with effective order, over 100: from 0 to 1.

    Args:
        column: The column of the references, a string or a list of strings.
        lowercase: Ignore case.
        tokenize: sacrebleu's tokenizer.
    """

    reads_only = True
    transient = ("metric", "counts")

    def __init__(
        self, column: str = "references", *, lowercase: bool = False, tokenize: str = "13a"
    ) -> None:
        self.name = "bleu"
        self.column, self.lowercase, self.tokenize = column, lowercase, tokenize

    def check(self, columns: Collection[str]) -> None:
        """Check that the references are there."""
        check_column(f"reward {self.name!r}", self.column, columns)

    @functools.cached_property
    def metric(self) -> Callable[[tuple[str, ...]], BLEU]:
        """Give sacrebleu's metric for a tuple of references, their n-grams extracted once."""
        from sacrebleu.metrics.bleu import BLEU

        def make(references: tuple[str, ...]) -> BLEU:
            return BLEU(
                lowercase=self.lowercase,
                tokenize=self.tokenize,
                effective_order=True,
                references=[[reference] for reference in references],
            )

        return functools.lru_cache(CACHED_PROMPTS)(make)

    @functools.cached_property
    def counts(self) -> Callable[[tuple[str, ...]], ReferenceCounts]:
        """Give the n-gram counts that cursors share for a tuple of references."""
        tokenizer = self.metric(("",)).tokenizer

        def words(text: str) -> list[str]:
            return cast(str, tokenizer(text.lower() if self.lowercase else text)).split()

        return functools.lru_cache(CACHED_PROMPTS)(
            lambda references: ReferenceCounts(references, words)
        )

    def begin(self, row: Mapping[str, Any]) -> Cursor | None:
        """Begin a cursor; there is one for the tokenizer `13a`."""
        if self.tokenize != "13a":
            return None
        return BleuCursor(self.counts(references_of(row, self.column, f"reward {self.name!r}")))

    def score(self, batch: TextBatch) -> list[Any]:
        """Score each text with sacrebleu."""
        values: list[Any] = []
        for text, row in zip(batch.texts, batch.rows, strict=True):
            try:
                references = references_of(row, self.column, f"reward {self.name!r}")
                # On one text the corpus score is the sentence score, and uses the cache.
                values.append(self.metric(references).corpus_score([text], None).score / 100.0)
            except Exception as error:
                values.append(error)
        return values


class ReferenceCounts:
    """The side of the references in BLEU.

    Args:
        references: The reference texts.
        words: Splits a text into words.

    Attributes:
        ngrams: For each n-gram of a reference, the most often that one reference has it.
        lengths: The references' lengths in words.
    """

    def __init__(self, references: Sequence[str], words: Callable[[str], list[str]]) -> None:
        self.words = words
        self.ngrams: Counter[Gram] = Counter()
        self.lengths: list[int] = []
        for reference in references:
            found = words(reference.rstrip())
            self.lengths.append(len(found))
            self.ngrams |= Counter(
                tuple(found[i : i + n])
                for n in range(1, ORDER + 1)
                for i in range(len(found) - n + 1)
            )
        self._closest: dict[int, int] = {}

    def closest(self, length: int) -> int:
        """Give the reference length nearest to `length`, the shorter of two."""
        if length not in self._closest:
            self._closest[length] = min(self.lengths, key=lambda x: (abs(x - length), x))
        return self._closest[length]


class BleuCursor:
    """BLEU of a text that grows.

    Words are counted for good once nothing that follows can change them; the rest, usually one
    unfinished word, is counted for each value and taken back.

    Args:
        references: The counts of the references, shared and not changed.
    """

    __slots__ = ("context", "correct", "length", "references", "seen", "tail")

    def __init__(self, references: ReferenceCounts) -> None:
        self.references = references
        self.tail = ""
        self.length = 0
        self.context: Gram = ()
        self.correct = [0] * ORDER
        self.seen: dict[Gram, int] = {}

    def push(self, piece: str) -> float:
        """Append `piece` and give the BLEU of the text so far, from 0 to 1."""
        from sacrebleu.metrics.bleu import BLEU

        self.tail += piece
        unfinished = self.tail.rstrip()
        cut = _last_break(unfinished)
        if cut is not None:
            self._count(self.references.words(unfinished[:cut]))
            self.tail = self.tail[cut + 1 :]
            unfinished = unfinished[cut + 1 :]
        length, context = self.length, self.context
        matched = self._count(self.references.words(unfinished))
        value = BLEU.compute_bleu(
            list(self.correct),
            [max(0, self.length - n) for n in range(ORDER)],
            self.length,
            self.references.closest(self.length),
            smooth_method="exp",
            effective_order=True,
        ).score
        self.length, self.context = length, context
        for gram in matched:
            self.seen[gram] -= 1
            self.correct[len(gram) - 1] -= 1
        return value / 100.0

    def _count(self, words: list[str]) -> list[Gram]:
        """Count words; give the n-grams that matched, clipped to what the references have."""
        matched = []
        limits, seen = self.references.ngrams, self.seen
        for word in words:
            self.context = (*self.context[1 - ORDER :], word)
            for n in range(1, len(self.context) + 1):
                gram = self.context[-n:]
                limit = limits.get(gram)
                if limit is None:
                    break  # then no reference has a longer one that ends here
                count = seen.get(gram, 0)
                if count < limit:
                    seen[gram] = count + 1
                    self.correct[n - 1] += 1
                    matched.append(gram)
        self.length += len(words)
        return matched

    def copy(self) -> BleuCursor:
        """Give an independent copy."""
        twin = BleuCursor(self.references)
        twin.tail, twin.length, twin.context = self.tail, self.length, self.context
        twin.correct, twin.seen = list(self.correct), dict(self.seen)
        return twin


def _last_break(text: str) -> int | None:
    """Find the space before the last word of a stripped text, if it surely parts words.

    The tokenizer deletes `-` with a newline after it, also where a deleted `<skipped>` stood
    between them; every other space parts words, and no rule of the tokenizer looks across one.
    """
    pieces = text.rsplit(None, 1)
    if len(pieces) < 2:
        return None
    cut = len(text) - len(pieces[1]) - 1
    sure = text[cut] != "\n" or text[cut - 1] not in "->"
    return cut if sure else None
