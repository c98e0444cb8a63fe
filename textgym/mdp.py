"""The token decision process: what a task is, and the one transition function, on arrays `[N, L]`.

A state is a prompt followed by the response so far, an action is one vocabulary id, the transition appends it. Both
environments are faces of `TokenMDP`: `TextGenEnv` of one row, `TextGenVectorEnv` of N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray

from textgym.prompts import Prompts
from textgym.rewards import Payment, Schedule, TextBatch, as_schedule
from textgym.streams import mix64
from textgym.tokens import Tokenizer, load_tokenizer

Budget = Literal["terminate", "truncate"]
StopReason = Literal["stop_id", "stop_string", "length", "env"]
STOP_REASONS: tuple[StopReason, ...] = ("stop_id", "stop_string", "length", "env")

_PROMPT_DRAW = 1  # key of the draw that picks an episode's prompt from its stream


@dataclass(frozen=True)
class Reply:
    """What an environment answers to a response so far: tokens of its own, and whether the episode is over."""

    tokens: Sequence[int] = ()
    end: bool = False


Respond = Callable[[Mapping[str, Any], Sequence[int]], Reply | None]
"""`respond(row, response_ids)` is called after every action that did not end the episode."""


class Task:
    """A text-generation task: prompts, tokenizer, reward and the rules of the game. Shared by all rows, read-only.

    Args:
        prompts: A `Prompts` table or anything that `Prompts.load` reads.
        reward: A schedule, a reward, any callable, or the name of a registered reward.
        tokenizer: Anything that `load_tokenizer` takes.
        max_new_tokens: Budget of tokens after the prompt, the environment's own replies included.
        max_prompt_tokens: Longest prompt in tokens; default is the longest over all splits of the table.
        truncate_prompt: Side on which longer prompts are cut; None makes them an error.
        stop: What ends a response. None: the tokenizer's stop ids. Integers replace those ids, strings are added to
            them, an empty sequence means that only the budget ends.
        budget: `"terminate"`: an empty budget ends the task. `"truncate"`: it is a time limit, without outcome.
        vocab_size: Number of actions V; default is the tokenizer's size.
        respond: Hook by which the environment takes turns of its own.

    Raises:
        ValueError: A prompt is too long, an id is outside the vocabulary, a column that the reward needs is missing, there
            is nothing that ends a response, or an argument is out of range.
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
            raise ValueError(f"truncate_prompt must be None, 'left' or 'right', got {truncate_prompt!r}")
        self.prompts = Prompts.load(prompts)
        self.tokenizer: Tokenizer = load_tokenizer(tokenizer)
        self.schedule: Schedule = as_schedule(reward)
        self.schedule.check(self.prompts.columns)
        self.max_new_tokens = _positive("max_new_tokens", max_new_tokens)
        self.budget: Budget = budget
        self.respond = respond
        self.vocab_size = _positive("vocab_size", vocab_size or self.tokenizer.vocab_size)
        self.stop_ids, self.stop_strings = _stops(stop, self.tokenizer, self.vocab_size)
        self.is_stop_id = np.zeros(self.vocab_size, np.bool_)
        self.is_stop_id[list(self.stop_ids)] = True
        self.max_prompt_tokens = self._longest(max_prompt_tokens, truncate_prompt)
        encoded = [self._cut(ids, truncate_prompt) for ids in _encoded(self.prompts, self.tokenizer)]
        self.prompt_length = np.array([len(ids) for ids in encoded], np.int64)
        self.prompt_ids = np.zeros((len(encoded), self.max_prompt_tokens), np.int64)
        for i, ids in enumerate(encoded):
            self.prompt_ids[i, : len(ids)] = ids
        if int(self.prompt_ids.max()) >= self.vocab_size:
            row = int(np.flatnonzero((self.prompt_ids >= self.vocab_size).any(1))[0])
            raise ValueError(
                f"prompt {row} holds id {int(self.prompt_ids[row].max())}, but vocab_size is {self.vocab_size}"
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
        return self.tokenizer.decode(prompt)

    def _longest(self, limit: int | None, truncate: str | None) -> int:
        if limit is not None and truncate is not None:
            return _positive("max_prompt_tokens", limit)
        longest = max(
            max(map(len, _encoded(table, self.tokenizer))) for table in self.prompts.family
        )
        if limit is None:
            return longest
        if longest > limit:
            lengths = list(map(len, _encoded(self.prompts, self.tokenizer)))
            row = int(np.argmax(lengths))
            raise ValueError(
                f"prompt {row} has {max(lengths)} tokens (longest over all splits: {longest}), more than "
                f"max_prompt_tokens={limit}; raise it, or cut with truncate_prompt='left' or 'right'"
            )
        return _positive("max_prompt_tokens", limit)

    def _cut(self, ids: list[int], truncate: str | None) -> list[int]:
        limit = self.max_prompt_tokens
        if len(ids) <= limit:
            return ids
        return ids[-limit:] if truncate == "left" else ids[:limit]


@dataclass(frozen=True)
class RowState:
    """An episode in full, as `get_state` copies it."""

    ids: NDArray[np.int64]
    prompt_length: int
    prompt_row: int
    stream: int
    seed: int
    episode: int
    steps: int
    done: bool
    track: Any


@dataclass
class Outcome:
    """What one step did to the N rows. Rows that were not live have reward 0 and no flag."""

    reward: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    stop_reason: list[StopReason | None]
    text: dict[int, str] = field(default_factory=dict)
    paid_rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    payment: Payment | None = None


class TokenMDP:
    """N episodes of one task side by side.

    Args:
        task: The task.
        num_envs: Number of rows N.
        max_episode_steps: Actions after which a row is truncated, as Gymnasium's `TimeLimit` does; None for no limit.

    Attributes:
        ids: int64 `[N, L]`, prompt and response from column 0, zeros to the right of `length`.
        length: int64 `[N]`, tokens in each row.
        done: bool `[N]`, rows that need a reset before they can step.
    """

    def __init__(self, task: Task, num_envs: int, max_episode_steps: int | None = None) -> None:
        self.task = task
        self.num_envs = _positive("num_envs", num_envs)
        self.max_episode_steps = max_episode_steps
        self.ids = np.zeros((num_envs, task.max_length), np.int64)
        self.length = np.ones(num_envs, np.int64)
        self.prompt_length = np.ones(num_envs, np.int64)
        self.prompt_row = np.zeros(num_envs, np.int64)
        self.stream = np.zeros(num_envs, np.uint64)
        self.seed = np.zeros(num_envs, np.int64)
        self.episode = np.zeros(num_envs, np.int64)
        self.steps = np.zeros(num_envs, np.int64)
        self.done = np.ones(num_envs, np.bool_)
        self.tracks: list[Any] = [None] * num_envs

    def begin(
        self,
        rows: NDArray[np.int64],
        prompt_row: Any = None,
        stream: Any = None,
    ) -> None:
        """Start the next episode of some rows.

        Args:
            rows: int64 `[n]`.
            prompt_row: int64 `[n]`, which prompts; default is drawn from the stream.
            stream: uint64 `[n]`, the episodes' identities; default is the hash of (row seed, episode number).

        Raises:
            ValueError: A prompt row is outside the table.
        """
        task = self.task
        number = len(task.prompts)
        self.stream[rows] = mix64(self.seed[rows], self.episode[rows]) if stream is None else stream
        self.episode[rows] += 1
        if prompt_row is None:
            prompt_row = mix64(self.stream[rows], _PROMPT_DRAW) % np.uint64(number)
        chosen = np.asarray(prompt_row).astype(np.int64)
        if (chosen < 0).any() or (chosen >= number).any():
            raise ValueError(f"prompt_row must be in [0, {number}), got {chosen.tolist()}")
        self.prompt_row[rows] = chosen
        self.ids[rows, : task.max_prompt_tokens] = task.prompt_ids[chosen]
        self.ids[rows, task.max_prompt_tokens :] = 0
        self.prompt_length[rows] = self.length[rows] = task.prompt_length[chosen]
        self.steps[rows] = 0
        self.done[rows] = False
        for i in rows:
            p = int(self.prompt_row[i])
            self.tracks[i] = task.schedule.begin(task.prompts[p], task.prompt_text(p))

    def step(self, actions: Any, live: NDArray[np.bool_] | None = None) -> Outcome:
        """Append one action to each live row, let the environment reply, and pay what is due.

        Args:
            actions: Integers `[N]`; those of rows that are not live are ignored.
            live: bool `[N]`, rows to step; default all.

        Raises:
            TypeError: The actions are not integers.
            ValueError: There are not N of them, or one of a live row is outside the vocabulary.
            gymnasium.error.ResetNeeded: A live row has ended or was never reset.
        """
        rows = np.arange(self.num_envs) if live is None else np.flatnonzero(live)
        chosen = self._checked(actions, rows)
        if self.done[rows].any():
            late = rows[self.done[rows]].tolist()
            raise ResetNeeded(f"rows {late} have ended or were never reset; call reset() before step()")
        self.ids[rows, self.length[rows]] = chosen
        self.length[rows] += 1
        self.steps[rows] += 1
        outcome = self._end(rows, chosen)
        finished = outcome.terminated | outcome.truncated
        self._pay(rows, outcome, finished)
        if self.max_episode_steps is not None:
            late_rows = rows[(self.steps[rows] >= self.max_episode_steps) & ~finished[rows]]
            outcome.truncated[late_rows] = True
            finished[late_rows] = True
        self.done |= finished
        return outcome

    def observation(self, copy: bool = True) -> dict[str, NDArray[np.int64]]:
        """Observations of all rows: `input_ids [N, L]`, `length [N, 1]`, `prompt_length [N, 1]`."""
        observed = {
            "input_ids": self.ids,
            "length": self.length[:, None],
            "prompt_length": self.prompt_length[:, None],
        }
        return {k: v.copy() for k, v in observed.items()} if copy else observed

    def response_ids(self, row: int) -> list[int]:
        """Every token after the prompt of one row."""
        ids: list[int] = self.ids[row, self.prompt_length[row] : self.length[row]].tolist()
        return ids

    def response_text(self, row: int) -> str:
        """Text of the response so far of one row, without a stop id and cut before a stop string."""
        ids = self.response_ids(row)
        if ids and self.task.is_stop_id[ids[-1]]:
            ids.pop()
        return _before_stop(self.task.tokenizer.decode(ids), self.task.stop_strings)[0]

    def get_state(self, row: int) -> RowState:
        """Copy one row's episode in full; `set_state` on any row of an equal task continues it exactly."""
        return RowState(
            ids=self.ids[row, : self.length[row]].copy(),
            prompt_length=int(self.prompt_length[row]),
            prompt_row=int(self.prompt_row[row]),
            stream=int(self.stream[row]),
            seed=int(self.seed[row]),
            episode=int(self.episode[row]),
            steps=int(self.steps[row]),
            done=bool(self.done[row]),
            track=None if self.tracks[row] is None else self.tracks[row].copy(),
        )

    def set_state(self, row: int, state: RowState) -> None:
        """Put a copied episode into one row.

        Raises:
            ValueError: The state is longer than this task's observations.
        """
        count = len(state.ids)
        if count > self.task.max_length:
            raise ValueError(f"the state has {count} tokens, this task at most {self.task.max_length}")
        self.ids[row] = 0
        self.ids[row, :count] = state.ids
        self.length[row] = count
        self.prompt_length[row] = state.prompt_length
        self.prompt_row[row] = state.prompt_row
        self.stream[row] = np.uint64(state.stream)
        self.seed[row], self.episode[row] = state.seed, state.episode
        self.steps[row], self.done[row] = state.steps, state.done
        self.tracks[row] = None if state.track is None else state.track.copy()

    def _checked(self, actions: Any, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        array = np.asarray(actions)
        if array.dtype.kind not in "iu":
            raise TypeError(f"actions must be integers, got {array.dtype}: {actions!r:.80}")
        if array.shape != (self.num_envs,):
            raise ValueError(f"expected {self.num_envs} actions, got an array of shape {array.shape}")
        chosen = array[rows].astype(np.int64)
        outside = (chosen < 0) | (chosen >= self.task.vocab_size)
        if outside.any():
            k = int(np.flatnonzero(outside)[0])
            raise ValueError(
                f"action {int(chosen[k])} of row {int(rows[k])} is outside the vocabulary; expected an id in "
                f"[0, {self.task.vocab_size})"
            )
        return chosen

    def _end(self, rows: NDArray[np.int64], actions: NDArray[np.int64]) -> Outcome:
        """Decide which rows end and why. The one place that tells terminated from truncated."""
        task = self.task
        reason: list[StopReason | None] = [None] * self.num_envs
        by_id = task.is_stop_id[actions]
        for i in rows[by_id]:
            reason[i] = "stop_id"
        rest = rows[~by_id]
        if task.stop_strings and len(rest):
            texts = task.tokenizer.decode_batch([self.response_ids(i) for i in rest])
            for i, text in zip(rest, texts, strict=True):
                if _before_stop(text, task.stop_strings)[1]:
                    reason[i] = "stop_string"
        if task.respond is not None:
            for i in rest:
                if reason[i] is None and self._reply(int(i)):
                    reason[i] = "env"
        spent = self.length[rest] - self.prompt_length[rest] >= task.max_new_tokens
        for i in rest[spent]:
            reason[i] = reason[i] or "length"
        terminated = np.zeros(self.num_envs, np.bool_)
        truncated = np.zeros(self.num_envs, np.bool_)
        for i in rows if len(rest) < len(rows) or task.stop_strings or task.respond else rest[spent]:
            if reason[i] == "length" and task.budget == "truncate":
                truncated[i] = True
            elif reason[i] is not None:
                terminated[i] = True
        return Outcome(np.zeros(self.num_envs), terminated, truncated, reason)

    def _reply(self, i: int) -> bool:
        """Let the environment take its turn in row i; returns whether it ended the episode."""
        task = self.task
        assert task.respond is not None
        reply = task.respond(task.prompts[int(self.prompt_row[i])], self.response_ids(i))
        if reply is None:
            return False
        room = int(self.prompt_length[i]) + task.max_new_tokens - int(self.length[i])
        tokens = list(reply.tokens)[:room]
        self.ids[i, self.length[i] : self.length[i] + len(tokens)] = tokens
        self.length[i] += len(tokens)
        return reply.end

    def _pay(
        self, rows: NDArray[np.int64], outcome: Outcome, finished: NDArray[np.bool_]
    ) -> None:
        """Score the finished rows in one batch (all live rows where a schedule pays every token)."""
        due = rows if self.task.schedule.every_step else rows[finished[rows]]
        if not len(due):
            return
        batch = self._batch(due, outcome)
        payment = self.task.schedule.pay(
            [self.tracks[i] for i in due], batch, outcome.terminated[due], outcome.truncated[due]
        )
        outcome.reward[due] = payment.reward
        outcome.paid_rows, outcome.payment = due, payment
        outcome.text = {
            int(i): text for i, text in zip(due, batch.texts, strict=True) if finished[i]
        }

    def _batch(self, due: NDArray[np.int64], outcome: Outcome) -> TextBatch:
        task = self.task
        responses = [self.response_ids(i) for i in due]
        reasons = [outcome.stop_reason[i] for i in due]
        visible = [
            ids[:-1] if reason == "stop_id" else ids
            for ids, reason in zip(responses, reasons, strict=True)
        ]
        texts = task.tokenizer.decode_batch(visible)
        if task.stop_strings:
            texts = [_before_stop(text, task.stop_strings)[0] for text in texts]
        prompt_rows = self.prompt_row[due].tolist()
        return TextBatch(
            prompts=[task.prompt_text(p) for p in prompt_rows],
            texts=texts,
            token_ids=responses,
            prompt_ids=[task.prompt_ids[p, : task.prompt_length[p]].tolist() for p in prompt_rows],
            rows=[task.prompts[p] for p in prompt_rows],
            stop_reasons=list(reasons),
        )


def _encoded(table: Prompts, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of every prompt of a table, encoded once per table and tokenizer."""
    cache = table.__dict__.setdefault("_encoded", {})
    if id(tokenizer) not in cache:
        cache[id(tokenizer)] = (tokenizer, [tokenizer.encode(row["prompt"]) for row in table])
    ids: list[list[int]] = cache[id(tokenizer)][1]
    return ids


def _stops(
    stop: Sequence[int | str] | str | int | None, tokenizer: Tokenizer, vocab_size: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    given = [stop] if isinstance(stop, str | int) else list(stop or ())
    strings = tuple(s for s in given if isinstance(s, str))
    ids = tuple(int(i) for i in given if not isinstance(i, str))
    if stop is None or (strings and not ids):
        ids = tokenizer.stop_ids
    if stop is None and not ids:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has no end-of-sequence id, so nothing would end a response; give stop= ids "
            "or strings, or stop=() to end on the budget alone"
        )
    if "" in strings:
        raise ValueError("a stop string must not be empty")
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ValueError(f"stop id {i} is outside the vocabulary of {vocab_size} ids")
    return ids, strings


def _before_stop(text: str, stop_strings: tuple[str, ...]) -> tuple[str, bool]:
    """Text before the first stop string in it, and whether there was one."""
    found = [at for at in (text.find(s) for s in stop_strings) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)
