"""When a reward is paid: at the end, or spread over the tokens (steps of a text: see `steps`).

`terminal(r)` pays the value of the finished response on its last action. `dense(r)` pays the growth
of the value from token to token (potential-based shaping, Ng, Harada & Russell 1999):

    r_t = γ φ_t − φ_(t−1),   φ_0 := 0,   t = 1 … T.

When the episode terminates, φ_T = 0 and the outcome R is paid as well, so that
Σ_t γ^(t−1) r_t = γ^(T−1) R for every response: what is best does not change. When it is truncated,
φ_T is kept and no outcome is paid: the learner bootstraps. At γ = 1 with the return-to-go the
expected policy gradient is that of the terminal schedule (φ acts as a baseline of the state), so
density helps learners that bootstrap: values, λ < 1.

Schedules are summed and scaled; a bare reward in such a sum is terminal. What varies with the
outcome is composed inside: `dense(r * gate)`, never `dense(r) * gate`.

Sub-goals with weights of their own are sums in sums. The weights multiply, and every sub-goal is a
component of `info["reward"]` and of the logs, unweighted, under the name that it is given; one of
weight 0 is logged and pays nothing:

    style = 0.5 * tags.named("style/tags") + 0.5 * length.named("style/length")
    reward = 0.8 * correct.named("answer") + 0.2 * style + 0 * style.named("style")
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from textgym.rewards.base import Reward
from textgym.rewards.batch import Prompt, TextBatch
from textgym.rewards.compose import weighted_bounds
from textgym.rewards.functions import as_reward
from textgym.rewards.payers import Dense, Payer, Shaping, Terminal
from textgym.rewards.scores import FloatArray, is_number, strict_error


@dataclass
class Track:
    """What a schedule remembers of one episode.

    Attributes:
        states: One state per part; None for a part that remembers nothing.
        failed: Why the episode is unscored; None while it is not.
    """

    states: list[Any]
    failed: str | None = None

    def copy(self) -> Track:
        """Give an exact, independent copy."""
        states = [None if state is None else state.copy() for state in self.states]
        return Track(states, self.failed)


@dataclass(frozen=True)
class Payment:
    """What a schedule pays in one step of `n` episodes.

    Attributes:
        reward: float64 `[n]`, finite; 0 where an episode is unscored.
        components: For each part what it paid, without its weight: float64 `[n]`, NaN where the
            part does not apply.
        status: None, or why the episode is unscored; once set, it stays for the episode.
        traceback: The first traceback of this call, if something failed.
    """

    reward: FloatArray
    components: dict[str, FloatArray]
    status: list[str | None]
    traceback: str | None = None


@dataclass(frozen=True)
class _Part:
    name: str
    weight: float
    payer: Payer


class Schedule:
    """A weighted sum of parts, each of which pays a reward in its own way.

    Made by `terminal`, `dense`, `steps` and `as_schedule`. Shared like a reward: it deep-copies as
    itself.

    Attributes:
        every_step: A part must see every token.
        gamma: The discount of the dense parts; None if there are none. Agents compare it to theirs.
        low: The worst value of the outcome.
        high: The best value.
        names: The names of the components, without duplicates.
        strict: Failures are raised at once.

    Raises:
        ValueError: If two dense parts have different discounts, or a weight is not finite.
    """

    __array_ufunc__ = None

    def __init__(self, terms: list[tuple[float, Payer]], *, strict: bool = False) -> None:
        gammas = sorted({payer.gamma for _, payer in terms if payer.gamma is not None})
        if len(gammas) > 1:
            raise ValueError(
                f"the dense parts of one schedule must share one gamma, got {gammas}: use the "
                "gamma of the agent in all of them"
            )
        parts: list[_Part] = []
        for weight, payer in terms:
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {payer.name!r} must be finite, got {weight}")
            parts.append(_Part(_unused(payer.name, [p.name for p in parts]), weight, payer))
        self._parts = tuple(parts)
        self.strict = strict
        self.every_step = any(part.payer.every_step for part in parts)
        self.gamma: float | None = gammas[0] if gammas else None
        self.low, self.high = weighted_bounds((p.weight, p.payer) for p in parts)
        self.names = tuple(part.name for part in parts)
        # With one paying part a value is due from it; of several, some may not apply.
        self._optional = sum(p.weight != 0 and not isinstance(p.payer, Shaping) for p in parts) > 1
        self._warned: set[str] = set()

    def check(self, columns: Collection[str]) -> None:
        """Check that the prompt table has the columns of every part.

        Raises:
            RewardColumnError: If one is missing.
        """
        for part in self._parts:
            part.payer.check(columns)

    def fitted(self, rows: Sequence[Mapping[str, Any]]) -> Self:
        """Give the schedule of the rewards as they are fitted on the training rows; mostly itself.

        See `Reward.fitted`.
        """
        payers = [part.payer.fitted(rows) for part in self._parts]
        if all(new is part.payer for new, part in zip(payers, self._parts, strict=True)):
            return self
        twin = copy.copy(self)
        pairs = zip(self._parts, payers, strict=True)
        twin._parts = tuple(replace(part, payer=payer) for part, payer in pairs)
        return twin

    def keep(self, folder: Path) -> None:
        """Write what `fitted` froze into the folder of a run; mostly nothing."""
        for part in self._parts:
            part.payer.reward.keep(folder)

    def begin(self, row: Mapping[str, Any], prompt: Prompt) -> Track:
        """Begin an episode on a row of the prompt table."""
        return Track([part.payer.begin(row) for part in self._parts])

    def pay(
        self,
        tracks: list[Track],
        batch: TextBatch,
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
    ) -> Payment:
        """Pay one step of `n` episodes.

        Args:
            tracks: Their tracks, which are brought up to date.
            batch: Their responses so far.
            terminated: bool `[n]`; an episode that is also truncated counts as terminated.
            truncated: bool `[n]`.

        Raises:
            RewardError: If the schedule is strict and a reward fails.
        """
        n = len(batch)
        if not len(tracks) == n == len(terminated) == len(truncated):
            raise ValueError(
                f"expected as many tracks and flags as texts, got {len(tracks)} tracks, "
                f"{len(terminated)} and {len(truncated)} flags for {n} texts"
            )
        ended = np.asarray(terminated, np.bool_)
        alive = [i for i in range(n) if tracks[i].failed is None]
        whole = len(alive) == n
        live_batch = batch if whole else batch.take(alive)
        total = np.zeros(n)
        components = {name: np.full(n, np.nan) for name in self.names}
        silent = ended.copy()  # terminated episodes to which no paying part applied
        traceback: str | None = None
        for k, part in enumerate(self._parts):
            metric = part.weight == 0
            states = [tracks[i].states[k] for i in alive]
            paid = part.payer.pay(
                states,
                live_batch,
                ended[alive],
                worst="high" if part.weight < 0 else "low",
                optional=self._optional or metric,
                strict=self.strict,
            )
            components[part.name][alive] = paid.values
            if paid.rescored:
                self._warn_once(
                    f"rescored {part.name}",
                    f"the reward {part.name!r} has no cursor: dense scores the whole text again "
                    "after every token",
                )
            if not metric:
                with np.errstate(over="ignore", invalid="ignore"):  # seen below
                    total[alive] += part.weight * np.nan_to_num(paid.values)
                if part.payer.pays_outcome:
                    silent[alive] &= paid.silent
            for i, status in zip(alive, paid.status, strict=True):
                if status is None:
                    continue
                if metric:
                    self._warn_once(
                        f"metric {part.name}",
                        f"the metric {part.name!r} (weight 0) has no value for some texts "
                        f"({status}); the episodes keep their reward",
                    )
                elif tracks[i].failed is None:
                    tracks[i].failed = status
            if not metric and any(status is not None for status in paid.status):
                traceback = traceback or paid.traceback
        for i in alive:
            if tracks[i].failed is not None:
                continue
            if silent[i]:
                tracks[i].failed, why = "none", "No part of the reward gave a value"
            elif not math.isfinite(total[i]):
                tracks[i].failed, why = "inf", "The weighted sum of the parts is not finite"
            else:
                continue
            why += f" for the text {batch.texts[i]!r:.200}."
            if self.strict:
                raise strict_error("+".join(self.names), tracks[i].failed, why)
            traceback = traceback or why
        status_of = [track.failed for track in tracks]
        total[[status is not None for status in status_of]] = 0.0
        return Payment(total, components, status_of, traceback)

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, UserWarning, stacklevel=3)

    def with_strict(self, strict: bool) -> Self:
        """Give the same schedule, strict or not."""
        twin = copy.copy(self)
        twin.strict = strict
        return twin

    def _terms(self) -> list[tuple[float, Payer]]:
        return [(part.weight, part.payer) for part in self._parts]

    def __add__(self, other: Any) -> Schedule:
        return _add(self, other, 1.0)

    def __radd__(self, other: Any) -> Schedule:
        return _add(self, other, 1.0, reverse=True)

    def __sub__(self, other: Any) -> Schedule:
        return _add(self, other, -1.0)

    def __rsub__(self, other: Any) -> Schedule:
        return _add(-self, other, 1.0, reverse=True)

    def __neg__(self) -> Schedule:
        return self * -1.0

    def __mul__(self, other: Any) -> Schedule:
        if not is_number(other):
            raise TypeError(
                "a schedule can be scaled by a number only: put the gate inside, as in "
                "dense(reward * gate) or terminal(reward * gate)"
            )
        terms = [(float(other) * weight, payer) for weight, payer in self._terms()]
        return Schedule(terms, strict=self.strict)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Schedule:
        return self * (1.0 / other) if is_number(other) else NotImplemented

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __repr__(self) -> str:
        terms = ", ".join(f"{p.weight:g}*{type(p.payer).__name__}({p.name})" for p in self._parts)
        return f"<Schedule {terms}>"


def terminal(reward: Any) -> Schedule:
    """Pay a reward on the last action of an episode that terminates.

    Args:
        reward: Anything that `as_reward` takes.
    """
    return Schedule([(weight, Terminal(part)) for weight, part in as_reward(reward).parts()])


def dense(reward: Any, potential: Any = None, gamma: float = 1.0) -> Schedule:
    """Pay the growth of a potential at every action, and the reward when the episode terminates.

    Args:
        reward: The outcome; anything that `as_reward` takes.
        potential: φ; the reward itself by default. If it is another one, it is reported as a
            component of its own, which sums to 0 over a terminated episode at γ = 1.
        gamma: γ, in (0, 1]; the agent's.

    Raises:
        ValueError: If gamma is not in (0, 1].
    """
    if not (is_number(gamma) and 0.0 < gamma <= 1.0):
        raise ValueError(f"gamma must be in (0, 1], got {gamma!r}")
    gamma = float(gamma)
    outcome = as_reward(reward)
    if potential is None:
        return Schedule([(weight, Dense(part, gamma)) for weight, part in outcome.parts()])
    shaping = Schedule([(w, Shaping(part, gamma)) for w, part in as_reward(potential).parts()])
    return terminal(outcome) + shaping


def as_schedule(x: Any, *, strict: bool = False) -> Schedule:
    """Turn what a user passes as `reward=` into a schedule: a bare reward is terminal.

    Args:
        x: A schedule, or anything that `as_reward` takes.
        strict: Raise failures at once. A schedule that is strict stays so.
    """
    if isinstance(x, str):
        from textgym.rewards.registry import parse_reward

        x = parse_reward(x)  # may be a schedule
    schedule = x if isinstance(x, Schedule) else terminal(x)
    return schedule.with_strict(True) if strict and not schedule.strict else schedule


def _add(left: Schedule, right: Any, sign: float, *, reverse: bool = False) -> Schedule:
    if is_number(right) and right == 0:  # what sum() starts from
        return left
    if not isinstance(right, Schedule | Reward) and not callable(right):
        return NotImplemented  # type: ignore[no-any-return]
    other = as_schedule(right)
    mine, theirs = left._terms(), [(sign * weight, payer) for weight, payer in other._terms()]
    return Schedule(theirs + mine if reverse else mine + theirs, strict=left.strict or other.strict)


def _unused(name: str, taken: list[str]) -> str:
    if name not in taken:
        return name
    number = 2
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"
