"""Returns, advantages and baselines over a flat list of action tokens.

Everything here is over the M action tokens of B episodes, laid end to end: `offsets` is int64 [B +
1], and episode b owns the tokens `offsets[b]:offsets[b + 1]`. There is no padding, so padding
cannot matter. Arithmetic is in float64.

One discount is paid per action: what the environment appends between two actions (a user turn, a
tool's result) takes no time, and the next value of an action is that of the next decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def check_offsets(offsets: Any, tokens: int) -> IntArray:
    """Return `offsets` as int64 [B + 1] after checking that it cuts `tokens` tokens into episodes.

    Raises:
        ValueError: If it is not one-dimensional, does not run from 0 to `tokens`, or ever
            decreases.
        TypeError: If it does not hold integers.
    """
    array = np.asarray(offsets)
    if array.dtype.kind not in "iu":
        raise TypeError(f"offsets must hold integers, got {array.dtype}")
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"offsets must have shape [B + 1], got {list(array.shape)}")
    array = array.astype(np.int64)
    if array[0] != 0 or array[-1] != tokens or (np.diff(array) < 0).any():
        raise ValueError(
            f"offsets must rise from 0 to the number of action tokens ({tokens}), "
            f"got {array.tolist()[:16]}"
        )
    return array


def check_vector(name: str, values: Any, length: int | None = None) -> FloatArray:
    """Return `values` as finite float64 of shape [length].

    Raises:
        ValueError: If the shape differs or a value is not finite.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or (length is not None and len(array) != length):
        expected = "one dimension" if length is None else f"shape [{length}]"
        raise ValueError(f"{name} must have {expected}, got {list(array.shape)}")
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{name} must be finite, got {array[bad]} at position {bad}")
    return array


