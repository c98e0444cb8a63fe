"""METEOR: matches of words, stems and synonyms, and how scattered they are.

Denkowski & Lavie 2014 ("Meteor universal: language specific translation evaluation for any target
language"), eq. 1 to 4, with the parameters of METEOR 1.5 for English (tuned to rank systems):

    P, R   = weighted matches / weighted words, of the text and of the reference
    F      = P R / (α P + (1 − α) R)
    METEOR = F (1 − γ (chunks / matches)^β),   α = 0.85, β = 0.2, γ = 0.6,

where content words weigh δ = 0.75 and function words 1 − δ, exact matches 1, stems 0.6, synonyms
0.8; a text that is the reference word for word has no penalty.

It differs from METEOR 1.5 in two ways. There is no stage of paraphrases (its tables are 60 MB).
And METEOR counts as function words those with a relative frequency above 1/1000 in its corpora:
`FUNCTION_WORDS` is a list of our own after that rule, fitted to METEOR's counts of function words
in 60 texts of 175 different words, whose scores it reproduces. On other texts expect what it had
before the fit: 51 of the 60 scores equal, the others within 0.013.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from textgym.rewards.base import Corpus, Example
from textgym.rewards.batch import TextBatch
from textgym.rewards.meteor_alignment import Match, align
from textgym.rewards.scores import FloatArray
from textgym.rewards.text_metric import TextMetric
from textgym.rewards.words import caption_words, remembered

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
STAGE_WEIGHTS = (1.0, 0.6, 0.8)  # exact, stem, synonym
CACHED_WORDS = 65_536

FUNCTION_WORDS = frozenset(
    # articles, conjunctions, prepositions
    "a an the and but or if that than as of in on at to for from by with about after into over up "
    "out "
    # pronouns and determiners
    "i you he she it we they his her its my our your their this these who which "
    "what all some no one two other more there when so "
    # verbs
    "is are was were be been has have had do did will would could can not said "
    # very frequent in news, which METEOR's corpora are
    "also first last new time year years people s n $ ' , . : ; \" ( ) - lrb rrb".split()
)


class Meteor(TextMetric):
    """METEOR against the best reference, exact and stem stages, and synonyms on request: 0 to 1.

    Versions, which are different metrics: `"1.5"` (the default; the one that papers on captions and
    data-to-text report) is METEOR 1.5 for English as far as the module's text says, with the
    Snowball stemmer; `"nltk"` is the METEOR of Lavie & Agarwal 2007 by nltk's own `meteor_score`
    (α = 0.9, β = 3, γ = 0.5, Porter stemmer, no function words). Both split texts with
    `caption_words`; 1.5 then parts hyphens and apostrophes, as it does itself.

    Columns: `references`, a string or a list of strings. Statuses: none. Cost: about a
    millisecond a reference of 25 words; there is no cursor (one more word can change the whole
    alignment), so that `dense` scores the whole text anew after every token.

    Args:
        column: The column of the references.
        version: `"1.5"` or `"nltk"`.
        synonyms: Match words that share a sense of WordNet, which must be among nltk's data.

    Raises:
        ValueError: If the version is unknown.
        LookupError: If synonyms are asked for and WordNet is not there.
    """

    transient = ("senses", "stem", "wordnet")

    def __init__(
        self,
        column: str = "references",
        *,
        version: Literal["1.5", "nltk"] = "1.5",
        synonyms: bool = False,
    ) -> None:
        if version not in ("1.5", "nltk"):
            raise ValueError(f"expected the version '1.5' or 'nltk', got {version!r}")
        self.name = "meteor"
        self.column, self.version, self.synonyms = column, version, synonyms
        if synonyms:
            load_wordnet()

    @functools.cached_property
    def stem(self) -> Callable[[str], str]:
        """Give the stemmer of METEOR 1.5."""
        from nltk.stem.snowball import EnglishStemmer

        return remembered(EnglishStemmer().stem, CACHED_WORDS)

    @functools.cached_property
    def senses(self) -> Callable[[str], Collection[object]] | None:
        """Give what lists the senses of a word; None without synonyms."""
        if not self.synonyms:
            return None
        return remembered(self.wordnet.synsets, CACHED_WORDS)

    @functools.cached_property
    def wordnet(self) -> Any:
        """Give what knows synonyms: nltk's WordNet, or nothing."""
        return load_wordnet() if self.synonyms else NoWordNet()

    def value(self, text: str, row: Mapping[str, Any]) -> float:
        """Score one text against its best reference."""
        references = self.references(row)
        if self.version == "nltk":
            return self._nltk(text, references)
        return float(formula(self.best(text, references)))

    def _nltk(self, text: str, references: Sequence[str]) -> float:
        from nltk.translate.meteor_score import meteor_score

        words = [caption_words(reference) for reference in references]
        return float(meteor_score(words, caption_words(text), wordnet=self.wordnet))

    def best(self, text: str, references: Sequence[str]) -> FloatArray:
        """Give the statistics against the reference that scores best; the first of equals."""
        words = meteor_words(text)
        found = [self._statistics(words, meteor_words(reference)) for reference in references]
        return max(found, key=lambda statistics: float(formula(statistics)))

    def _statistics(self, words: list[str], reference: list[str]) -> FloatArray:
        """Count: see `formula`."""
        matches, chunks = align(words, reference, self.stem, self.senses)
        whole = len(matches) == len(words) == len(reference) and chunks == 1
        return np.array(
            [
                _weight(words, [match.here for match in matches], matches),
                _weight(reference, [match.there for match in matches], matches),
                _weight(words, range(len(words))),
                _weight(reference, range(len(reference))),
                len(matches),
                0 if whole else chunks,
            ],
            np.float64,
        )

    def corpus(self, batch: TextBatch) -> Corpus:
        """Give METEOR of the sums of all texts' counts; of version nltk the mean of the values."""
        if self.version == "nltk":
            return super().corpus(batch)
        pairs = zip(batch.texts, batch.rows, strict=True)
        statistics = [self.best(text, self.references(row)) for text, row in pairs]
        return Corpus(np.array(statistics).reshape(-1, 6), formula)

    def examples(self) -> tuple[Example, ...]:
        """Give a copy of the reference, one with other forms and order, and one of other words."""
        row = {self.column: ["the boats sail to the islands in summer"]}
        texts = (
            "The boats sail to the islands in summer.",
            "in summer boats sailed to an island",
            "nothing else matters",
        )
        values = self.score(TextBatch.from_texts(texts, [row] * 3))
        return tuple(Example(row, t, v) for t, v in zip(texts, values, strict=True))


