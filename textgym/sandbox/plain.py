"""Plain data across the boundary between a scored program and its scorer.

A program's answer crosses as JSON and is never made into objects by the scorer: `same` walks the
expected value and looks whether the JSON says the same. So no class of the program takes part in
the comparison, its cost is bounded by the expected value and the length of the JSON, and no hash
table is filled with keys that the program chose.

JSON's null, booleans, strings, lists, finite floats and small integers stand for themselves; an
object is a tag with its contents: `{"int": "-0xff"}`, `{"float": "nan"}`, `{"tuple": [...]}`,
`{"set": [...]}`, `{"dict": [[key, value], ...]}`, `{"bytes": "00ff"}`.
"""

from __future__ import annotations

import json
import math
from typing import Any

DEEPEST = 64
# Beyond these an integer is written in hexadecimal: reading decimals of any length takes long.
SMALL = 2**53
_DIGITS = 20


class NotPlainError(ValueError):
    """A value is not plain data, or is nested too deeply."""


def to_json(value: Any, depth: int = 0) -> Any:
    """Give plain data as JSON.

    Args:
        value: None, bool, int, float, str, bytes, and lists, tuples, sets, frozen sets and dicts of
            them, at most `DEEPEST` deep. Exactly these types: a subclass is not plain.
        depth: How deep `value` lies.

    Raises:
        NotPlainError: If it is anything else.
    """
    if depth > DEEPEST:
        raise NotPlainError(f"expected data nested at most {DEEPEST} deep")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -SMALL < value < SMALL else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is list:
        return [to_json(item, depth + 1) for item in value]
    if kind is tuple:
        return {"tuple": [to_json(item, depth + 1) for item in value]}
    if kind is set or kind is frozenset:
        return {"set": [to_json(item, depth + 1) for item in value]}
    if kind is dict:
        items = [[to_json(k, depth + 1), to_json(v, depth + 1)] for k, v in value.items()]
        return {"dict": items}
    raise NotPlainError(
        "expected None, bool, int, float, str, bytes, or lists, tuples, sets and dicts of them, "
        f"got {kind.__name__}"
    )


def from_json(data: Any) -> Any:
    """Make the value again; for data that this process or its parent wrote, not for answers."""
    if isinstance(data, list):
        return [from_json(item) for item in data]
    if not isinstance(data, dict):
        return data
    ((tag, content),) = data.items()
    if tag == "int":
        return int(content, 16)
    if tag == "float":
        return float(content)
    if tag == "bytes":
        return bytes.fromhex(content)
    if tag == "tuple":
        return tuple(from_json(item) for item in content)
    if tag == "set":
        return {from_json(item) for item in content}
    return {from_json(key): from_json(item) for key, item in content}


def parse_answer(data: bytes) -> Any:
    """Read the JSON of an answer that may be forged.

    Raises:
        ValueError: If it is not JSON, is nested too deeply, or holds an integer that is not small.
    """
    try:
        return json.loads(data.decode("utf-8", "surrogatepass"), parse_int=_small)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def same(expected: Any, answer: Any, tolerance: float = 1e-6) -> bool:
    """Tell whether an answer says the expected value.

    Types must agree, with two exceptions, for tables come from JSON: where a list is expected a
    tuple will do, and where a float is expected an integer. A float may differ by
    `tolerance * |expected|`, and by 1e-9; inside sets and as keys it may not. NaN equals NaN.

    Args:
        expected: Plain data, trusted.
        answer: The JSON of an answer, not trusted.
        tolerance: The relative tolerance of floats, relative to the expected value.
    """
    kind = type(expected)
    if expected is None or kind is bool:
        return answer is expected
    if kind is str:
        return type(answer) is str and answer == expected
    if kind is float:
        return _near(expected, answer, tolerance)
    if kind is list or kind is tuple:
        items = _tagged(answer, "tuple") if type(answer) is dict or kind is tuple else answer
        return (
            type(items) is list
            and len(items) == len(expected)
            and all(map(lambda e, a: same(e, a, tolerance), expected, items))
        )
    if kind is dict:
        return _same_dict(expected, _tagged(answer, "dict"), tolerance)
    if kind is set or kind is frozenset:
        items = _tagged(answer, "set")
        if type(items) is not list or len(items) != len(expected):
            return False
        return sorted(map(_text, to_json(expected)["set"])) == sorted(map(_text, items))
    # An int (never equal to a bool here, or to a float) or bytes: as written.
    written = to_json(expected)
    return type(written) is type(answer) and bool(written == answer)


def _same_dict(expected: dict[Any, Any], pairs: Any, tolerance: float) -> bool:
    if type(pairs) is not list or len(pairs) != len(expected):
        return False
    if not all(type(pair) is list and len(pair) == 2 for pair in pairs):
        return False
    wanted = sorted(((_text(to_json(k)), v) for k, v in expected.items()), key=_first)
    given = sorted(((_text(k), v) for k, v in pairs), key=_first)
    return all(
        key == other and same(value, answer, tolerance)
        for (key, value), (other, answer) in zip(wanted, given, strict=True)
    )


def _near(expected: float, answer: Any, tolerance: float) -> bool:
    if not math.isfinite(expected):
        written = _tagged(answer, "float")
        return type(written) is str and written == repr(expected)
    if type(answer) is dict:
        digits = _tagged(answer, "int")
        # 300 hexadecimal digits are more than a float can hold.
        if type(digits) is not str or len(digits) > 300:
            return False
        try:
            answer = int(digits, 16)
        except ValueError:
            return False
    if type(answer) is not int and type(answer) is not float:
        return False
    try:
        return abs(answer - expected) <= max(tolerance * abs(expected), 1e-9)
    except OverflowError:
        return False


def _tagged(answer: Any, tag: str) -> Any:
    """Give what is under the tag; None if it is another tag, or none."""
    return answer.get(tag) if type(answer) is dict and len(answer) == 1 else None


def _text(data: Any) -> str:
    # Text has an order, whatever a program put in; of what is nested too deeply there is none.
    try:
        return json.dumps(data, sort_keys=True)
    except RecursionError:
        return ""


def _first(pair: tuple[str, Any]) -> str:
    return pair[0]


def _small(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits is not small")
    return int(digits)
