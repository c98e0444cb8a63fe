"""Reading numbers out of texts, exactly, in linear time, whatever the text.

A number is a fraction of two integers, `(numerator, denominator)`, in no lowest terms. Digits are
counted before they are converted, exponents bounded, and only 0 to 9 are digits.
"""

from __future__ import annotations

import re

from textgym.rewards.verifiers.answers import LONGEST_REGION, boxes, line_at, phrases

Number = tuple[int, int]

MOST_DIGITS = 200
LARGEST_EXPONENT = 300

_CURRENCY = r"$€£¥₹"
_DOUBTS = "or|and|not|to|between|either|neither|least|most|than|nor|plus|minus|negative|times|maybe"
_PLAIN = re.compile(
    r"\s*\$?(-?(?:[0-9]{1,18}|[0-9]{1,3}(?:,[0-9]{3}){1,5}))(?:\.([0-9]{1,18}))?"
    rf"(?:\s(?!(?:{_DOUBTS})\b)[a-z]{{2,16}})?\.?\s*\Z"
)
_NUMBER = re.compile(
    rf"""
    (?P<sign>[-+]?)\s?[{_CURRENCY}]?\s?(?P<inner>[-+]?)
    (?:(?P<whole>[0-9]{{1,3}}(?:,[0-9]{{3}})+(?![0-9])|[0-9]+)(?:\.(?P<part>[0-9]*))?|\.(?P<bare>[0-9]+))
    (?:[eE](?P<e>[-+]?[0-9]+)|\s?(?:x|×|\*|\\times|\\cdot)\s?10\s?(?:\^|\*\*)\s?\{{?(?P<ten>[-+]?[0-9]+)\}}?)?
    (?:(?P<mixed>\s[0-9]+)?\s?/\s?(?P<under>[0-9]+)(?![0-9.]))?
    """,
    re.VERBOSE,
)
_START = re.compile(rf"[-+]?\s?[{_CURRENCY}]?\s?[-+]?\.?[0-9]")
# What may stand before a number: words, `x =`; what may follow: a unit, `m^2`, `%`, a bracket.
_BEFORE = re.compile(r"(?:[^-0-9<>≤≥≠±^*/~|&+√\\]|-(?=\s?[A-Za-z]))*\Z")
_AFTER = re.compile(
    r"(?:[^0-9<>≤≥≠±=^*/~|&+\\]|/(?=\s?[A-Za-z])|(?<=[A-Za-z])\^?[23](?![0-9.]))*\Z"
)
_HEDGE = re.compile(rf"\b(?:{_DOUBTS})\b", re.I)
_RELATION = re.compile(r"[<>≤≥≠±~|&]|\\(?:[gl](?:eq?|t)|neq?|pm|mp|in)\b")
_FRACTION = re.compile(r"\\[dt]?frac\s?\{([0-9]+)\}\s?\{([0-9]+)\}")
_GROUPS = re.compile(
    r"(?<=[0-9])(?:\{,\}|\\,|\\ |\\!|,\\!|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))"
)
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s?\{([^{}]*)\}")
_JUNK = re.compile(r"\\[()\[\]$%]|\\[,!;: ]|__|[`\u200b]|\\(?:left|right|quad|circ|degree)\b")
_DRESS = " \t\r\n$*_`\"',;:!?()[]{}"
_STARS = re.compile(r"(?<![0-9])\*\*|\*\*(?![0-9])")
_WORD = re.compile(r"\s*(?:[A-Za-z]{1,12}\s*[=:]\s*)?\Z")
_TOKEN = re.compile(
    rf"(?<![A-Za-z_0-9.^])(?:(?<![0-9)])[-+])?[{_CURRENCY}]?-?"
    r"(?:[0-9]+\s(?=[0-9]+/))?(?:[0-9]|\.[0-9])(?:[0-9.,]*[0-9])?(?:[eE][-+]?[0-9]+)?"
    r"(?:\s?/\s?[0-9]+(?![0-9.]))?"
)
_LINKS = frozenset({*"-–—,;/|~&+*×^x", "", "and", "to"})
# What makes the last number of a text no answer: an operator, a bound, a doubt.
_WRONG_BEFORE = re.compile(
    r"(?:(?<![<>])[<>]|[≤≥≠±^*/~|&+×√\\]|[<>!]=|-|\\[A-Za-z]+|"
    r"\b(?:not|n?or|least|most|than|n?either|minus|negative|plus|times|sqrt\s?\(?))\s?\Z",
    re.I,
)
_LINK = re.compile(r"\bn?or\b|^(?:[,;]|and)\s?[a-z]\s?=$")
_DIGIT = re.compile(r"[0-9]")


