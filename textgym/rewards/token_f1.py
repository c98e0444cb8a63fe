"""F1 of words, as SQuAD scores answers."""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from textgym.rewards.base import Cursor, Example
from textgym.rewards.text_metric import TextMetric
from textgym.rewards.words import GrowingText

CACHED_PROMPTS = 1024

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")


def squad_words(text: str) -> list[str]:
    """Split a text as SQuAD's evaluation does: no case, ASCII punctuation or English articles.

    Rajpurkar et al. 2016 ("SQuAD: 100,000+ questions for machine comprehension of text"). Linear
    time.
    """
    return _ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split()


class TokenF1(TextMetric):
    """F1 of words against the best reference, as SQuAD scores answers: from 0 to 1.

    Words are compared as a bag, after SQuAD's normalisation (`squad_words`). Of a reference without
    words (an article, punctuation, nothing) the F1 is 1 if the text has none either, else 0, as in
    SQuAD 2.0. Columns: `references`, a string or a list of strings. Statuses: none. Cost:
    linear in the text; a cursor costs a look-up a word and reference.

    Args:
        column: The column of the references.
    """

    cheap = True
    transient = ("bags",)

    def __init__(self, column: str = "references") -> None:
        self.name = "token_f1"
        self.column = column

    @functools.cached_property
    def bags(self) -> Callable[[tuple[str, ...]], list[Counter[str]]]:
        """Give the words of each reference, counted once."""
        return functools.lru_cache(CACHED_PROMPTS)(
            lambda references: [Counter(squad_words(reference)) for reference in references]
        )

    def begin(self, row: Mapping[str, Any]) -> Cursor:
        """Begin a cursor."""
        references = self.references(row)
        return TokenF1Cursor(self.bags(references))

    def examples(self) -> tuple[Example, ...]:
        """Give an answer in other words around it, a part of one, and a wrong one."""
        row = {self.column: ["the Eiffel Tower", "Eiffel Tower, Paris"]}
        return (
            Example(row, "An Eiffel tower!", 1.0),
            Example(row, "Eiffel", 2 / 3),
            Example(row, "Big Ben", 0.0),
        )


class TokenF1Cursor:
    """Token F1 of a text that grows.

    Args:
        bags: The words of each reference, shared and not changed.
    """

    __slots__ = ("bags", "hits", "length", "seen", "text")

    def __init__(self, bags: list[Counter[str]]) -> None:
        self.bags = bags
        self.text = GrowingText()
        self.seen: dict[str, int] = {}
        self.hits = [0] * len(bags)
        self.length = 0

    def push(self, piece: str) -> float:
        """Append `piece` and give the F1 of the text so far."""
        self._count(squad_words(self.text.push(piece)))
        length, hits = self.length, list(self.hits)
        unfinished = squad_words(self.text.tail)
        self._count(unfinished)
        value = max(map(self._value, self.bags, self.hits))
        self.length, self.hits = length, hits
        for word in unfinished:
            self.seen[word] -= 1
        return value

    def _count(self, words: list[str]) -> None:
        self.length += len(words)
        for word in words:
            count = self.seen[word] = self.seen.get(word, 0) + 1
            for i, bag in enumerate(self.bags):
                self.hits[i] += count <= bag.get(word, 0)

    def _value(self, bag: Counter[str], hits: int) -> float:
        length = bag.total()
        if not length or not self.length:
            return float(length == self.length)
        if not hits:
            return 0.0
        precision, recall = hits / self.length, hits / length
        return 2 * precision * recall / (precision + recall)

    def copy(self) -> TokenF1Cursor:
        """Give an independent copy."""
        twin = TokenF1Cursor(self.bags)
        twin.text, twin.length = GrowingText(self.text.tail), self.length
        twin.seen, twin.hits = dict(self.seen), list(self.hits)
        return twin
