"""Bleu and Rouge equal sacrebleu and rouge-score: whole texts, every prefix, and corpora.

`test_parity_bleu_rouge.py` compares far more texts; here are the contracts around them.
"""

import copy
import importlib.util
import logging
import pickle
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from textgym.rewards import Bleu, Meteor, RewardColumnError, Rouge, Ter, TextBatch

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
KINDS = ["rouge1", "rouge2", "rouge3", "rougeL", "rougeLsum"]


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


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("reward", [Bleu(), *(Rouge(kind) for kind in KINDS)])
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


def test_long_references_do_not_pile_up(monkeypatch):
    monkeypatch.setattr("textgym.rewards.bleu.CACHED_NGRAMS", 2000)
    rng = random.Random(8)
    reward = Bleu()
    rows = [row(" ".join(f"w{rng.randrange(10_000)}" for _ in range(100))) for _ in range(50)]
    rows.insert(25, row(" ".join(f"w{i}" for i in range(3000))))  # alone more than is kept
    texts = [one["references"][:200] for one in rows]
    expected = [
        sacrebleu_score(text, [one["references"]]) for text, one in zip(texts, rows, strict=True)
    ]
    tracemalloc.start()
    for _ in range(2):
        values = [reward.begin(one).push(text) for text, one in zip(texts, rows, strict=True)]
        assert values == expected
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 1_000_000  # bytes; all of them would take 6 million


@pytest.mark.parametrize(
    "reward",
    [
        *(Bleu(), Bleu(lowercase=True), Bleu(tokenize="intl"), Bleu(tokenize="zh"), Ter(low=-1e9)),
        *(Rouge(use_stemmer=True), Meteor()),
    ],
)
def test_long_texts_are_not_kept(reward):
    def score(number):
        text = f"{number}a" * 10_000
        reward.score(TextBatch.from_texts([text, f"{text}."], [row("a cat")] * 2))

    score(99)
    tracemalloc.start()
    for number in range(20):
        score(number)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 200_000  # bytes; the texts themselves are 1.2 million


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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"effective_order": False, "smooth_method": "add-k", "lowercase": True},
        {"effective_order": False, "smooth_method": "none", "tokenize": "intl"},
        {"smooth_method": "floor", "smooth_value": 0.02, "tokenize": "char"},
    ],
)
@pytest.mark.parametrize("order", [2, 4])
def test_corpus_bleu_is_sacrebleus_with_any_number_of_references(options, order):
    rng = random.Random(6)
    texts = [joined(rng, 25) for _ in range(40)]
    references = [[joined(rng, 25) for _ in range(rng.randrange(1, 5))] for _ in texts]
    rows = [row(found) for found in references]
    corpus = Bleu(max_order=order, **options).corpus(TextBatch.from_texts(texts, rows))
    streams = [[r[k] if k < len(r) else None for r in references] for k in range(4)]
    library = BLEU(max_ngram_order=order, **options)
    # Samples of the texts, as a bootstrap takes them, all in one call.
    samples = [range(40), range(1), *(rng.choices(range(40), k=40) for _ in range(5))]
    sums = np.stack([corpus.statistics[list(sample)].sum(0) for sample in samples])
    expected = [
        library.corpus_score(
            [texts[i] for i in sample], [[stream[i] for i in sample] for stream in streams]
        ).score
        / 100
        for sample in samples
    ]
    assert corpus.score(sums).tolist() == expected
    assert corpus.score(sums[0]) == expected[0]
    assert 0.001 < expected[0] < 0.999 and len(set(expected)) > 3


def test_corpus_bleu_names_bad_references():
    with pytest.raises(ValueError, match="column 'references'"):
        Bleu().corpus(TextBatch.from_texts(["a"], [row([])]))


def test_corpus_rouge_is_the_mean():
    batch = TextBatch.from_texts(["the cat sat", "on the mat"], [row(REFERENCES)] * 2)
    corpus = Rouge().corpus(batch)
    mean = corpus.score(corpus.statistics.sum(0))
    assert mean == pytest.approx(np.mean(Rouge().score(batch)))


@pytest.mark.parametrize("kind", KINDS)
def test_mean_over_references(kind):
    references, text = ["the cat sat", "a dog", "on the mat the cat sat"], "the cat sat on"
    batch = TextBatch.from_texts([text], [row(references)])
    each = [rouge_score(kind, text, [reference]) for reference in references]
    assert Rouge(kind, aggregate="mean").score(batch)[0] == pytest.approx(np.mean(each), abs=1e-12)
    assert Rouge(kind).score(batch)[0] == pytest.approx(max(each), abs=1e-12)


