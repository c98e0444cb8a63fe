"""How varied texts are: within one (distinct-n, repetition), and over a group (self-BLEU).

Words are what white space parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from textgym.rewards.base import Cursor, Example, Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.bleu import Bleu
from textgym.rewards.words import GrowingText, ngrams


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Different n-grams over all n-grams of all texts (Li et al. 2016, "distinct-n"), 0 to 1.

    0 where no text has an n-gram. It is no function of sums over the texts (two texts share
    n-grams), so that it has no bootstrap interval and is not the mean of `Distinct`.

    Args:
        texts: The texts, split at white space.
        n: Order of the n-grams.
    """
    grams = [gram for text in texts for gram in ngrams(text.split(), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


class Distinct(Reward):
    """Different n-grams of a text over all its n-grams (distinct-n): from 0 to 1.

    Li et al. 2016 ("A diversity-promoting objective function for neural conversation models"), for
    one text; 0 for a text without n-grams. It falls with length and is 1 for a single word: a
    term beside a measure of content, or a metric. Columns, statuses: none. Cost: linear in
    the text; a cursor costs one look-up a word.

    Args:
        order: The n of the n-grams.

    Raises:
        ValueError: If the order is below 1.
    """

    cheap = True
    reads_only = True
    judges_content = False

    def __init__(self, order: int = 2) -> None:
        self.name = f"distinct{order}"
        self.order = _checked(order)

    def begin(self, row: Mapping[str, Any]) -> Cursor:
        """Begin a cursor."""
        return DistinctCursor(self.order)

    def score(self, batch: TextBatch) -> list[float]:
        """Count the n-grams of each text."""
        return [DistinctCursor(self.order).push(text) for text in batch.texts]

    def examples(self) -> tuple[Example, ...]:
        """Give a text without a repeated n-gram, one with some, and one without n-grams."""
        return (
            Example({}, " ".join(str(i) for i in range(self.order + 2)), 1.0),
            Example({}, " ".join(["no"] * (self.order + 1)), 0.5),
            Example({}, "", 0.0),
        )


class Repetition(Reward):
    """Minus the share of a text's n-grams that it has written before: from −1 to 0.

        r = −(1 − different n-grams / n-grams)

    That is minus seq-rep-n of Welleck et al. 2020 ("Neural text generation with unlikelihood
    training"), over words; 0 for a text of fewer than n words. Columns, statuses: none. Cost:
    linear in the text; a cursor costs one look-up a word.

    Args:
        order: The n of the n-grams.

    Raises:
        ValueError: If the order is below 1.
    """

    cheap = True
    reads_only = True
    judges_content = False
    low = -1.0
    high = 0.0

    def __init__(self, order: int = 4) -> None:
        self.name = "repetition"
        self.order = _checked(order)

    def begin(self, row: Mapping[str, Any]) -> Cursor:
        """Begin a cursor."""
        return DistinctCursor(self.order, offset=-1.0, empty=0.0)

    def score(self, batch: TextBatch) -> list[float]:
        """Count the n-grams of each text."""
        return [self.begin({}).push(text) for text in batch.texts]

    def examples(self) -> tuple[Example, ...]:
        """Give a text without a repeated n-gram, and one word again and again, less and more."""
        n = self.order
        return (
            Example({}, " ".join(str(i) for i in range(n + 2)), 0.0),
            Example({}, " ".join(["no"] * (n + 1)), -0.5),
            Example({}, " ".join(["no"] * (n + 9)), -0.9),
        )


class DistinctCursor:
    """Share of different n-grams of a text that grows, plus an offset.

    Args:
        order: The n of the n-grams.
        offset: What is added.
        empty: The value of a text without n-grams.
    """

    __slots__ = ("context", "empty", "grams", "offset", "order", "text", "total")

    def __init__(self, order: int, offset: float = 0.0, empty: float = 0.0) -> None:
        self.order, self.offset, self.empty = order, offset, empty
        self.text = GrowingText()
        self.context: tuple[str, ...] = ()
        self.grams: set[tuple[str, ...]] = set()
        self.total = 0

    def push(self, piece: str) -> float:
        """Append `piece` and give the value of the text so far."""
        finished = self.text.push(piece)
        for word in finished.split():
            self._extend(word)
        different, total = len(self.grams), self.total
        if self.text.tail:
            gram = (*self.context, self.text.tail)[-self.order :]
            if len(gram) == self.order:
                total += 1
                different += gram not in self.grams
        return different / total + self.offset if total else self.empty

    def _extend(self, word: str) -> None:
        self.context = (*self.context, word)[-self.order :]
        if len(self.context) == self.order:
            self.grams.add(self.context)
            self.total += 1

    def copy(self) -> DistinctCursor:
        """Give an independent copy."""
        twin = DistinctCursor(self.order, self.offset, self.empty)
        twin.text, twin.context = GrowingText(self.text.tail), self.context
        twin.grams, twin.total = set(self.grams), self.total
        return twin


class SelfBleu(Reward):
    """Minus the BLEU of a text against the other responses to its prompt: from −1 to 0.

    Zhu et al. 2018 ("Texygen"): 0 where the responses share no word, −1 where they are equal. It is
    *defined over the batch*: the value of a text depends on what else is in it, so that it is not
    invariant to how texts are batched, and a text that is the only response to its prompt in the
    batch gets 0. Score whole groups with it, as in the reward function of a group-based learner or
    in an evaluation: an environment scores responses as they finish, seldom a whole group at once.

    Columns: none; prompts are told apart by what they say. Statuses: none. Cost: quadratic in
    the size of the group; there is no cursor.

    Args:
        lowercase: Ignore case.
        tokenize: sacrebleu's tokenizer.
    """

    reads_only = True
    per_text = False
    judges_content = False
    low = -1.0
    high = 0.0

    def __init__(self, *, lowercase: bool = False, tokenize: str = "13a") -> None:
        self.name = "self_bleu"
        self.bleu = Bleu(lowercase=lowercase, tokenize=tokenize)

    def score(self, batch: TextBatch) -> list[Any]:
        """Score each text against the others of its prompt."""
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(batch.prompts):
            groups.setdefault(repr(prompt), []).append(i)
        values: list[Any] = [0.0] * len(batch)
        for group in groups.values():
            if len(group) < 2:
                continue
            texts = [batch.texts[i] for i in group]
            rows = [{"references": texts[:k] + texts[k + 1 :]} for k in range(len(texts))]
            found = self.bleu.score(TextBatch.from_texts(texts, rows))
            for i, value in zip(group, found, strict=True):
                values[i] = value if isinstance(value, Exception) else 0.0 - value
        return values

    def examples(self) -> tuple[Example, ...]:
        """Give three responses to one prompt, to be scored as one batch."""
        row = {"prompt": "Greet:"}
        texts = ("hello there my friend", "good day to you", "good day to him")
        values = self.score(TextBatch.from_texts(texts, [row] * 3))
        return tuple(Example(row, t, v) for t, v in zip(texts, values, strict=True))


def _checked(order: int) -> int:
    if order < 1:
        raise ValueError(f"expected n-grams of order 1 or more, got {order}")
    return order
