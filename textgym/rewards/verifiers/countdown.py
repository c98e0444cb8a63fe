"""Countdown and the game of 24: an expression of given numbers that makes a target."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import Any

from textgym.rewards.base import Example
from textgym.rewards.errors import check_column
from textgym.rewards.verifiers.answers import boxes, phrases
from textgym.rewards.verifiers.base import Verifier

LONGEST = 200  # characters of an expression
DEEPEST = 20
_MOST_DIGITS = 6
_TOKENS = re.compile(r"\s*([0-9]+|[-+*/()])")
_LETTERS = re.compile(r"(?<![A-Za-z\\])[A-Za-z]+")
_DRESS = " \t\r\n$_`\"'.,;:!?"
_OTHERS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"})
_LATEX = {"\\times": "*", "\\cdot": "*", "\\div": "/", "\\left": "", "\\right": "", "\\": ""}


class Countdown(Verifier):
    r"""1 if the response is an expression of the given numbers that makes the target, else 0.

    **Accepts** whole numbers, `+ - * /` (also `× ÷ \times \div`), unary minus before a bracket or a
    number, and parentheses, at most 200 characters: in `\boxed{...}`, after "the answer is", or as
    the last line that has a number. It may end in `= 24`, which must then be the target. Every
    number is used once (with `use_all=False` at most once). The expression is parsed here, with
    exact fractions, and never evaluated by Python.

    **The columns** hold a list of whole numbers from 0 to 999,999, and the target, a whole number.

    **Range** 0 or 1. **Cost** linear in the text, some microseconds. **Statuses**: none.

    Args:
        numbers: The column of the numbers.
        target: The column of the target; or the target itself, as 24.
        use_all: Every number must be used.
    """

    column: str

    def __init__(
        self, numbers: str = "numbers", target: str | int = "target", *, use_all: bool = True
    ) -> None:
        super().__init__("countdown", numbers)
        self.target, self.use_all = target, use_all

    def check(self, columns: Collection[str]) -> None:
        """Check that both columns are there."""
        super().check(columns)
        if isinstance(self.target, str):
            check_column(f"reward {self.name!r}", self.target, columns)

    def verify(self, text: str, row: Mapping[str, Any]) -> float:
        """Read the expression and compare what it makes."""
        numbers, target = self._task(row)
        made = read_expression(final_expression(text))
        if made is None or made.value != target or made.claim not in (None, target):
            return 0.0
        used, given = Counter(made.numbers), Counter(numbers)
        return float(used == given if self.use_all else used <= given)

    def examples(self) -> tuple[Example, ...]:
        """Give a solution, one that uses a number twice, and one that misses."""
        row: dict[str, Any] = {self.column: [3, 3, 8, 8]}
        if isinstance(self.target, str):
            row[self.target] = 24
        elif self.target != 24:
            return ()
        other = {**row, self.column: [4, 6]}
        return (
            Example(row, "8 / 3 is 2 2/3, so:\n8 / (3 - 8 / 3) = 24", 1.0),
            Example(row, r"\boxed{8 \div (3 - 8 \div 3)}", 1.0),
            Example(row, "The answer is 3 * 8", float(not self.use_all)),
            Example(row, "8 + 8 + 8 = 24", 0.0),
            Example(row, "3 + 3 + 8 + 8", 0.0),
            Example(other, "So: 6 * 4 = 24", 1.0),
        )

    def _task(self, row: Mapping[str, Any]) -> tuple[list[int], int]:
        numbers = row[self.column]
        target = row[self.target] if isinstance(self.target, str) else self.target
        whole = all(
            isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 10**_MOST_DIGITS
            for n in (numbers if isinstance(numbers, list | tuple) else [None])
        )
        if not whole or not numbers or not isinstance(target, int) or isinstance(target, bool):
            raise ValueError(
                f"reward {self.name!r} expected a list of whole numbers in the column "
                f"{self.column!r} and a whole target, got {numbers!r:.200} and {target!r:.200}"
            )
        return list(numbers), target


class Made:
    """What an expression is: its value, the numbers in it, and what it claims to make."""

    __slots__ = ("claim", "numbers", "value")

    def __init__(self, value: Fraction, numbers: list[int], claim: int | None) -> None:
        self.value, self.numbers, self.claim = value, numbers, claim


def final_expression(text: str) -> str:
    """Find where a response has its expression; several boxes that differ are none."""
    if "\\boxed" in text:
        found = {" ".join((box or "").split()) for box in boxes(text)}
        return found.pop() if len(found) == 1 else ""
    for phrase in phrases(text):
        if re.search("[0-9]", phrase):
            return _formula(phrase).rstrip(_DRESS).removesuffix("**")
    end = len(text.rstrip())
    for _ in range(8):
        start = text.rfind("\n", 0, end) + 1
        line = text[max(start, end - LONGEST - 1) : end]
        if re.search("[0-9]", line) or start == 0:
            return _formula(line)
        end = start - 1
    return ""


def _formula(line: str) -> str:
    """Give the end of a line that is no words: `So: 3 * 8 = 24` has `3 * 8 = 24`."""
    words = [m.end() for m in _LETTERS.finditer(line)]
    return line[words[-1] :] if words else line


def read_expression(text: str) -> Made | None:
    """Read an expression, within limits; None if it is none."""
    text = text.strip(_DRESS)
    if text.startswith("**"):  # bold
        text = text[2:].removesuffix("**").strip(_DRESS)
    for command, sign in _LATEX.items():
        text = text.replace(command, sign)
    text = text.translate(_OTHERS)
    left, equals, right = text.partition("=")
    if len(text) > LONGEST:
        return None
    claim = re.fullmatch(rf"\s*(-?[0-9]{{1,{_MOST_DIGITS + 3}}})\s*", right)
    if equals and claim is None:
        return None
    tokens, at = [], 0
    left = left.rstrip()
    while at < len(left):
        token = _TOKENS.match(left, at)
        if token is None or len(token[1]) > _MOST_DIGITS:
            return None
        tokens.append(token[1])
        at = token.end()
    parser = _Parser(tokens)
    try:
        value = parser.sum(0)
    except (SyntaxError, ZeroDivisionError):
        return None
    if parser.at < len(tokens):
        return None
    return Made(value, parser.numbers, int(claim[1]) if claim is not None else None)


class _Parser:
    """A parser by recursive descent; its depth is bounded, and so are its fractions."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at = tokens, 0
        self.numbers: list[int] = []

    def take(self, *wanted: str) -> str | None:
        if self.at < len(self.tokens) and self.tokens[self.at] in wanted:
            self.at += 1
            return self.tokens[self.at - 1]
        return None

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while sign := self.take("+", "-"):
            other = self.product(depth)
            value = value + other if sign == "+" else value - other
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while sign := self.take("*", "/"):
            other = self.factor(depth)
            value = value * other if sign == "*" else value / other
        return value

    def factor(self, depth: int) -> Fraction:
        if depth > DEEPEST:
            raise SyntaxError("too deep")
        if self.take("-"):
            return -self.factor(depth + 1)
        if self.take("("):
            value = self.sum(depth + 1)
            if not self.take(")"):
                raise SyntaxError("a bracket is not closed")
            return value
        if self.at == len(self.tokens) or not self.tokens[self.at].isdigit():
            raise SyntaxError("expected a number")
        self.at += 1
        self.numbers.append(int(self.tokens[self.at - 1]))
        return Fraction(self.numbers[-1])
