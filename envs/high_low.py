"""HighLow: find a number in three guesses. Are the environment's own tokens never trained on?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from textgym.env import TextGenEnv
from textgym.envs.splits import check_split
from textgym.rewards import as_reward
from textgym.task import Reply, Task
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

OPTIMUM = 1.0


def random_return(guesses: int = 3) -> float:
    """Expected return of a uniform random policy: 1 - (1 - 1/V)^guesses, V = 2^guesses + 2."""
    actions = (1 << guesses) + 2
    return 1.0 - (1.0 - 1.0 / actions) ** guesses


class Oracle:
    """Answers a guess: `higher`, `lower`, or `go` to what is no number; ends a decided episode.

    Token `i` below `count` is the number i + 1; then come `higher`, `lower` and `go`. A response
    alternates guesses and answers.
    """

    def __init__(self, guesses: int) -> None:
        self.guesses = guesses
        self.count = (1 << guesses) - 1
        self.higher, self.lower, self.go = range(self.count, self.count + 3)

    def __call__(self, row: Mapping[str, Any], response_ids: Sequence[int]) -> Reply:
        """Answer the last guess of a response."""
        guess, secret = response_ids[-1] + 1, row["secret"]
        if guess == secret or len(response_ids) >= 2 * self.guesses - 1:
            return Reply(end=True)
        if guess > self.count:
            return Reply(tokens=[self.go])
        return Reply(tokens=[self.higher if guess < secret else self.lower])


def found(token_ids: Sequence[int], secret: int) -> float:
    """1 if the last token is the secret number, 0 otherwise."""
    return float(token_ids[-1] + 1 == secret)


def high_low_task(*, split: str = "train", guesses: int = 3) -> Task:
    """Build the task.

    Args:
        split: Every split is the same.
        guesses: How many guesses there are; the secret is one of the 2^guesses - 1 numbers that
            they can tell apart.

    Raises:
        ValueError: A knob is out of range.
    """
    check_split(split)
    if not 1 <= guesses <= 6:
        raise ValueError(f"guesses must be in 1..6, got {guesses}")
    oracle = Oracle(guesses)
    numbers = [str(i + 1) for i in range(oracle.count)]
    return Task(
        prompts=[{"prompt": "go", "secret": i + 1} for i in range(oracle.count)],
        tokenizer=symbol_tokenizer([*numbers, "higher", "lower", "go"], bos=None, eos=None),
        reward=as_reward(found),
        max_new_tokens=2 * guesses - 1,
        stop=(),
        respond=oracle,
    )


class HighLowEnv(TextGenEnv):
    """Find a number from 1 to 7 in three guesses; aimed at tokens of the environment's own.

    ## Description
    The prompt is always `go`; the secret is a column of the prompt table that is not observed.
    After each wrong guess the environment appends `higher` or `lower` (`go` after what is no
    number). Optimum **1** (binary search tells 7 numbers apart in 3 guesses), uniform random policy
    **1 - (9/10)^3 = 0.271**.

    ## Observation Space
    That of `TextGenEnv` with V = 10 and L = 6. `length` jumps by 2 where the environment answers.

    ## Action Space
    `Discrete(10)`: the numbers 1 to 7 are 0 to 6, then `higher`, `lower` and `go`.

    ## Rewards
    1 at the end if the last guess is the secret, else 0.

    ## Episode End
    Terminated by the right guess or by the third (`stop_reason` is `"env"`).

    ## Information
    That of `TextGenEnv`; the component is `found`.

    ## Arguments
    `guesses=3`; `split` changes nothing.

    ## Version History
    v0: first version.
    """

    make_task = staticmethod(high_low_task)


class HighLowVectorEnv(TextGenVectorEnv):
    """N rows of `HighLowEnv`."""

    make_task = staticmethod(high_low_task)
