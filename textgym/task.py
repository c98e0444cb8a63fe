"""A text-generation task: prompts, tokenizer, reward and the rules of the game.

A `Task` is read-only and shared: every row of a vector environment, and every environment made with
equal arguments, plays the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from gymnasium import spaces

from textgym.prompts import Prompts
from textgym.rewards import Schedule, as_schedule
from textgym.tokens import Tokenizer, load_tokenizer

Budget = Literal["terminate", "truncate"]
StopReason = Literal["stop_id", "stop_string", "length", "env"]
STOP_REASONS: tuple[StopReason, ...] = ("stop_id", "stop_string", "length", "env")


@dataclass(frozen=True)
class Reply:
    """What an environment answers: tokens of its own, and whether the episode is over."""

    tokens: Sequence[int] = ()
    end: bool = False


Respond = Callable[[Mapping[str, Any], Sequence[int]], Reply | None]
"""`respond(row, response_ids)` is called after every action that did not end the episode by a stop.

A reply counts toward the budget and is cut where it overflows."""


class Task:
    """Prompts, tokenizer, reward and the rules of the game; read-only and shared by all rows.

    Args:
        prompts: A `Prompts` table or anything that `Prompts.load` reads.
        reward: A schedule, a reward, any callable, or the name of a registered reward.
        tokenizer: Anything that `load_tokenizer` takes.
        max_new_tokens: Budget of tokens after the prompt, the environment's own replies included.
        max_prompt_tokens: Longest prompt in tokens; default is the longest over all splits of the
            table.
        truncate_prompt: Side on which longer prompts are cut; None makes them an error.
        stop: What ends a response. None: the tokenizer's stop ids. Integers replace those ids,
            strings are added to them, an empty sequence means that only the budget ends.
        budget: `"terminate"`: an empty budget ends the task. `"truncate"`: it is a time limit,
            without outcome.
        vocab_size: Number of actions V; default is the tokenizer's size.
        respond: Hook by which the environment takes turns of its own.

    Raises:
        ValueError: A prompt is too long, an id is outside the vocabulary, a column that the reward
            needs is missing, there is nothing that ends a response, or an argument is out of range.
    """

    def __init__(
        self,
        *,
        prompts: Any,
        reward: Any,
        tokenizer: Any = "embedded",
        max_new_tokens: int = 64,
        max_prompt_tokens: int | None = None,
        truncate_prompt: Literal["left", "right"] | None = None,
        stop: Sequence[int | str] | str | int | None = None,
        budget: Budget = "terminate",
        vocab_size: int | None = None,
        respond: Respond | None = None,
    ) -> None:
        if budget not in ("terminate", "truncate"):
            raise ValueError(f"budget must be 'terminate' or 'truncate', got {budget!r}")
        if truncate_prompt not in (None, "left", "right"):
            raise ValueError(
                f"truncate_prompt must be None, 'left' or 'right', got {truncate_prompt!r}"
            )
        self.prompts = Prompts.load(prompts)
        self._decoded: dict[int, str] = {}  # texts of prompts that are given as ids
        self.tokenizer: Tokenizer = load_tokenizer(tokenizer)
        schedule = as_schedule(reward)
        schedule.check(self.prompts.columns)
        # The first of the splits is the one for training.
        self.schedule: Schedule = schedule.fitted(self.prompts.family[0])
        self.max_new_tokens = positive("max_new_tokens", max_new_tokens)
        self.budget: Budget = budget
        self.respond = respond
        size = self.tokenizer.vocab_size if vocab_size is None else vocab_size
        self.vocab_size = positive("vocab_size", size)
        self.stop_ids, self.stop_strings = _stops(stop, self.tokenizer, self.vocab_size)
        self.is_stop_id = np.zeros(self.vocab_size, np.bool_)
        self.is_stop_id[list(self.stop_ids)] = True
        if max_prompt_tokens is not None:
            positive("max_prompt_tokens", max_prompt_tokens)
        self.max_prompt_tokens = self._longest(max_prompt_tokens, truncate_prompt)
        encoded = [
            self._cut(ids, truncate_prompt) for ids in _encoded(self.prompts, self.tokenizer)
        ]
        self.prompt_tokens = encoded
        self.prompt_length = np.array([len(ids) for ids in encoded], np.int64)
        self.prompt_ids = np.zeros((len(encoded), self.max_prompt_tokens), np.int64)
        for i, ids in enumerate(encoded):
            self.prompt_ids[i, : len(ids)] = ids
        if int(self.prompt_ids.max()) >= self.vocab_size:
            row = int(np.flatnonzero((self.prompt_ids >= self.vocab_size).any(1))[0])
            raise ValueError(
                f"prompt {row} holds id {int(self.prompt_ids[row].max())}, but vocab_size is "
                f"{self.vocab_size}"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Task:
        """Return itself: a task is read-only and shared."""
        return self

    @property
    def max_length(self) -> int:
        """Columns L of an observation."""
        return self.max_prompt_tokens + self.max_new_tokens

    def observation_space(self) -> spaces.Dict:
        """Space of one row: `input_ids [L]`, `length [1]`, `prompt_length [1]`, all int64."""
        columns = self.max_length
        return spaces.Dict(
            {
                "input_ids": spaces.Box(0, self.vocab_size - 1, (columns,), np.int64),
                "length": spaces.Box(1, columns, (1,), np.int64),
                "prompt_length": spaces.Box(1, columns, (1,), np.int64),
            }
        )

    def prompt_text(self, row: int) -> Any:
        """A prompt as rewards and people see it: its string or messages, or its decoded ids."""
        prompt = self.prompts[row]["prompt"]
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], Mapping)):
            return prompt
        if row not in self._decoded:
            self._decoded[row] = self.tokenizer.decode(prompt)
        return self._decoded[row]

    def _longest(self, limit: int | None, truncate: str | None) -> int:
        if limit is not None and truncate is not None:
            return limit
        longest, row, table = max(
            (
                (len(ids), i, table)
                for table in self.prompts.family
                for i, ids in enumerate(_encoded(table, self.tokenizer))
            ),
            key=lambda found: found[0],
        )
        if limit is not None and longest > limit:
            of = "" if table is self.prompts else f" of another split, {table!r},"
            raise ValueError(
                f"prompt {row}{of} has {longest} tokens, more than max_prompt_tokens={limit}; "
                "raise it, or cut with truncate_prompt='left' or 'right'"
            )
        return longest if limit is None else limit

    def _cut(self, ids: list[int], truncate: str | None) -> list[int]:
        limit = self.max_prompt_tokens
        if len(ids) <= limit:
            return ids
        return ids[-limit:] if truncate == "left" else ids[:limit]


def _encoded(table: Prompts, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of every prompt of a table, encoded once per table and tokenizer."""
    if tokenizer not in table.encoded:
        table.encoded[tokenizer] = [
            _encode(table, row, i, tokenizer) for i, row in enumerate(table)
        ]
    return table.encoded[tokenizer]


