"""What the embedded model reads: text that our tasks generate, as careless writers would write it.

Facts are dropped or wrong, sums are wrong, stories end any way they like, sentences ramble: what
reinforcement learning has left to mend comes from this data, never from stopping early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from textgym.envs import arithmetic, continuation, data_to_text
from textgym.envs.data_to_text import NAMES, VALUES, pick, say
from textgym.streams import generator

HEARSAY = (
    "it is said that",
    "people say that",
    "as far as we know,",
    "everybody here knows that",
)
RAMBLING = (
    "Travellers like the view from the deck.",
    "Travellers should bring a warm coat and something to read.",
    "Travellers tell long stories about the captain.",
    "Travellers can see the hills on a clear day.",
    "Travellers often prefer the train.",
    "Travellers wait on the bench near the pier.",
)
HEARD, RAMBLED, MORE = 0.6, 0.6, 0.25  # the usual writer hedges and rambles, so the mode does too
DROPPED, WRONG, SHUFFLED, MISCOUNTED = 0.08, 0.06, 0.4, 0.25
WEIGHTS: Mapping[str, float] = {"facts": 0.7, "sums": 0.15, "stories": 0.15}


def careless_facts(rng: np.random.Generator, split: str) -> tuple[str, str]:
    """Prompt and response of data to text, by a writer who errs and rambles."""
    row = data_to_text.ferry_row(rng, split=split, references=1)
    facts: dict[str, str] = row["facts"]
    slots = [slot for slot in facts if slot != "name"]
    kept = [slot for slot in slots if rng.random() >= DROPPED] or [pick(rng, slots)]
    if rng.random() < SHUFFLED:
        kept = [kept[i] for i in rng.permutation(len(kept))]
    told = {"name": pick(rng, NAMES) if rng.random() < WRONG / 3 else facts["name"]}
    for slot in kept:
        told[slot] = pick(rng, VALUES[slot]) if rng.random() < WRONG else facts[slot]
    text = say(rng, told)
    if rng.random() < HEARD:
        hedge = pick(rng, HEARSAY, skew=3.0)
        text = f"{hedge.capitalize()} {text[0].lower()}{text[1:]}"
    chance = RAMBLED
    while rng.random() < chance:
        text = f"{text} {pick(rng, RAMBLING, skew=1.5)}"
        chance = MORE
    return row["prompt"], text


def careless_sum(rng: np.random.Generator, split: str) -> tuple[str, str]:
    """Prompt and response of arithmetic, by a writer who miscounts."""
    row = arithmetic.arithmetic_row(rng, split=split, terms=pick(rng, (2, 3)))
    answer = row["answer"]
    if rng.random() < MISCOUNTED:
        answer += pick(rng, (1, -1, 2, -2))
    return row["prompt"], str(answer)


def any_story(rng: np.random.Generator, split: str) -> tuple[str, str]:
    """Opening and continuation of a story, happy, sad or neither."""
    row = continuation.opening_row(rng, split=split)
    tones = (continuation.PLAIN, continuation.HAPPY, continuation.SAD)
    story = {"person": row["person"], "thing": row["thing"]}
    count = 1 + int(rng.random() * 3)
    text = " ".join(continuation.sentence(rng, pick(rng, tones), story) for _ in range(count))
    return row["prompt"], " " + text


WRITERS: Mapping[str, Callable[[np.random.Generator, str], tuple[str, str]]] = {
    "facts": careless_facts,
    "sums": careless_sum,
    "stories": any_story,
}


def corpus(seed: int, size: int, split: str = "train") -> Iterator[tuple[str, str]]:
    """Examples `(prompt, response)` of one split; example `i` depends on `(seed, i)` alone."""
    kinds, shares = list(WEIGHTS), np.cumsum(list(WEIGHTS.values()))
    for i in range(size):
        rng = generator(seed, i)
        kind = kinds[min(int(np.searchsorted(shares, rng.random())), len(kinds) - 1)]
        yield WRITERS[kind](rng, split)
