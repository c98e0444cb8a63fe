"""Bleu and Rouge equal sacrebleu and rouge-score: whole texts, and every prefix of every text."""

import copy
import pickle
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from textgym.rewards import Bleu, RewardColumnError, Rouge, TextBatch

REFERENCES = ["the cat sat on the mat", "A cat sat on the mat, didn't it?", "on the mat: a cat."]
# What the tokenizers treat in a special way, and what they could trip over.
PIECES = [
    *("the", "The", " the", " cat", "cat", " sat", " on", " mat", "mats", " a", "a", "A"),
    *(" ", "  ", "\n", "-\n", "-", "--", "-\n\n", "\n\n", "\t", "\r\n", "\xa0", "\u2009", "\x1c"),
    *(".", ",", "...", ", ", ".,", "3.5", "1,000", "10", "5", "0-1", "1-", "-2", "$", "%"),
    *("&amp;", "&", "amp;", "&lt;", "&quot;", "&am", "p;", "&amp;lt;", "<", ">", "<skipped>"),
    *(
        "<skip",
        "ped>",
        "-<skipped>\n",
        "<skip-\nped>",
        "(",
        ")",
        "'",
        '"',
        "didn't",
        "/",
        "\\",
        "_",
    ),
    *("é", "日本", "ΑΣ", "Σ", "ς", "İ", "\u212a", "ß", "😀", "\u0301", "\u200b", "running", "runs"),
]
KINDS = ["rouge1", "rouge2", "rouge3", "rougeL"]


def row(references):
    return {"references": references}


def sacrebleu_score(text, references, **options):
    return BLEU(effective_order=True, **options).sentence_score(text, references).score / 100


def rouge_score(kind, text, references, stem=False):
    return RougeScorer([kind], use_stemmer=stem).score_multi(references, text)[kind].fmeasure


def joined(rng, most):
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(most)))


def test_bleu_by_hand():
    # 3 of 4 unigrams, 2 of 3 bigrams, 1 of 2 trigrams, 0 of 1 four-grams (smoothed to 1/2), and a
    # brevity penalty exp(1 - 6/4).
    value = Bleu().score(TextBatch.from_texts(["the cat sat quietly"], [row([REFERENCES[0]])]))[0]
    expected = np.exp(1 - 6 / 4) * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert value == pytest.approx(expected, rel=1e-12)


def test_rouge_by_hand():
    batch = TextBatch.from_texts(["the mat sat"], [row(["the cat sat on the mat"])])
    assert Rouge("rouge1").score(batch)[0] == pytest.approx(2 * 1 * 0.5 / 1.5)  # 3 of 3, 3 of 6
    assert Rouge("rouge2").score(batch)[0] == pytest.approx(2 * 0.5 * 0.2 / 0.7)  # 1 of 2, 1 of 5
    lcs = 2 / 3, 2 / 6  # "the sat"
    assert Rouge("rougeL").score(batch)[0] == pytest.approx(2 * lcs[0] * lcs[1] / sum(lcs))


@pytest.mark.parametrize("lowercase", [False, True])
def test_bleu_is_sacrebleu_on_random_texts(lowercase):
    rng = random.Random(0)
    bleu = Bleu(lowercase=lowercase)
    for _ in range(400):
        references = [joined(rng, 20) for _ in range(rng.randrange(1, 4))]
        text = joined(rng, 20)
        value = bleu.score(TextBatch.from_texts([text], [row(references)]))[0]
        assert value == sacrebleu_score(text, references, lowercase=lowercase)


@pytest.mark.parametrize("kind", [*KINDS, "rougeLsum"])
@pytest.mark.parametrize("stem", [False, True])
def test_rouge_is_rouge_score_on_random_texts(kind, stem):
    rng = random.Random(1)
    rouge = Rouge(kind, use_stemmer=stem)
    for _ in range(100):
        references = [joined(rng, 20) for _ in range(rng.randrange(1, 4))]
        text = joined(rng, 20)
        value = rouge.score(TextBatch.from_texts([text], [row(references)]))[0]
        assert value == pytest.approx(rouge_score(kind, text, references, stem), abs=1e-12)


