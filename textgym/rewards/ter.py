"""Translation edit rate, by sacrebleu.

Snover et al. 2006 ("A study of translation edit rate with targeted human annotation"): the fewest
insertions, deletions, substitutions and shifts of phrases that make a reference of the text, over
the length of the references in words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.rewards.base import Corpus, Example
from textgym.rewards.batch import TextBatch
from textgym.rewards.bleu_words import forgetful
from textgym.rewards.scores import FloatArray
from textgym.rewards.text_metric import TextMetric

if TYPE_CHECKING:
    from sacrebleu.metrics.ter import TER

CACHED_PROMPTS = 1024


class Ter(TextMetric):
    """1 − TER, but no less than `low`: 1 where nothing is to be edited.

        r = max(low, 1 − edits / mean reference length)

    The rate has no upper end (a long text needs more deletions than the reference has words), hence
    `low`: by default −1, two edits a reference word. A text so long that its deletions alone cost
    that much is not aligned at all. `corpus` is 1 − TER as well, and has no lower end.

    Columns: `references`, a string or a list of strings. Statuses: none. Cost: words of the
    text times words of the reference, times the shifts that are tried; there is no cursor (one more
    word can undo every shift), so that `dense` scores the whole text anew after every token.

    Args:
        column: The column of the references.
        normalized: Part words and punctuation, and undo XML escapes, as Tercom does.
        no_punct: Ignore punctuation.
        asian_support: With these two, treat CJK characters and punctuation alike.
        case_sensitive: Tell upper and lower case apart.
        low: The worst value.

    Raises:
        ValueError: If `low` is not finite, or not below 1.
    """

    transient = ("metric",)

    def __init__(
        self,
        column: str = "references",
        *,
        normalized: bool = False,
        no_punct: bool = False,
        asian_support: bool = False,
        case_sensitive: bool = False,
        low: float = -1.0,
    ) -> None:
        if not -np.inf < low < 1:
            raise ValueError(f"expected a finite low < 1, got {low}")
        self.name = "ter"
        self.column, self.low = column, float(low)
        self.normalized, self.no_punct = normalized, no_punct
        self.asian_support, self.case_sensitive = asian_support, case_sensitive

    @functools.cached_property
    def metric(self) -> Callable[[tuple[str, ...]], TER]:
        """Give sacrebleu's metric for a tuple of references, split into words once."""
        from sacrebleu.metrics.ter import TER

        def make(references: tuple[str, ...]) -> TER:
            metric = TER(
                normalized=self.normalized,
                no_punct=self.no_punct,
                asian_support=self.asian_support,
                case_sensitive=self.case_sensitive,
                references=[[reference] for reference in references],
            )
            vars(metric)["tokenizer"] = forgetful(metric.tokenizer)
            return metric

        return functools.lru_cache(CACHED_PROMPTS)(make)

    def value(self, text: str, row: Mapping[str, Any]) -> float:
        """Score one text with sacrebleu."""
        metric = self.metric(self.references(row))
        if self._hopeless(text, metric):
            return self.low
        return max(self.low, 1.0 - float(metric.corpus_score([text], None).score) / 100.0)

    def _hopeless(self, text: str, metric: TER) -> bool:
        """Tell whether the text's surplus of words alone gives it the worst value."""
        assert metric._ref_cache is not None
        lengths = [len(words) for words in metric._ref_cache[0]["ref_words"]]
        if not sum(lengths):
            return False
        surplus = len(metric._preprocess_segment(text).split()) - max(lengths)
        return surplus >= (1.0 - self.low) * sum(lengths) / len(lengths)

    def corpus(self, batch: TextBatch) -> Corpus:
        """Give 1 − sacrebleu's `corpus_score` over 100, from edits and lengths of each text."""
        statistics = np.zeros((len(batch), 2))
        for i, (text, row) in enumerate(zip(batch.texts, batch.rows, strict=True)):
            metric = self.metric(self.references(row))
            statistics[i] = metric._extract_corpus_statistics([text], None)[0]

        def score(sums: FloatArray) -> FloatArray:
            edits, length = sums[..., 0], sums[..., 1]
            with np.errstate(divide="ignore", invalid="ignore"):
                return 1.0 - np.where(length > 0, edits / length, edits > 0)

        return Corpus(statistics, score)

    def examples(self) -> tuple[Example, ...]:
        """Give no edit, a shift of two words (one edit), and as many edits as words."""
        row = {self.column: ["on Monday we sailed"]}
        return (
            Example(row, "on Monday we sailed", 1.0),
            Example(row, "we sailed on Monday", 0.75),
            Example(row, "nothing of it", 0.0),
        )
