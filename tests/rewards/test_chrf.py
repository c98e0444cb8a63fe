"""Chrf equals sacrebleu: whole texts, every prefix of every text, and the corpus."""

import pickle
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.chrf import CHRF

from textgym.rewards import Chrf, RewardColumnError, TextBatch

OPTIONS = [
    {},
    {"word_order": 2},
    {"word_order": 2, "lowercase": True, "whitespace": True},
    {"lowercase": True},
    {"whitespace": True, "beta": 1},
    {"eps_smoothing": True, "char_order": 3, "word_order": 1},
    {"char_order": 0, "word_order": 2},
]


def row(references):
    return {"references": references}


def oracle(text, references, **options):
    return CHRF(**options).sentence_score(text, references).score / 100


def test_by_hand():
    """For "ab" against "abc", orders 1 and 2: precisions 1 and 1, recalls 2/3 and 1/2."""
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    expected = 5 * precision * recall / (4 * precision + recall)
    value = Chrf(char_order=2).score(TextBatch.from_texts(["ab"], [row("abc")]))[0]
    assert value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parity_with_sacrebleu(options, joined):
    rng = random.Random(0)
    reward = Chrf(**options)
    for _ in range(150):
        references = [joined(rng, 16) for _ in range(rng.randrange(1, 4))]
        text = joined(rng, 16)
        value = reward.score(TextBatch.from_texts([text], [row(references)]))[0]
        assert value == oracle(text, references, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parity_of_the_cursor_at_every_prefix(options, joined, prefixes):
    rng = random.Random(1)
    reward = Chrf(**options)
    for _ in range(150):
        references = [joined(rng, 16) for _ in range(rng.randrange(1, 4))]
        for value, text in prefixes(reward, row(references), rng):
            assert value == oracle(text, references, **options), (text, references)


@given(st.lists(st.text(max_size=6), max_size=8), st.text(max_size=20), st.booleans())
def test_parity_of_the_cursor_on_arbitrary_unicode(pieces, reference, lowercase):
    references = [reference, "".join(pieces[::2])]
    options = {"word_order": 2, "lowercase": lowercase}
    cursor, text = Chrf(**options).begin(row(references)), ""
    for piece in pieces:
        text += piece
        assert cursor.push(piece) == oracle(text, references, **options)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_parity_of_the_corpus_score(options, joined):
    rng = random.Random(2)
    for _ in range(20):
        n = rng.randrange(1, 6)
        references = [[joined(rng, 12) for _ in range(rng.randrange(1, 4))] for _ in range(n)]
        texts = [joined(rng, 12) for _ in range(n)]
        batch = TextBatch.from_texts(texts, [row(targets) for targets in references])
        corpus = Chrf(**options).corpus(batch)
        most = max(map(len, references))
        streams = [[r[k] if k < len(r) else None for r in references] for k in range(most)]
        expected = CHRF(**options).corpus_score(texts, streams).score / 100
        assert corpus.score(corpus.statistics.sum(0)) == pytest.approx(expected, abs=1e-12)
        resamples = np.stack([corpus.statistics.sum(0), corpus.statistics[0]])
        assert corpus.score(resamples).shape == (2,)


def test_names_pickles_and_refusals():
    assert (Chrf().name, Chrf(word_order=2).name) == ("chrf", "chrfpp")
    reward = Chrf(word_order=2, lowercase=True)
    batch = TextBatch.from_texts(["The Cat"], [row("the cat sat")])
    values = reward.score(batch)
    reward.begin(row("the cat sat"))
    data = pickle.dumps(reward)
    assert len(data) < 400
    assert pickle.loads(data).score(batch) == values
    with pytest.raises(ValueError, match="one above 0"):
        Chrf(char_order=0)
    with pytest.raises(RewardColumnError):
        reward.check(["prompt"])
    scores = reward.evaluate(TextBatch.from_texts(["a", "a"], [row(None), row("a")]))
    assert "column 'references'" in scores.status[0] and scores.values[1] == 1


def test_examples_earn_what_they_state():
    examples = Chrf().examples()
    batch = TextBatch.from_texts([e.text for e in examples], [e.row for e in examples])
    assert Chrf().score(batch) == [e.value for e in examples]
    assert [examples[0].value, examples[-1].value] == [1, 0]
