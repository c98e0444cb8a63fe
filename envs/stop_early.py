"""StopEarly: ending at once is right. Is the reward of the stop token paid to the stop token?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from textgym.env import TextGenEnv
from textgym.envs.splits import check_split
from textgym.rewards import as_reward
from textgym.task import Task
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

OPTIMUM = 1.0


def random_return(symbols: int = 7, horizon: int = 32) -> float:
    """Expected return of a uniform random policy over `symbols` and the stop token.

    With V = symbols + 1 it stops after n symbols with chance (1 - 1/V)^n / V, which pays 1 / (1 +
    n).
    """
    stop = 1.0 / (symbols + 1)
    return sum((1 - stop) ** n * stop / (1 + n) for n in range(horizon))


def brevity(token_ids: Sequence[int], stop_id: int) -> float:
    """1 / (1 + n) for a response that stops after n symbols, 0 for one that does not stop."""
    return 1.0 / len(token_ids) if token_ids[-1] == stop_id else 0.0


def stop_early_task(*, split: str = "train", symbols: int = 7, horizon: int = 32) -> Task:
    """Build the task.

    Args:
        split: Every split is the same.
        symbols: Symbols beside the stop token, at least 3.
        horizon: Budget in tokens, the stop token included.

    Raises:
        ValueError: A knob is out of range.
    """
    check_split(split)
    if symbols < 3 or horizon < 1:
        raise ValueError(f"expected symbols >= 3 and horizon >= 1, got {symbols} and {horizon}")
    return Task(
        prompts=[{"prompt": "s0"}],
        tokenizer=symbol_tokenizer([f"s{i}" for i in range(symbols)], bos=None),
        reward=as_reward(partial(brevity, stop_id=symbols)),
        max_new_tokens=horizon,
    )


class StopEarlyEnv(TextGenEnv):
    """Ending at once is right; aimed at rewards paid one token off and at lost stop tokens.

    ## Description
    The prompt is always `s0`. Optimum **1** (stop first), uniform random policy **0.2967**.

    ## Observation Space
    That of `TextGenEnv` with V = 8 and L = 33.

    ## Action Space
    `Discrete(8)`: seven symbols, and 7 is the stop token.

    ## Rewards
    At the end, 1 / (1 + n) for a stop after n symbols; 0 without a stop.

    ## Episode End
    Terminated by the stop token, or after 32 tokens.

    ## Information
    That of `TextGenEnv`; the component is `brevity`.

    ## Arguments
    `symbols=7`, `horizon=32`; `split` changes nothing.

    ## Version History
    v0: first version.
    """

    make_task = staticmethod(stop_early_task)


class StopEarlyVectorEnv(TextGenVectorEnv):
    """N rows of `StopEarlyEnv`."""

    make_task = staticmethod(stop_early_task)
