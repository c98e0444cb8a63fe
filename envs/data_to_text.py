"""Data to text: facts about a ferry in, sentences out, scored against several references.

The module is a grammar, three splits and an environment. A fact is a pair (slot, value); every
phrase of the grammar states exactly one fact, so a reference states all facts and nothing else.
References differ in wording, in the order of the facts, in how facts are joined into sentences, and
in voice ("serves coffee", "coffee is served").
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np

from textgym.env import TextGenEnv
from textgym.envs.splits import check_split, table
from textgym.task import Task
from textgym.tokens import EMBEDDED
from textgym.vector import TextGenVectorEnv

T = TypeVar("T")

NAMES: tuple[str, ...] = tuple(
    "Heron Otter Petrel Comet Juniper Marigold Falcon Osprey Willow Saffron Amber Cobalt "
    "Dorado Ember Fulmar Gannet Harrier Ibis Kestrel Lark Merlin Nimbus Puffin Tern".split()
)
PORTS: tuple[str, ...] = tuple(
    "Aldo Brin Corvo Dunmar Elsa Farrow Gale Holm Istra Kell Lorn Mirra Norra Ostin".split()
)
VALUES: Mapping[str, tuple[str, ...]] = {
    "kind": ("steamer", "catamaran", "hydrofoil", "paddleboat", "barge", "sailboat"),
    "route": tuple(f"{a} {b}" for a in PORTS for b in PORTS if a != b),
    "time": ("dawn", "noon", "dusk", "midnight", "six", "nine"),
    "trip": ("15", "20", "30", "45", "60"),
    "fare": ("free", "2", "4", "6", "9"),
    "food": ("coffee", "soup", "pastries", "seafood", "none"),
    "bikes": ("yes", "no"),
    "season": ("spring", "summer", "autumn", "winter"),
}
SLOTS: tuple[str, ...] = tuple(VALUES)

# Phrases of a slot, the most usual one first. "verb" follows a subject ("the Heron sails ..."),
# "ing" hangs on a sentence that has one, "clause" has a subject of its own. A slot with a value
# ("fare=free") goes before its slot.
PHRASES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "kind": {"verb": ("is a {}",), "ing": ("being a {}",), "clause": ("the boat is a {}",)},
    "route": {
        "verb": ("sails from {} to {}", "goes from {} to {}", "leaves {} for {}"),
        "ing": ("sailing from {} to {}", "going from {} to {}"),
        "clause": ("the route is from {} to {}", "passengers are taken from {} to {}"),
    },
    "time": {
        "verb": ("departs at {}", "sets off at {}"),
        "ing": ("departing at {}", "setting off at {}"),
        "clause": ("departure is at {}", "the start is at {}"),
    },
    "trip": {
        "verb": ("takes {}", "arrives after {}"),
        "ing": ("taking {}", "arriving after {}"),
        "clause": ("the trip takes {}", "the crossing lasts {}"),
    },
    "fare": {
        "verb": ("costs {} coins", "charges {} coins"),
        "ing": ("costing {} coins", "charging {} coins"),
        "clause": ("a ticket costs {} coins", "the fare is {} coins"),
    },
    "fare=free": {
        "verb": ("is free", "costs nothing"),
        "ing": ("being free", "costing nothing"),
        "clause": ("tickets are free", "no ticket is needed"),
    },
    "food": {
        "verb": ("serves {}", "offers {} on board"),
        "ing": ("serving {}", "offering {} on board"),
        "clause": ("{} can be bought on board", "there is {} on board"),
    },
    "food=none": {
        "verb": ("serves no food", "has no kitchen"),
        "ing": ("serving no food", "having no kitchen"),
        "clause": ("no food is served", "there is no kitchen"),
    },
    "bikes=yes": {
        "verb": ("takes bicycles", "has room for bicycles"),
        "ing": ("taking bicycles", "having room for bicycles"),
        "clause": ("bicycles are welcome", "bicycles are allowed"),
    },
    "bikes=no": {
        "verb": ("does not take bicycles", "has no room for bicycles"),
        "ing": ("not taking bicycles", "having no room for bicycles"),
        "clause": ("bicycles are not allowed", "bicycles must stay ashore"),
    },
    "season": {
        "verb": ("runs in {}", "operates in {}"),
        "ing": ("running in {}", "operating in {}"),
        "clause": ("the season is {}", "there are trips in {}"),
    },
}
WORDINGS: Mapping[str, tuple[str, ...]] = {
    "15": ("15 minutes", "a quarter of an hour"),
    "20": ("20 minutes",),
    "30": ("30 minutes", "half an hour"),
    "45": ("45 minutes",),
    "60": ("60 minutes", "an hour"),
}
HELDOUT_PAIRS = 12  # one pair of values in so many is kept out of training
VALIDATION_SHARE = 10  # one input without such a pair in so many is for validation


def pick(rng: np.random.Generator, options: Sequence[T], *, skew: float = 1.0) -> T:
    """Draw one option; a `skew` above 1 favours the first ones (index = n * u**skew)."""
    return options[int(len(options) * rng.random() ** skew)]


def draw_facts(
    rng: np.random.Generator, *, min_facts: int = 2, max_facts: int = 4
) -> dict[str, str]:
    """Draw a name and between `min_facts` and `max_facts` other facts, in the order of `SLOTS`."""
    if not 1 <= min_facts <= max_facts <= len(SLOTS):
        raise ValueError(
            f"expected 1 <= min_facts <= max_facts <= {len(SLOTS)}, got {min_facts} and {max_facts}"
        )
    count = min_facts + int(rng.random() * (max_facts - min_facts + 1))
    chosen = set(rng.permutation(len(SLOTS))[:count].tolist())
    facts = {"name": pick(rng, NAMES)}
    facts.update({s: pick(rng, VALUES[s]) for i, s in enumerate(SLOTS) if i in chosen})
    return facts


def ferry_row(
    rng: np.random.Generator,
    *,
    split: str = "train",
    min_facts: int = 2,
    max_facts: int = 4,
    references: int = 8,
    variety: int = 3,
) -> dict[str, Any]:
    """Draw a row of one split: `{"prompt": str, "references": list[str], "facts": dict[str, str]}`.

    Args:
        rng: Where the choices come from.
        split: `"train"`, `"validation"` or `"test"`; see `split_of`.
        min_facts: Fewest facts besides the name.
        max_facts: Most facts besides the name, at most 8.
        references: How many different references are sought; short inputs may have fewer.
        variety: How references may differ, 1 to 3; see `say`.

    Raises:
        ValueError: A knob is out of range.
    """
    check_split(split)
    if references < 1 or variety not in (1, 2, 3):
        raise ValueError(
            f"expected references >= 1 and variety in 1..3, got {references} and {variety}"
        )
    while True:
        facts = draw_facts(rng, min_facts=min_facts, max_facts=max_facts)
        if split_of(facts) == split:
            break
    texts: dict[str, None] = {}
    for _ in range(4 * references):
        texts[say(rng, facts, variety=variety)] = None
        if len(texts) == references:
            break
    return {"prompt": linearise(facts), "references": list(texts), "facts": facts}


def linearise(facts: Mapping[str, str]) -> str:
    """Write facts as a prompt: `name Heron | kind steamer | fare 4 =`."""
    return " | ".join(f"{slot} {value}" for slot, value in facts.items()) + " ="


def split_of(facts: Mapping[str, str]) -> str:
    """Say which split an input belongs to; the facts alone decide, never a seed or a knob.

    Every pair of values is hashed and one in `HELDOUT_PAIRS` is held out. An input with such a pair
    is `"test"`, so the test split asks for combinations that training never shows. Of the others,
    one in `VALIDATION_SHARE` (by the hash of the whole input) is `"validation"`: new inputs made of
    known combinations. The rest is `"train"`.
    """
    items = [f"{slot}={value}" for slot, value in facts.items()]
    if any(_held_out(a, b) for i, a in enumerate(items) for b in items[i + 1 :]):
        return "test"
    whole = zlib.crc32(" ".join(["whole", *items]).encode())
    return "validation" if whole % VALIDATION_SHARE == 0 else "train"


@cache
def _held_out(a: str, b: str) -> bool:
    return zlib.crc32(f"{a}&{b}".encode()) % HELDOUT_PAIRS == 0


def say(rng: np.random.Generator, facts: Mapping[str, str], *, variety: int = 3) -> str:
    """Write one reference that states all facts and nothing else.

    Args:
        rng: Where the choices come from.
        facts: Slot to value; `name` and at least one other slot.
        variety: 1 chooses words, 2 also the order of the facts, 3 also how they are joined and in
            which voice.
    """
    slots = [slot for slot in facts if slot != "name"]
    subject = f"the {facts['name']}"
    if variety >= 2 and rng.random() < 0.35:
        i = int(rng.random() * len(slots))
        slots.insert(0, slots.pop(i))
    if variety >= 3 and "kind" in slots and len(slots) > 1 and rng.random() < 0.6:
        slots.remove("kind")
        subject = f"the {facts['kind']} {facts['name']}"
    sentences = []
    for group in _groups(rng, slots, variety):
        sentences.append(_sentence(rng, subject, [(s, facts[s]) for s in group], variety))
        subject = "it"
    return " ".join(sentences)


def phrase(rng: np.random.Generator, slot: str, value: str, form: str) -> str:
    """Write one fact as a `"verb"`, `"ing"` or `"clause"` phrase, in lower case."""
    template = pick(rng, PHRASES.get(f"{slot}={value}", PHRASES.get(slot, {}))[form], skew=1.7)
    if slot == "route":
        return template.format(*value.split())
    return template.format(
        pick(rng, WORDINGS.get(value, (value,)), skew=1.7) if slot == "trip" else value
    )


def _groups(rng: np.random.Generator, slots: list[str], variety: int) -> Iterator[list[str]]:
    """Cut the facts into sentences of one to three facts (two at a time below variety 3)."""
    rest = slots
    while rest:
        size = 2 if variety < 3 or len(rest) == 4 else pick(rng, (2, 3, 1), skew=1.5)
        yield rest[:size]
        rest = rest[size:]


def _sentence(
    rng: np.random.Generator, subject: str, facts: list[tuple[str, str]], variety: int
) -> str:
    """Join one to three facts into a sentence."""
    pattern = pick(rng, ("verbs", "verbs", "ing", "first", "which", "clause"), skew=1.3)
    if variety < 3:
        pattern = "verbs"
    elif len(facts) == 1:
        pattern = "clause" if subject == "it" and rng.random() < 0.6 else "verbs"
    elif subject == "it" and pattern == "which":
        pattern = "verbs"
    forms = {"first": ["ing", "verb", "verb"], "clause": ["verb", "verb", "verb"]}.get(
        pattern, ["verb", "verb", "verb"]
    )[: len(facts)]
    if pattern == "ing":
        forms[-1] = "ing"
    elif pattern == "clause":
        forms[-1] = "clause"
    parts = [
        phrase(rng, slot, value, form) for (slot, value), form in zip(facts, forms, strict=True)
    ]
    if pattern == "first":
        text = f"{parts[0]}, {subject} {_join(parts[1:])}"
    elif pattern == "which":
        text = f"{subject}, which {parts[0]}, {_join(parts[1:])}"
    elif pattern == "ing":
        text = f"{subject} {_join(parts[:-1])}, {parts[-1]}"
    elif pattern == "clause" and len(facts) == 1:
        text = parts[0]
    elif pattern == "clause":
        text = f"{subject} {_join(parts[:-1])}, and {parts[-1]}"
    else:
        text = f"{subject} {_join(parts)}"
    return text[0].upper() + text[1:] + "."


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def data_to_text_task(
    *,
    split: str = "train",
    min_facts: int = 2,
    max_facts: int = 4,
    references: int = 8,
    variety: int = 3,
    seed: int = 0,
    reward: Any = "bleu",
    tokenizer: Any = "embedded",
    max_new_tokens: int = 40,
) -> Task:
    """Build the task.

    Args:
        split: `"train"`, `"validation"` (new inputs) or `"test"` (new combinations of values); no
            two share an input.
        min_facts: Fewest facts besides the name.
        max_facts: Most facts besides the name, at most 8.
        references: References of an input.
        variety: 1: references differ in words; 2: also in the order of facts; 3: also in how facts
            are joined.
        seed: Key of the table.
        reward: Anything that scores a text; `"bleu"` and `"rougeL"` read the references.
        tokenizer: Anything that `load_tokenizer` takes.
        max_new_tokens: Budget of a response.

    Raises:
        ValueError: A knob is out of range.
    """
    return Task(
        prompts=table(
            ferry_row,
            split,
            seed=seed,
            min_facts=min_facts,
            max_facts=max_facts,
            references=references,
            variety=variety,
        ),
        reward=reward,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        # A bound of the embedded tokenizer: two tokens a fact, four with a number, and the name.
        max_prompt_tokens=4 + 4 * max_facts if tokenizer == EMBEDDED else None,
    )


class DataToTextEnv(TextGenEnv):
    """Facts in, one or two sentences out; the reward is BLEU against several references.

    ## Description
    A prompt lists facts about a ferry, `name Heron | kind steamer | fare 4 =`; the response should
    state them all and nothing else, as `The steamer Heron costs 4 coins.` does. Eight references
    differ in wording, in the order of the facts, in how they are joined and in voice. There are
    4,000 training inputs and 500 of each other split; no two share an input, and every test input
    combines two values that no training input combines.

    ## Observation Space
    That of `TextGenEnv`; with the embedded tokenizer V = 1024 and L = 60.

    ## Action Space
    `Discrete(V)`.

    ## Rewards
    At the end, sentence BLEU (0 to 1) of the response against its references. One reference scored
    against the others has 0.70 on the test split; the optimum is not known, and higher.

    ## Episode End
    Terminated by the tokenizer's stop ids or after 40 tokens.

    ## Information
    That of `TextGenEnv`; the component is that of the reward.

    ## Arguments
    `split="train"`, `min_facts=2`, `max_facts=4`, `references=8`, `variety=3`, `seed=0`,
    `reward="bleu"`, `tokenizer="embedded"`, `max_new_tokens=40`.

    ## Version History
    v0: first version.
    """

    make_task = staticmethod(data_to_text_task)


class DataToTextVectorEnv(TextGenVectorEnv):
    """N rows of `DataToTextEnv`."""

    make_task = staticmethod(data_to_text_task)
