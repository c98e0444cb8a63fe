"""A price on length."""

from __future__ import annotations

import numpy as np

from textgym.rewards.base import FloatArray, Reward
from textgym.rewards.batch import TextBatch


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
    low = -1.0
    high = 0.0

    def __init__(self, free: int = 0, span: int = 100) -> None:
        if free < 0 or span < 1:
            raise ValueError(f"expected free >= 0 and span >= 1, got free={free}, span={span}")
        self.name = "length"
        self.free, self.span = free, span

    def score(self, batch: TextBatch) -> FloatArray:
        """Price each response by its number of tokens."""
        count = np.array([len(ids) for ids in batch.token_ids], np.float64)
        return -np.clip((count - self.free) / self.span, 0.0, 1.0) + 0.0
