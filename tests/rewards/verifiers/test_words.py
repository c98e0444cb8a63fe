"""Constraints on words."""

import random

import pytest

from textgym.rewards import TextBatch
from textgym.rewards.verifiers import WordConstraints

from .hostile import HOSTILE


def value(text, **constraints):
    reward = WordConstraints(**{"include": None, **constraints})
    return reward.evaluate(TextBatch.from_texts([text]), strict=True).values[0]


@pytest.mark.parametrize(
    ("text", "constraints", "expected"),
    [
        ("The Cat sat.", {"include": ["cat", "sat"]}, 1),
        ("The cats sat.", {"include": ["cat"]}, 0),
        ("concatenate", {"include": ["cat"]}, 0),
        ("the_cat_sat", {"include": ["cat"]}, 1),
        ("a well-known cat", {"include": ["well-known"]}, 1),
        ("a well-known cat", {"include": ["well"]}, 0),
        ("don\u2019t", {"include": ["don't"]}, 1),
        ("STRASSE", {"include": ["straße"]}, 1),
        ("the big cat", {"include": ["big cat"]}, 1),
        ("the cat is big", {"include": ["big cat"]}, 0),
        ("the big, cat", {"include": ["big cat"]}, 1),
        ("anything", {"include": []}, 1),
        ("a dog", {"exclude": ["cat"]}, 1),
        ("a CAT", {"exclude": ["cat"]}, 0),
        ("a cat flap", {"exclude": ["cat flap"]}, 0),
        ("", {"exclude": ["cat"]}, 0),
        (" ... ", {"length": (0, 9)}, 0),
        ("a b c", {"order": ["a", "c"]}, 1),
        ("c b a c", {"order": ["a", "c"]}, 1),
        ("c b a", {"order": ["a", "c"]}, 0),
        ("a a", {"order": ["a", "a"]}, 1),
        ("a", {"order": ["a", "a"]}, 0),
        ("a b b c", {"order": ["a b", "b c"]}, 1),
        ("a b c", {"order": ["a b", "b c"]}, 0),
        ("cat cat dog", {"counts": {"cat": 2, "dog": (1, 3), "cow": 0}}, 1),
        ("cat cat cat", {"counts": {"cat": 2}}, 0),
        ("cat", {"counts": {"cat": [2, 3]}}, 0),
        ("a a a", {"counts": {"a a": 2}}, 1),
        ("one two three", {"length": 3}, 1),
        ("one two three", {"length": (1, 2)}, 0),
        ("cat dog", {"include": ["cat"], "exclude": ["dog"]}, 0),
    ],
)
def test_constraints(text, constraints, expected):
    assert value(text, **constraints) == expected


def test_random_texts_against_a_plain_reference():
    rng = random.Random(0)
    for _ in range(500):
        words = rng.choices("abc", k=rng.randrange(1, 9))
        text = " ".join(words)
        phrase = rng.choices("abc", k=rng.randrange(1, 4))
        places = [i for i in range(len(words)) if words[i : i + len(phrase)] == phrase]
        joined = " ".join(phrase)
        assert value(text, include=[joined]) == float(bool(places))
        assert value(text, exclude=[joined]) == float(not places)
        assert value(text, counts={joined: len(places)}) == 1.0
        assert value(text, counts={joined: len(places) + 1}) == 0.0
        rest = iter(words)
        assert value(text, order=phrase) == float(all(word in rest for word in phrase))


def test_columns_and_what_is_no_constraint():
    reward = WordConstraints(exclude="no", length="size")
    reward.check(["include", "no", "size"])
    with pytest.raises(ValueError, match="needs the column 'no'"):
        reward.check(["include", "size"])
    row = {"include": ["cat"], "no": ["dog"], "size": 2}
    assert reward.score(TextBatch.from_texts(["A cat", "A dog", "The cat sat"], [row] * 3)) == [
        1,
        0,
        0,
    ]
    with pytest.raises(ValueError, match="at least one of the constraints"):
        WordConstraints(None)
    for bad in (
        {"include": [3]},
        {"include": ["..."]},
        {"counts": {"a": -1}},
        {"counts": {"a": (2, 1)}},
        {"counts": {}},
        {"counts": ["a"]},
        {"length": (1, 2, 3)},
        {"length": 1.5},
    ):
        with pytest.raises(ValueError, match="reward 'words' expected for"):
            WordConstraints(**{"include": None, **bad})
    scores = WordConstraints().evaluate(TextBatch.from_texts(["cat"], [{"include": "cat"}]))
    assert "expected for include a list of words" in scores.status[0]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts(name):
    reward = WordConstraints(["no", "such words"], counts={"cat cat": 3}, order=["x", "y"])
    assert reward.score(TextBatch.from_texts([HOSTILE[name]])) == [0.0]


def test_a_text_that_is_too_long():
    scores = WordConstraints(["a"]).evaluate(TextBatch.from_texts(["a " * 500_001]))
    assert scores.status == ["text: too long"] and scores.values[0] == 0.0
