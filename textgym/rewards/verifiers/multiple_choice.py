"""Whether a response chooses the right letter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from textgym.rewards.base import Example
from textgym.rewards.verifiers.answers import boxes, phrases
from textgym.rewards.verifiers.base import Verifier

_DRESS = " \t\r\n*_`\"'$.,:;!?"
# "A" and "I" are words too: bare, they are letters only where nothing follows, or a reason does.
_ARTICLE = re.compile(r"[AI]\s+(?!because\b|since\b|as\b|for\b|[-–—(])[A-Za-z]")


class MultipleChoice(Verifier):
    r"""1 if the response chooses the letter in the column, else 0.

    **Accepts** as the choice the first of these that is there: `\boxed{B}`; "the answer is B" (the
    last time); a response that is nothing but the letter (`b`, `(B)`, `**B.**`) or begins with it
    (`B) the blue one`); the last letter in brackets. Several letters there ("B or C", "(A) and
    (B)") are no choice.

    **The column** holds the letter: `"B"`, `"(B)"`, `"b."`.

    **Range** 0 or 1. **Cost** linear in the text, some microseconds. **Statuses**: none.

    Args:
        column: The column of the right letter.
        letters: The letters that are choices.

    Raises:
        ValueError: If the letters are not different capital letters, two or more.
    """

    column: str

    def __init__(self, column: str = "answer", *, letters: str = "ABCDEFGHIJ") -> None:
        super().__init__("multiple_choice", column)
        if not re.fullmatch("[A-Z]{2,26}", letters) or len(set(letters)) < len(letters):
            raise ValueError(f"letters must be different capitals, two or more, got {letters!r}")
        self.letters = letters
        some = f"[{letters}]"
        either = f"[{letters}{letters.lower()}]"
        self._alone = re.compile(rf"\(?({either})\)?")
        self._first = re.compile(rf"[\s*_`\"'$]*(?:\(({either})\)|({some})(?=[).:,*]|\s|\Z))")
        self._bracketed = re.compile(rf"\(({some})\)")
        self._any = re.compile(
            rf"(?<![A-Za-z'\u2019])(?:\(({either})\)|({some}))(?![A-Za-z'\u2019])"
        )

    def verify(self, text: str, row: Mapping[str, Any]) -> float:
        """Compare the letter that the text chooses with the right one."""
        value = row[self.column]
        alone = self._alone.fullmatch(value.strip(_DRESS)) if isinstance(value, str) else None
        if alone is None:
            raise ValueError(
                f"reward {self.name!r} expected one of the letters {self.letters} in the column "
                f"{self.column!r}, got {value!r:.200}"
            )
        return float(self.choice(text) == alone[1].upper())

    def choice(self, text: str) -> str | None:
        """Give the letter that a text chooses; None if it chooses none, or several."""
        if "\\boxed" in text:
            chosen = {self._lone(re.sub(r"\\text\s?|[{}]", "", box or "")) for box in boxes(text)}
            return chosen.pop() if len(chosen) == 1 else None
        for region in phrases(text):
            if self._first.match(region):
                return self._only(region)
        short = text[:200].strip(_DRESS)
        if (alone := self._lone(short)) is not None:
            return alone
        line = text.lstrip()[:200].partition("\n")[0]
        first = self._first.match(line)
        if first is not None and (first[1] or line[first.end() : first.end() + 1] in tuple(").:")):
            return self._only(line)
        tail = text[-200:]
        found = set(self._bracketed.findall(tail[tail.rstrip().rfind("\n") + 1 :]))
        return found.pop() if len(found) == 1 else None

    def _lone(self, text: str) -> str | None:
        alone = self._alone.fullmatch(text.strip(_DRESS))
        return None if alone is None else alone[1].upper()

    def _only(self, region: str) -> str | None:
        """Give the letter with which a region begins, if it names no other."""
        if _ARTICLE.match(region.lstrip(_DRESS)):
            return None
        # The option's own words may begin with "A" or "I": those are not choices.
        found = {
            (m[1] or m[2]).upper()
            for m in self._any.finditer(region)
            if m[1] or not _ARTICLE.match(region, m.start())
        }
        return found.pop() if len(found) == 1 else None

    def examples(self) -> tuple[Example, ...]:
        """Give right answers, a hedge and a wrong one."""
        row = {self.column: self.letters[1]}
        right, wrong = self.letters[1], self.letters[0]
        return (
            Example(row, f"The first cannot be. The answer is ({right}).", 1.0),
            Example(row, f"**{right}**", 1.0),
            Example(row, f"The answer is {right} or {wrong}.", 0.0),
            Example(row, f"The answer is {wrong}.", 0.0),
            Example({self.column: wrong}, f"({wrong})", 1.0),
        )
