"""Rewards by name, and the expressions of the command line."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from textgym.rewards.base import Reward
from textgym.rewards.bleu import Bleu
from textgym.rewards.chrf import Chrf
from textgym.rewards.cider import Cider
from textgym.rewards.diversity import Distinct, Repetition, SelfBleu
from textgym.rewards.exact_match import ExactMatch
from textgym.rewards.functions import as_reward
from textgym.rewards.length import LengthPenalty
from textgym.rewards.meteor import Meteor
from textgym.rewards.rouge import Rouge
from textgym.rewards.schedules import Schedule
from textgym.rewards.ter import Ter
from textgym.rewards.token_f1 import TokenF1
from textgym.rewards.verifiers import (
    Countdown,
    Json,
    JsonSchema,
    Math,
    MultipleChoice,
    Numeric,
    UnitTests,
    WordConstraints,
    think_answer,
)

REWARDS: dict[str, Callable[[], Reward]] = {
    "bleu": Bleu,
    "rouge1": partial(Rouge, "rouge1"),
    "rouge2": partial(Rouge, "rouge2"),
    "rougeL": partial(Rouge, "rougeL"),
    "rougeLsum": partial(Rouge, "rougeLsum"),
    "chrf": Chrf,
    "chrfpp": partial(Chrf, word_order=2),
    "ter": Ter,
    "cider": Cider,
    "meteor": Meteor,
    "token_f1": TokenF1,
    "exact_match": ExactMatch,
    "distinct1": partial(Distinct, 1),
    "distinct2": partial(Distinct, 2),
    "self_bleu": SelfBleu,
    "repetition": Repetition,
    "length": LengthPenalty,
    "numeric": Numeric,
    "math": Math,
    "multiple_choice": MultipleChoice,
    "countdown": Countdown,
    "json": Json,
    "json_schema": JsonSchema,
    "think_answer": think_answer,
    "words": WordConstraints,
    "code": UnitTests,
}

_WORD = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<name>[A-Za-z_][\w.]*(?::[A-Za-z_][\w.]*)?)"
    r"|(?P<sign>[-+*]))"
)


def make_reward(name: str) -> Reward:
    """Make the reward of that name.

    Raises:
        ValueError: If there is none; suggests the nearest.
    """
    if name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"there is no reward named {name!r}.{hint} The names are: {', '.join(REWARDS)}; "
            "a reward of your own is written `module:object`."
        )
    return REWARDS[name]()


def parse_reward(expression: str) -> Reward | Schedule:
    """Read a sum of products of numbers and rewards, as `0.5*bleu + 0.5*rougeL`.

    Args:
        expression: Numbers, names of rewards and `module:object` (a reward, a schedule or a
            callable of your own), joined by `+`, `-` and `*`.

    Returns:
        The reward; a schedule if one of the objects is a schedule.

    Raises:
        ValueError: If the expression cannot be read, or names what does not exist.
    """
    words = _split(expression)
    total: Any = None
    while words:
        sign = 1.0
        if words[0] in ("+", "-"):
            sign = -1.0 if words.pop(0) == "-" else 1.0
        elif total is not None:
            raise _unreadable(expression, words[0])
        product = _factor(words, expression)
        while words and words[0] == "*":
            words.pop(0)
            product = product * _factor(words, expression)
        if isinstance(product, float):
            raise ValueError(f"{expression!r}: the number {product:g} multiplies no reward")
        term = product if sign > 0 else -product
        total = term if total is None else total + term
    if total is None:
        raise ValueError("the reward is empty; write for example `bleu`, or `0.5*bleu+0.5*rougeL`")
    assert isinstance(total, Reward | Schedule)
    return total


def _split(expression: str) -> list[str]:
    words, at = [], 0
    text = expression.rstrip()
    while at < len(text):
        match = _WORD.match(text, at)
        if match is None:
            raise _unreadable(expression, text[at:].lstrip())
        words.append(match.group().strip())
        at = match.end()
    return words


def _factor(words: list[str], expression: str) -> Any:
    if not words or words[0] in ("+", "-", "*"):
        raise _unreadable(expression, words[0] if words else "")
    word = words.pop(0)
    if word[0].isdigit() or word[0] == ".":
        return float(word)
    return load_object(word) if ":" in word else make_reward(word)


def load_object(path: str) -> Reward | Schedule:
    """Import `module:object` and make a reward of it.

    Raises:
        ValueError: If there is no such module or object.
    """
    module_name, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ValueError(
            f"{path!r}: there is no module {module_name!r} on the import path"
        ) from None
    for name in attribute.split("."):
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, dir(found), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path!r}: {module_name!r} has no {attribute!r}.{hint}")
        found = getattr(found, name)
    if isinstance(found, type) and issubclass(found, Reward):
        found = found()
    return found if isinstance(found, Schedule) else as_reward(found)


def _unreadable(expression: str, at: str) -> ValueError:
    where = f"at {at!r}" if at else "at its end"
    return ValueError(
        f"cannot read the reward {expression!r} {where}; write for example `0.5*bleu+0.5*rougeL` "
        "or `module:object`"
    )
