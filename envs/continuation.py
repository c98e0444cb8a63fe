"""Continuation: the opening of a story in, a happy continuation out.

The openings come from a template grammar. The default reward is the sentiment of a small lexicon
plus the log-probability under a reference model, which keeps the text a story; any other scorer can
take the lexicon's place.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from textgym.env import TextGenEnv
from textgym.envs.splits import check_split, hashed_split, table
from textgym.rewards import ReferenceLogProb, Reward, as_reward
from textgym.task import Task
from textgym.tokens import EMBEDDED, assets_folder
from textgym.vector import TextGenVectorEnv

POSITIVE: frozenset[str] = frozenset(
    """
    able admire adore amaze amazed amazing appreciate beautiful beauty best better bless
    blessed bliss bold brave bravo bright brilliant calm celebrate celebrated charm charming
    cheer cheered cheerful clean clever comfort comfortable confident congratulate content
    cosy courage cuddle cure cured dance danced dear delicious delight delighted delightful
    eager ease easy elegant embrace encourage enjoy enjoyed excellent excited exciting fair
    faith famous fantastic favourite festive fine flourish fond forgive fortunate free freedom
    fresh friend friendly friends fun funny generous gentle gift gifts glad gladly glee
    glorious golden good grace graceful grand grateful great grin grinned happily happiness
    happy heal healed healthy heaven help helped helpful hero holiday honest honour hope hoped
    hopeful hug hugged joke jolly joy joyful jubilant keen kind kindly kindness kiss laugh
    laughed laughter like liked lively love loved lovely loving luck lucky magic magnificent
    marvellous merry neat nice noble peace peaceful perfect play played pleasant pleased
    pleasure praise praised precious pretty prize proud proudly rejoice relax relief rescue
    rescued reward rich safe safely sang satisfied save saved share shared shine shiny sing
    smart smile smiled song sparkle splendid strong succeed success sunny sunshine superb
    support sure sweet sweetly tender terrific thank thanked thankful thanks thrill thrilled
    tidy treasure treat triumph true trust warm warmly welcome welcomed well win winner wise
    wish won wonder wonderful wonderfully worthy yummy
    """.split()
)
NEGATIVE: frozenset[str] = frozenset(
    """
    abandon abandoned abuse accident ache afraid alarm alone anger angrily angry anguish annoy
    annoyed anxious argue argued ashamed attack attacked awful bad badly beaten bitter blame
    blamed bleed blind bored boring bother break broke broken bruise burn burned burnt
    careless cheat cheated cold complain complained confused coward cracked crash crashed
    cried cruel cruelly cry crying curse cursed damage damaged danger dangerous dark dead
    death deceive defeat defeated despair desperate destroy destroyed die died difficult dirty
    disappoint disappointed disaster disease disgust disgusting dread dreadful drown drowned
    dull dying empty enemy envy evil fail failed failure fear feared fearful fell fierce fight
    filthy fool foolish forgot fought fright frightened furious ghastly gloom gloomy greedy
    grief grim guilty harm harmed harsh hate hated hateful helpless hideous hopeless horrible
    horror hostile hungry hurt ill injured insult jealous kill killed lament lazy lie lied
    lonely lose loss lost mad mean mess miserable misery mistake mourn mud muddy nasty nervous
    nightmare pain painful panic pity poison poor problem punish punished quarrel quarrelled
    rage regret reject rejected rotten rude ruin ruined sad sadly sadness scare scared scary
    scream screamed selfish shame shiver shouted shy sick sigh sighed sink sorrow sorry sour
    stain starve steal stole stolen storm strange stuck stupid suffer suffered sulk tear tears
    terrible terrified terror thief threat threaten tired torn trouble ugly unhappy unkind
    unlucky upset useless vain vanished violent war weak weep wept wicked worried worry worse
    worst wound wounded wreck wretched wrong
    """.split()
)
NEGATIONS: frozenset[str] = frozenset(
    "not no never none nobody nothing neither nor without hardly cannot".split()
)
INTENSIFIERS: frozenset[str] = frozenset("very really so truly extremely deeply".split())
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[.,;:!?]")
REACH = 3  # a negation turns the words after it, up to this many, or to the next punctuation mark


def sentiment(text: str) -> float:
    """Score a text by the lexicon: -1 is gloomy, 0 neutral, 1 cheerful.

    With `s` the sum over words of +1 (`POSITIVE`) or -1 (`NEGATIVE`), doubled after an intensifier
    and turned by a negation in the same part of the sentence (`not happy`, `didn't cry`), the score
    is `s / sqrt(s*s + 4)`.
    """
    total, turned, strength = 0.0, 0, 1.0
    for word in WORD.findall(text.lower().replace("\u2019", "'")):
        if word in ".,;:!?":
            turned, strength = 0, 1.0
        elif word in NEGATIONS or word.endswith("n't"):
            turned, strength = REACH + 1, 1.0
        elif word in INTENSIFIERS:
            strength = 2.0
            continue
        else:
            sign = (word in POSITIVE) - (word in NEGATIVE)
            total += sign * strength * (-1.0 if turned else 1.0)
            strength = 1.0
        turned = max(0, turned - 1)
    return total / math.sqrt(total * total + 4.0)


# The grammar of the stories.
WOMEN = ("Mara", "Lisle", "Pella", "Sanne", "Vida", "Yora")
MEN = ("Tobin", "Oren", "Rufus", "Ulric", "Wim", "Zeno")
JOBS = ("baker", "sailor", "painter", "farmer", "teacher", "clockmaker", "gardener", "tailor")
QUALITIES = ("old", "small", "red", "silver", "wooden", "blue")
THINGS = ("lamp", "key", "map", "drum", "box", "boat", "kite", "bell")
FINDS = ("found", "made", "bought", "borrowed", "carried")
PLACES = (
    "by the river",
    "in the market",
    "on the hill",
    "near the mill",
    "behind the school",
    "at the harbour",
)
DAYS = ("One morning", "One evening", "In spring", "After the rain", "On Sunday")

HAPPY = (
    "{who} was happy with the {thing} and smiled.",
    "{who} showed it to a friend, and they laughed.",
    "A kind neighbour came and helped.",
    "The {thing} was beautiful, and everyone loved it.",
    "{who} felt proud and safe.",
    "They played with the {thing} and had fun.",
)
SAD = (
    "{who} was sad and cried.",
    "The {thing} was broken, and nobody liked it.",
    "A rude neighbour came and shouted.",
    "{who} lost the {thing} and was afraid.",
    "{who} felt tired and lonely.",
    "The storm ruined the {thing}.",
)
PLAIN = (
    "{who} put the {thing} on the table.",
    "{who} walked home {place}.",
    "Then it was time for dinner.",
    "The {thing} was {quality} and heavy.",
    "A neighbour came and looked at the {thing}.",
    "{who} waited until the evening.",
)


def opening_row(
    rng: np.random.Generator, *, split: str = "train", sentences: int = 1
) -> dict[str, Any]:
    """Draw a row of one split, with columns `prompt`, `person`, `thing` and `references`.

    Args:
        rng: Where the choices come from.
        split: `"train"`, `"validation"` or `"test"`; by the hash of the first sentence, so no two
            share one.
        sentences: Length of the opening.

    Raises:
        ValueError: A knob is out of range.
    """
    check_split(split)
    if not 1 <= sentences <= 3:
        raise ValueError(f"sentences must be in 1..3, got {sentences}")
    while True:
        story = {"person": _pick(rng, WOMEN + MEN), "thing": _pick(rng, THINGS)}
        first = (
            f"{_pick(rng, DAYS)}, {story['person']} the {_pick(rng, JOBS)} {_pick(rng, FINDS)} "
            f"a {_pick(rng, QUALITIES)} {story['thing']} {_pick(rng, PLACES)}."
        ).replace(" a old", " an old")
        if hashed_split(first) == split:
            more = [sentence(rng, PLAIN, story) for _ in range(sentences - 1)]
            ending = " ".join(sentence(rng, HAPPY, story) for _ in range(2))
            return {"prompt": " ".join([first, *more]), **story, "references": [" " + ending]}


def sentence(rng: np.random.Generator, forms: tuple[str, ...], story: dict[str, str]) -> str:
    """Write one sentence about the person and the thing of a story."""
    pronoun = "She" if story["person"] in WOMEN else "He"
    who = _pick(rng, (story["person"], pronoun, pronoun))
    return _pick(rng, forms).format(
        who=who, thing=story["thing"], place=_pick(rng, PLACES), quality=_pick(rng, QUALITIES)
    )


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(len(options) * rng.random())]


def continuation_task(
    *,
    split: str = "train",
    sentences: int = 1,
    seed: int = 0,
    scorer: Any = sentiment,
    reference: Any = "embedded",
    fluency: float = 0.02,
    tokenizer: Any = "embedded",
    max_new_tokens: int = 24,
) -> Task:
    """Build the task.

    Args:
        split: `"train"`, `"validation"` or `"test"`; no two share an opening.
        sentences: Length of the opening, 1 to 3.
        seed: Key of the table.
        scorer: Anything that scores a text; default is `sentiment`.
        reference: Model whose log-probability of the response is added; None for the scorer alone.
        fluency: Weight of that log-probability, per nat.
        tokenizer: Anything that `load_tokenizer` takes.
        max_new_tokens: Budget of a response.

    Raises:
        ValueError: A knob is out of range.
    """
    reward: Reward = as_reward(scorer, low=-1.0) if scorer is sentiment else as_reward(scorer)
    if reference is not None:
        source = assets_folder() if reference == EMBEDDED else reference
        reward = reward + fluency * ReferenceLogProb(source)
    return Task(
        prompts=table(opening_row, split, seed=seed, sentences=sentences),
        reward=reward,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        # A bound of the embedded tokenizer.
        max_prompt_tokens=4 + 16 * sentences if tokenizer == EMBEDDED else None,
    )


class ContinuationEnv(TextGenEnv):
    """The opening of a story in, a cheerful continuation out.

    ## Description
    A prompt is `One morning, Mara the baker found an old lamp by the river.` The response goes on,
    and is the better the more cheerful it is and the more likely under a reference model. The
    optimum is not known.

    ## Observation Space
    That of `TextGenEnv`; with the embedded tokenizer V = 1024 and L = 44.

    ## Action Space
    `Discrete(V)`.

    ## Rewards
    At the end, the sentiment of a small lexicon (-1 to 1) + 0.02 times the log-probability of the
    response, in nats, under the embedded model. The second part costs longer texts more;
    `reference=None` leaves it out.

    ## Episode End
    Terminated by the tokenizer's stop ids or after 24 tokens.

    ## Information
    That of `TextGenEnv`; the components are `sentiment` and that of `ReferenceLogProb`.

    ## Arguments
    `split="train"`, `sentences=1`, `seed=0`, `scorer=sentiment`, `reference="embedded"`,
    `fluency=0.02`, `tokenizer="embedded"`, `max_new_tokens=24`.

    ## Version History
    v0: first version.
    """

    make_task = staticmethod(continuation_task)


class ContinuationVectorEnv(TextGenVectorEnv):
    """N rows of `ContinuationEnv`."""

    make_task = staticmethod(continuation_task)
