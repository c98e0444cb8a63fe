"""Words of a text, and of a text that grows.

White space parts words in every metric of this package, and no rule that makes words of a stretch
of text looks across it. So a cursor splits only what follows the last white space anew.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

LONGEST_REMEMBERED = 64

_RUN = re.compile(
    r"(?<!\w)'(?:s|re|ve|ll|d|m)(?!\w)"  # a clitic that stands alone, as in text split before
    r"|\d+(?:[.,:]\d+)+"  # 12.50, 1,000, 10:30
    r"|[^\W_]+(?:['-][^\W_]+)*"  # words with hyphens and apostrophes
    r"|[$£€%&#]"
)
_CLITICS = ("n't", "'s", "'re", "'ve", "'ll", "'d", "'m")


def caption_words(text: str) -> list[str]:
    """Split a text into lower-case words as caption metrics count them, without punctuation.

    It follows the Penn Treebank's rules for clitics ("can't" is "ca n't", "river's" is
    "river 's"), keeps hyphenated words, numbers, currency and per-cent signs, and drops all other
    punctuation. It gives the words of its own output, joined by spaces, again. Linear time.

    Args:
        text: Any text.
    """
    words = []
    for run in _RUN.findall(text.lower().replace("\u2019", "'")):
        end, clitics = len(run), []
        while run.endswith(_CLITICS, 1, end):
            start = run.rindex("n't" if run.endswith("n't", 1, end) else "'", 0, end)
            clitics.append(run[start:end])
            end = start
        words += [run[:end], *reversed(clitics)]
    return words


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """List the n-grams of a sequence of words."""
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def remembered(function: Callable[[str], T], most: int) -> Callable[[str], T]:
    """Remember what a function gives for the words asked for last, but not for endless ones.

    A text without spaces is one word: `most` of those would fill the memory.
    """
    known = functools.lru_cache(most)(function)
    return lambda word: known(word) if len(word) <= LONGEST_REMEMBERED else function(word)


class GrowingText:
    """A text that grows, split after its last white space.

    Attributes:
        tail: What follows the last white space: a word that may go on.
    """

    __slots__ = ("tail",)

    def __init__(self, tail: str = "") -> None:
        self.tail = tail

    def push(self, piece: str) -> str:
        """Append `piece`; give the text that it finishes, which ends in white space."""
        text = self.tail + piece
        last = text.rsplit(None, 1)[-1:]
        if not last or text[-1].isspace():
            self.tail = ""
            return text
        self.tail = last[0]
        return text[: len(text) - len(self.tail)]
