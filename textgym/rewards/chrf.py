"""chrF and chrF++, by sacrebleu.

Popović 2015 ("chrF: character n-gram F-score for automatic MT evaluation") and 2017 ("chrF++: words
helping character n-grams"). `Chrf().score` *is* sacrebleu, with the n-grams of the references
cached. The cursor equals it at every prefix of every text: it counts what sacrebleu counts and
computes with sacrebleu's formula.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.rewards.base import Corpus, Cursor, Example
from textgym.rewards.batch import TextBatch
from textgym.rewards.scores import FloatArray
from textgym.rewards.text_metric import TextMetric
from textgym.rewards.words import GrowingText

if TYPE_CHECKING:
    from sacrebleu.metrics.chrf import CHRF

CACHED_PROMPTS = 1024

Symbols = str | tuple[str, ...]


class Chrf(TextMetric):
    """Character n-gram F-score (chrF2) against the best reference: from 0 to 1.

    With `word_order=2` it is chrF++, and its name is `chrfpp`. Columns: `references`, a string or a
    list of strings. Statuses: none. Cost: linear in the text; a cursor costs `char_order`
    look-ups a character.

    Args:
        column: The column of the references.
        char_order: The longest character n-gram.
        word_order: The longest word n-gram; 0 for chrF, 2 for chrF++.
        beta: How much more recall weighs than precision.
        lowercase: Ignore case.
        whitespace: Count white space as characters.
        eps_smoothing: Average over all orders, as chrF++.py, Moses and NLTK do, and not over those
            that both texts have.

    Raises:
        ValueError: If an order is negative, or no n-gram is left.
    """

    transient = ("metric", "targets")

    def __init__(
        self,
        column: str = "references",
        *,
        char_order: int = 6,
        word_order: int = 0,
        beta: int = 2,
        lowercase: bool = False,
        whitespace: bool = False,
        eps_smoothing: bool = False,
    ) -> None:
        if char_order < 0 or word_order < 0 or char_order + word_order < 1:
            raise ValueError(
                "expected orders of 0 or more, and one above 0, "
                f"got char_order={char_order}, word_order={word_order}"
            )
        self.name = "chrf" + "p" * word_order
        self.column, self.lowercase, self.whitespace = column, lowercase, whitespace
        self.char_order, self.word_order, self.beta = char_order, word_order, beta
        self.eps_smoothing = eps_smoothing

    @functools.cached_property
    def metric(self) -> Callable[[tuple[str, ...]], CHRF]:
        """Give sacrebleu's metric for a tuple of references, their n-grams extracted once."""
        from sacrebleu.metrics.chrf import CHRF

        def make(references: tuple[str, ...]) -> CHRF:
            return CHRF(
                char_order=self.char_order,
                word_order=self.word_order,
                beta=self.beta,
                lowercase=self.lowercase,
                whitespace=self.whitespace,
                eps_smoothing=self.eps_smoothing,
                references=[[reference] for reference in references],
            )

        return functools.lru_cache(CACHED_PROMPTS)(make)

    @functools.cached_property
    def targets(self) -> Callable[[tuple[str, ...]], Targets]:
        """Give what cursors share for a tuple of references."""
        return functools.lru_cache(CACHED_PROMPTS)(
            lambda references: Targets(self.metric(references), self.lowercase)
        )

    def begin(self, row: Mapping[str, Any]) -> Cursor:
        """Begin a cursor."""
        return ChrfCursor(self.targets(self.references(row)))

    def value(self, text: str, row: Mapping[str, Any]) -> float:
        """Score one text with sacrebleu."""
        metric = self.metric(self.references(row))
        return float(metric.corpus_score([text], None).score / 100.0)

    def corpus(self, batch: TextBatch) -> Corpus:
        """Give sacrebleu's `corpus_score` over 100, from the counts of each text."""
        statistics = np.zeros((len(batch), 3 * (self.char_order + self.word_order)))
        for i, (text, row) in enumerate(zip(batch.texts, batch.rows, strict=True)):
            metric = self.metric(self.references(row))
            statistics[i] = metric._extract_corpus_statistics([text], None)[0]
        formula = self.metric(("",))._compute_f_score

        def score(sums: FloatArray) -> FloatArray:
            return np.apply_along_axis(lambda row: formula(list(row)) / 100.0, -1, sums)

        return Corpus(statistics, score)

    def examples(self) -> tuple[Example, ...]:
        """Give a copy of the reference, a text with a part of it, and one with nothing of it."""
        row = {self.column: ["the cat sat"]}
        texts = ("the cat sat", "the cat", "xyz 123")
        values = self.score(TextBatch.from_texts(texts, [row] * 3))
        return tuple(Example(row, t, v) for t, v in zip(texts, values, strict=True))


class Targets:
    """The side of the references: how many of each n-gram each of them has.

    Args:
        metric: sacrebleu's, with the references cached.
        lowercase: Ignore case.

    Attributes:
        grams: For each n-gram (a string of characters, a tuple of words) of any reference its
            number in each.
        totals: Per reference the number of its n-grams of each order, characters before words.
        words_of: sacrebleu's splitting of punctuation from words.
        formula: sacrebleu's formula.
    """

    def __init__(self, metric: CHRF, lowercase: bool) -> None:
        assert metric._ref_cache is not None
        self.lowercase, self.whitespace = lowercase, metric.whitespace
        self.char_order, self.word_order = metric.char_order, metric.word_order
        self.words_of, self.formula = metric._remove_punctuation, metric._compute_f_score
        references: list[list[Counter[str]]] = metric._ref_cache[0]["ref_ngrams"]
        self.totals = [[sum(counts.values()) for counts in orders] for orders in references]
        self.grams: dict[Symbols, list[int]] = {}
        for r, orders in enumerate(references):
            for k, counts in enumerate(orders):
                for gram, count in counts.items():
                    key = gram if k < self.char_order else tuple(gram.split(" "))
                    self.grams.setdefault(key, [0] * len(references))[r] = count