def read_number(text: str, *, words: bool = True) -> Number | None:
    """Read a text that is one number, perhaps with a unit: `"$1,250.50"`, `"3/4 cup"`, `"x = 7"`.

    Args:
        text: What was written where an answer is due.
        words: Any words may come before the number; else only `x =` and the like.

    Returns:
        The number; None if it is none, if there are several, or if it is hedged.
    """
    plain = _plain(text)
    if plain is not None:
        return plain
    if len(text) > LONGEST_REGION + MOST_DIGITS:
        return None
    text = _clean(text)
    if "=" in text:
        left, _, right = text.rpartition("=")
        if (
            _RELATION.search(left)
            or _HEDGE.search(left)
            or (_DIGIT.search(left) and not _is_sum(left))
        ):
            return None
        text = right
    start = _START.search(text)
    if start is None:
        return None
    before = text[: start.start()]
    if not (_BEFORE if words else _WORD).match(before) or _HEDGE.search(before):
        return None
    match = _NUMBER.match(text, start.start())
    if match is None:
        return None
    after = text[match.end() :]
    if not _AFTER.match(after) or _HEDGE.search(after):
        return None
    return _value(match)


def final_number(text: str) -> Number | None:
    r"""Find the final answer of a response.

    The first of these that is there decides: `#### 42`; `\boxed{42}`; `the answer is 42`; the last
    number. Several marks of the first two kinds must agree, and every answer must be one number:
    "3 or 4" is none.
    """
    if len(text) < 24:  # often there is nothing but the number
        plain = _plain(text)
        if plain is not None:
            return plain
    mark = text.rfind("####")
    if mark >= 0:
        marked, found = _marked(text, mark)
        if marked:
            return found
    if "\\boxed" in text:
        return _agreed([None if box is None else read_number(box) for box in boxes(text)])
    for region in phrases(text):
        if _DIGIT.search(region):
            return read_number(region)
    return _last(text)


def _marked(text: str, mark: int) -> tuple[bool, Number | None]:
    """Read the `####` marks, which must agree; a heading of Markdown is none."""
    found: list[Number | None] = []
    for _ in range(32):
        region = line_at(text, mark + 4)
        plain = _plain(region)
        if plain is not None:
            found.append(plain)
        else:
            start = _START.search(_clean(region))
            if start is not None and _WORD.match(_clean(region), 0, start.start()):
                found.append(read_number(region, words=False))
        mark = text.rfind("####", 0, mark)
        if mark < 0:
            break
    return bool(found), _agreed(found)


