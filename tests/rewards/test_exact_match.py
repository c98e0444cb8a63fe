"""ExactMatch with SQuAD's normalisation."""

import pytest

from textgym.rewards import ExactMatch, TextBatch


def match(text, references, **options):
    batch = TextBatch.from_texts([text], [{"references": references}])
    return ExactMatch(**options).evaluate(batch, strict=True).values[0]


def test_squad_forgives_case_punctuation_articles_and_spaces():
    assert match(" The  Eiffel-Tower!", "eiffeltower", squad=True) == 1
    assert match("An answer.", ["the answer", "x"], squad=True) == 1
    assert match("42.", 42, squad=True) == 1
    assert match("new york", "newyork", squad=True) == 0
    assert match("The answer", "answer") == match("answer two", "answer", squad=True) == 0


@pytest.mark.parametrize("reward", [ExactMatch(), ExactMatch(squad=True)])
def test_examples(reward):
    examples = reward.examples()
    batch = TextBatch.from_texts([e.text for e in examples], [e.row for e in examples])
    assert reward.score(batch) == [e.value for e in examples]
