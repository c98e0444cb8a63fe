"""Multiple choice: which letter a response chooses."""

import pytest

from textgym.rewards import TextBatch
from textgym.rewards.verifiers import MultipleChoice

from .hostile import HOSTILE

CHOICES = [
    *(("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("**B**", "B"), (" (b). ", "B")),
    *(("B) the blue one", "B"), ("C: because it is", "C"), ("I", "I"), ("A.", "A")),
    ("The answer is B", "B"),
    ("the answer is (b)", "B"),
    ("The answer is A", "A"),
    ("The answer is A because it must be", "A"),
    ("The answer is B. A dog has four legs.", "B"),
    ("Answer: B) A dog", "B"),
    ("Answer: **C. 12**", "C"),
    ("**Answer:**\nC", "C"),
    ("I said that the answer is A. No: the answer is D.", "D"),
    ("I think that (C) is close, but no.\nThe correct option is (D).", "D"),
    (r"\boxed{B}", "B"),
    (r"\boxed{\text{(B)}}", "B"),
    (r"\boxed{B}, yes, \boxed{B}", "B"),
    *(
        (text, None)
        for text in ("", "A cat", "ABCDE", "A, B, C, D", "A B C D", "\uff22", "Z", "Bob")
    ),
    *((text, None) for text in ("B or C", "(A) and (B)", "The answer is B or C.", "B/C", "B, C")),
    ("The answer is A dog", None),
    ("The answer is not B", None),
    ("The answer is I do not know", None),
    (r"\boxed{A}\boxed{B}", None),
    (r"\boxed{A, B}", None),
    (r"\boxed{A", None),
]


@pytest.mark.parametrize(("text", "letter"), CHOICES)
def test_the_letter_of_a_text(text, letter):
    assert MultipleChoice().choice(text) == letter


def test_values_and_golds():
    texts = ["The answer is (B)."] * 5
    rows = [{"answer": gold} for gold in ("B", "(b)", "B.", "C", " b ")]
    assert MultipleChoice().score(TextBatch.from_texts(texts, rows)) == [1.0, 1.0, 1.0, 0.0, 1.0]
    for bad in ("", "K", "AB", 1, None):
        scores = MultipleChoice().evaluate(TextBatch.from_texts(["B"], [{"answer": bad}]))
        assert scores.status[0].startswith("error: ValueError: reward 'multiple_choice' expected")


def test_other_letters():
    reward = MultipleChoice("gold", letters="XYZ")
    rows = [{"gold": "Y"}] * 3
    assert reward.score(TextBatch.from_texts(["Y", "The answer is Y", "B"], rows)) == [1, 1, 0]
    for bad in ("", "A", "AA", "ab", "A1"):
        with pytest.raises(ValueError, match="letters must be different capitals"):
            MultipleChoice(letters=bad)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts(name):
    batch = TextBatch.from_texts([HOSTILE[name]], [{"answer": "B"}])
    assert MultipleChoice().score(batch) == [0.0]