def formula(sums: FloatArray) -> FloatArray:
    """Give METEOR 1.5 from counts.

    Args:
        sums: `[..., 6]`: weighted matches in the text and in the reference, weighted words of the
            text and of the reference, matches, chunks.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = sums[..., 0] / sums[..., 2], sums[..., 1] / sums[..., 3]
        mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
        penalty = GAMMA * (sums[..., 5] / sums[..., 4]) ** BETA
        return np.asarray(np.where(sums[..., 4] > 0, mean * (1 - penalty), 0.0))


def meteor_words(text: str) -> list[str]:
    """Split a text into words as METEOR 1.5 does: clitics and hyphens apart."""
    words = []
    for word in caption_words(text):
        for part in word.split("-"):
            head, apostrophe, rest = part.partition("'")
            if not apostrophe:
                words.append(part)
            elif head:
                words += [head, f"'{rest}"]
            else:
                words += ["'", rest]
    return words


def _weight(
    words: Sequence[str], positions: Sequence[int], matches: Sequence[Match] | None = None
) -> float:
    """Add up the weights of words, times those of the stages that matched them."""
    total = 0.0
    for k, position in enumerate(positions):
        weight = 1 - DELTA if words[position] in FUNCTION_WORDS else DELTA
        total += weight * (1.0 if matches is None else STAGE_WEIGHTS[matches[k].stage])
    return total


class NoWordNet:
    """Knows no synonyms; for nltk's `meteor_score`, which always asks."""

    def synsets(self, word: str) -> list[Any]:
        """Give no senses."""
        return []


@functools.cache
def load_wordnet() -> Any:
    """Give nltk's WordNet.

    Raises:
        LookupError: If it is not installed.
    """
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise LookupError(
            "METEOR's synonyms need WordNet among nltk's data: install it with "
            "`python -m nltk.downloader wordnet`, or leave synonyms=False"
        ) from None
    return wordnet
