"""Tables of generated tasks: three splits that share no prompt, whatever seed, size or knobs.

A row function takes a generator and the name of a split and draws until the input belongs to it;
which split an input belongs to is a hash of the input alone. The tables of one task are built once
per process.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from textgym.prompts import Prompts, link
from textgym.streams import generator

SPLITS: tuple[str, ...] = ("train", "validation", "test")
SIZES: Mapping[str, int] = {"train": 4000, "validation": 500, "test": 500}
PATIENCE = 10  # draws of a known input in a row after which a table is taken to hold all there is


def hashed_split(text: str) -> str:
    """Say which split an input belongs to: a tenth is validation, two tenths are test."""
    tenth = zlib.crc32(text.encode()) % 10
    return "validation" if tenth == 0 else "test" if tenth <= 2 else "train"


def check_split(split: str) -> None:
    """Raise a ValueError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {list(SPLITS)}, got {split!r}")


def table(
    function: Callable[..., Mapping[str, Any]], split: str, *, seed: int = 0, **knobs: Any
) -> Prompts:
    """Table of one split of a generated task, at most `SIZES[split]` rows and no prompt twice.

    Args:
        function: `function(rng, split=..., **knobs) -> row`.
        split: `"train"`, `"validation"` or `"test"`.
        seed: Key of the rows; another seed gives other rows of the same split.
        **knobs: Passed on; hashable.

    Raises:
        ValueError: The split is not known, or a knob is out of range.
    """
    check_split(split)
    return _tables(function, seed, tuple(sorted(knobs.items())))[SPLITS.index(split)]


@lru_cache(maxsize=32)
def _tables(
    function: Callable[..., Mapping[str, Any]], seed: int, knobs: tuple[tuple[str, Any], ...]
) -> tuple[Prompts, ...]:
    return link(*(_table(function, i, seed, dict(knobs)) for i in range(len(SPLITS))))


def _table(
    function: Callable[..., Mapping[str, Any]], index: int, seed: int, knobs: dict[str, Any]
) -> Prompts:
    split = SPLITS[index]
    rows: dict[str, Mapping[str, Any]] = {}
    draw, last = 0, 0
    while len(rows) < SIZES[split] and draw - last <= PATIENCE * (len(rows) + 1):
        row = function(generator(seed, index, draw), split=split, **knobs)
        draw += 1
        if row["prompt"] not in rows:
            rows[row["prompt"]] = row
            last = draw
    return Prompts(rows.values(), name=f"{getattr(function, '__name__', 'task')}:{split}")
