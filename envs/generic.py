"""`TextGen-v0`: the generic environment, for your own prompts, tokenizer and reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from textgym.env import TextGenEnv
from textgym.mdp import Budget, Task
from textgym.vector import TextGenVectorEnv


def generic_task(
    *,
    prompts: Any = None,
    tokenizer: Any = "embedded",
    reward: Any = None,
    max_new_tokens: int | None = None,
    max_prompt_tokens: int | None = None,
    truncate_prompt: Literal["left", "right"] | None = None,
    stop: Sequence[int | str] | str | int | None = None,
    budget: Budget = "terminate",
    vocab_size: int | None = None,
) -> Task:
    """Build a task from your own parts.

    Without prompts the table is that of the data-to-text task, and so is what else is left out.

    Args:
        prompts: A `Prompts` table or anything that `Prompts.load` reads.
        tokenizer: A folder, a hub name, a tokenizer object, or `"embedded"`.
        reward: Anything that scores a text; by default `"bleu"`, where the table has references.
        max_new_tokens: Budget of a response; 64 by default.
        max_prompt_tokens: Longest prompt in tokens; by default the longest over all splits.
        truncate_prompt: Side on which longer prompts are cut; None makes them an error.
        stop: Stop ids and stop strings; by default the tokenizer's stop ids.
        budget: Whether an empty budget is the end (`"terminate"`) or a time limit (`"truncate"`).
        vocab_size: Number of actions; by default the tokenizer's size.

    Raises:
        ValueError: Prompts came without a reward, or a part is bad (see `Task`).
    """
    if prompts is None:
        from textgym.envs.data_to_text import data_to_text_task

        base = data_to_text_task()
        prompts, reward = base.prompts, base.schedule if reward is None else reward
        max_new_tokens = base.max_new_tokens if max_new_tokens is None else max_new_tokens
        if max_prompt_tokens is None and tokenizer == "embedded":
            max_prompt_tokens = base.max_prompt_tokens
    if reward is None:
        from textgym.prompts import Prompts

        prompts = Prompts.load(prompts)
        if "references" not in prompts.columns:
            raise ValueError(
                "prompts without references need a reward: pass reward=<any callable> (columns: "
                f"{list(prompts.columns)})"
            )
        reward = "bleu"
    return Task(
        prompts=prompts,
        tokenizer=tokenizer,
        reward=reward,
        max_new_tokens=64 if max_new_tokens is None else max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        truncate_prompt=truncate_prompt,
        stop=stop,
        budget=budget,
        vocab_size=vocab_size,
    )


class GenericEnv(TextGenEnv):
    """`TextGen-v0`: write a response to your own prompts for your own reward.

    ## Description
    An episode is one response to one prompt of your table. Without arguments it is
    `textgym/DataToText-v0`.

    ## Observation Space, Action Space, Rewards, Episode End, Information
    Those of `textgym.env.TextGenEnv`.

    ## Arguments
    Those of `generic_task`. For example
    `gym.make("TextGen-v0", prompts=[{"prompt": "Say hi:"}], reward=lambda text: "hi" in text)`.

    ## Version History
    - v0: first version.
    """

    make_task = staticmethod(generic_task)


class GenericVectorEnv(TextGenVectorEnv):
    """Native vector environment of `TextGen-v0`."""

    make_task = staticmethod(generic_task)
