"""Cider equals coco-caption's values, and a slow reading of the paper's formula."""

import json
import math
import pickle
import random
from collections import Counter

import numpy as np
import pytest

from textgym.checks.faults import FaultyReward
from textgym.prompts import Prompts
from textgym.rewards import Bleu, Cider, TextBatch, dense, make_reward, terminal, think_answer
from textgym.rewards.verifiers.tags import InTag
from textgym.task import Task

REFERENCES = [
    ["a cat sat on the mat", "the cat is on a mat"],
    ["two dogs run in the rain"],
    ["it's a well-known cat", "a cat, well known", "the cat's fame"],
]


def row(references):
    return {"references": references}


def vector(words, n, frequency, documents):
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return {g: k * math.log(documents / max(1, frequency(g))) for g, k in grams.items()}


def slow_cider(words, references, corpus):
    """CIDEr-D by eq. 3 and 4, counting documents anew for every n-gram."""
    documents = [[" " + " ".join(r) + " " for r in texts] for texts in corpus]

    def frequency(gram):
        written = " " + " ".join(gram) + " "
        return sum(any(written in text for text in texts) for texts in documents)

    total = 0.0
    for n in range(1, 5):
        ours = vector(words, n, frequency, len(corpus))
        for reference in references:
            theirs = vector(reference, n, frequency, len(corpus))
            norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
            if norms:
                dot = sum(min(ours[g], theirs[g]) * theirs[g] for g in ours if g in theirs)
                gap = max(0, len(words) - 1) - max(0, len(reference) - 1)
                total += dot / norms * math.exp(-(gap**2) / 72)
    return 10 * total / (4 * len(references))


def test_parity_with_the_fixtures(shared):
    items = json.loads((shared / "fixtures/fixtures_caption.json").read_text())["items"]
    reward = Cider.from_references([item["refs"] for item in items], words="space")
    rows = [row(item["refs"]) for item in items]
    batch = TextBatch.from_texts([item["hyp"] for item in items], rows)
    expected = [item["cider"] for item in items]
    assert reward.score(batch) == pytest.approx(expected, abs=1e-9)
    corpus = reward.corpus(batch)
    assert corpus.score(corpus.statistics.sum(0)) == pytest.approx(np.mean(expected), abs=1e-9)


def test_parity_with_the_formula():
    rng = random.Random(0)
    words = "a b c d e f".split()

    def text():
        return [rng.choice(words) for _ in range(rng.randrange(9))]

    for _ in range(60):
        corpus = [[text() for _ in range(rng.randrange(1, 4))] for _ in range(rng.randrange(1, 6))]
        given = [[" ".join(r) for r in texts] for texts in corpus]
        reward = Cider.from_references(given, words="space")
        targets = [text() for _ in range(rng.randrange(1, 4))]
        ours = text()
        batch = TextBatch.from_texts([" ".join(ours)], [row([" ".join(r) for r in targets])])
        expected = slow_cider(ours, targets, corpus)
        assert reward.score(batch) == [pytest.approx(expected, abs=1e-9)]


@pytest.mark.parametrize("words", ["caption", "space"])
def test_parity_of_the_cursor_with_whole_texts_at_every_prefix(words, joined, prefixes):
    rng = random.Random(1)
    reward = Cider.from_references(REFERENCES, words=words)
    for _ in range(60):
        given = row([*rng.choice(REFERENCES), joined(rng, 9)])
        for value, text in prefixes(reward, given, rng):
            whole = reward.score(TextBatch.from_texts([text], [given]))[0]
            assert value == pytest.approx(whole, abs=1e-12)


