"""Countdown: expressions are read, never evaluated, and use what is given once."""

import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgym.rewards import TextBatch
from textgym.rewards.verifiers import Countdown
from textgym.rewards.verifiers.countdown import read_expression

from .hostile import HOSTILE


def value(text, numbers, target, **options):
    row = {"numbers": numbers, "target": target}
    return Countdown(**options).evaluate(TextBatch.from_texts([text], [row]), strict=True).values[0]


def random_expression(rng, depth):
    """Give an expression, its value by exact fractions, and its numbers; None over zero."""
    if depth == 0 or rng.random() < 0.25:
        n = rng.randrange(1, 30)
        return str(n), Fraction(n), [n]
    left, right = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    if left is None or right is None:
        return None
    sign = rng.choice("+-*/")
    if sign == "/" and right[1] == 0:
        return None
    made = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b if b else None,
    }[sign](left[1], right[1])
    space = rng.choice(["", " "])
    return f"({left[0]}{space}{sign}{space}{right[0]})", made, left[2] + right[2]


def test_random_expressions_have_their_exact_values():
    rng, seen = random.Random(0), 0
    while seen < 400:
        made = random_expression(rng, 4)
        if made is None or len(made[0]) > 200:
            continue
        read = read_expression(made[0])
        assert read is not None and read.value == made[1]
        assert sorted(read.numbers) == sorted(made[2])
        seen += 1


@given(st.text(alphabet="0123456789+-*/() ", max_size=24))
def test_what_python_reads_is_read_alike(text):
    # eval of a text of these characters only: numbers become fractions, powers are left out.
    import re

    read = read_expression(text)
    if text.startswith("**"):
        return  # bold
    if "**" in text or "//" in text:
        assert read is None
        return
    python = re.sub("[0-9]+", lambda m: f"Fraction({int(m[0])})", text.strip())
    try:
        expected = eval(python, {"Fraction": Fraction}) if python else None
    except (SyntaxError, ZeroDivisionError, TypeError):
        expected = None
    plus = re.search(r"(^|[-+*/(])\s*\+", text.strip()) is not None  # a unary plus is not read
    if not plus and isinstance(expected, Fraction) and not re.search("[0-9]{7}", text):
        assert read is not None and read.value == expected
    elif read is not None:
        assert read.value == expected


GOOD = [
    "8 / (3 - 8 / 3)",
    "8/(3-8/3) = 24",
    "First try: 3 * 8 = 24, no.\n8 / (3 - 8 / 3) = 24",
    "So the answer is 8 / (3 - 8 / 3) = 24.",
    "Answer: **8 / (3 - 8 / 3)**",
    "**So:** 8 / (3 - 8 / 3)",
    "So: **8 / (3 - 8 / 3) = 24**",
    r"\boxed{8 \div (3 - 8 \div 3)}",
    r"$8 / (3 - 8 / 3) = 24$",
    "8 ÷ (3 − 8 ÷ 3)",
    "-(8 / (8/3 - 3))",
    "((((8)))) / (3 - 8 / 3)",
]
BAD = [
    "",
    "24",
    "3 * 8",
    "8 + 8 + 8",
    "3 + 3 + 8 + 8",
    "8 / (3 - 8 / 3) = 25",
    "8 / (3 - 8 / 3) = x",
    "8 / (3 - 8 / 3) = 24 = 24",
    "8 / (3 - 8 / 3",
    "8 / (3 - 8 / 3))",
    "8 / (3 - 8 / 3) or 1",
    "8 / (3 - 8 / 3.0)",
    "8 / (8 / 3 - 3)",
    "88 / 33",
    "8 8 3 3",
    "8 / (3 - 3) / 8",
    "8**3 - 8**3 + 24",
    "8 // (3 - 8 / 3)",
    "24 + 8 * (3 - 3) * 8",
    "__import__('os')",
    r"\boxed{8 / (3 - 8 / 3)} or \boxed{1}",
    r"\boxed{8 / (3 - 8 / 3)",
    "\uff18 / (3 - 8 / 3)",
]


@pytest.mark.parametrize("text", GOOD)
def test_solutions(text):
    assert value(text, [3, 3, 8, 8], 24) == 1.0
    assert value(text, [3, 3, 8, 8], 25) == 0.0
    assert value(text, [3, 3, 8, 9], 24) == 0.0
    assert value(text, [3, 3, 8, 8, 1], 24) == 0.0
    assert value(text, [3, 3, 8, 8, 1], 24, use_all=False) == 1.0
    assert value(text, [3, 8, 8], 24, use_all=False) == 0.0


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_solution(text):
    assert value(text, [3, 3, 8, 8], 24) == 0.0


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts(name):
    assert value(HOSTILE[name], [3, 3, 8, 8], 24, use_all=False) == 0.0


def test_columns():
    reward = Countdown("nums", 24)
    reward.check(["nums"])
    with pytest.raises(ValueError, match="needs the column 'target'"):
        Countdown().check(["numbers"])
    batch = TextBatch.from_texts(["6 * 4"], [{"nums": [4, 6]}])
    assert reward.score(batch) == [1.0]
    for numbers, target in (
        ([], 1),
        ("3", 3),
        ([1.5], 1),
        ([-1], 1),
        ([True], 1),
        ([1], "1"),
        (3, 3),
    ):
        row = {"numbers": numbers, "target": target}
        status = Countdown().evaluate(TextBatch.from_texts(["1"], [row])).status[0]
        assert status.startswith("error: ValueError: reward 'countdown' expected"), row