def _last(text: str) -> Number | None:
    """Read the last number of a text, unless it is one of a list, or part of a formula."""
    end = len(text)
    while True:  # the last digit, searched in pieces from the end
        begin = max(0, end - 512)
        digits = [m.start() for m in _DIGIT.finditer(text, begin, end)]
        if digits or begin == 0:
            break
        end = begin
    if not digits:
        return None
    stop = digits[-1] + 1
    start = max(text.rfind("\n", 0, stop) + 1, stop - LONGEST_REGION)
    line = _clean(text[start:stop])
    tokens = list(_TOKEN.finditer(line))
    if not tokens or (tokens[0].start() == 0 and start and text[start - 1] in "0123456789.,"):
        return None
    last = tokens[-1]
    number = read_number(last[0])
    between = line[tokens[-2].end() if len(tokens) > 1 else 0 : last.start()]
    if number is None or _WRONG_BEFORE.search(between) or not _AFTER.match(line[last.end() :]):
        return None
    if len(tokens) > 1:
        link = between.strip(" \t$").lower()
        if link in _LINKS or _LINK.search(link):
            return None
        before = line[: tokens[-2].start()].rstrip()[-1:]
        if link == "=" and before not in tuple("+-*/×÷x)"):
            left = read_number(tokens[-2][0])
            # "4 = 4" says nothing and "5 = 4" says two things; "1/2 = 0.5" is fine.
            if left is None or not equal(left, number) or tokens[-2][0] == last[0]:
                return None
    return number


def equal(a: Number, b: Number, absolute: float = 0.0, relative: float = 0.0) -> bool:
    """Tell whether |a − b| ≤ max(absolute, relative · |b|), exactly."""
    difference = abs(a[0] * b[1] - b[0] * a[1])
    if difference == 0:
        return True
    if not (absolute or relative):
        return False
    scale = a[1] * b[1]
    try:
        return difference / scale <= max(absolute, relative * abs(b[0] / b[1]))
    except OverflowError:
        return False


def _plain(text: str) -> Number | None:
    """Read what most answers are, ten times as fast: digits, perhaps a point and a unit."""
    match = _PLAIN.match(text)
    if match is None:
        return None
    whole, part = match.groups()
    if "," in whole:
        whole = whole.replace(",", "")
    return (int(whole), 1) if part is None else (int(whole + part), 10 ** len(part))


def _value(match: re.Match[str]) -> Number | None:
    """Convert what was read, within bounds."""
    whole = (match["whole"] or "").replace(",", "")
    part = match["bare"] or match["part"] or ""
    under, mixed = match["under"], (match["mixed"] or "").strip()
    written = match["e"] or match["ten"] or "0"
    if len(whole) + len(part) + len(under or "") + len(mixed) > MOST_DIGITS or len(written) > 5:
        return None
    exponent = int(written)
    if abs(exponent) > LARGEST_EXPONENT or (match["sign"] and match["inner"]):
        return None
    top, bottom = int(whole + part), 10 ** len(part)
    if exponent >= 0:
        top *= 10**exponent
    else:
        bottom *= 10**-exponent
    if under is not None:
        below = int(under)
        if below == 0 or (mixed and (part or exponent)):
            return None
        if mixed:
            top = top * below + int(mixed)
        bottom *= below
    return (-top if "-" in (match["sign"], match["inner"]) else top), bottom


def _clean(text: str) -> str:
    """Take the dress of Markdown and LaTeX off a short text."""
    if "\\" in text or not text.isascii():
        text = text.replace("−", "-").replace("\\$", "$").replace("\\%", "%")
        text = _GROUPS.sub(",", text)
        text = _FRACTION.sub(r" \1/\2", text)
        text = _TEXT.sub(r" \1 ", text)
    return _JUNK.sub(" ", _STARS.sub("", text)).strip(_DRESS).rstrip(".")


def _is_sum(left: str) -> bool:
    """Tell whether the left side of an equation is a calculation, and not one number or a list."""
    return bool(re.search(r"[0-9)]\s?(?:[-+*/×÷^]|\\times|\\cdot|\\div)\s?[$(0-9]", left)) and not (
        re.search(r"[;<>≤≥≠±|&~]|,(?![0-9]{3})", left)
    )


def _agreed(found: list[Number | None]) -> Number | None:
    first = found[0] if found else None
    if first is None:
        return None
    return first if all(n is not None and equal(n, first) for n in found[1:]) else None
