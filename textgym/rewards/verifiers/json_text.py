"""Reading JSON that a model wrote: strictly, and within limits."""

from __future__ import annotations

import json
import math
from typing import Any

LONGEST = 100_000
DEEPEST = 64
MOST_DIGITS = 400


def read_json(text: str) -> Any:
    """Read a text that is one JSON value, alone or in one Markdown fence.

    Refused, beside what is no JSON: NaN and infinities, numbers that overflow or have more than
    400 digits, a key that comes twice, nesting deeper than 64.

    Raises:
        ValueError: If it is refused.
    """
    text = _unfenced(text.strip())
    try:
        value = json.loads(
            text,
            object_pairs_hook=_pairs,
            parse_constant=_no_constant,
            parse_float=_number,
            parse_int=_integer,
        )
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST + 1:
            raise ValueError(f"the JSON is nested deeper than {DEEPEST}")
        level = [
            item
            for parent in level
            if isinstance(parent, list | dict)
            for item in (parent if isinstance(parent, list) else parent.values())
        ]
    return value


def _unfenced(text: str) -> str:
    if not (text.startswith("```") and text.endswith("```") and len(text) >= 6):
        return text
    head, line, body = text[3:-3].partition("\n")
    return body if line and head.strip().lower() in ("", "json") else text


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key comes twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _number(digits: str) -> float:
    value = float(digits) if len(digits) <= MOST_DIGITS else math.inf
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError("a number is too large")
    return int(digits)