def _encode(table: Prompts, row: Mapping[str, Any], index: int, tokenizer: Tokenizer) -> list[int]:
    try:
        return tokenizer.encode(row["prompt"])
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{table.name}: row {index}, column 'prompt': {error}") from None


def _stops(
    stop: Sequence[int | str] | str | int | None, tokenizer: Tokenizer, vocab_size: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    given: list[Any] = [stop] if isinstance(stop, str | int) else list(stop or ())
    for s in given:
        if isinstance(s, bool) or not (isinstance(s, str) or hasattr(s, "__index__")):
            raise TypeError(f"stop holds ids (integers) and strings, got {s!r}")
    strings = tuple(s for s in given if isinstance(s, str))
    ids = tuple(int(i) for i in given if not isinstance(i, str))
    if stop is None or (strings and not ids):
        ids = tokenizer.stop_ids
    if stop is None and not ids:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has no end-of-sequence id, so nothing would end a "
            "response; give stop= ids or strings, or stop=() to end on the budget alone"
        )
    if "" in strings:
        raise ValueError("a stop string must not be empty")
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ValueError(f"stop id {i} is outside the vocabulary of {vocab_size} ids")
    return ids, strings


def positive(name: str, value: int) -> int:
    """Check that an argument is a positive integer.

    Raises:
        ValueError: It is not.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)
