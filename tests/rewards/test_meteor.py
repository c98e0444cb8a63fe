"""Meteor equals METEOR 1.5 without paraphrases, and nltk; its alignment is the best there is."""

import json
import math
import pickle
import random

import nltk
import numpy as np
import pytest
from nltk.stem.snowball import EnglishStemmer
from nltk.translate.meteor_score import meteor_score

from textgym.rewards import Meteor, TextBatch
from textgym.rewards import meteor as module
from textgym.rewards.meteor import FUNCTION_WORDS, NoWordNet, load_wordnet, meteor_words
from textgym.rewards.meteor_alignment import align
from textgym.rewards.words import caption_words

WORDS = "the cat cats sails sailing sail of dog dogs Runs run".split()


def row(references):
    return {"references": references}


def score(text, references, **options):
    return Meteor(**options).score(TextBatch.from_texts([text], [row(references)]))[0]


@pytest.fixture
def items(shared):
    return json.loads((shared / "fixtures/fixtures_caption.json").read_text())["items"]


class Senses:
    """A WordNet of two senses."""

    def synsets(self, word):
        return {"cat": ["feline"], "lion": ["feline", "star"], "dog": ["canine"]}.get(word, [])


def all_alignments(words, reference, matched):
    """Every set of matches of words, each word at most once."""
    if not words:
        yield []
        return
    last = len(words) - 1
    for found in all_alignments(words[:-1], reference, matched):
        yield found
        taken = {there for _, there in found}
        for there in range(len(reference)):
            if there not in taken and matched(words[last], reference[there]):
                yield [*found, (last, there)]


def quality(found):
    chunks = sum(
        (here - 1, there - 1) not in found[max(0, k - 1) : k]
        for k, (here, there) in enumerate(found)
    )
    return -len(found), chunks, sum(abs(here - there) for here, there in found)


def test_parity_with_the_fixtures(items):
    """METEOR 1.5 with its exact and stem stages, all 60 of them, and the counts behind them."""
    reward = Meteor()
    for item in items:
        value = score(item["hyp"], item["refs"])
        assert value == pytest.approx(item["meteor15_exact_stem"], abs=1e-9)
        counts = [float(n) for n in item["stats_exact_stem"].split()]
        statistics = reward.best(item["hyp"], item["refs"])
        assert statistics[4] == counts[21]
        assert statistics[5] in (counts[20], 0)
        assert len(meteor_words(item["hyp"])) == counts[0]


def test_parity_of_the_function_words_with_the_fixtures(items):
    for item in items:
        words = meteor_words(item["hyp"])
        count = float(item["stats_exact_stem"].split()[2])
        assert sum(word in FUNCTION_WORDS for word in words) == count


@pytest.mark.parametrize("seed", range(3))
def test_parity_with_nltk(seed, joined):
    rng = random.Random(seed)
    for _ in range(100):
        references = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 9))) for _ in range(3)]
        references[0] += joined(rng, 4)
        text = " ".join(rng.choices(WORDS, k=rng.randrange(9)))
        words = [caption_words(reference) for reference in references]
        expected = meteor_score(words, caption_words(text), wordnet=NoWordNet())
        assert score(text, references, version="nltk") == expected


def test_parity_of_the_alignment_with_all_there_are():
    rng = random.Random(0)
    stem = EnglishStemmer().stem
    for _ in range(300):
        words = [w.lower() for w in rng.choices(WORDS, k=rng.randrange(6))]
        reference = [w.lower() for w in rng.choices(WORDS, k=rng.randrange(6))]
        expected = min(
            quality(found)
            for found in all_alignments(words, reference, lambda a, b: stem(a) == stem(b))
        )
        matches, chunks = align(words, reference, stem)
        assert quality([(m.here, m.there) for m in matches]) == expected
        assert chunks == expected[1]
        for here, there, stage in matches:
            assert stage == (0 if words[here] == reference[there] else 1)


def test_by_hand():
    """Four words, "cats" by stem; "the" is a function word, and there are two chunks."""
    there = 0.25 + 3 * 0.75
    matched = 0.25 + 0.6 * 0.75 + 0.75
    precision = recall = matched / there
    mean = precision * recall / (0.85 * precision + 0.15 * recall)
    expected = mean * (1 - 0.6 * (2 / 3) ** 0.2)
    assert score("the cats ran home", "the cat stayed home") == pytest.approx(expected, rel=1e-12)


def test_texts_without_matches_or_words():
    assert score("", "the cat") == score("dog", "the cat") == score("the cat", "...") == 0
    assert score("", "") == 0
    assert score("The cat!", ["a dog", "the cat"]) == 1


def test_the_corpus_score_is_that_of_the_sums(items):
    batch = TextBatch.from_texts([i["hyp"] for i in items], [row(i["refs"]) for i in items])
    corpus = Meteor().corpus(batch)
    one = corpus.score(corpus.statistics)
    assert one == pytest.approx([item["meteor15_exact_stem"] for item in items], abs=1e-9)
    total = float(corpus.score(corpus.statistics.sum(0)))
    assert 0 < total < 1 and total != pytest.approx(np.mean(one), abs=1e-4)
    same = Meteor(version="nltk").corpus(batch)
    assert same.score(same.statistics.sum(0)) == pytest.approx(
        np.mean(Meteor(version="nltk").score(batch))
    )


def test_synonyms(monkeypatch):
    monkeypatch.setattr(module, "load_wordnet", Senses)
    assert score("lion", "cat") == 0
    assert score("lion", "cat", synonyms=True) == pytest.approx(0.8)
    assert score("dog", "cat", synonyms=True) == 0


def test_synonyms_need_wordnet(monkeypatch, tmp_path):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    load_wordnet.cache_clear()
    with pytest.raises(LookupError, match=r"nltk\.downloader wordnet"):
        Meteor(synonyms=True)


def test_words_are_parted_as_meteor_does():
    assert meteor_words("It can't: the river's open-source.") == (
        "it ca n 't the river ' s open source".split()
    )


def test_each_side_weighs_its_own_words():
    """'Year' is a function word and 'yearly' is not; they have one stem."""
    assert Meteor().best("yearly", ["year"]) == pytest.approx(
        [0.6 * 0.75, 0.6 * 0.25, 0.75, 0.25, 1, 0]
    )


def test_endless_texts_end():
    value = score("the cat " * 20_000, ["the cat sat on the mat with the cat"])
    assert 0 < value < 0.01
    assert align(["a"] * 300 + ["b"], ["b"], str.lower) == ([], 0)
    assert len(align(["a"] * 300 + ["b"], ["b"] * 200, str.lower)[0]) == 1


def test_pickles_examples_and_refusals():
    reward = Meteor()
    examples = reward.examples()
    batch = TextBatch.from_texts([e.text for e in examples], [e.row for e in examples])
    assert reward.score(batch) == [e.value for e in examples]
    assert len(pickle.dumps(reward)) < 400
    assert pickle.loads(pickle.dumps(reward)).score(batch) == [e.value for e in examples]
    assert reward.begin(examples[0].row) is None
    assert math.isclose(examples[0].value, 1)
    with pytest.raises(ValueError, match=r"'1\.5' or 'nltk'"):
        Meteor(version="2")
