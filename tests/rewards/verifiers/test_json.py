"""JSON, JSON Schema and patterns: strict, within limits, and linear or in a pool."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgym.rewards import TextBatch
from textgym.rewards.verifiers import Json, JsonSchema, Pattern
from textgym.rewards.verifiers.json_text import read_json

from .hostile import HOSTILE

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
BAD_JSON = [
    *("", "NaN", "Infinity", "-Infinity", "[NaN]", "1e999", "-1e999", "{} x", "{'a': 1}", "[1,]"),
    *(
        "01",
        "+1",
        ".5",
        "1.",
        "nul",
        '"',
        '"\n"',
        "[",
        '{"a"}',
        '{"a":1,"a":1}',
        "// x\n1",
        "\ufeff1",
    ),
    *("9" * 401, "[" * 66 + "]" * 66, "[" * 5000, '{"a":' * 70 + "1" + "}" * 70, "0x10", "\uff11"),
    *("Here: 1", "```json\n1", "```python\n1\n```", "``````", "```\n1\n```\n```\n2\n```"),
]
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "tags": {"items": {"$ref": "#/$defs/tag"}}},
    "required": ["age"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "maxLength": 3}},
}
EVIL = {"pattern": r"^(\w+\s?)*$"}


@given(VALUES)
def test_any_value_is_read_back(value):
    for text in (json.dumps(value), f" {json.dumps(value, indent=2)}\n"):
        assert read_json(text) == value
        assert read_json(f"```json\n{text}\n```") == value


def values(reward, texts, rows=None):
    return reward.score(TextBatch.from_texts(texts, rows))


@pytest.mark.parametrize("text", BAD_JSON)
def test_what_is_no_json(text):
    assert values(Json(), [text]) == [0.0]


def test_json_at_its_limits():
    good = ["[" * 64 + "]" * 64, "9" * 400, '"\\ud800"', "1e308", '{"a":1,"A":1}', '"a\u2028b"']
    assert values(Json(), good) == [1.0] * 6
    scores = Json().evaluate(TextBatch.from_texts([" " * 100_000, "1" + " " * 100_000]))
    assert scores.status == [None, "text: too long"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_and_patterns_that_match_none_of_them(name):
    batch = TextBatch.from_texts([HOSTILE[name]])
    assert Json().evaluate(batch).status in ([None], ["text: too long"])
    for pattern in (
        r"^(\w+\s?)*\?$",
        r"(?s)<think>.*?</think>.*?<answer>.*?</answer>\?",
        "(a|a)*b$",
    ):
        scores = Pattern(pattern).evaluate(batch)
        assert scores.status == [None] and scores.values[0] == 0.0


def test_schemas():
    texts = ['{"age": 3}', '{"age": 3, "tags": ["abc"]}', '{"age": 3.0}']
    assert values(JsonSchema(SCHEMA), texts) == [1.0] * 3
    bad = [
        '{"age": "3"}',
        "{}",
        '{"age": 3, "x": 1}',
        '{"age": 3, "tags": ["abcd"]}',
        "3",
        "age: 3",
    ]
    assert values(JsonSchema(SCHEMA), [*bad, '{"age": true}']) == [0.0] * 7
    rows = [{"schema": s} for s in (SCHEMA, json.dumps(SCHEMA), True, {"type": "array"})]
    assert values(JsonSchema(), ['{"age": 3}'] * 4, rows) == [1.0, 1.0, 1.0, 0.0]
    draft7 = {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "null"}]}
    assert values(JsonSchema(draft7), ["[null]", "[1]"]) == [1.0, 0.0]


def test_a_pattern_of_a_schema_that_explodes_costs_its_own_verdict():
    reward = JsonSchema(EVIL, cpu_seconds=0.2)
    scores = reward.evaluate(
        TextBatch.from_texts(['"abc def"', '"' + "a" * 40 + '!"', '"a!"', '"a"'])
    )
    assert scores.values.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert scores.status == [None, "text: timeout", None, None]


@pytest.mark.parametrize(
    ("schema", "text", "statuses"),
    [
        (
            {"uniqueItems": True},
            json.dumps([{"a": i} for i in range(5000)]),
            {None, "text: timeout"},
        ),
        ({"multipleOf": 0.01}, "1e308", {None}),
        ({"multipleOf": 0.5}, "9" * 400, {"text: overflow"}),
        (
            {"$defs": {"n": {"items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"},
            "[" * 64 + "]" * 64,
            {None},
        ),
        ({"$ref": "#"}, "1", {"text: recursion", "text: crash"}),
        ({"enum": ["\ud800", "a\x00b"]}, '"\\ud800"', {None}),
        ({"maxLength": 5}, '"' + "a" * 99_000 + '"', {None}),
    ],
)
def test_texts_that_are_hard_for_a_schema(schema, text, statuses):
    scores = JsonSchema(schema, cpu_seconds=0.2).evaluate(TextBatch.from_texts([text]))
    assert scores.status[0] in statuses and scores.values[0] in (0.0, 1.0)


def test_schemas_that_are_none_are_nobodys_low_score():
    with pytest.raises(ValueError, match="is not a JSON Schema"):
        JsonSchema({"type": "objekt"})
    with pytest.raises(ValueError, match="got both"):
        JsonSchema(SCHEMA, column="schema")
    for schema in ({"type": "objekt"}, {"$ref": "http://127.0.0.1:9/none"}, "no json", None, 3):
        scores = JsonSchema().evaluate(TextBatch.from_texts(["1"], [{"schema": schema}]))
        assert scores.status[0].startswith("error: "), schema


@given(st.text(alphabet="ab \n<>/é\U0001f600", max_size=30))
def test_patterns_are_those_of_python_where_both_know_them(text):
    for pattern in ("a+b", "^a.*b$", "<(a|b)*>", "[^a]{2,3}", r"\Aa*\z", r"(?i)A\s", "é."):
        python = re.compile(pattern.replace(r"\z", r"\Z").replace("b$", r"b\Z"))
        assert values(Pattern(pattern), [text]) == [float(python.search(text) is not None)]
        whole = python.fullmatch(text.strip()) is not None
        assert values(Pattern(pattern, whole=True), [text]) == [float(whole)]


def test_patterns_in_a_column_and_patterns_that_are_not_linear():
    rows = [{"p": "a"}, {"p": "b"}, {"p": "(?=a)"}, {"p": 3}]
    scores = Pattern(column="p").evaluate(TextBatch.from_texts(["a"] * 4, rows))
    assert scores.values.tolist()[:2] == [1.0, 0.0]
    assert "no lookahead" in scores.status[2] and "expected a string" in scores.status[3]
    for pattern in ("(?=a)b", "(?<!a)b", r"(a)\1", "a++", "(", "\ud800", "(a{1000}){1000}"):
        with pytest.raises(ValueError, match="no lookahead, lookbehind or backreferences"):
            Pattern(pattern)
    for arguments in ({}, {"pattern": "a", "column": "p"}):
        with pytest.raises(ValueError, match="expected a pattern or a column"):
            Pattern(**arguments)
    scores = Pattern("a").evaluate(TextBatch.from_texts(["\ud800a", "a" * 1_000_001]))
    assert scores.values.tolist() == [1.0, 0.0] and scores.status == [None, "text: too long"]
