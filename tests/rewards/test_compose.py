"""Rewards are summed, scaled and gated; what comes out is a reward."""

import copy
import pickle

import numpy as np
import pytest

from textgym.rewards import Bleu, ExactMatch, RewardColumnError, Rouge, TextBatch, as_reward

BATCH = TextBatch.from_texts(["a", "bb", "ccc"])


def length(text):
    return float(len(text))


def square(text):
    return float(len(text) ** 2)


def is_long(text):
    return len(text) > 1


def values(reward):
    return reward.evaluate(BATCH).values.tolist()


A = as_reward(length, low=0.0, high=4.0)
B = as_reward(square, low=-1.0, high=9.0)
GATE = as_reward(is_long)


def test_algebra():
    assert values(A + B) == [2, 6, 12]
    assert values(A - B) == [0, -2, -6]
    assert values(A + 0.5 * B - A * 2) == [-0.5, 0, 1.5]
    assert values(-A) == [-1, -2, -3]
    assert values(A / 2) == [0.5, 1, 1.5]
    assert values(np.float64(0.5) * A) == [0.5, 1, 1.5]
    assert values(sum([A, B, A])) == [3, 8, 15]
    assert values(A * B) == [1, 8, 27]
    assert values((A + B) * GATE) == [0, 6, 12]
    assert values(A * GATE + 0.1 * B) == pytest.approx([0.1, 2.4, 3.9])
    assert values(2 * A * GATE * 3) == [0, 12, 18]


def test_plain_callables_join_in():
    assert values(A + square) == values(square + A) == [2, 6, 12]
    assert values(A * is_long) == values(is_long * A) == [0, 2, 3]
    assert values(square - A) == [0, 2, 6]


def test_parts_are_flat_and_keep_their_weights():
    reward = A + 0.5 * (B - 2 * A) + 0 * GATE
    assert [(w, part.name) for w, part in reward.parts()] == [
        *((1.0, "length"), (0.5, "square"), (-1.0, "length"), (0.0, "is_long"))
    ]
    gated = 0.5 * A * GATE
    assert [(w, part.name) for w, part in gated.parts()] == [(0.5, "length*is_long")]
    assert ((A + B) * GATE).name == "(length+square)*is_long"


def test_a_named_sum_is_one_part():
    total = (A + B).named("quality")
    assert [(w, part.name) for w, part in (0.5 * total).parts()] == [(0.5, "quality")]
    assert values(0.5 * total) == [1, 3, 6]
    assert len((A + B).parts()) == 2


def test_named_leaves_the_original_alone():
    other = A.named("other")
    assert (A.name, other.name) == ("length", "other") and values(other) == values(A)


def test_bounds_follow_the_algebra():
    assert ((A + B).low, (A + B).high) == (-1, 13)
    assert ((A - B).low, (A - B).high) == (-9, 5)
    assert ((A * B).low, (A * B).high) == (-4, 36)
    assert ((-2 * B).low, (-2 * B).high) == (-18, 2)
    assert ((0 * B).low, (0 * B).high) == (0, 0)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda: A + 1, TypeError),
        (lambda: 1 - A, TypeError),
        (lambda: A + "bleu", TypeError),
        (lambda: A * None, TypeError),
        (lambda: A / B, TypeError),
        (lambda: A * float("nan"), ValueError),
        (lambda: A * float("inf"), ValueError),
    ],
)
def test_what_is_refused(wrong, error):
    with pytest.raises(error):
        wrong()


def test_check_reaches_every_part():
    for reward in (Bleu() + A, A - Bleu(), A * Bleu(), 0 * Bleu() + A, (A + Bleu()).named("x")):
        reward.check(["references"])
        with pytest.raises(RewardColumnError):
            reward.check(["prompt"])


def test_no_value_in_a_factor_is_no_value():
    maybe = as_reward(lambda text: None if text == "bb" else 1.0)
    scores = (A * maybe).evaluate(BATCH, optional=True)
    assert scores.status == [None, "none", None]


def test_cursors_compose():
    row = {"references": ["the cat sat on the mat", "a cat sat"]}
    reward = (0.5 * Bleu() + 0.25 * Rouge() + 0 * A).named("mix") * Rouge("rouge1")
    cursor, text = reward.begin(row), ""
    for piece in ["the", " cat", " sat", " on", "."]:
        text += piece
        twin = cursor.copy()
        value = cursor.push(piece)
        expected = reward.evaluate(TextBatch.from_texts([text], [row])).values[0]
        assert value == pytest.approx(expected, rel=1e-12) and expected > 0
        assert twin.push(piece) == value
    assert (Bleu() + ExactMatch()).begin(row) is None
    assert (Bleu() * A).begin(row) is None


def test_compositions_copy_as_themselves_and_pickle():
    reward = (0.5 * A + B) * GATE - 0.5 * Bleu()
    assert copy.deepcopy(reward) is reward
    twin = pickle.loads(pickle.dumps(reward))
    assert [w for w, _ in twin.parts()] == [1.0, -0.5] and twin.name == reward.name
