"""Echo: repeat the symbols of the prompt. Does each token get its own credit?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from textgym.env import TextGenEnv
from textgym.envs.splits import hashed_split, table
from textgym.rewards import as_reward
from textgym.task import Task
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

LETTERS = "abcdefghijklmnopqrstuvwxyz"
OPTIMUM = 1.0


def random_return(symbols: int = 16) -> float:
    """Expected return of a uniform random policy: a position is right with chance 1 / V."""
    return 1.0 / symbols


def echo_row(
    rng: np.random.Generator, *, split: str = "train", symbols: int = 16, size: int = 4
) -> dict[str, Any]:
    """Draw a row: `{"prompt": "c a b", "echo": [2, 0, 1], "references": ["c a b"]}`."""
    while True:
        ids = [int(i) for i in rng.integers(symbols, size=size)]
        prompt = " ".join(LETTERS[i] for i in ids)
        if hashed_split(prompt) == split:
            return {"prompt": prompt, "echo": ids, "references": [prompt]}


def right_positions(token_ids: Sequence[int], echo: Sequence[int]) -> float:
    """Share of the positions that hold the right symbol."""
    return sum(a == b for a, b in zip(token_ids, echo, strict=False)) / len(echo)


def echo_task(*, split: str = "train", symbols: int = 16, size: int = 4, seed: int = 0) -> Task:
    """Build the task.

    Args:
        split: `"train"`, `"validation"` or `"test"`; no two share a prompt.
        symbols: Size of the vocabulary, 4 to 26.
        size: Symbols of a prompt, 3 to 16.
        seed: Key of the prompts.

    Raises:
        ValueError: A knob is out of range.
    """
    if not 4 <= symbols <= len(LETTERS) or not 3 <= size <= 16:
        raise ValueError(f"expected symbols in 4..26 and size in 3..16, got {symbols} and {size}")
    return Task(
        prompts=table(echo_row, split, seed=seed, symbols=symbols, size=size),
        tokenizer=symbol_tokenizer(LETTERS[:symbols], bos=None, eos=None),
        reward=as_reward(right_positions),
        max_new_tokens=size,
        stop=(),
    )


class EchoEnv(TextGenEnv):
    """Repeat 4 of 16 symbols; aimed at credit across prompt and response, and off-by-one errors.

    ## Description
    The prompt is four symbols, the response four tokens. Optimum **1**, uniform random policy
    **1/16 = 0.0625**; the best response that does not look at the prompt has the same.

    ## Observation Space
    That of `TextGenEnv` with V = 16 and L = 8.

    ## Action Space
    `Discrete(16)`.

    ## Rewards
    At the end, the share of positions that hold the right symbol.

    ## Episode End
    Terminated after four tokens (`stop_reason` is `"length"`).

    ## Information
    That of `TextGenEnv`; the component is `right_positions`.

    ## Arguments
    `split="train"`, `symbols=16`, `size=4`, `seed=0`.

    ## Version History
    v0: first version.
    """

    make_task = staticmethod(echo_task)


class EchoVectorEnv(TextGenVectorEnv):
    """N rows of `EchoEnv`."""

    make_task = staticmethod(echo_task)
