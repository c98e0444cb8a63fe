"""Plain data: what crosses comes out equal, and nothing else is equal to it."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgym.sandbox.frames import encode
from textgym.sandbox.plain import NotPlainError, from_json, parse_answer, same, to_json

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.text(st.characters(codec=None), max_size=5)
    | st.binary(max_size=3)
)
KEYS = st.integers() | st.text(max_size=3) | st.tuples(st.integers(), st.booleans())
DATA = st.recursive(
    ATOMS | st.sets(KEYS, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)


def crossed(value):
    return parse_answer(encode(to_json(value))[4:])


@given(DATA)
def test_what_crosses_is_the_same(value):
    assert same(value, crossed(value))
    assert repr(from_json(crossed(value))) == repr(value) or sets_in(value)


def sets_in(value):
    return "{" in repr(value)  # their order may differ


@given(DATA, DATA)
def test_what_is_the_same_is_equal(first, second):
    """Against Python's own comparison, where that is exact: without floats and NaN."""
    if same(first, crossed(second), 0.0) and not has_floats(first):
        assert first == second or loosely(first) == loosely(second)
    if type(first) is type(second) and not same(first, crossed(second)):
        assert repr(first) != repr(second)


def has_floats(value):
    return "." in repr(value) or "e" in repr(value) or "inf" in repr(value)


def loosely(value):
    if isinstance(value, list | tuple):
        return [loosely(item) for item in value]
    return {k: loosely(v) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        ([1, 2], (1, 2)),
        ([[1], (2,)], ((1,), (2,))),
        (2.0, 2),
        (1e6, 1e6 + 0.5),
        (0.0, 1e-10),
        (math.nan, math.nan),
        (-math.inf, -math.inf),
        (1e300, 10**300),
        ({"a": 1.0}, {"a": 1 + 1e-9}),
        ({1, "1"}, {"1", 1}),
        (frozenset([1]), {1}),
        ({(1, 2): [3]}, {(1, 2): (3,)}),
    ],
)
def test_same(expected, answer):
    assert same(expected, crossed(answer))


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        ((1, 2), [1, 2]),
        (2, 2.0),
        (1, True),
        (True, 1),
        (0, False),
        (False, None),
        (0, None),
        (1.0, True),
        (1.0, "1.0"),
        ("1", 1),
        ("a", b"a"),
        (1e6, 1e6 + 2),
        (1.0, math.nan),
        (1.0, math.inf),
        (math.nan, 1.0),
        (math.inf, 1e308),
        (math.inf, 10**400),
        (1e300, 10**400),
        ((), []),
        ([1], [1, 1]),
        ([1, 1], [1]),
        ({1}, [1]),
        ({1}, {1.0}),
        ({1}, {True}),
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1}, {"b": 1}),
        ({1: 1}, {"1": 1}),
        ({}, []),
        (set(), {}),
        ("a", "a\x00"),
        ("\ud800", "\udc00"),
    ],
)
def test_not_same(expected, answer):
    assert not same(expected, crossed(answer))


EXPECTED = [0, 1.5, "x", None, True, [1], (1,), {1}, {1: 2}, b"x", 2**80, math.nan]
FORGED = [
    {},
    {"int": 1},
    {"int": "zz"},
    {"int": "0x1", "float": "1.5"},
    {"float": 1.5},
    {"float": "1.5"},
    {"float": None},
    {"tuple": 1},
    {"tuple": {"tuple": []}},
    {"set": None},
    {"set": [[[]]]},
    {"dict": [1]},
    {"dict": [[1]]},
    {"dict": [[{}, {}]]},
    {"dict": [[{"set": [{}]}, 2]]},
    {"dict": {"1": 2}},
    {"bytes": 1},
    {"unknown": 1},
    [{}],
    [[[[]]]],
    "0x1",
]


@pytest.mark.parametrize("forged", FORGED, ids=json.dumps)
def test_forged_json_is_the_same_as_nothing(forged):
    for expected in EXPECTED:
        assert same(expected, forged) is False
        assert (
            same([expected], [forged]) is same({"k": expected}, {"dict": [["k", forged]]}) is False
        )


def test_one_way_to_write_a_value():
    """Nothing but the one form counts, so that no answer is hidden in another."""
    assert not same(5, {"int": "0x5"})
    assert same(2.0, {"int": "0x2"})  # compared as a number, where a float is expected
    assert not same(2**80, {"int": str(2**80)})


class Text(str):
    pass


class Number(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize(
    "value", [Text("a"), Number(1), [Number(1)], {Number(1): 1}, object(), 1j, range(3), int]
)
def test_a_subclass_is_not_plain(value):
    with pytest.raises(NotPlainError):
        to_json(value)


def test_depth():
    value = []
    for _ in range(60):
        value = [value]
    assert same(value, crossed(value))
    for _ in range(20):
        value = [value]
    with pytest.raises(NotPlainError, match="deep"):
        to_json(value)
    value.append(value)
    with pytest.raises(NotPlainError, match="deep"):
        to_json(value)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[" * 100_000, b"9" * 1_000_000, b"\xff", b"nul", b'"\x00"', b"1 2"]
)
def test_what_is_no_answer(data):
    with pytest.raises(ValueError):
        parse_answer(data)


def test_forged_nesting_of_any_depth_is_read_or_refused():
    """What is just shallow enough to be read may be too deep to be written again."""
    for depth in (1, 10, *range(800, 1010), 5000, 100_000):
        data = b'{"set": [' + b"[" * depth + b"]" * depth + b"]}"
        try:
            answer = parse_answer(data)
        except ValueError:
            continue
        pairs = {"dict": [[answer["set"][0], 1]]}
        for expected in EXPECTED:
            assert same(expected, answer) is same([expected], [answer]) is False
            assert same(expected, pairs) is False
