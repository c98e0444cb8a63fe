"""Distinct-n, repetition and self-BLEU, against counts made anew."""

import random

import pytest
from sacrebleu.metrics.bleu import BLEU

from textgym.rewards import Distinct, Repetition, SelfBleu, TextBatch
from textgym.rewards.diversity import distinct_n


def distinct(text, n):
    words = text.split()
    grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def test_by_hand():
    batch = TextBatch.from_texts(["a b a b", "a b", "a", ""])
    assert Distinct(1).score(batch) == [0.5, 1, 1, 0]
    assert Distinct(2).score(batch) == [pytest.approx(2 / 3), 1, 0, 0]
    assert Repetition(2).score(batch) == [pytest.approx(-1 / 3), 0, 0, 0]
    assert Repetition().score(TextBatch.from_texts(["a a a a a"])) == [-0.5]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_parity_at_every_prefix(n, prefixes):
    rng = random.Random(n)
    for _ in range(100):
        seed = rng.random()
        for value, text in prefixes(Distinct(n), {}, random.Random(seed), 24):
            expected = distinct(text, n)
            assert value == (0.0 if expected is None else expected)
        for value, text in prefixes(Repetition(n), {}, random.Random(seed), 24):
            expected = distinct(text, n)
            assert value == (0.0 if expected is None else pytest.approx(expected - 1, abs=1e-12))
            assert Repetition(n).score(TextBatch.from_texts([text])) == [value]


def test_distinct_of_several_texts():
    assert distinct_n(["a b a b", "a b"], 2) == pytest.approx(2 / 4)
    assert distinct_n([], 2) == distinct_n(["a", ""], 2) == 0


def test_orders_below_one_are_refused():
    for reward in (Distinct, Repetition):
        with pytest.raises(ValueError, match="order 1 or more, got 0"):
            reward(0)


def test_parity_of_self_bleu_with_sacrebleu(joined):
    rng = random.Random(0)
    metric = BLEU(effective_order=True)
    for _ in range(40):
        texts = [joined(rng, 12) for _ in range(9)]
        prompts = [rng.choice(["one", [1, 2], [{"role": "user", "content": "x"}]]) for _ in texts]
        batch = TextBatch.from_texts(texts, [{"prompt": prompt} for prompt in prompts])
        for i, value in enumerate(SelfBleu().score(batch)):
            others = [t for k, t in enumerate(texts) if k != i and prompts[k] == prompts[i]]
            expected = metric.sentence_score(texts[i], others).score / 100 if others else 0
            assert value == pytest.approx(-expected, abs=1e-9)


def test_self_bleu_depends_on_the_batch_and_says_so():
    row = {"prompt": "Go:"}
    alone = TextBatch.from_texts(["the cat sat"], [row])
    twins = TextBatch.from_texts(["the cat sat", "the cat sat"], [row, row])
    assert SelfBleu().score(alone) == [0]
    assert SelfBleu().score(twins) == [pytest.approx(-1), pytest.approx(-1)]
    assert not SelfBleu.per_text
    assert "defined over the batch" in " ".join(SelfBleu.__doc__.split())


@pytest.mark.parametrize("reward", [Distinct(1), Distinct(3), Repetition(), SelfBleu()])
def test_examples(reward):
    examples = reward.examples()
    batch = TextBatch.from_texts([e.text for e in examples], [e.row for e in examples])
    assert reward.score(batch) == pytest.approx([e.value for e in examples], abs=1e-12)
    values = [e.value for e in examples]
    assert values == sorted(values, reverse=True)