@pytest.mark.parametrize("lowercase", [False, True])
def test_bleu_cursor_is_sacrebleu_at_every_prefix(lowercase):
    rng = random.Random(2)
    bleu = Bleu(lowercase=lowercase)
    for trial in range(250):
        references = [joined(rng, 16) for _ in range(rng.randrange(1, 4))] + REFERENCES[: trial % 3]
        cursor, text = bleu.begin(row(references)), ""
        for _ in range(16):
            piece = rng.choice(PIECES)
            text += piece
            value = cursor.push(piece)
            assert value == sacrebleu_score(text, references, lowercase=lowercase), (
                text,
                references,
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stem", [False, True])
def test_rouge_cursor_is_rouge_score_at_every_prefix(kind, stem):
    rng = random.Random(3)
    rouge = Rouge(kind, use_stemmer=stem)
    for trial in range(60):
        references = [joined(rng, 16) for _ in range(rng.randrange(1, 4))] + REFERENCES[: trial % 3]
        cursor, text = rouge.begin(row(references)), ""
        for _ in range(16):
            piece = rng.choice(PIECES)
            text += piece
            expected = rouge_score(kind, text, references, stem)
            assert cursor.push(piece) == pytest.approx(expected, abs=1e-12), (text, references)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.lists(st.text(max_size=6), max_size=8), st.text(max_size=20))
def test_cursors_on_arbitrary_unicode(pieces, reference):
    references = [reference, "".join(pieces[::2])]
    cursors = [reward.begin(row(references)) for reward in (Bleu(), Rouge("rouge1"), Rouge())]
    text = ""
    for piece in pieces:
        text += piece
        values = [cursor.push(piece) for cursor in cursors]
        assert values[0] == sacrebleu_score(text, references)
        assert values[1] == pytest.approx(rouge_score("rouge1", text, references), abs=1e-12)
        assert values[2] == pytest.approx(rouge_score("rougeL", text, references), abs=1e-12)


@pytest.mark.parametrize("reward", [Bleu(), Rouge("rouge1"), Rouge("rouge2"), Rouge("rougeL")])
def test_cursor_copies_are_independent(reward):
    rng = random.Random(4)
    for _ in range(30):
        cursor = reward.begin(row(REFERENCES))
        first, left, right = joined(rng, 8), joined(rng, 8), joined(rng, 8)
        cursor.push(first)
        twin = cursor.copy()
        expected = reward.begin(row(REFERENCES)).push(first + left)
        assert cursor.push(left) == expected
        assert twin.push(right) == reward.begin(row(REFERENCES)).push(first + right)
        # ... and neither has touched what all cursors of the prompt share.
        assert reward.begin(row(REFERENCES)).push(first + left) == expected


def test_a_single_reference_may_be_a_string():
    batch = TextBatch.from_texts(["the cat"] * 2, [row("the cat sat"), row(["the cat sat"])])
    for reward in (Bleu(), Rouge()):
        one, many = reward.score(batch)
        assert one == many


def test_the_reference_cache_keeps_prompts_apart():
    rng = random.Random(5)
    texts = [joined(rng, 20) for _ in range(60)]
    rows = [row([rng.choice(REFERENCES), joined(rng, 9)]) for _ in range(6)] * 10
    values = Bleu().score(TextBatch.from_texts(texts, rows))
    assert values == [sacrebleu_score(t, r["references"]) for t, r in zip(texts, rows, strict=True)]


@pytest.mark.parametrize("references", [None, [], 3, ["a", None]])
def test_bad_references_are_named(references):
    for reward in (Bleu(), Rouge()):
        scores = reward.evaluate(TextBatch.from_texts(["a", "a"], [row(references), row("a")]))
        assert scores.status[0] is not None and scores.status[1] is None
        assert "column 'references'" in scores.status[0]
        with pytest.raises(ValueError, match="column 'references'"):
            reward.begin(row(references))


def test_missing_reference_column_suggests_the_nearest():
    with pytest.raises(RewardColumnError, match=r"Did you mean 'reference'\?.*prompt, reference"):
        Bleu().check(["prompt", "reference"])
    Rouge(column="reference").check(["prompt", "reference"])


@pytest.mark.parametrize("tokenize", ["none", "char", "zh", "intl"])
def test_other_tokenizers_are_sacrebleus_too(tokenize):
    reward = Bleu(tokenize=tokenize)
    batch = TextBatch.from_texts(["the dog, on"], [row(REFERENCES)])
    expected = sacrebleu_score("the dog, on", REFERENCES, tokenize=tokenize)
    assert reward.score(batch) == [expected]
    assert reward.begin(row(REFERENCES)).push("the dog, on") == expected


def test_rouge_rejects_unknown_kinds():
    with pytest.raises(ValueError, match="'rougeX'"):
        Rouge("rougeX")


@pytest.mark.parametrize("reward", [Bleu(lowercase=True), Rouge("rouge2", use_stemmer=True)])
def test_pickles_hold_no_caches(reward):
    batch = TextBatch.from_texts(["The cats sat"], [row(REFERENCES)])
    values = reward.score(batch)
    reward.begin(REFERENCES and row(REFERENCES))
    data = pickle.dumps(reward)
    assert len(data) < 400
    assert pickle.loads(data).score(batch) == values
    assert copy.deepcopy(reward) is reward
