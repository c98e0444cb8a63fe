"""TokenF1 equals SQuAD's evaluation, rewritten here from its definition, at every prefix."""

import random
import re
import string
from collections import Counter

import pytest

from textgym.rewards import TextBatch, TokenF1


def row(references):
    return {"references": references}


def squad_f1(text, reference):
    def words(text):
        kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", kept).split()

    ours, theirs = words(text), words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    if not same:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


def score(text, references):
    return TokenF1().score(TextBatch.from_texts([text], [row(references)]))[0]


def test_by_hand():
    assert score("The Cat sat!", "a cat sat") == 1
    assert score("the cat", ["dog", "cat sat on mats"]) == pytest.approx(2 * 1 * 0.25 / 1.25)
    assert score("cat cat", "cat") == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert score("the", "a") == score("", "...") == 1
    assert score("cat", "the") == score("the", "cat") == 0


def test_parity_at_every_prefix(joined, prefixes):
    rng = random.Random(0)
    reward = TokenF1()
    for _ in range(300):
        references = [joined(rng, 9) for _ in range(rng.randrange(1, 4))]
        for value, text in prefixes(reward, row(references), rng):
            expected = max(squad_f1(text, reference) for reference in references)
            assert value == expected
            assert score(text, references) == expected


def test_corpus_is_the_mean():
    batch = TextBatch.from_texts(["cat", "dog"], [row("cat"), row("cat dog")])
    corpus = TokenF1().corpus(batch)
    assert corpus.score(corpus.statistics.sum(0)) == pytest.approx((1 + 2 / 3) / 2)


def test_bad_references_are_named():
    scores = TokenF1().evaluate(TextBatch.from_texts(["a", "b"], [row([]), row("b")]))
    assert "column 'references'" in scores.status[0] and scores.values[1] == 1


def test_examples():
    examples = TokenF1().examples()
    batch = TextBatch.from_texts([e.text for e in examples], [e.row for e in examples])
    assert TokenF1().score(batch) == pytest.approx([e.value for e in examples], abs=1e-12)
