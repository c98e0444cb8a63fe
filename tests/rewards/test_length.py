"""Length windows and DAPO's punishment, against their formulas written out."""

import pickle
from dataclasses import replace

import pytest

from textgym.rewards import LengthPenalty, LengthWindow, SoftOverlong, TextBatch


def of_lengths(lengths):
    batch = TextBatch.from_texts([" ".join(["w"] * n) for n in lengths])
    return replace(batch, token_ids=[[0] * n for n in lengths])


def dapo(n, longest, buffer):
    """Yu et al. 2025, eq. 13."""
    if n <= longest - buffer:
        return 0.0
    if n <= longest:
        return ((longest - buffer) - n) / buffer
    return -1.0


@pytest.mark.parametrize(("longest", "buffer"), [(20, 8), (5, 5), (7, 1)])
def test_parity_of_the_soft_overlong_punishment_with_its_equation(longest, buffer):
    lengths = range(30)
    values = SoftOverlong(longest, buffer).score(of_lengths(lengths)).tolist()
    assert values == pytest.approx([dapo(n, longest, buffer) for n in lengths])


def test_soft_overlong_by_hand():
    values = SoftOverlong().score(of_lengths([16_384, 18_432, 20_480, 30_000])).tolist()
    assert values == [0, -0.5, -1, -1]


def test_a_window_and_a_target():
    lengths = [0, 4, 5, 10, 12, 15, 20, 99]
    window = LengthWindow(5, 10, span=10)
    expected = [0.5, 0.9, 1, 1, 0.8, 0.5, 0, 0]
    assert window.score(of_lengths(lengths)).tolist() == pytest.approx(expected)
    target = LengthWindow(5, span=5)
    expected = [0, 0.8, 1, 0, 0, 0, 0, 0]
    assert target.score(of_lengths(lengths)).tolist() == pytest.approx(expected)


def test_words_are_counted_in_the_text():
    batch = TextBatch.from_texts(["one two  three\n", ""])
    assert LengthWindow(3, span=3, unit="words").score(batch).tolist() == [1, 0]
    assert LengthWindow(3, span=3).score(batch).tolist() == [0, 0]  # no token ids


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthWindow(-1), "0 <= shortest"),
        (lambda: LengthWindow(5, 4), "shortest <= longest"),
        (lambda: LengthWindow(5, span=0), "span >= 1"),
        (lambda: LengthWindow(5, unit="pages"), "'tokens' or 'words'"),
        (lambda: SoftOverlong(5, 6), "buffer <= longest"),
        (lambda: SoftOverlong(5, 0), "1 <= buffer"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "reward", [LengthPenalty(), LengthPenalty(3, 7), SoftOverlong(20, 9), LengthWindow(3, 5)]
)
def test_examples_and_pickles(reward):
    examples = reward.examples()
    batch = of_lengths([len(e.text.split()) for e in examples])
    assert reward.score(batch).tolist() == pytest.approx([e.value for e in examples])
    assert pickle.loads(pickle.dumps(reward)).__dict__ == reward.__dict__


def test_endless_examples_are_left_out():
    assert SoftOverlong().examples() == () == LengthWindow(5000).examples()
