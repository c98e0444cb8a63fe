"""Continuation: the lexicon's scores by hand, the openings, and the reward's parts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from textgym.envs.continuation import (
    HAPPY,
    NEGATIVE,
    PLAIN,
    POSITIVE,
    SAD,
    ContinuationEnv,
    continuation_task,
    opening_row,
    sentence,
    sentiment,
)
from textgym.envs.splits import SPLITS, table
from textgym.streams import generator


def score(total: float) -> float:
    return total / math.sqrt(total * total + 4)


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("", 0),
        ("The lamp was on the table.", 0),
        ("She was happy.", 1),
        ("SHE WAS HAPPY", 1),
        ("She was very happy and laughed.", 3),
        ("She was not happy.", -1),
        ("She was not very happy.", -2),
        ("He didn't cry.", 1),
        ("He didn\u2019t cry.", 1),
        ("Not a soul cried, and everyone was glad.", 2),  # the comma ends the negation
        ("No, she was happy.", 1),
        ("Not in all those many years was she happy.", 1),  # out of reach
        ("It was never boring or sad.", 2),
        ("happyhappy unhappily", 0),
    ],
)
def test_sentiment_by_hand(text: str, total: float) -> None:
    assert sentiment(text) == pytest.approx(score(total))


def test_sentiment_is_bounded_and_cheap() -> None:
    assert -1 < sentiment("sad " * 10_000) < -0.99
    assert 0.99 < sentiment("happy " * 10_000) < 1


def test_the_lexicon_is_consistent() -> None:
    assert not POSITIVE & NEGATIVE
    assert len(POSITIVE) > 200
    assert len(NEGATIVE) > 200
    assert all(word.isalpha() and word == word.lower() for word in POSITIVE | NEGATIVE)


def test_the_grammar_means_what_it_says() -> None:
    story = {"person": "Mara", "thing": "lamp"}
    for sign, forms in ((1, HAPPY), (-1, SAD), (0, PLAIN)):
        for form in forms:
            value = sentiment(sentence(generator(1), (form,), story))
            assert (value > 0) - (value < 0) == sign, form


def test_rows_are_a_function_of_the_seed_and_splits_share_no_opening() -> None:
    assert opening_row(generator(4)) == opening_row(generator(4))
    tables = {split: table(opening_row, split, sentences=1) for split in SPLITS}
    firsts = [{row["prompt"].split(".")[0] for row in rows} for rows in tables.values()]
    assert len(set().union(*firsts)) == sum(map(len, firsts)) == 5000


@pytest.mark.parametrize("knobs", [{"sentences": 0}, {"sentences": 4}, {"split": "x"}])
def test_knobs_out_of_range_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"sentences must|split must"):
        ContinuationEnv(**knobs)


def test_any_scorer_takes_the_place_of_the_lexicon() -> None:
    def shouts(text: str) -> float:
        return float("!" in text)

    task = continuation_task(scorer=shouts, reference=None)
    assert task.schedule.names == ("shouts",)


@pytest.mark.parametrize("sentences", [1, 3])
def test_prompts_fit(sentences: int) -> None:
    task = continuation_task(split="test", sentences=sentences, reference=None)
    assert task.prompt_length.max() <= task.max_prompt_tokens


def test_the_reward_is_sentiment_plus_weighted_log_probability() -> None:
    env = ContinuationEnv(fluency=0.5)
    env.reset(options={"prompt_row": 0})
    ids = env.task.tokenizer.encode(" She was happy.")[1:]
    total = 0.0
    for action in [*ids, env.task.tokenizer.stop_ids[0]]:
        _, reward, terminated, _, info = env.step(action)
        total += reward
    parts = info["reward"]
    assert terminated
    assert parts["sentiment"] == pytest.approx(score(1))
    assert parts["reference_logprob"] < 0
    assert total == pytest.approx(parts["sentiment"] + 0.5 * parts["reference_logprob"])
