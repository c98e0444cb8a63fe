"""Words of captions, and texts that grow."""

import random

import pytest

from textgym.rewards.words import GrowingText, caption_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat, it sat!", "the cat it sat"),
        ("can't won't Didn\u2019t", "ca n't wo n't did n't"),
        ("the river's level; they're", "the river 's level they 're"),
        ('"open-source" (about $12.50, 30%)', "open-source about $ 12.50 30 %"),
        ("1,000 at 10:30.", "1,000 at 10:30"),
        ("o'clock -- _ ...", "o'clock"),
        ("Ünïcode 日本", "ünïcode 日本"),
        ("", ""),
    ],
)
def test_caption_words(text, words):
    assert caption_words(text) == words.split()


def test_caption_words_of_their_own_output_are_the_same(joined):
    rng = random.Random(0)
    for _ in range(500):
        words = caption_words(joined(rng, 16))
        assert caption_words(" ".join(words)) == words


@pytest.mark.parametrize("split", [str.split, caption_words])
def test_a_growing_text_has_the_words_of_the_whole(split, joined):
    rng = random.Random(1)
    for _ in range(300):
        growing, text, finished = GrowingText(), "", []
        for _ in range(10):
            piece = joined(rng, 3)
            text += piece
            finished += split(growing.push(piece))
            assert finished + split(growing.tail) == split(text)


def test_parity_with_the_penn_treebank_tokens_of_captions(shared):
    """All hypotheses and references of the fixtures, whose brackets coco-caption keeps."""
    import json

    items = json.loads((shared / "fixtures/fixtures_caption.json").read_text())["items"]
    for item in items:
        raw = [item["hyp_raw"], *item["refs_raw"]]
        for text, tokens in zip(raw, [item["hyp"], *item["refs"]], strict=True):
            kept = [token for token in tokens.split() if token not in ("-lrb-", "-rrb-")]
            assert caption_words(text) == kept
