"""ROUGE, by rouge-score.

Lin 2004. `Rouge(kind).score` *is* rouge-score's `score_multi`, with the words of the references
cached; its cursor equals rouge-score at every prefix of every text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from textgym.rewards.base import Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.errors import check_column
from textgym.rewards.references import references_of

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

CACHED_TEXTS = 16384


class Rouge(Reward):
    """The F-measure against the best reference: from 0 to 1.

    Args:
        kind: `"rouge1"` to `"rouge9"` (n-grams), `"rougeL"` (longest common subsequence) or
            `"rougeLsum"` (the same, line by line).
        column: The column of the references, a string or a list of strings.
        use_stemmer: Compare the stems of words (Porter).
    """

    reads_only = True
    transient = ("scorer",)

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

        return RougeScorer([self.kind], tokenizer=_CachedTokenizer(self.use_stemmer))

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


class _CachedTokenizer:
    """rouge-score's tokenizer behind a cache, in which references stay and texts pass."""

    def __init__(self, use_stemmer: bool) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self.tokenize = functools.lru_cache(CACHED_TEXTS)(DefaultTokenizer(use_stemmer).tokenize)
