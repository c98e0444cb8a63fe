"""Random texts out of what tokenizers treat in a special way, and cursors pushed through them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from textgym.rewards import Reward

PIECES = [
    *("the", "The", " the", " cat", "cat", " sat", " on", " mat", "mats", " a", "a", "A", "an"),
    *(" ", "  ", "\n", "-\n", "-", "--", "\n\n", "\t", "\r\n", "\xa0", "\u2009", "\x1c", "\u200b"),
    *(".", ",", "...", ", ", "3.5", "1,000", "10", "5", "0-1", "1-", "$", "%", "&amp;", "&", "<"),
    *("(", ")", "'", '"', "didn't", "n't", "'s", "cat's", "\u2019s", "well-known", "/", "_", "!"),
    *("é", "日本", "。", "ΑΣ", "Σ", "ς", "İ", "\u212a", "ß", "😀", "\u0301", "running", "runs"),
]


@pytest.fixture
def joined() -> Callable[[random.Random, int], str]:
    """A function that joins fewer than `most` random pieces."""
    return lambda rng, most: "".join(rng.choice(PIECES) for _ in range(rng.randrange(most)))


@pytest.fixture
def prefixes() -> Callable[..., Iterator[tuple[float, str]]]:
    """A function that pushes random pieces into a cursor: its value and the text after each."""

    def push(
        reward: Reward, row: Mapping[str, Any], rng: random.Random, count: int = 16
    ) -> Iterator[tuple[float, str]]:
        cursor, text = reward.begin(row), ""
        assert cursor is not None
        for _ in range(count):
            piece = rng.choice(PIECES)
            text += piece
            value = cursor.push(piece)
            if rng.random() < 0.2:  # neither a copy nor nothing at all changes what follows
                cursor.copy().push("the cat" + piece)
                assert cursor.push("") == value
                cursor = cursor.copy()
            yield value, text

    return push
