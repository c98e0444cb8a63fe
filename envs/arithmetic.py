"""Arithmetic: a sum in, its value out, checked by a verifier that reads the number in the text."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from textgym.env import TextGenEnv
from textgym.envs.splits import check_split, hashed_split, table
from textgym.rewards import as_reward
from textgym.task import Task
from textgym.tokens import EMBEDDED
from textgym.vector import TextGenVectorEnv

OPERATORS = "+-*"
ANSWER = re.compile(r"([+-]?[0-9]{1,32})(?:\.0*)?")
LONGEST = 64  # characters of an answer; a longer text is not read


def arithmetic_row(
    rng: np.random.Generator,
    *,
    split: str = "train",
    digits: int = 1,
    operators: str = "+-",
    terms: int = 2,
) -> dict[str, Any]:
    """Draw a row of one split: `{"prompt": "12 + 7 =", "answer": 19, "references": ["19"]}`.

    Each term has between 1 and `digits` digits. Products bind before sums, as usual.

    Raises:
        ValueError: A knob is out of range.
    """
    if not 1 <= digits <= 9 or not 2 <= terms <= 8:
        raise ValueError(f"expected digits in 1..9 and terms in 2..8, got {digits} and {terms}")
    if not operators or set(operators) - set(OPERATORS):
        raise ValueError(f"operators is a choice of {OPERATORS!r}, got {operators!r}")
    check_split(split)
    while True:
        numbers = [int(rng.integers(10 ** int(rng.integers(1, digits + 1)))) for _ in range(terms)]
        signs = [operators[int(rng.integers(len(operators)))] for _ in range(terms - 1)]
        prompt = f"{numbers[0]}" + "".join(
            f" {sign} {number}" for sign, number in zip(signs, numbers[1:], strict=True)
        )
        prompt += " ="
        if hashed_split(prompt) == split:
            answer = value_of(numbers, signs)
            return {"prompt": prompt, "answer": answer, "references": [str(answer)]}


def value_of(numbers: list[int], signs: list[str]) -> int:
    """Compute `numbers[0] signs[0] numbers[1] ...`; products bind before sums and differences."""
    total, product, sign = 0, numbers[0], 1
    for op, number in zip(signs, numbers[1:], strict=True):
        if op == "*":
            product *= number
        else:
            total += sign * product
            product, sign = number, 1 if op == "+" else -1
    return total + sign * product


def read_number(text: str) -> int | None:
    """Read a text that is one whole number and nothing else; None where it is not.

    A sign, leading zeros, white space around it, a full stop after it and a zero fraction (`7.0`)
    are allowed. Digits are ASCII and at most 32, and there is no exponent, so that a hostile text
    costs nothing.
    """
    text = text.strip()
    match = ANSWER.fullmatch(text) if len(text) <= LONGEST else None
    return None if match is None else int(match[1])


def numeric_match(text: str, answer: int) -> float:
    """1 if the text is the number `answer` and nothing else, 0 otherwise."""
    return float(read_number(text) == answer)


def arithmetic_task(
    *,
    split: str = "train",
    digits: int = 1,
    operators: str = "+-",
    terms: int = 2,
    seed: int = 0,
    tokenizer: Any = "embedded",
    max_new_tokens: int = 16,
) -> Task:
    """Build the task.

    Args:
        split: `"train"`, `"validation"` or `"test"`; no two share a sum.
        digits: Most digits of a term, 1 to 9.
        operators: A choice of `+`, `-` and `*`.
        terms: Terms of a sum, 2 to 8.
        seed: Key of the table.
        tokenizer: Anything that `load_tokenizer` takes.
        max_new_tokens: Budget of an answer.

    Raises:
        ValueError: A knob is out of range.
    """
    return Task(
        prompts=table(
            arithmetic_row, split, seed=seed, digits=digits, operators=operators, terms=terms
        ),
        reward=as_reward(numeric_match),
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        # The embedded tokenizer has a token a digit, one an operator, the bos token and the equals
        # sign.
        max_prompt_tokens=1 + terms * (digits + 1) if tokenizer == EMBEDDED else None,
    )


class ArithmeticEnv(TextGenEnv):
    """A sum in, its value out; a verifier reads the number.

    ## Description
    A prompt is `8 + 7 =`, the right response `15`. Terms have one digit; with `digits=2` one or
    two, each as likely. Optimum **1**.

    ## Observation Space
    That of `TextGenEnv`; with the embedded tokenizer V = 1024 and L = 21.

    ## Action Space
    `Discrete(V)`.

    ## Rewards
    At the end, 1 if the text is the right whole number and nothing else (`15`, ` 15.`, `+015`),
    else 0.

    ## Episode End
    Terminated by the tokenizer's stop ids or after 16 tokens.

    ## Information
    That of `TextGenEnv`; the component is `numeric_match`.

    ## Arguments
    `split="train"`, `digits=1`, `operators="+-"`, `terms=2`, `seed=0`, `tokenizer="embedded"`,
    `max_new_tokens=16`.

    ## Version History
    v0: first version.
    """

    make_task = staticmethod(arithmetic_task)


class ArithmeticVectorEnv(TextGenVectorEnv):
    """N rows of `ArithmeticEnv`."""

    make_task = staticmethod(arithmetic_task)
