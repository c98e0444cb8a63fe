"""Sentence BLEU, by sacrebleu.

Papineni et al. 2002, with the smoothing and the effective order that sacrebleu recommends for
sentences (Chen & Cherry 2014; Post 2018). `Bleu().score` *is* sacrebleu, with the n-grams of the
references cached; its cursor equals sacrebleu bit for bit at every prefix of every text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from textgym.rewards.base import Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.errors import check_column
from textgym.rewards.references import references_of

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

CACHED_PROMPTS = 4096


class Bleu(Reward):
    """Sentence BLEU with effective order, over 100: from 0 to 1.

    Args:
        column: The column of the references, a string or a list of strings.
        lowercase: Ignore case.
        tokenize: sacrebleu's tokenizer.
    """

    reads_only = True
    transient = ("metric",)

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
