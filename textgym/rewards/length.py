"""Prices on length, and the length that is asked for."""

from __future__ import annotations

from typing import Literal

import numpy as np

from textgym.rewards.base import Example, Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.scores import FloatArray

Unit = Literal["tokens", "words"]
LONGEST_EXAMPLE = 1000  # words; longer ones show nothing to anybody


class LengthPenalty(Reward):
    """0 up to `free` tokens, then falling linearly to −1 at `free + span` tokens, and no further.

        r = −min(1, max(0, n − free) / span)

    `n` counts the tokens of the response, its stop id included.

    Args:
        free: Tokens that cost nothing.
        span: Tokens over which the penalty grows to 1.

    Raises:
        ValueError: If `free` is negative or `span` is not positive.
    """

    cheap = True
    reads_only = True
    judges_content = False
    reads_tokens = True
    low = -1.0
    high = 0.0

    def __init__(self, free: int = 0, span: int = 100) -> None:
        if free < 0 or span < 1:
            raise ValueError(f"expected free >= 0 and span >= 1, got free={free}, span={span}")
        self.name = "length"
        self.free, self.span = free, span

    def score(self, batch: TextBatch) -> FloatArray:
        """Price each response by its number of tokens."""
        return -np.clip((lengths(batch, "tokens") - self.free) / self.span, 0.0, 1.0) + 0.0

    def examples(self) -> tuple[Example, ...]:
        """Give texts of one token a word: free of charge, at half the price, at the full price."""
        if self.free + self.span > LONGEST_EXAMPLE:
            return ()
        half = self.span // 2
        return (
            Example({}, _words(self.free), 0.0),
            Example({}, _words(self.free + half), 0.0 - half / self.span),
            Example({}, _words(self.free + self.span), -1.0),
        )


class SoftOverlong(LengthPenalty):
    """The soft overlong punishment of DAPO: 0, then falling to −1 at the budget.

        r = 0                                        for n ≤ longest − buffer
            ((longest − buffer) − n) / buffer        up to n = longest
            −1                                       beyond

    Yu et al. 2025 ("DAPO: an open-source LLM reinforcement learning system at scale"), eq. 13:
    `longest` is L_max and `buffer` is L_cache. It is `LengthPenalty(longest - buffer, buffer)`. `n`
    counts the tokens of the response, its stop id included.

    Args:
        longest: Tokens at which the punishment is −1: the budget of a response.
        buffer: Tokens over which it grows.

    Raises:
        ValueError: If `buffer` is not positive, or larger than `longest`.
    """

    def __init__(self, longest: int = 20_480, buffer: int = 4_096) -> None:
        if not 1 <= buffer <= longest:
            raise ValueError(
                f"expected 1 <= buffer <= longest, got longest={longest}, buffer={buffer}"
            )
        super().__init__(longest - buffer, buffer)
        self.name = "soft_overlong"


class LengthWindow(Reward):
    """1 from `shortest` to `longest`, falling linearly to 0 over `span` on either side.

        r = max(0, 1 − d / span),   d = max(0, shortest − n, n − longest)

    Columns, statuses: none. Cost: none to speak of.

    Args:
        shortest: The least length that earns 1.
        longest: The greatest; a target length where it equals `shortest`, which is the default.
        span: How far outside the reward is 0.
        unit: What `n` counts: `"tokens"` of the response, its stop id included, or `"words"` of its
            text, parted by white space.

    Raises:
        ValueError: If `shortest` is negative or above `longest`, `span` is not positive, or the
            unit is unknown.
    """

    cheap = True
    reads_only = True
    judges_content = False

    def __init__(
        self, shortest: int, longest: int | None = None, span: int = 20, unit: Unit = "tokens"
    ) -> None:
        longest = shortest if longest is None else longest
        if not 0 <= shortest <= longest or span < 1:
            raise ValueError(
                "expected 0 <= shortest <= longest and span >= 1, "
                f"got shortest={shortest}, longest={longest}, span={span}"
            )
        if unit not in ("tokens", "words"):
            raise ValueError(f"expected the unit 'tokens' or 'words', got {unit!r}")
        self.name = "length_window"
        self.shortest, self.longest, self.span, self.unit = shortest, longest, span, unit
        self.reads_tokens = unit == "tokens"

    def score(self, batch: TextBatch) -> FloatArray:
        """Compare the length of each response with the window."""
        count = lengths(batch, self.unit)
        outside = np.maximum(np.maximum(self.shortest - count, count - self.longest), 0.0)
        return np.maximum(0.0, 1.0 - outside / self.span)

    def examples(self) -> tuple[Example, ...]:
        """Give texts of one token a word: in the window, half out, and out."""
        if self.longest + self.span > LONGEST_EXAMPLE:
            return ()
        half = self.span // 2
        return (
            Example({}, _words(self.longest), 1.0),
            Example({}, _words(self.longest + half), 1.0 - half / self.span),
            Example({}, _words(self.longest + self.span), 0.0),
        )


def lengths(batch: TextBatch, unit: str) -> FloatArray:
    """Count the tokens or the words of each response."""
    if unit == "tokens":
        return np.array([len(ids) for ids in batch.token_ids], np.float64)
    return np.array([len(text.split()) for text in batch.texts], np.float64)


def _words(count: int) -> str:
    return " ".join(["word"] * count)
