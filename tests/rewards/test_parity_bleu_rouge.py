"""Fuzzing: Bleu and Rouge equal sacrebleu and rouge-score at every prefix of hostile texts.

Texts grow by pieces that the tokenizers treat in a special way, or could trip over. BLEU must be
equal bit for bit, ROUGE to 1e-9, with random options; now and then a cursor is copied, and both
copies go on apart.
"""

import logging
import random
from functools import cache

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from textgym.rewards import Bleu, Rouge, TextBatch

PIECES = [
    # words, whole and in part, with the space before and after
    *("the", "The", " the", " cat", "cat", " sat", " on", " mat", "mats", " a", "a", "A", "the "),
    *(" ca", "t", "ts", " runn", "ing", " running", " runs", "ational", " generous", "ly"),
    *("didn't", " a b a", "b a b ", " the cat sat on", " on the mat."),
    # space, and what only looks like it
    *("", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2003"),
    *("\u2009", "\u2028", "\u2029", "\u3000", "\u200b", "\u2060", "\ufeff", "\x00", "\x00\x00"),
    # what 13a deletes and replaces, whole and in part
    *("-\n", "-", "--", "-\n\n", "- \n", "-\r\n", "-\n ", "\n-", ">\n", "<skipped>", "-<skipped>"),
    *("-<skipped>\n", "<skip", "ped>", "<SKIPPED>", "<s\u212aipped>", "<skip-\nped>", "&-\namp;"),
    *("<skipped><skipped>\n", "&quot;", "&amp;", "&", "amp;", "&lt;", "&gt;", "&am", "p;", "<"),
    # digits beside punctuation
    *("3.5", "1,000", "10", "5", ".5", "5.", ",5", " .", ".", ",", "...", ", ", ".,", "1.-2"),
    *("0-1", "1-", "-2", "$5", "5%", "½.", "ⅷ,", "\u0663.", "²", "5.\n", "5. 5", " , , "),
    # symbols, scripts, case that depends on what is beside it, and no characters at all
    *("$", "%", "(", ")", "[", "]", "'", '"', "\u2019", "“", "/", "\\", "_", "€", "5€.", "^", ">"),
    *("~", "é", "e\u0301", "\u0301", "日本", "中", "\uff0c", "。", "5。5", "\u0391Σ", "Σ", "ς"),
    *("\u2019Σ", "\u0391", "ß", "İ", "\u212a", "😀", "\ud800", "\udfff", "a\ud83d", "\u017f", "አማ"),
]
STEPS = 16
# Texts for each parameter; each of the STEPS prefixes of each is compared.
BLEU_TEXTS = {"13a": 900, "none": 350, "char": 350, "zh": 350, "intl": 350}
ROUGE_TEXTS = {"rouge1": 250, "rouge2": 250, "rouge4": 150, "rougeL": 350, "rougeLsum": 500}


def test_parity_is_checked_on_fifty_thousand_prefixes():
    assert STEPS * (sum(BLEU_TEXTS.values()) + sum(ROUGE_TEXTS.values())) >= 50_000


def alphabet(rng):
    """All pieces, or so few that texts and references have much in common."""
    return PIECES if rng.random() < 0.4 else rng.sample(PIECES, rng.randrange(3, 12))


def joined(rng, pieces, most):
    return "".join(rng.choice(pieces) for _ in range(rng.randrange(most)))


def fuzz(rng, reward, references, pieces, check):
    """Grow one text; `check(text, value)` is called for STEPS prefixes. Returns how many."""
    row = {"references": references}
    cursor, text, checked = reward.begin(row), "", 0
    while checked < STEPS:
        piece = rng.choice(pieces)
        if rng.random() < 0.1:
            other, more = cursor.copy(), rng.choice(pieces)
            check(text + more, other.push(more))
            if rng.random() < 0.5:  # either of the two goes on
                cursor, text = other, text + more
            checked += 1
            continue
        text += piece
        check(text, cursor.push(piece))
        checked += 1
    whole = reward.score(TextBatch.from_texts([text], [row]))[0]
    check(text, whole)
    # ... and however it is cut.
    again, at = reward.begin(row), 0
    while at < len(text):
        size = rng.choice((1, 1, 2, 3, 7))
        value = again.push(text[at : at + size])
        at += size
    if text:
        check(text, value)
        assert value == whole
    return checked


@cache
def sacrebleu(**options):
    return BLEU(**options)


@pytest.mark.parametrize("tokenize", BLEU_TEXTS)
def test_bleu_parity_bit_for_bit(tokenize, caplog):
    caplog.set_level(logging.ERROR, "sacrebleu")  # it advises effective_order for sentences
    rng = random.Random(f"bleu {tokenize}")
    checked = 0
    for _ in range(BLEU_TEXTS[tokenize]):
        method = rng.choice(["exp", "exp", "floor", "add-k", "none"])
        value = rng.choice([None, 0, 0.3, 1]) if method in ("floor", "add-k") else None
        options = {"lowercase": rng.random() < 0.5, "tokenize": tokenize}
        options |= {"smooth_method": method, "smooth_value": value}
        options["effective_order"] = rng.random() < 0.7
        order = rng.choice([1, 2, 3, 4, 4, 4, 6])
        reward = Bleu(max_order=order, **options)
        library = sacrebleu(max_ngram_order=order, **options)
        pieces = alphabet(rng)
        references = [joined(rng, pieces, 16) for _ in range(rng.randrange(1, 5))]

        def check(text, value, library=library, references=references, options=options):
            expected = library.sentence_score(text, references).score / 100
            assert value == expected, (text, references, options)

        checked += fuzz(rng, reward, references, pieces, check)
    assert checked == STEPS * BLEU_TEXTS[tokenize]


@pytest.mark.parametrize("kind", ROUGE_TEXTS)
def test_rouge_parity(kind):
    rng = random.Random(f"rouge {kind}")
    libraries = [RougeScorer([kind], use_stemmer=stem) for stem in (False, True)]
    rewards = {
        (stem, aggregate): Rouge(kind, use_stemmer=stem, aggregate=aggregate)
        for stem in (False, True)
        for aggregate in ("best", "mean")
    }
    checked = 0
    for _ in range(ROUGE_TEXTS[kind]):
        stem, aggregate = rng.choice(list(rewards))
        pieces = alphabet(rng)
        if kind == "rougeLsum":  # lines of few words, so that there are many ways to align them
            pieces = [*rng.sample(pieces, 3), " a", " b", " c", " a b", "\n", rng.choice(PIECES)]
        references = [joined(rng, pieces, 20) for _ in range(rng.randrange(1, 4))]

        def check(text, value, stem=stem, aggregate=aggregate, references=references):
            library = libraries[stem]
            if aggregate == "best":
                expected = library.score_multi(references, text)[kind].fmeasure
            else:
                values = [library.score(r, text)[kind].fmeasure for r in references]
                expected = sum(values) / len(values)
            assert value == pytest.approx(expected, abs=1e-9), (text, references, stem, aggregate)

        checked += fuzz(rng, rewards[stem, aggregate], references, pieces, check)
    assert checked == STEPS * ROUGE_TEXTS[kind]
