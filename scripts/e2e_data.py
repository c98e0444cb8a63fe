"""Tables of the E2E restaurant data: training, validation and test.

The dev inputs know coffee shops, Chinese and English food only, and twenty names; the test inputs
have pubs, five more kinds of food, and other names. A model that is trained on the dev inputs as
they are learns those words by heart. So names and words are put in their place in the training
inputs and in what people wrote for them, none of which is in the test inputs, and copying is what
is left to learn. Validation inputs have restaurants that training has not.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from textgym.prompts import Prompts

Facts = dict[str, str]
Row = tuple[Facts, list[str]]  # an input, and what people wrote for it

SHARE = 0.75  # of the facts below that are changed
VALIDATION = 0.18  # of the dev inputs
OTHERS = {
    "name": (
        "Harbour Lights, The Red Lion, Bella Roma, Old Station, The Oak Tree, Maple Kitchen, "
        "Silver Spoon, The Lantern, Corner House, Golden Harvest, The Fox, Juniper, Number Nine, "
        "Pepper Lane, The Anchor, Riverbank, Saffron, The Kings Head, Marigold, Tamarind House, "
        "The Bell, Olive Grove, Blue Door, White Hart, The Copper Pot, Quayside, Hazel, "
        "The Gardeners, Little Dragon, Sunrise, Magnolia, The Swan, Castle View, Pomodoro, "
        "The Windmill, Brick Lane, Nutmeg, The Crown, Green Lantern, Rosemary"
    ),
    "near": (
        "Grand Hotel, Town Hall, The Old Library, Central Station, Museum Square, Pizza Corner, "
        "The Odeon, Park Inn, City Hall, Café Milano, Taste of Asia, The Globe Theatre, "
        "Market Street, The Royal Oak, Victoria Gardens, Hotel Bristol, Noodle Bar, Café Luna, "
        "Kings College, The Guildhall"
    ),
    "food": (
        "Mexican, Thai, Greek, Spanish, Turkish, Korean, Vietnamese, Lebanese, American, "
        "Portuguese, Moroccan, Polish, Brazilian, Persian, Ethiopian, Vegan, Seafood, Swedish"
    ),
    "eatType": (
        "bar, bakery, bistro, diner, tea room, canteen, tavern, brasserie, cafeteria, steakhouse, "
        "wine bar, grill, food court, pizzeria, inn"
    ),
}


def read(path: Path) -> list[Row]:
    """Inputs of a file of the challenge, each with all that people wrote for it."""
    rows = Prompts.load(path, prompt="mr", references="ref")
    found = (re.findall(r"([\w ]+)\[([^\]]*)\]", row["prompt"]) for row in rows)
    facts = [{name.strip(): value for name, value in pairs} for pairs in found]
    return [(f, list(row["references"])) for f, row in zip(facts, rows, strict=True)]


def split(rows: list[Row], share: float = VALIDATION) -> tuple[list[Row], list[Row]]:
    """Set the rarest names aside, until they make up a share of the inputs."""
    counts = Counter(facts["name"] for facts, _ in rows)
    kept: set[str] = set()
    for name in sorted(counts, key=lambda name: (counts[name], name)):
        if sum(counts[k] for k in kept) >= share * len(rows):
            break
        kept.add(name)
    return [r for r in rows if r[0]["name"] not in kept], [r for r in rows if r[0]["name"] in kept]


def vary(rows: Iterable[Row], rng: np.random.Generator) -> list[Row]:
    """Put other names and words into inputs and texts alike.

    A fact stays as it is unless half of the texts say it word for word; texts that say it in other
    words are dropped when it changes.
    """
    varied = []
    for facts, texts in rows:
        changed: Facts = {}
        left = texts
        for fact, others in OTHERS.items():
            if fact in facts and rng.random() < SHARE:
                word = _word(facts[fact])
                verbatim = [text for text in left if word.search(text)]
                if 2 * len(verbatim) >= len(texts):
                    changed[fact] = str(rng.choice(others.split(", ")))
                    left = verbatim
        for fact, other in changed.items():
            left = [_word(facts[fact]).sub(other, text) for text in left]
        varied.append((facts | changed, left))
    return varied


def _word(value: str) -> re.Pattern[str]:
    return re.compile(rf"\b{re.escape(value)}\b", re.IGNORECASE)


def as_prompt(facts: Mapping[str, str]) -> str:
    """An input as a line, its values with a space before them, as they are in running text."""
    return "; ".join(f"{name}: {value}" for name, value in facts.items())


def write(rows: Iterable[Row], path: Path) -> None:
    """Write a table with columns `mr` and `ref`, one line a text."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mr", "ref"])
        writer.writerows((as_prompt(facts), text) for facts, texts in rows for text in texts)


def prepare(data: Path, out: Path) -> None:
    """Write `train.csv`, `validation.csv` and `test.csv` into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    train, validation = split(read(data / "devset.csv"))
    write(vary(train, np.random.default_rng(0)), out / "train.csv")
    write(validation, out / "validation.csv")
    write(read(data / "testset_w_refs.csv"), out / "test.csv")