def check_unit(name: str, value: float) -> float:
    """Return `value` after checking that it lies in [0, 1].

    Raises:
        ValueError: If it does not.
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return float(value)


def discounted_returns(
    rewards: Any, offsets: Any, gamma: float, *, last_value: Any | None = None
) -> FloatArray:
    """Discounted reward-to-go of every action, within its episode.

        G_t = r_t + gamma * G_(t+1),    G_(T+1) = last_value

    Sutton & Barto 2018, equation 3.9. Rewards before an action are not in its return: it cannot
    change them.

    Args:
        rewards: [M], the reward of each action.
        offsets: int64 [B + 1].
        gamma: Discount per action, in [0, 1].
        last_value: [B], what follows the last action of each episode: the value of the final state
            where the episode was truncated, 0 where it terminated. None is 0 everywhere.

    Returns:
        float64 [M].

    Raises:
        ValueError: If a shape is wrong, a number is not finite or `gamma` is outside [0, 1].
    """
    r = check_vector("rewards", rewards)
    cuts = check_offsets(offsets, len(r))
    episodes = len(cuts) - 1
    last = (
        np.zeros(episodes)
        if last_value is None
        else check_vector("last_value", last_value, episodes)
    )
    return _suffix_sums(r, cuts, check_unit("gamma", gamma), last)


def gae(
    rewards: Any,
    values: Any,
    offsets: Any,
    *,
    terminated: Any,
    last_value: Any,
    gamma: float,
    gae_lambda: float,
) -> tuple[FloatArray, FloatArray]:
    """Generalised advantage estimates, and the lambda-returns that the value function learns.

        delta_t = r_t + gamma * V_(t+1) - V_t
        A_t     = delta_t + gamma * lambda * A_(t+1),    A_(T+1) = 0
        G_t     = A_t + V_t

    Schulman et al. 2016, equations 11 and 16. V_(T+1) is 0 where the episode terminated, and
    `last_value` where it was truncated; `terminated` is asked first, so what `last_value` holds for
    a terminated episode never matters.

    Args:
        rewards: [M].
        values: [M], V of the state in which each action was taken.
        offsets: int64 [B + 1].
        terminated: bool [B].
        last_value: [B], V of the final state; read for truncated episodes only.
        gamma: Discount per action, in [0, 1].
        gae_lambda: In [0, 1]. 1 gives returns minus values, 0 the one-step temporal difference.

    Returns:
        Advantages and lambda-returns, each float64 [M].

    Raises:
        ValueError: If a shape is wrong, a number that is read is not finite, or a factor is outside
            [0, 1].
    """
    r = check_vector("rewards", rewards)
    v = check_vector("values", values, len(r))
    cuts = check_offsets(offsets, len(r))
    episodes = len(cuts) - 1
    done = np.asarray(terminated, bool)
    last = np.asarray(last_value, np.float64)
    if done.shape != (episodes,) or last.shape != (episodes,):
        raise ValueError(
            f"terminated and last_value must have shape [{episodes}] (one entry an episode), "
            f"got {list(done.shape)} and {list(last.shape)}"
        )
    last = check_vector("last_value of truncated episodes", np.where(done, 0.0, last), episodes)
    discount = check_unit("gamma", gamma)
    decay = discount * check_unit("gae_lambda", gae_lambda)

    following = np.empty_like(v)
    following[:-1] = v[1:]
    filled = np.diff(cuts) > 0
    following[cuts[1:][filled] - 1] = last[filled]
    delta = r + discount * following - v
    advantages = _suffix_sums(delta, cuts, decay, np.zeros(episodes))
    return advantages, advantages + v


def whiten(advantages: Any, weights: Any, *, floor: float = 0.0, eps: float = 1e-8) -> FloatArray:
    """Give the advantages of action tokens weighted mean 0 and standard deviation 1.

        A'_t = (A_t - mean) / (max(std, floor) + eps)
        mean = sum(w * A) / sum(w),    std**2 = sum(w * (A - mean)**2) / sum(w)

    Where all responses earn the same, what is left of the advantages is the error of the values;
    without a floor it would be made as large as any signal, and push a policy that has learned
    everything away from it, update after update.

    The standard deviation is that of the population, so that it does not depend on how weights are
    scaled. There is no padding in a flat list, and tokens of weight 0 (unscored episodes) enter
    neither moment and become 0.

    Args:
        advantages: [M]; may hold anything where the weight is 0.
        weights: [M], at least 0.
        floor: The standard deviation is not taken smaller, in units of reward.
        eps: Added to the standard deviation; equal advantages become 0.

    Returns:
        float64 [M].

    Raises:
        ValueError: If shapes differ, a weight is negative, or an advantage of positive weight is
            not finite.
    """
    w = check_vector("weights", weights)
    if (w < 0).any():
        raise ValueError(f"weights must be at least 0, got {w.min()}")
    raw = np.asarray(advantages, np.float64)
    if raw.shape != w.shape:
        raise ValueError(f"advantages must have shape {list(w.shape)}, got {list(raw.shape)}")
    used = w > 0
    a = check_vector("advantages", np.where(used, raw, 0.0))
    total = w.sum()
    if total == 0:
        return np.zeros_like(a)
    centred = np.where(used, a - (w * a).sum() / total, 0.0)
    std = math.sqrt((w * centred**2).sum() / total)
    return np.asarray(centred / (max(std, floor) + eps))


def explained_variance(values: Any, returns: Any, weights: Any | None = None) -> float:
    """Share of the variance of the returns that the values explain.

        1 - Var[G - V] / Var[G]

    1 is a perfect value function, 0 is no better than a constant, below 0 is worse than a constant.

    Args:
        values: [M], predicted before the update.
        returns: [M], the targets.
        weights: [M], at least 0; None weighs all tokens alike.

    Returns:
        The share, or NaN where the returns do not vary.

    Raises:
        ValueError: If shapes differ or a number is not finite.
    """
    v = check_vector("values", values)
    g = check_vector("returns", returns, len(v))
    w = np.ones_like(v) if weights is None else check_vector("weights", weights, len(v))
    if w.sum() == 0:
        return math.nan
    variance = _variance(g, w)
    # A constant return has a variance of rounding errors, and a ratio of those means nothing.
    if variance <= (np.finfo(np.float64).eps * max(1.0, float(np.abs(g).max()))) ** 2:
        return math.nan
    return float(1.0 - _variance(g - v, w) / variance)


class MovingAverageBaseline:
    """A running mean of episode returns as baseline (reinforcement comparison, Sutton 1984).

        m <- decay * m + (1 - decay) * mean(G),    value = m / (1 - decay**updates)

    The division corrects for the start at 0 (Kingma & Ba 2015, section 3), so the value after one
    update is that update's mean. Read `value` before `update`: a baseline that has seen the actions
    it judges would be biased.

    Attributes:
        decay: In [0, 1).
        updates: Updates made so far.
    """

    def __init__(self, decay: float = 0.9) -> None:
        """Start with value 0.

        Raises:
            ValueError: If `decay` is outside [0, 1).
        """
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = float(decay)
        self.updates = 0
        self._mean = 0.0

    @property
    def value(self) -> float:
        """The baseline for the next batch; 0 before the first update."""
        return self._mean / (1.0 - self.decay**self.updates) if self.updates else 0.0

    def update(self, returns: Any, weights: Any | None = None) -> None:
        """Take in the returns of one batch.

        Args:
            returns: [B], the return of each episode.
            weights: [B]; episodes of weight 0 (unscored) do not count. A batch of weight 0 changes
                nothing.
        """
        w = (
            np.ones(len(returns))
            if weights is None
            else check_vector("weights", weights, len(returns))
        )
        g = check_vector("returns", np.where(w > 0, returns, 0.0))
        if w.sum() > 0:
            self._mean = self.decay * self._mean + (1.0 - self.decay) * float(
                (w * g).sum() / w.sum()
            )
            self.updates += 1

    def state_dict(self) -> dict[str, float]:
        """Everything that `load_state_dict` needs to go on exactly."""
        return {"decay": self.decay, "mean": self._mean, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state`."""
        self.decay = float(state["decay"])
        self._mean = float(state["mean"])
        self.updates = int(state["updates"])


def episode_sums(values: Any, offsets: Any) -> FloatArray:
    """Sum [M] token values within each episode: float64 [B], 0 for an episode without actions."""
    v = np.asarray(values, np.float64)
    cuts = check_offsets(offsets, len(v))
    lengths = np.diff(cuts)
    sums = np.zeros(len(lengths))
    filled = lengths > 0
    if filled.any():
        sums[filled] = np.add.reduceat(v, cuts[:-1][filled])
    return sums


def _suffix_sums(x: FloatArray, cuts: IntArray, decay: float, last: FloatArray) -> FloatArray:
    """y_t = x_t + decay * y_(t+1) in each episode, y_(T+1) = last; all at once, from the ends."""
    out = np.empty_like(x)
    lengths = np.diff(cuts)
    order = np.argsort(-lengths, kind="stable")
    ends, sorted_lengths, running = cuts[1:][order], lengths[order], last[order].copy()
    for step in range(int(lengths.max(initial=0))):
        live = int(
            np.searchsorted(-sorted_lengths, -step, side="left")
        )  # episodes longer than `step`
        at = ends[:live] - 1 - step
        running[:live] = x[at] + decay * running[:live]
        out[at] = running[:live]
    return out


def _variance(x: FloatArray, w: FloatArray) -> float:
    mean = (w * x).sum() / w.sum()
    return float((w * (x - mean) ** 2).sum() / w.sum())
