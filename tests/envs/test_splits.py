"""Tables of generated tasks: linked splits, built once, as large as there are inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from textgym.envs.splits import SIZES, SPLITS, hashed_split, table


def coin_row(rng: np.random.Generator, *, split: str, sides: int = 1000) -> dict[str, Any]:
    while True:
        prompt = f"side {int(rng.integers(sides))}"
        if hashed_split(prompt) == split:
            return {"prompt": prompt}


def test_a_table_is_built_once_and_knows_its_family() -> None:
    tables = [table(coin_row, split) for split in SPLITS]
    assert table(coin_row, "train") is tables[0]
    assert table(coin_row, "train", seed=1) is not tables[0]
    assert tables[0].family == tuple(tables)


def test_a_small_space_is_listed_whole() -> None:
    rows = [{row["prompt"] for row in table(coin_row, split)} for split in SPLITS]
    assert len(set().union(*rows)) == sum(map(len, rows)) == 1000
    assert 50 < len(rows[1]) < 150 < len(rows[2]) < 250


def test_a_large_space_fills_the_sizes() -> None:
    assert {s: len(table(coin_row, s, sides=10**6)) for s in SPLITS} == SIZES


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of \['train', 'validation', 'test'\], got 'dev'"):
        table(coin_row, "dev")
