"""Whether the final answer of a response is the right number."""

from __future__ import annotations

import math
from typing import Any

from textgym.rewards.base import Example
from textgym.rewards.batch import TextBatch
from textgym.rewards.verifiers.base import Verifier
from textgym.rewards.verifiers.numbers import Number, equal, final_number, read_number

REMEMBERED = 65_536


class Numeric(Verifier):
    r"""1 if the final answer of the response is the number in the column, else 0.

    **Accepts** as the answer the first of these that is there: `#### 42`, `\boxed{42}`, "the answer
    is 42", the last number of the text. Numbers may have thousands separators, a sign, a currency,
    a unit or a per cent sign (which count for nothing: 50% is 50), be fractions (`3/4`, `1 1/2`,
    `\frac{3}{4}`) or have an exponent (`1.5e3`, `1.5 × 10^3`) of at most 300. Answers that differ,
    lists, ranges, inequalities and hedges ("3 or 4") earn 0; so do more than 200 digits.

    **The column** holds a number, or a string: a number, or a worked answer that ends in one, as in
    GSM8K ("... #### 42").

    **Range** 0 or 1. **Cost** linear in the text, a few microseconds. **Statuses**: none.

    Args:
        column: The column of the answer.
        absolute: An answer may be this far from the right one; by default two numbers are equal if
            they are so to six decimals or so, which is what 0.333333 for 1/3 needs.
        relative: The same, in parts of the right answer.

    Raises:
        ValueError: If a tolerance is negative or not finite.
    """

    column: str
    transient = ("_golds",)

    def __init__(
        self, column: str = "answer", *, absolute: float = 1e-6, relative: float = 0.0
    ) -> None:
        super().__init__("numeric", column)
        if not (0.0 <= absolute < math.inf and 0.0 <= relative < math.inf):
            raise ValueError(
                f"tolerances must be finite and at least 0, got {absolute} and {relative}"
            )
        self.absolute, self.relative = absolute, relative
        self._golds: dict[Any, Number] = {}

    def score(self, batch: TextBatch) -> list[Any]:
        """Compare the final number of each text with the right one."""
        items: list[Any] = []
        absolute, relative = self.absolute, self.relative
        for text, answer in zip(batch.texts, batch.column(self.column), strict=True):
            try:
                # True is 1 to a dict.
                known = None if answer is True or answer is False else self._golds.get(answer)
                gold = known or self._gold(answer)
            except TypeError:  # a list, which is no key
                items.append(self._no_number(answer))
                continue
            except ValueError as error:
                items.append(error)
                continue
            found = final_number(text)
            if found is None:
                items.append(0.0)
            elif found == gold:
                items.append(1.0)
            else:
                items.append(float(equal(found, gold, absolute, relative)))
        return items

    def examples(self) -> tuple[Example, ...]:
        """Give a right answer, one with a unit, and a wrong, a hedged and a missing one."""
        row = {self.column: "She has 3 + 39 = 42 apples.\n#### 42"}
        return (
            Example(row, "There are 6 rows of 7, which makes 42.\n#### 42", 1.0),
            Example(row, r"So the answer is $\boxed{42 \text{ apples}}$.", 1.0),
            Example(row, "The answer is 43.", 0.0),
            Example(row, "The answer is 42 or 43.", 0.0),
            Example(row, "I do not know.", 0.0),
            Example({self.column: 1250}, "She pays $1,250.00", 1.0),
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _golds={})

    def _gold(self, answer: Any) -> Number:
        gold = gold_number(answer)
        if gold is None:
            raise self._no_number(answer)
        if len(self._golds) >= REMEMBERED:
            self._golds.clear()
        self._golds[answer] = gold
        return gold

    def _no_number(self, answer: Any) -> ValueError:
        return ValueError(
            f"reward {self.name!r} expected a number, or a text that ends in one, in the column "
            f"{self.column!r}, got {answer!r:.200}"
        )


def gold_number(answer: Any) -> Number | None:
    """Read a right answer: a number, or a string of one, or a worked answer; None if it is none."""
    if isinstance(answer, str):
        return read_number(answer, words=False) or final_number(answer)
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        return None
    if isinstance(answer, int):
        return answer, 1
    # The decimal that was written: 0.1 is 1/10.
    return read_number(repr(answer)) if math.isfinite(answer) else None
