"""Ter equals sacrebleu, above its floor."""

import pickle
import random

import pytest
from sacrebleu.metrics.ter import TER

from textgym.rewards import Ter, TextBatch, dense

OPTIONS = [
    {},
    {"normalized": True},
    {"no_punct": True, "case_sensitive": True},
    {"normalized": True, "no_punct": True, "asian_support": True},
]
FAR = -1e6


def row(references):
    return {"references": references}


def score(text, references, **options):
    return Ter(**options).score(TextBatch.from_texts([text], [row(references)]))[0]


def test_by_hand():
    assert score("a b c d", "a b c d") == 1
    assert score("c d a b", "a b c d") == 0.75  # one shift
    assert score("a x c", "a b c d") == 0.5  # one substitution, one insertion
    assert score("x", ["a b c d", "x y"]) == pytest.approx(1 - 1 / 3)  # mean length


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parity_with_sacrebleu(options, joined):
    rng = random.Random(0)
    low, floored = Ter(low=FAR, **options), Ter(**options)
    for _ in range(120):
        references = [joined(rng, 16) for _ in range(rng.randrange(1, 4))]
        text = joined(rng, 24)
        expected = 1 - TER(**options).sentence_score(text, references).score / 100
        batch = TextBatch.from_texts([text], [row(references)])
        assert low.score(batch) == [pytest.approx(expected, abs=1e-9)]
        assert floored.score(batch) == [pytest.approx(max(-1.0, expected), abs=1e-9)]


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_parity_of_the_corpus_score(options, joined):
    rng = random.Random(1)
    for _ in range(15):
        n = rng.randrange(1, 6)
        references = [[joined(rng, 12) for _ in range(rng.randrange(1, 4))] for _ in range(n)]
        texts = [joined(rng, 12) for _ in range(n)]
        batch = TextBatch.from_texts(texts, [row(targets) for targets in references])
        corpus = Ter(**options).corpus(batch)
        most = max(map(len, references))
        streams = [[r[k] if k < len(r) else None for r in references] for k in range(most)]
        expected = 1 - TER(**options).corpus_score(texts, streams).score / 100
        assert corpus.score(corpus.statistics.sum(0)) == pytest.approx(expected, abs=1e-12)


def test_the_floor_ends_what_length_costs():
    """A hundred thousand words against two are not aligned: that would take hours."""
    assert score("word " * 100_000, "two words") == -1
    assert score("a b c d e", "a b", low=-1.5) == pytest.approx(1 - 3 / 2)
    assert score("x y z u v w", "a b", low=-1.5) == -1.5
    long = "w " * 20
    assert score(long, ["a", long], low=-0.5) == 1  # hopeless against one of them only
    with pytest.raises(ValueError, match="finite low"):
        Ter(low=float("-inf"))


def test_empty_texts():
    assert score("", "a b") == 0
    assert score("", "") == 1
    assert score("a b", "") == 0
    assert score(" \n", "a b") == 0


def test_has_no_cursor_and_is_rescored():
    assert Ter().begin(row("a b")) is None
    schedule = dense(Ter())
    tracks = [schedule.begin(row("a b"), "")]
    paid = 0.0
    with pytest.warns(UserWarning, match="no cursor"):
        for text, end in (("a", False), ("a b", True)):
            batch = TextBatch.from_texts([text], [row("a b")])
            paid += schedule.pay(tracks, batch, [end], [False]).reward[0]
    assert paid == 1


def test_pickles_and_examples():
    reward = Ter(normalized=True, low=-3)
    examples = reward.examples()
    batch = TextBatch.from_texts([e.text for e in examples], [e.row for e in examples])
    assert pickle.loads(pickle.dumps(reward)).score(batch) == [e.value for e in examples]