def test_saves_loads_and_pickles(tmp_path):
    reward = Cider.from_references(REFERENCES, words="space")
    batch = TextBatch.from_texts(["the cat sat"], [row(REFERENCES[0])])
    values = reward.score(batch)
    reward.save(tmp_path / "frequencies.json")
    assert Cider.load(tmp_path / "frequencies.json").frequencies == reward.frequencies
    assert Cider.load(tmp_path / "frequencies.json").score(batch) == values
    assert pickle.loads(pickle.dumps(reward)).score(batch) == values
    (tmp_path / "other.json").write_text('{"documents": 3}')
    with pytest.raises(ValueError, match="no document frequencies"):
        Cider.load(tmp_path / "other.json")


def test_without_frequencies_it_says_how_to_get_them():
    reward = make_reward("cider")
    batch = TextBatch.from_texts(["the cat"], [row("the cat")])
    status = reward.evaluate(batch).status[0]
    assert "Cider.from_references" in status
    with pytest.raises(ValueError, match=r"Cider\.load"):
        reward.save("nowhere.json")
    with pytest.raises(ValueError, match="at least one input"):
        Cider.from_references([])
    with pytest.raises(ValueError, match="'caption' or 'space'"):
        Cider(words="letters")


def test_is_fitted_on_training_rows_once():
    rows = [row(references) for references in REFERENCES]
    frozen = Cider.from_references(REFERENCES)
    bare = Cider()
    fitted = bare.fitted(rows)
    assert fitted.frequencies == frozen.frequencies and bare.frequencies is None
    assert bare.fitted(rows) is fitted and fitted.fitted(rows[:1]) is fitted
    assert bare.fitted(rows[:2]).frequencies.documents == 2
    batch = TextBatch.from_texts(["the cat sat"], [rows[0]])
    value, bleu = frozen.score(batch)[0], Bleu().score(batch)[0]
    summed = (0.1 * Cider() + Bleu()).fitted(rows)
    assert summed.score(batch) == [pytest.approx(0.1 * value + bleu)]
    product = (Cider() * Bleu()).named("gated").fitted(rows)
    assert product.name == "gated"
    assert product.score(batch) == [pytest.approx(value * bleu)]
    both = (0.1 * Cider() + Bleu()).named("both").fitted(rows)
    assert [(weight, part.name) for weight, part in both.parts()] == [(1.0, "both")]
    plain = Bleu() + 2 * Bleu()
    assert plain.fitted(rows) is plain


@pytest.mark.parametrize("wrap", [FaultyReward, lambda r: InTag(r, "a"), think_answer])
def test_what_wraps_it_is_fitted_and_kept_with_it(wrap, tmp_path):
    rows = [row(references) for references in REFERENCES]
    wrapped = wrap(Cider()).fitted(rows)
    text = f"<a>{REFERENCES[0][0]}</a><answer>{REFERENCES[0][0]}</answer>"
    assert wrapped.evaluate(TextBatch.from_texts([text], rows[:1])).status == [None]
    assert wrapped.fitted(rows[:1]).name == wrapped.name
    wrapped.keep(tmp_path)
    assert (tmp_path / "cider.json").exists()


def test_a_task_fits_it_on_the_training_split_and_a_run_keeps_it(tmp_path):
    rows = [{"prompt": f"Say {i}:", "references": [f"number {i} is said"]} for i in range(8)]
    train, held_out = Prompts(rows).split(3)
    held_out, test = held_out.split(1)
    expected = Cider.from_references([r["references"] for r in train])
    given = terminal(Bleu()) + dense(0.1 * Cider())
    for table in (train, held_out, test, held_out[:1]):
        schedule = Task(prompts=table, reward=given).schedule
        schedule.keep(tmp_path / table.name)
        assert Cider.load(tmp_path / table.name / "cider.json").frequencies == expected.frequencies
        batch = TextBatch.from_texts(["number 1"], [rows[1]])
        track = schedule.begin(rows[1], "")
        paid = schedule.pay([track], batch, np.array([True]), np.array([False]))
        assert paid.components["cider"] == pytest.approx(expected.score(batch))
        assert paid.status == [None]
    plain = Task(prompts=train, reward=(bleu := terminal(Bleu()))).schedule
    assert plain is bleu
    plain.keep(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
