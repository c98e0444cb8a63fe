"""BLEU (Papineni et al. 2002), equal to sacrebleu's bit for bit: of a sentence, of a corpus.

Texts are split by sacrebleu's tokenizers (`bleu_words`). N-grams are counted for whole texts and,
at every prefix of every text, for texts that grow (`bleu_counts`). `bleu_formula` makes a score of
the counts.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from textgym.rewards.base import Corpus, Cursor, Example
from textgym.rewards.batch import TextBatch
from textgym.rewards.bleu_counts import BleuCursor, Count, Target
from textgym.rewards.bleu_formula import SMOOTHING, Formula, brevity_penalty
from textgym.rewards.bleu_words import STEPWISE, Splitter, make_tokenizer, splitter
from textgym.rewards.scores import FloatArray, is_number
from textgym.rewards.text_metric import TextMetric

CACHED_NGRAMS = 400_000  # some 70 MB


class Bleu(TextMetric):
    """Sentence BLEU divided by 100: from 0 to 1. As a corpus metric it is corpus BLEU over 100.

    Cost: linear in the text; a cursor takes a few microseconds a token. Statuses: none. There are
    cursors for the tokenizers `13a`, `none`, `char`, `zh` and `intl`; with another one, dense
    schedules score the whole text again. A perfect text may earn 1 + 4e-16, as in sacrebleu.

    Args:
        column: The column of the references, a string or a list of strings; rows may have
            different numbers of them.
        lowercase: Ignore case.
        tokenize: sacrebleu's tokenizer. `ja-mecab`, `ko-mecab`, `spm`, `flores101`, `flores200`
            and `spBLEU-1K` need packages, and the last four a model that is downloaded beforehand.
        effective_order: Average over the n that the text is long enough for, as sacrebleu
            recommends for sentences; it counts for the corpus too.
        max_order: The longest n-grams.
        smooth_method: What becomes of an n without a match (Chen & Cherry 2014): `"exp"`,
            `"floor"`, `"add-k"` or `"none"`, as in sacrebleu.
        smooth_value: For `"floor"` (0.1 by default; at most 1) and `"add-k"` (1 by default).

    Raises:
        ValueError: If an option is none of those.
        ImportError: If the tokenizer needs a package that is not installed.
        FileNotFoundError: If the tokenizer needs a model that is not there.
    """

    transient = ("splitter", "target")

    def __init__(
        self,
        column: str = "references",
        *,
        lowercase: bool = False,
        tokenize: str = "13a",
        effective_order: bool = True,
        max_order: int = 4,
        smooth_method: str = "exp",
        smooth_value: float | None = None,
    ) -> None:
        self.name = "bleu"
        self.column, self.lowercase, self.tokenize = column, lowercase, tokenize
        if tokenize not in STEPWISE:
            make_tokenizer(tokenize)
        if isinstance(max_order, bool) or not isinstance(max_order, int) or max_order < 1:
            raise ValueError(f"max_order must be an integer of at least 1, got {max_order!r}")
        value = _smooth_value(smooth_method, smooth_value)
        self.formula = Formula(max_order, effective_order, smooth_method, value)

    @functools.cached_property
    def splitter(self) -> Splitter:
        """Give what splits texts into words."""
        return splitter(self.tokenize, self.lowercase)

    @functools.cached_property
    def target(self) -> TargetCache:
        """Give the n-grams of references, which cursors share."""
        return TargetCache(self.splitter, self.formula.max_order)

    def begin(self, row: Mapping[str, Any]) -> Cursor | None:
        """Begin a cursor; None with a tokenizer that needs the whole text."""
        if self.tokenize not in STEPWISE:
            return None
        return BleuCursor(self._target(row), self.formula, self.splitter)

    def value(self, text: str, row: Mapping[str, Any]) -> float:
        """Score one text."""
        return self._count(text, row).value(self.formula)

    def corpus(self, batch: TextBatch) -> Corpus:
        """Give corpus BLEU; its statistics are those of sacrebleu, in its order.

        Each text has its length, the length of its closest reference, then its matched n-grams and
        all its n-grams by n: `k = 2 + 2 max_order`.

        Raises:
            ValueError: If a row has no references.
        """
        order = self.formula.max_order
        statistics = np.zeros((len(batch), 2 + 2 * order))
        for i, (text, row) in enumerate(zip(batch.texts, batch.rows, strict=True)):
            count = self._count(text, row)
            totals = [max(0, count.length - n) for n in range(order)]
            closest = count.target.closest(count.length)
            statistics[i] = [count.length, closest, *count.correct, *totals]

        def score(sums: FloatArray) -> FloatArray:
            sums = np.asarray(sums, np.float64)
            values = [
                self.formula.of_counts(
                    row[2 : 2 + order], row[2 + order :], brevity_penalty(*row[:2])
                )
                for row in sums.reshape(-1, sums.shape[-1]).tolist()
            ]
            return np.array(values).reshape(sums.shape[:-1])

        return Corpus(statistics, score)

    def examples(self) -> tuple[Example, ...]:
        """Give a perfect text, one with half of its n-grams, and one with none.

        With other options than the defaults they are worth other values, so there are none.
        """
        if self.formula != Formula() or self.tokenize != "13a":
            return ()
        row = {self.column: ["the cat sat on the mat"]}
        # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, none of 1 (counts as half), 6 words to 4.
        middling = math.exp(1 - 6 / 4) * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
        return (
            Example(row, "the cat sat on the mat", 1.0),
            Example(row, "the cat sat quietly", middling),
            Example(row, "a dog lay under a tree", 0.0),
        )

    def _target(self, row: Mapping[str, Any]) -> Target:
        return self.target(self.references(row))

    def _count(self, text: str, row: Mapping[str, Any]) -> Count:
        count = Count(self._target(row))
        count.add(self.splitter.whole(text))
        return count


class TargetCache:
    """The n-grams of references, remembered for those that were asked for last.

    Args:
        splitter: Splits texts into words.
        max_order: The longest n-grams.
    """

    def __init__(self, splitter: Splitter, max_order: int) -> None:
        self.splitter, self.max_order = splitter, max_order
        self._kept: OrderedDict[tuple[str, ...], Target] = OrderedDict()
        self._ngrams = 0
        self._lock = threading.Lock()

    def __call__(self, references: tuple[str, ...]) -> Target:
        """Give the n-grams of a tuple of references."""
        with self._lock:
            if references in self._kept:
                self._kept.move_to_end(references)
                return self._kept[references]
        words = [self.splitter.whole(reference) for reference in references]
        target = Target(words, self.max_order)
        with self._lock:
            if references not in self._kept:
                self._kept[references] = target
                self._ngrams += len(target.limits)
            while self._ngrams > CACHED_NGRAMS:
                _, old = self._kept.popitem(last=False)
                self._ngrams -= len(old.limits)
        return target


def _smooth_value(method: str, value: float | None) -> float:
    """Give the value that a smoothing method uses, 0 where it uses none.

    Raises:
        ValueError: If there is no such method, or it has no such value.
    """
    if method not in SMOOTHING:
        raise ValueError(
            f"smooth_method must be one of {', '.join(map(repr, SMOOTHING))}, got {method!r}"
        )
    default = SMOOTHING[method]
    if value is None:
        return default or 0.0
    if default is None:
        raise ValueError(f"smooth_method={method!r} has no value, got smooth_value={value!r}")
    most = 1.0 if method == "floor" else math.inf
    if not (is_number(value) and 0 <= value <= most and math.isfinite(value)):
        wanted = "from 0 to 1" if method == "floor" else "finite and at least 0"
        raise ValueError(
            f"smooth_value of {method!r} must be {wanted}, got {value!r}: a matching text would "
            "be worth no more than another"
        )
    return float(value)