@pytest.mark.parametrize("method", ["exp", "floor", "add-k", "none"])
@pytest.mark.parametrize("effective", [False, True])
def test_bleu_options_by_hand(method, effective):
    # The text has 2 words, 1 matches; its 1 pair does not; it has no triple.
    words, pairs = 1 / 2, {"exp": 1 / 2, "floor": 0.1, "add-k": 1 / 2, "none": 0}[method]
    reward = Bleu(effective_order=effective, smooth_method=method, max_order=3)
    value = reward.score(TextBatch.from_texts(["the dog"], [row("the cat")]))[0]
    if method == "add-k":  # which finds 1 of 1 triples where there are none
        expected = (words * pairs * 1) ** (1 / 3)
    else:
        expected = (words * pairs) ** 0.5 if effective else 0.0
    assert value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smooth_method": "linear"}, "one of 'exp', 'floor', 'add-k', 'none', got 'linear'"),
        ({"smooth_method": "exp", "smooth_value": 0.1}, "has no value"),
        ({"smooth_method": "floor", "smooth_value": 2}, "from 0 to 1"),
        ({"smooth_method": "add-k", "smooth_value": -1}, "at least 0"),
        ({"smooth_method": "add-k", "smooth_value": float("inf")}, "finite"),
        ({"max_order": 0}, "at least 1"),
        ({"max_order": 2.5}, "an integer"),
        ({"tokenize": "14a"}, "Did you mean '13a'"),
    ],
)
def test_bleu_says_what_is_wrong_with_an_option(options, message):
    with pytest.raises(ValueError, match=message):
        Bleu(**options)


@pytest.mark.parametrize(
    ("tokenize", "command"),
    [
        ("flores200", "pip install sentencepiece"),
        ("spm", "pip install sentencepiece"),
        ("ja-mecab", r'pip install "sacrebleu\[ja\]"'),
        ("ko-mecab", r'pip install "sacrebleu\[ko\]"'),
    ],
)
def test_tokenizers_that_need_a_package_name_it(tokenize, command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=command):
        Bleu(tokenize=tokenize)


def test_tokenizers_that_need_a_model_download_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("sacrebleu.utils.SACREBLEU_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"flores200.*fetch it once"):
        Bleu(tokenize="flores200")
    assert list(tmp_path.iterdir()) == []


def test_bleu_does_not_advise_about_sentences(caplog):
    with caplog.at_level(logging.WARNING):
        Bleu(effective_order=False).score(TextBatch.from_texts(["a ."] * 200, [row("a")] * 200))
    assert caplog.records == []


@pytest.mark.parametrize("reward", [Bleu(), *(Rouge(kind) for kind in KINDS)])
def test_examples_are_worth_what_they_say(reward):
    examples = reward.examples()
    values = [reward.score(TextBatch.from_texts([e.text], [e.row]))[0] for e in examples]
    assert values == pytest.approx([example.value for example in examples], abs=1e-9) or (
        reward.name == "rouge3" and not examples
    )
    assert values == sorted(values, reverse=True)


def test_other_options_have_no_examples_of_the_defaults():
    assert Bleu(max_order=2).examples() == () and Bleu(tokenize="char").examples() == ()


@pytest.mark.parametrize("reward", [Bleu(), *(Rouge(kind) for kind in KINDS)])
def test_cursors_stay_small_on_endless_text(reward):
    cursor = reward.begin(row(REFERENCES))
    cursor.push("the cat sat")
    tracemalloc.start()
    for i in range(3000):
        cursor.push("\n" if i % 20 == 0 else " cat" if i % 20 == 1 else f" word{i}")
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 10_000  # bytes: not even the words of the text are kept


@pytest.mark.parametrize("reward", [Bleu(lowercase=True), Rouge("rouge2", use_stemmer=True)])
def test_pickles_hold_no_caches(reward):
    batch = TextBatch.from_texts(["The cats sat"], [row(REFERENCES)])
    values = reward.score(batch)
    reward.begin(REFERENCES and row(REFERENCES))
    data = pickle.dumps(reward)
    assert len(data) < 400
    assert pickle.loads(data).score(batch) == values
    assert copy.deepcopy(reward) is reward
