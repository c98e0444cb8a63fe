"""The token decision process: what a task is, and the one transition function, on arrays `[N, L]`.

A state is a prompt followed by the response so far, an action is one vocabulary id, the transition
appends it. Both environments are faces of `TokenMDP`: `TextGenEnv` of one row, `TextGenVectorEnv`
of N rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray

from textgym.detokenize import TextStream
from textgym.rewards import Payment, TextBatch
from textgym.streams import mix64
from textgym.task import STOP_REASONS, Budget, Reply, Respond, StopReason, Task, positive

__all__ = [
    "STOP_REASONS",
    "Budget",
    "Outcome",
    "Reply",
    "Respond",
    "RowState",
    "StopReason",
    "Task",
    "TokenMDP",
]

_PROMPT_DRAW = 1  # key of the draw that picks an episode's prompt from its stream


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
    paid: float
    track: Any
    replied: NDArray[np.bool_] | None = None


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
        max_episode_steps: Actions after which a row is truncated, as Gymnasium's `TimeLimit` does;
            None for no limit.

    Attributes:
        ids: int64 `[N, L]`, prompt and response from column 0, zeros to the right of `length`.
        length: int64 `[N]`, tokens in each row.
        paid: float64 `[N]`, sum of the rewards of each row's episode.
        done: bool `[N]`, rows that need a reset before they can step.
        replied: bool `[N, L]`, columns that the environment wrote in reply; None for tasks that do
            not reply.
    """

    def __init__(self, task: Task, num_envs: int, max_episode_steps: int | None = None) -> None:
        self.task = task
        self.num_envs = positive("num_envs", num_envs)
        if max_episode_steps is not None:
            positive("max_episode_steps", max_episode_steps)
        self.max_episode_steps = max_episode_steps
        self.ids = np.zeros((num_envs, task.max_length), np.int64)
        self.length = np.ones(num_envs, np.int64)
        self.prompt_length = np.ones(num_envs, np.int64)
        self.prompt_row = np.zeros(num_envs, np.int64)
        self.stream = np.zeros(num_envs, np.uint64)
        self.seed = np.zeros(num_envs, np.uint64)
        self.episode = np.zeros(num_envs, np.int64)
        self.steps = np.zeros(num_envs, np.int64)
        self.paid = np.zeros(num_envs)
        self.done = np.ones(num_envs, np.bool_)
        self.tracks: list[Any] = [None] * num_envs
        self.replied = None if task.respond is None else np.zeros(self.ids.shape, np.bool_)
        # What follows from the ids, made where it is asked for and kept: each row's response, its
        # text so far, and how many characters of that lie before the policy's present turn.
        self._written: list[list[int]] = [[] for _ in range(num_envs)]
        self._streams: list[TextStream | None] = [None] * num_envs
        self._said: list[int | None] = [None] * num_envs

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
            stream: uint64 `[n]`, the episodes' identities; default is the hash of (row seed,
                episode number).

        Raises:
            TypeError: Prompt rows are not integers.
            ValueError: A prompt row is outside the table.
        """
        task = self.task
        if stream is None:
            stream = mix64(self.seed[rows], self.episode[rows])
        chosen = self._prompt_rows(prompt_row, stream)
        self.stream[rows] = stream
        self.episode[rows] += 1
        self.prompt_row[rows] = chosen
        self.ids[rows, : task.max_prompt_tokens] = task.prompt_ids[chosen]
        self.ids[rows, task.max_prompt_tokens :] = 0
        self.prompt_length[rows] = self.length[rows] = task.prompt_length[chosen]
        self.steps[rows] = 0
        self.paid[rows] = 0.0
        self.done[rows] = False
        if self.replied is not None:
            self.replied[rows] = False
        for i in rows:
            p = int(self.prompt_row[i])
            self.tracks[i] = task.schedule.begin(task.prompts[p], task.prompt_text(p))
            self._forget(int(i))

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
            over = rows[self.done[rows]].tolist()
            raise ResetNeeded(
                f"rows {over} have ended or were never reset; call reset() before step()"
            )
        self.ids[rows, self.length[rows]] = chosen
        self.length[rows] += 1
        self.steps[rows] += 1
        outcome = self._end(rows, chosen)
        ended = outcome.terminated | outcome.truncated
        late = np.zeros(self.num_envs, np.bool_)
        if self.max_episode_steps is not None:
            late[rows] = (self.steps[rows] >= self.max_episode_steps) & ~ended[rows]
        self.done |= ended | late  # before the reward is asked, which may raise
        self._pay(rows, outcome, ended)
        self.paid += outcome.reward
        outcome.truncated |= late
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
        known = self._written[row]
        known += self.ids[row, self.prompt_length[row] + len(known) : self.length[row]].tolist()
        return known.copy()

    def response_text(self, row: int) -> str:
        """Text of one row's response so far, without a stop id, cut before a stop string."""
        ids = self.response_ids(row)
        by_policy = self.replied is None or not self.replied[row, self.length[row] - 1]
        if ids and by_policy and self.task.is_stop_id[ids[-1]]:
            ids.pop()
        return self._cut(row, self.task.tokenizer.decode(ids))[0]

    def get_state(self, row: int) -> RowState:
        """Copy one row's episode; `set_state` in any row of an equal task continues it exactly."""
        return RowState(
            ids=self.ids[row, : self.length[row]].copy(),
            prompt_length=int(self.prompt_length[row]),
            prompt_row=int(self.prompt_row[row]),
            stream=int(self.stream[row]),
            seed=int(self.seed[row]),
            episode=int(self.episode[row]),
            steps=int(self.steps[row]),
            done=bool(self.done[row]),
            paid=float(self.paid[row]),
            track=None if self.tracks[row] is None else self.tracks[row].copy(),
            replied=None if self.replied is None else self.replied[row].copy(),
        )

    def set_state(self, row: int, state: RowState) -> None:
        """Put a copied episode into one row.

        Raises:
            ValueError: The state is of another task: it is longer, or has ids or a prompt that this
                one has not.
        """
        task, count = self.task, len(state.ids)
        if count > task.max_length:
            raise ValueError(f"the state has {count} tokens, this task at most {task.max_length}")
        if (
            state.prompt_row >= len(task.prompts)
            or int(state.ids.max(initial=0)) >= task.vocab_size
        ):
            raise ValueError(
                f"the state (prompt row {state.prompt_row}, largest id {state.ids.max(initial=0)}) "
                f"is of another task: this one has {len(task.prompts)} prompts and "
                f"{task.vocab_size} ids"
            )
        self.ids[row] = 0
        self.ids[row, :count] = state.ids
        self.length[row] = count
        self.prompt_length[row] = state.prompt_length
        self.prompt_row[row] = state.prompt_row
        self.stream[row] = np.uint64(state.stream)
        self.seed[row], self.episode[row] = np.uint64(state.seed), state.episode
        self.steps[row], self.done[row], self.paid[row] = state.steps, state.done, state.paid
        self.tracks[row] = None if state.track is None else state.track.copy()
        self._forget(row)
        if self.replied is not None:
            self.replied[row] = False if state.replied is None else state.replied

    def _prompt_rows(self, prompt_row: Any, stream: Any) -> NDArray[np.int64]:
        number = len(self.task.prompts)
        if prompt_row is None:
            return (mix64(stream, _PROMPT_DRAW) % np.uint64(number)).astype(np.int64)
        chosen = np.asarray(prompt_row)
        if chosen.dtype.kind not in "iu":
            raise TypeError(f"prompt_row must be integers, got {chosen.dtype}: {prompt_row!r:.80}")
        if (chosen < 0).any() or (chosen >= number).any():
            raise ValueError(f"prompt_row must be in [0, {number}), got {chosen.tolist()}")
        return chosen.astype(np.int64)

    def _checked(self, actions: Any, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        array = np.asarray(actions)
        if array.dtype.kind not in "iu":
            raise TypeError(f"actions must be integers, got {array.dtype}: {actions!r:.80}")
        if array.shape != (self.num_envs,):
            raise ValueError(
                f"expected {self.num_envs} actions, got an array of shape {array.shape}"
            )
        chosen = array[rows].astype(np.int64)
        outside = (chosen < 0) | (chosen >= self.task.vocab_size)
        if outside.any():
            k = int(np.flatnonzero(outside)[0])
            raise ValueError(
                f"action {int(chosen[k])} of row {int(rows[k])} is outside the vocabulary; "
                f"expected an id in [0, {self.task.vocab_size})"
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
            for i in rest:
                if self._cut(int(i), self._text_so_far(int(i)))[1]:
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
        for i in (
            rows if len(rest) < len(rows) or task.stop_strings or task.respond else rest[spent]
        ):
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
        tokens = np.asarray(reply.tokens, np.int64)
        if ((tokens < 0) | (tokens >= task.vocab_size)).any():
            raise ValueError(
                f"the environment replied with {tokens.tolist()}, but ids are in [0, "
                f"{task.vocab_size})"
            )
        tokens = tokens[:room]
        here = slice(int(self.length[i]), int(self.length[i]) + len(tokens))
        self.ids[i, here] = tokens
        assert self.replied is not None
        self.replied[i, here] = True
        self.length[i] += len(tokens)
        self._said[i] = None
        return reply.end

    def _pay(self, rows: NDArray[np.int64], outcome: Outcome, finished: NDArray[np.bool_]) -> None:
        """Score the finished rows in one batch, or all live rows where every token is paid."""
        due = rows if self.task.schedule.every_step else rows[finished[rows]]
        if not len(due):
            return
        batch = self._batch(due, outcome, finished)
        payment = self.task.schedule.pay(
            [self.tracks[i] for i in due], batch, outcome.terminated[due], outcome.truncated[due]
        )
        outcome.reward[due] = payment.reward
        outcome.paid_rows, outcome.payment = due, payment
        outcome.text = {
            int(i): text for i, text in zip(due, batch.texts, strict=True) if finished[i]
        }

    def _batch(
        self, due: NDArray[np.int64], outcome: Outcome, finished: NDArray[np.bool_]
    ) -> TextBatch:
        """What rewards see. A finished response is decoded in one go, which is the last word."""
        task = self.task
        responses = [self.response_ids(i) for i in due]
        reasons = [outcome.stop_reason[i] for i in due]
        ended = [k for k, i in enumerate(due) if finished[i]]
        visible = [responses[k][:-1] if reasons[k] == "stop_id" else responses[k] for k in ended]
        whole = dict(zip(ended, task.tokenizer.decode_batch(visible), strict=True))
        texts = [
            self._cut(int(i), whole[k])[0] if k in whole else self._text_so_far(int(i))
            for k, i in enumerate(due)
        ]
        prompt_rows = self.prompt_row[due].tolist()
        return TextBatch(
            prompts=[task.prompt_text(p) for p in prompt_rows],
            texts=texts,
            token_ids=responses,
            prompt_ids=[task.prompt_tokens[p] for p in prompt_rows],
            rows=[task.prompts[p] for p in prompt_rows],
            stop_reasons=list(reasons),
            action_masks=self._action_masks(due),
        )

    def _action_masks(self, due: NDArray[np.int64]) -> list[Any] | None:
        """Which tokens of each response the policy chose; None where it chose all."""
        if self.replied is None:
            return None
        spans = [slice(self.prompt_length[i], self.length[i]) for i in due]
        return [(~self.replied[i, span]).tolist() for i, span in zip(due, spans, strict=True)]

    def _forget(self, row: int) -> None:
        """Drop what was kept of a row whose episode is another one now."""
        self._written[row] = []
        self._streams[row] = self._said[row] = None

    def _text_so_far(self, row: int) -> str:
        """The text of one row's response, of which only new tokens are decoded; see `TextStream`.

        It holds stop ids and stop strings, so it is the text of a response that goes on.
        """
        stream = self._streams[row]
        if stream is None:
            stream = self._streams[row] = self.task.tokenizer.stream()
        fresh = slice(int(self.prompt_length[row]) + stream.read, int(self.length[row]))
        return stream.push(self.ids[row, fresh].tolist())

    def _cut(self, row: int, text: str) -> tuple[str, bool]:
        """Text of a response before its first stop string, and whether there is one.

        What the environment said before the policy's present turn is not searched.
        """
        task = self.task
        if not task.stop_strings:
            return text, False
        start = self._spoken(row)
        found = [at for at in (text.find(s, start) for s in task.stop_strings) if at >= 0]
        return (text[: min(found)], True) if found else (text, False)

    def _spoken(self, row: int) -> int:
        """Characters of a response up to the end of the environment's last reply."""
        if self.replied is None:
            return 0
        known = self._said[row]
        if known is None:
            said = np.flatnonzero(self.replied[row])
            last = said[-1] + 1 if len(said) else self.prompt_length[row]
            earlier = self.ids[row, self.prompt_length[row] : last].tolist()
            known = self._said[row] = len(self.task.tokenizer.decode(earlier))
        return known
