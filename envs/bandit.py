"""Bandit: one token of 64 is right. Does the gradient have the right sign?"""

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


def random_return(arms: int = 64) -> float:
    """Expected return of a uniform random policy: one arm of `arms` pays."""
    return 1.0 / arms


def right_arm(token_ids: Sequence[int], target: int) -> float:
    """1 if the first token is `target`, 0 otherwise."""
    return float(token_ids[0] == target)


def bandit_task(*, split: str = "train", arms: int = 64, target: int = 37) -> Task:
    """Build the task.

    Args:
        split: Every split is the same.
        arms: Size of the vocabulary.
        target: Id of the right token.

    Raises:
        ValueError: A knob is out of range.
    """
    check_split(split)
    if arms < 2 or not 0 <= target < arms:
        raise ValueError(f"expected arms >= 2 and 0 <= target < arms, got {arms} and {target}")
    return Task(
        prompts=[{"prompt": "s0"}],
        tokenizer=symbol_tokenizer([f"s{i}" for i in range(arms)], bos=None, eos=None),
        reward=as_reward(partial(right_arm, target=target)),
        max_new_tokens=1,
        stop=(),
    )


class BanditEnv(TextGenEnv):
    """One token of 64 is right; aimed at sign errors in rewards, advantages and losses.

    ## Description
    The prompt is always `s0`; the response is one token. Optimum **1**, uniform random policy
    **1/64 = 0.0156**.

    ## Observation Space
    That of `TextGenEnv` with V = 64 and L = 2.

    ## Action Space
    `Discrete(64)`.

    ## Rewards
    1 if the token is `s37`, else 0.

    ## Episode End
    Terminated after one token (`stop_reason` is `"length"`).

    ## Information
    That of `TextGenEnv`; the component is `right_arm`.

    ## Arguments
    `arms=64`, `target=37`; `split` changes nothing.

    ## Version History
    v0: first version.
    """

    make_task = staticmethod(bandit_task)


class BanditVectorEnv(TextGenVectorEnv):
    """N rows of `BanditEnv`."""

    make_task = staticmethod(bandit_task)
