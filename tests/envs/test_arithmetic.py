"""Arithmetic: sums are right, the verifier reads numbers and nothing else, splits do not leak."""

from __future__ import annotations

import time
from typing import Any

import pytest

from textgym.envs.arithmetic import (
    ArithmeticEnv,
    arithmetic_row,
    numeric_match,
    read_number,
    value_of,
)
from textgym.envs.splits import SPLITS, table
from textgym.streams import generator


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("19", 19),
        (" 19\n", 19),
        ("19.", 19),
        ("19.000", 19),
        ("+19", 19),
        ("-19", -19),
        ("007", 7),
        ("-0", 0),
        ("", None),
        ("-", None),
        (".", None),
        ("1 9", None),
        ("19 apples", None),
        ("= 19", None),
        ("19.5", None),
        ("1e1", None),
        ("0x13", None),
        ("1_9", None),
        ("1,900", None),
        ("--19", None),
        ("١٩", None),
        ("inf", None),
        ("9" * 32, int("9" * 32)),
        ("9" * 33, None),
    ],
)
def test_a_number_is_read_strictly(text: str, number: int | None) -> None:
    assert read_number(text) == number


@pytest.mark.parametrize("text", ["9" * 10**6, "1." + "0" * 10**6, " " * 10**6, "9" + " " * 10**6])
def test_a_hostile_text_costs_nothing(text: str) -> None:
    start = time.process_time()
    read_number(text)
    assert time.process_time() - start < 0.1


def test_the_match_is_exact() -> None:
    assert numeric_match("-3.", -3) == 1.0
    assert numeric_match("3", -3) == 0.0
    assert numeric_match("nothing", 0) == 0.0


@pytest.mark.parametrize(
    ("numbers", "signs", "value"),
    [
        ([7], [], 7),
        ([7, 2], ["-"], 5),
        ([2, 3, 4], ["+", "*"], 14),
        ([2, 3, 4], ["*", "-"], 2),
        ([9, 3, 3], ["-", "-"], 3),
        ([1, 2, 3, 4], ["-", "*", "*"], -23),
    ],
)
def test_products_bind_first(numbers: list[int], signs: list[str], value: int) -> None:
    assert value_of(numbers, signs) == value


@pytest.mark.parametrize("knobs", [{}, {"digits": 3, "terms": 4, "operators": "+-*"}])
def test_answers_agree_with_python(knobs: dict[str, Any]) -> None:
    for i in range(200):
        row = arithmetic_row(generator(2, i), **knobs)
        expression = row["prompt"].removesuffix(" =")
        assert set(expression) <= set("0123456789+-* ")
        assert eval(expression) == row["answer"]
        assert row["references"] == [str(row["answer"])]


def test_splits_share_no_sum_and_small_tables_hold_all_there_is() -> None:
    prompts = {split: {row["prompt"] for row in table(arithmetic_row, split)} for split in SPLITS}
    assert sum(map(len, prompts.values())) == 200  # 10 x 10 terms, two operators
    assert len(set().union(*prompts.values())) == 200
    assert all(prompts.values())


@pytest.mark.parametrize(
    "knobs",
    [
        {"digits": 0},
        {"digits": 10},
        {"terms": 1},
        {"terms": 9},
        {"operators": ""},
        {"operators": "+/"},
        {"split": "training"},
    ],
)
def test_knobs_out_of_range_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|choice|split"):
        ArithmeticEnv(**knobs)


@pytest.mark.parametrize("knobs", [{}, {"digits": 9, "terms": 8}])
def test_prompts_fit_and_the_right_answer_pays(knobs: dict[str, Any]) -> None:
    env = ArithmeticEnv(split="test", **knobs)
    for row in range(5):
        env.reset(options={"prompt_row": row})
        answer = str(env.task.prompts[row]["answer"])
        total = 0.0
        for action in [*env.task.tokenizer.encode(answer)[1:], env.task.tokenizer.stop_ids[0]]:
            _, reward, terminated, _, info = env.step(action)
            total += reward
        assert terminated
        assert total == info["reward"]["numeric_match"] == 1.0
