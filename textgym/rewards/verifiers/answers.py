"""Where a response says its final answer: in a box, or behind "the answer is"."""

from __future__ import annotations

import re
from collections.abc import Iterator

LONGEST_REGION = 240  # characters in which an answer is looked for, behind its mark
_PHRASE = re.compile(
    r"nswer(?:\s{1,4}(?:to|of|for|in)\b[^.:=\n]{0,80}?)?\s{0,4}(?:\*\*)?\s{0,4}(?:is|are|was|[:=])",
    re.I,
)
_SENTENCE = re.compile(r"[.!?](?:\s|\Z)")


def phrases(text: str) -> Iterator[str]:
    """Give what "the answer is" introduces, the last first, at most eight times."""
    at = len(text)
    for _ in range(8):
        at = max(text.rfind("nswer", 0, at), text.rfind("NSWER", 0, at))
        if at < 0:
            return
        phrase = _PHRASE.match(text, at)
        if phrase is not None:
            yield _sentence(text, phrase.end())


def boxes(text: str, longest: int = LONGEST_REGION) -> list[str | None]:
    r"""Give what is in each `\boxed{...}`, the last first, at most 32; None if it does not end."""
    found: list[str | None] = []
    at = text.rfind("\\boxed")
    while at >= 0 and len(found) < 32:
        found.append(_box(text, at, longest))
        at = text.rfind("\\boxed", 0, at)
    return found


def line_at(text: str, start: int) -> str:
    """Give what a line has from `start` on, at most `LONGEST_REGION` characters."""
    end = text.find("\n", start, start + LONGEST_REGION)
    if end >= 0:
        return text[start:end]
    line = text[start : start + LONGEST_REGION]
    # A number that is cut in two is none.
    return line if len(line) < LONGEST_REGION else line.rstrip("0123456789.,eE")


def _box(text: str, at: int, longest: int) -> str | None:
    r"""Give what is in the `\boxed{...}` at `at`; None if it is not closed, or too long."""
    start = at + len("\\boxed")
    end = start + longest
    if text[start : start + 1] != "{":
        return None
    depth = 0
    for i in range(start, min(end, len(text))):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : i]
    return None


def _sentence(text: str, start: int) -> str:
    """Give the sentence behind a phrase; the next line that is not empty, if the line ends."""
    while start < len(text) and text[start] in ' \t\r\n*_:`"':
        start += 1
    line = line_at(text, start)
    end = _SENTENCE.search(line)
    return line if end is None else line[: end.start()]
