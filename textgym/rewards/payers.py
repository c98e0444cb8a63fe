"""The ways to pay one reward over an episode; `schedules` weights and sums them."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from textgym.rewards.base import Cursor, Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.scores import FloatArray, Scores, text_at_fault, with_retry


@dataclass
class Paid:
    """What one part pays in one step: the values are NaN, with no status, where it does not apply.

    Attributes:
        values: float64 `[n]`.
        silent: bool `[n]`; the reward gave no value.
        status: What failed, text by text; None where nothing did.
        traceback: The first traceback.
        rescored: A dense part scored whole texts for want of a cursor.
    """

    values: FloatArray
    silent: NDArray[np.bool_]
    status: list[str | None]
    traceback: str | None = None
    rescored: bool = False


class Payer:
    """One way to pay one reward.

    Attributes:
        reward: The reward.
        name: Its name.
        low: Its bounds, as those of the reward; of a shaping part 0, for it adds up to nothing.
        high: See `low`.
        every_step: It must see every token.
        pays_outcome: It pays when the episode terminates.
        gamma: Its discount; None if it has none.
    """

    every_step: ClassVar[bool] = False
    pays_outcome: ClassVar[bool] = True
    gamma: float | None = None

    def __init__(self, reward: Reward) -> None:
        self.reward, self.name = reward, reward.name
        self.low, self.high = reward.low, reward.high

    def check(self, columns: Collection[str]) -> None:
        """Check that the prompt table has the columns of the reward.

        Raises:
            RewardColumnError: If one is missing.
        """
        self.reward.check(columns)

    def fitted(self, rows: Sequence[Mapping[str, Any]]) -> Self:
        """Give the payer of the fitted reward."""
        reward = self.reward.fitted(rows)
        if reward is self.reward:
            return self
        twin = copy.copy(self)
        twin.reward = reward
        return twin

    def begin(self, row: Mapping[str, Any]) -> Any:
        """Begin an episode; the state has `copy()`, or is None."""
        return None

    def pay(
        self,
        states: list[Any],
        batch: TextBatch,
        terminated: NDArray[np.bool_],
        *,
        worst: Literal["low", "high"],
        optional: bool,
        strict: bool,
    ) -> Paid:
        """Pay one step.

        Args:
            states: The states of `n` episodes, which are brought up to date.
            batch: Their responses so far.
            terminated: bool `[n]`; which of them have terminated.
            worst: The bound that a text gets that is at fault.
            optional: No value means "does not apply".
            strict: Raise failures at once.
        """
        raise NotImplementedError


class Terminal(Payer):
    """Pay the reward of each response that has terminated."""

    def pay(
        self,
        states: list[Any],
        batch: TextBatch,
        terminated: NDArray[np.bool_],
        *,
        worst: Literal["low", "high"],
        optional: bool,
        strict: bool,
    ) -> Paid:
        """Pay the outcome of what has terminated; nothing applies to the others."""
        n = len(batch)
        scores = Scores(np.full(n, np.nan), [None] * n)
        done = [int(i) for i in np.flatnonzero(terminated)]
        if done:
            part = batch if len(done) == n else batch.take(done)
            found = self.reward.evaluate(part, optional=optional, strict=strict)
            _spread(found, done, scores)
        values = settled(scores, self.reward, worst)
        return Paid(values, np.isnan(values), failures(scores, optional), scores.traceback)


class Dense(Payer):
    """Pay γ φ_t − φ_(t−1), the reward itself being φ, and the reward at the end."""

    every_step = True

    def __init__(self, reward: Reward, gamma: float) -> None:
        super().__init__(reward)
        self.gamma = gamma

    def begin(self, row: Mapping[str, Any]) -> Potential:
        """Begin at φ_0 = 0."""
        return Potential(row)

    def pay(
        self,
        states: list[Any],
        batch: TextBatch,
        terminated: NDArray[np.bool_],
        *,
        worst: Literal["low", "high"],
        optional: bool,
        strict: bool,
    ) -> Paid:
        """Pay the growth of the potential. Where the reward gives no value, φ is 0."""
        n = len(batch)
        asked = [i for i in range(n) if self.pays_outcome or not terminated[i]]
        scores, rescored = self._score(states, batch, asked, optional=optional, strict=strict)
        values = settled(scores, self.reward, worst)
        silent = np.isnan(values)
        phi = np.nan_to_num(values)
        before = np.array([state.phi for state in states], np.float64)
        # At the end φ_T = 0, and `phi` holds the outcome, or 0 if this part pays none.
        gain = np.where(terminated, phi, float(self.gamma or 1.0) * phi) - before
        status = failures(scores, optional)
        for i, state in enumerate(states):
            state.phi = phi[i]
            if status[i] is not None or (silent[i] and before[i] == 0.0 and not terminated[i]):
                gain[i] = math.nan
        return Paid(gain, silent, status, scores.traceback, rescored)

    def _score(
        self,
        states: list[Potential],
        batch: TextBatch,
        asked: list[int],
        *,
        optional: bool,
        strict: bool,
    ) -> tuple[Scores, bool]:
        """Score the texts `asked`: by their cursors, or together where there are none."""
        n, texts = len(batch), batch.texts
        items = {i: states[i].value(self.reward, texts[i]) for i in asked}
        whole = [i for i in asked if items[i] is RESCORE]
        stepped = [i for i in asked if items[i] is not RESCORE]
        scores = Scores(np.full(n, np.nan), [None] * n)

        def attempt(rows: Sequence[int]) -> Scores:
            chosen = [stepped[row] for row in rows]
            values = [
                items.pop(i) if i in items else states[i].value(self.reward, texts[i])
                for i in chosen
            ]
            found = self.reward.read(values, [texts[i] for i in chosen], optional=optional)
            for i, status in zip(chosen, found.status, strict=True):
                if status is not None:
                    states[i].cursor = None  # what it has counted is not to be trusted
            return found

        if stepped:
            found = with_retry(attempt, len(stepped), self.name, optional=optional, strict=strict)
            _spread(found, stepped, scores)
        if whole:
            part = batch if len(whole) == n else batch.take(whole)
            found = self.reward.evaluate(part, optional=optional, strict=strict)
            _spread(found, whole, scores)
        return scores, bool(whole) and not self.reward.cheap


class Shaping(Dense):
    """Pay γ φ_t − φ_(t−1), and at the end −φ_(T−1): nothing in sum, at γ = 1."""

    pays_outcome = False

    def __init__(self, reward: Reward, gamma: float) -> None:
        super().__init__(reward, gamma)
        self.low = self.high = 0.0


RESCORE = object()


class Potential:
    """The potential of one episode: its last value, and the cursor that keeps it.

    Args:
        row: The episode's row of the prompt table.
    """

    __slots__ = ("cursor", "last", "phi", "row", "text")

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row = row
        self.phi = 0.0
        self.cursor: Cursor | None = None
        self.text = ""
        self.last: Any = None

    def value(self, reward: Reward, text: str) -> Any:
        """Give the value of `text`, the exception that befell it, or RESCORE without a cursor.

        A text that does not extend the last one (bytes that became a character, spaces that the
        tokenizer cleaned up) is given whole to a new cursor.
        """
        try:
            if self.cursor is None or not text.startswith(self.text):
                self.cursor = reward.begin(self.row)
                if self.cursor is None:
                    return RESCORE
                self.last = self.cursor.push(text)
            elif len(text) > len(self.text):
                self.last = self.cursor.push(text[len(self.text) :])
            self.text = text
            return self.last
        except Exception as error:
            self.cursor = None
            return error

    def copy(self) -> Potential:
        """Give an exact, independent copy."""
        twin = Potential(self.row)
        twin.phi, twin.text, twin.last = self.phi, self.text, self.last
        twin.cursor = None if self.cursor is None else self.cursor.copy()
        return twin


def _spread(found: Scores, rows: list[int], scores: Scores) -> None:
    """Write the scores of some rows into those of all."""
    scores.values[rows] = found.values
    for i, status in zip(rows, found.status, strict=True):
        scores.status[i] = status
    scores.traceback = scores.traceback or found.traceback


def settled(scores: Scores, reward: Reward, worst: Literal["low", "high"]) -> FloatArray:
    """Give the values, with the worst one where the text is at fault."""
    for i, status in enumerate(scores.status):
        if text_at_fault(status):
            scores.values[i] = getattr(reward, worst)
    return scores.values


def failures(scores: Scores, optional: bool) -> list[str | None]:
    """Give the statuses of the texts that failed, None for the others."""
    failed = set(scores.failed(optional=optional))
    return [status if i in failed else None for i, status in enumerate(scores.status)]
