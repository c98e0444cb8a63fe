"""Whether the final answer of a response is mathematically the right one, by math-verify."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from textgym.rewards.base import Example
from textgym.rewards.verifiers.answers import boxes, phrases
from textgym.rewards.verifiers.base import Ask, PooledVerifier, check_length, need
from textgym.rewards.verifiers.numbers import Number, equal, final_number, read_number

LONGEST = 20_000
TAIL = 1_000
MOST_BOXES = 4

# What leaves open which answer is meant; math-verify takes the one that it likes.
_HEDGE = re.compile(
    r"\b(?:n?or|n?either|approximately|roughly)\b|≈|~|→|\u2228|\\(?:approx|sim(?:eq)?|to|lor|vee|mid|[lc]?dots|"
    r"(?:long)?(?:left)?rightarrow|implies|iff)(?![A-Za-z])",
    re.I,
)
# Several formulas in a row; a box may have them, for math-verify takes them for a set.
_LIST = re.compile(
    r"(?:(?<![0-9]),|,(?![0-9]{3}(?![0-9]))|;|\.\.|\band\b)\s*(?:[A-Za-z]\s?=\s?)?[-+(\[{]{0,3}[0-9$\\]"
)
_INTEGER = re.compile(r"-?(?:[0-9]{1,40}|[0-9]{1,3}(?:,[0-9]{3}){1,9})")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_EQUALS = re.compile(r"(?<![<>!\\:])=")


class Math(PooledVerifier):
    r"""1 if the final answer of the response equals that in the column, else 0.

    **Accepts** LaTeX and plain formulas, as math-verify reads them: numbers, fractions, roots,
    polynomials, equations, sets, intervals, matrices. The answer is what is in `\boxed{...}`; else
    what follows `####` or "the answer is"; else the last formula. Plain integers are compared here,
    as `Numeric` does; everything else by math-verify in a worker pool.

    math-verify takes one answer among several, and the right side of any equation. Here two boxes
    that differ, "3 or 4", "3 ≈ 4" and "5 = 4" earn 0, unless the right answer itself is written so.
    What is only not worked out (`3+1` for 4) is equal to its value, as in math-verify; `Numeric`
    does not take it.

    **The column** holds a string (LaTeX, with or without dollars; or a worked answer that ends in
    `#### 42` or has a `\boxed{...}`), or a number.

    **Range** 0 or 1. **Cost** microseconds for integers, else about a millisecond in a worker; at
    most `cpu_seconds`. **Statuses** of what could not be judged: `too long` (more than 20,000
    characters), `timeout`, `memory`, `recursion`, `crash`, `killed`, `unparsable` (math-verify
    failed).

    Args:
        column: The column of the answer.
        cpu_seconds: CPU time of one text.
        wall_seconds: Wall time of one text.
        memory_mb: Memory of a worker, in MiB.
        workers: How many processes.

    Raises:
        ImportError: If math-verify is not installed.
    """

    column: str
    setup = "textgym.rewards.verifiers.math_worker:judge"

    def __init__(
        self,
        column: str = "answer",
        *,
        cpu_seconds: float = 1.0,
        wall_seconds: float = 20.0,
        memory_mb: int = 2048,
        workers: int = 2,
    ) -> None:
        need("math_verify", "Math")
        super().__init__(
            "math",
            column,
            cpu_seconds=cpu_seconds,
            wall_seconds=wall_seconds,
            memory_mb=memory_mb,
            workers=workers,
        )

    def ask(self, text: str, row: Mapping[str, Any]) -> float | Ask:
        """Compare integers; refuse hedges; ask about the rest."""
        check_length(text, LONGEST)
        if not text.strip():
            return 0.0
        gold = self._gold(row)
        answers = _answers(text)
        if not answers or len(answers) > MOST_BOXES:
            return 0.0
        right = _number(gold)
        if right is not None and len(answers) == 1:
            found = _integer(answers[0])
            if "\\" not in answers[0]:
                found = final_number(text)  # plain words: what `Numeric` finds in them, or nothing
                return float(found is not None and equal(found, right, 1e-6))
            if found is not None:
                return float(equal(found, right))
        claims: list[str] = []
        for answer in answers:
            sides = _sides(answer, gold)
            if sides is None or (_HEDGE.search(answer) and not _HEDGE.search(gold)):
                return 0.0
            if not answer.startswith("\\boxed") and not _LIST.search(gold):
                if _LIST.search(_last_formula(answer)):
                    return 0.0
            claims += sides
        return Ask((gold, claims))

    def examples(self) -> tuple[Example, ...]:
        """Give two right answers, and wrong ones."""
        row = {self.column: r"\frac{1}{2}"}
        return (
            Example(row, r"Half of it, so \boxed{\frac{1}{2}}.", 1.0),
            Example(row, r"The answer is $\frac{\sqrt{4}}{4}$.", 1.0),
            Example(row, r"It is \boxed{\frac{1}{3}}.", 0.0),
            Example(row, r"It is \boxed{\frac{1}{2}} or perhaps \boxed{\frac{1}{3}}.", 0.0),
            Example(row, "I do not know.", 0.0),
            Example({self.column: "(x+1)^2"}, r"\boxed{x^2 + 2x + 1}", 1.0),
        )

    def _gold(self, row: Mapping[str, Any]) -> str:
        value = row[self.column]
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return str(value)
        if isinstance(value, str) and value.strip():
            return value.rpartition("####")[2].strip()
        raise ValueError(
            f"reward {self.name!r} expected a number or LaTeX in the column {self.column!r}, "
            f"got {value!r:.200}"
        )


def _answers(text: str) -> list[str]:
    """Find the final answers of a response: one, unless it has several boxes that differ."""
    if "\\boxed" in text:
        found = boxes(text, LONGEST)
        if None in found:
            return []
        different = {"".join(box.split()): box for box in found if box and box.strip()}
        return [f"\\boxed{{{box}}}" for box in different.values()]
    if "####" in text:
        lines = [part.partition("\n")[0].strip() for part in text.split("####")[1:][-32:]]
        return [_in_dollars(line) for line in dict.fromkeys(lines) if line]
    for phrase in phrases(text):
        if phrase.strip():
            return [f"The answer is {phrase}"]
    tail = text[-TAIL:]
    return [tail] if not _HEDGE.search(_last_formula(tail)) else []


def _number(gold: str) -> Number | None:
    """Read a right answer that is a number: digits, signs and at most a fraction in LaTeX."""
    if re.search("[A-Za-z%]", gold.replace("\\frac", "").replace("\\dfrac", "")):
        return None
    return read_number(gold, words=False)


def _integer(text: str) -> Number | None:
    """Read a text that is nothing but an integer, in a box or not."""
    inner = text.removeprefix("\\boxed{").removeprefix("The answer is")
    # A point in front is part of the number: .5 is not 5.
    inner = inner.lstrip("{} $\n").rstrip("{} $.\n")
    return read_number(inner) if _INTEGER.fullmatch(inner) else None


def _in_dollars(formula: str) -> str:
    return formula if "$" in formula else f"${formula}$"


def _last_formula(text: str) -> str:
    """Give the last line that has a digit or a formula."""
    lines = [line for line in text.splitlines() if re.search(r"[0-9$\\]", line)]
    return lines[-1] if lines else ""


def _sides(answer: str, gold: str) -> list[str] | None:
    """Give what must equal the right answer: both sides of an equation without unknowns.

    `4 = 4` and `5 = 4`, in which one side is only a number, are None.
    """
    if not _EQUALS.search(answer) or _EQUALS.search(gold):
        return [answer]
    inner = answer.removeprefix("The answer is").strip()
    if inner.startswith("\\boxed{"):
        inner = inner[len("\\boxed{") : -1]
    parts = [part.lstrip(" $").rstrip(" $.") for part in _EQUALS.split(inner)]
    if any(read_number(part) is not None for part in parts[:-1]):
        return None
    if re.search("[A-Za-z]", _COMMAND.sub("", inner)):
        return [answer]
    return [f"\\boxed{{{part}}}" for part in parts]
