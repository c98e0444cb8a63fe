"""ROUGE (Lin 2004), equal to rouge-score's at every prefix of every text.

Words are split and stemmed as in rouge-score; `rouge_counts` and `rouge_lsum` count, without its
tables of the size of reference times text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from textgym.rewards.base import Example
from textgym.rewards.rouge_counts import (
    GramCursor,
    GramTarget,
    LcsCursor,
    LcsTarget,
    RougeCursor,
    Words,
    split_text,
)
from textgym.rewards.rouge_lsum import LsumCursor, LsumTarget
from textgym.rewards.text_metric import TextMetric
from textgym.rewards.words import remembered

CACHED_PROMPTS = 1024
CACHED_WORDS = 1 << 15


class Rouge(TextMetric):
    """ROUGE, the F-measure of n-grams or of the longest common subsequence: from 0 to 1.

    Cost: linear in the text for n-grams; text times reference, 64 words of it at a time, for the
    longest common subsequence. Statuses: none. As a corpus metric it is the mean.

    Args:
        kind: `"rouge1"` to `"rouge9"` (n-grams), `"rougeL"` (longest common subsequence) or
            `"rougeLsum"` (the same, line by line).
        column: The column of the references, a string or a list of strings.
        use_stemmer: Compare the stems of words (Porter).
        aggregate: Over the references, `"best"` (rouge-score's `score_multi`) or `"mean"`.

    Raises:
        ValueError: If an option is none of those.
    """

    transient = ("split", "target")

    def __init__(
        self,
        kind: str = "rougeL",
        column: str = "references",
        *,
        use_stemmer: bool = False,
        aggregate: Literal["best", "mean"] = "best",
    ) -> None:
        if not re.fullmatch(r"rouge([1-9]|L|Lsum)", kind):
            raise ValueError(
                f"expected 'rouge1' to 'rouge9', 'rougeL' or 'rougeLsum', got {kind!r}"
            )
        if aggregate not in ("best", "mean"):
            raise ValueError(f"aggregate must be 'best' or 'mean', got {aggregate!r}")
        self.name = self.kind = kind
        self.column, self.use_stemmer, self.aggregate = column, use_stemmer, aggregate

    @functools.cached_property
    def split(self) -> Callable[[str], Words]:
        """Give the function from a run of letters and digits to its word, stemmed or not."""
        if not self.use_stemmer:
            return lambda run: (run,)
        from rouge_score.tokenizers import DefaultTokenizer

        return remembered(DefaultTokenizer(use_stemmer=True).tokenize, CACHED_WORDS)

    @functools.cached_property
    def target(self) -> Callable[[tuple[str, ...]], GramTarget | LcsTarget | LsumTarget]:
        """Give what cursors share for a tuple of references."""

        def make(references: tuple[str, ...]) -> GramTarget | LcsTarget | LsumTarget:
            if self.kind == "rougeLsum":
                return LsumTarget(
                    [[split_text(line, self.split) for line in r.split("\n")] for r in references]
                )
            words = [split_text(reference, self.split) for reference in references]
            return LcsTarget(words) if self.kind == "rougeL" else GramTarget(words, self._order)

        return functools.lru_cache(CACHED_PROMPTS)(make)

    @property
    def _order(self) -> int:
        return int(self.kind[5:])

    def begin(self, row: Mapping[str, Any]) -> RougeCursor:
        """Begin a cursor."""
        target = self.target(self.references(row))
        mean = self.aggregate == "mean"
        if isinstance(target, LsumTarget):
            return LsumCursor(target, self.split, mean)
        if isinstance(target, LcsTarget):
            return LcsCursor(target, self.split, mean)
        return GramCursor(target, self.split, mean)

    def examples(self) -> tuple[Example, ...]:
        """Give a perfect text, one that leaves out words, and one of other words."""
        row = {self.column: ["the cat sat on the mat"]}
        # Found of 3 words 3, of 2 pairs 1, in order 2 ("the sat", "the mat"); there are 6 and 5.
        middling = {"rouge1": 6 / 9, "rouge2": 2 / 7, "rougeL": 4 / 9, "rougeLsum": 4 / 9}
        if self.kind not in middling:
            return ()
        return (
            Example(row, "The cat sat on the mat.", 1.0),
            Example(row, "the mat sat", middling[self.kind]),
            Example(row, "a dog lay under a tree", 0.0),
        )