class ChrfCursor:
    """chrF of a text that grows.

    Characters are counted for good as they come; of the word that may go on the words' n-grams
    are counted for each value and taken back, and so are characters whose lower case may change.

    Args:
        targets: The counts of the references, shared and not changed.
    """

    __slots__ = ("chars", "matches", "seen", "settled", "targets", "text", "words")

    def __init__(self, targets: Targets) -> None:
        self.targets = targets
        self.text = GrowingText()
        self.settled = 0  # characters of the unfinished word that are counted for good
        self.chars = Run("", targets.char_order)
        self.words = Run((), targets.word_order)
        self.seen: dict[Symbols, int] = {}
        orders = targets.char_order + targets.word_order
        self.matches = [[0] * orders for _ in targets.totals]

    def push(self, piece: str) -> float:
        """Append `piece` and give the chrF of the text so far, from 0 to 1."""
        targets = self.targets
        finished = self.text.push(piece)
        unsure = self._characters(finished)
        self._count(self.words, self._words(finished))
        chars, words = self.chars.copy(), self.words.copy()
        undo = self._count(self.chars, unsure)
        undo += self._count(self.words, self._words(self.text.tail))
        written = self.chars.totals() + self.words.totals()
        value = 0.0
        for matched, there in zip(self.matches, targets.totals, strict=True):
            statistics = []
            for ours, theirs, both in zip(written, there, matched, strict=True):
                statistics += [ours if theirs else 0, theirs, both]
            value = max(value, targets.formula(statistics))
        self.chars, self.words = chars, words
        for gram, order, hits in undo:
            self.seen[gram] -= 1
            for r in hits:
                self.matches[r][order] -= 1
        return value / 100.0

    def _characters(self, finished: str) -> str:
        """Count the characters that nothing can change any more; give the others.

        Python lowers a capital sigma by its place in the word; every other character has one lower
        case.
        """
        if finished:
            self._count(self.chars, self._symbols(finished)[self.settled :])
            self.settled = 0
        tail = self.text.tail
        symbols = self._symbols(tail)
        sure = len(symbols)
        if self.targets.lowercase and "Σ" in tail:
            sure = len(tail[: tail.index("Σ")].lower())
        self._count(self.chars, symbols[self.settled : sure])
        self.settled = sure
        return symbols[sure:]

    def _symbols(self, text: str) -> str:
        text = text if self.targets.whitespace else "".join(text.split())
        return text.lower() if self.targets.lowercase else text

    def _words(self, text: str) -> tuple[str, ...]:
        if not self.targets.word_order:
            return ()
        return tuple(self.targets.words_of(text.lower() if self.targets.lowercase else text))

    def _count(self, run: Run, symbols: Sequence[str]) -> list[tuple[Symbols, int, list[int]]]:
        """Count symbols at the end of a run; give the n-grams that a reference has, with hits."""
        counted = []
        grams, seen = self.targets.grams, self.seen
        offset = 0 if run is self.chars else self.targets.char_order
        for symbol in symbols:
            context = run.append(symbol)
            for n in range(1, len(context) + 1):
                gram = context[-n:]
                limits = grams.get(gram)
                if limits is None:
                    break  # then no reference has a longer one that ends here
                count = seen[gram] = seen.get(gram, 0) + 1
                order = offset + n - 1
                hits = [r for r, limit in enumerate(limits) if count <= limit]
                for r in hits:
                    self.matches[r][order] += 1
                counted.append((gram, order, hits))
        return counted

    def copy(self) -> ChrfCursor:
        """Give an independent copy."""
        twin = ChrfCursor(self.targets)
        twin.text, twin.settled = GrowingText(self.text.tail), self.settled
        twin.chars, twin.words = self.chars.copy(), self.words.copy()
        twin.seen, twin.matches = dict(self.seen), [list(orders) for orders in self.matches]
        return twin


class Run:
    """The end of a sequence of characters or of words, and how long the sequence is.

    Args:
        context: Its last symbols.
        order: How many of them are kept: those of the longest n-gram.
        length: How many symbols there were.
    """

    __slots__ = ("context", "length", "order")

    def __init__(self, context: Symbols, order: int, length: int = 0) -> None:
        self.context, self.order, self.length = context, order, length

    def append(self, symbol: str) -> Symbols:
        """Append a symbol; give the context that ends with it."""
        self.length += 1
        if self.order == 0:
            return self.context
        if isinstance(self.context, str):
            self.context = self.context[-self.order + 1 :] + symbol if self.order > 1 else symbol
        else:
            kept = self.context[-self.order + 1 :] if self.order > 1 else ()
            self.context = (*kept, symbol)
        return self.context

    def totals(self) -> list[int]:
        """Give the number of n-grams of each order."""
        return [max(0, self.length - n) for n in range(self.order)]

    def copy(self) -> Run:
        """Give an independent copy."""
        return Run(self.context, self.order, self.length)
