"""Baselines and advantages of responses over the others to the same prompt.

Everything here is over B responses whose groups of equal size lie one after another, as `collect`
returns them. Arithmetic is in float64.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from textgym.returns import FloatArray, check_vector


def leave_one_out(returns: Any, group_size: int, weights: Any | None = None) -> FloatArray:
    """Mean return of the other episodes of each episode's group, as its baseline.

        b_i = sum_j w_j G_j / sum_j w_j    over the group of i, without i

    It depends on none of the actions that it judges, so it adds no bias (Kool, van Hoof & Welling
    2019, "Buy 4 REINFORCE samples, get a baseline for free!", equation 8). An episode whose group
    has no other of any weight is judged by the rest of the batch.

    Args:
        returns: [B], of episodes whose groups lie one after another.
        group_size: Episodes of a group, at least 2.
        weights: [B], at least 0; episodes of weight 0 (unscored) do not count.

    Returns:
        float64 [B]; 0 where no other episode has any weight.

    Raises:
        ValueError: If B is no multiple of `group_size`, shapes differ, or a return is not finite.
    """
    w = np.ones(len(returns)) if weights is None else check_vector("weights", weights, len(returns))
    g = w * check_vector("returns", np.where(w > 0, returns, 0.0))
    if group_size < 2 or len(g) % group_size:
        raise ValueError(
            f"group_size must be at least 2 and divide the episodes, got {group_size} for {len(g)}"
        )
    groups = (x.reshape(-1, group_size) for x in (g, w))
    totals, shares = ((x.sum(axis=1, keepdims=True) - x).reshape(-1) for x in groups)
    alone = shares <= 0
    totals[alone], shares[alone] = (g.sum() - g)[alone], (w.sum() - w)[alone]
    baseline: FloatArray = np.zeros_like(totals)
    np.divide(totals, shares, out=baseline, where=shares > 0)
    return baseline


GroupAdvantage = Literal["standard", "mean", "leave_one_out"]
"""What a response is compared with: mean and std of its group, its mean, or that of the others."""


def group_advantages(
    scores: Any, group_size: int, weights: Any, how: GroupAdvantage
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Advantage of each response over those to the same prompt.

        "standard"       A_i = (r_i - mean) / (std + 1e-4)      (Shao et al. 2024, section 4.1.2)
        "mean"           A_i = r_i - mean                       (Liu et al. 2025, equation 2)
        "leave_one_out"  A_i = r_i - mean of the others         (Kool et al. 2019, equation 8)

    The mean and the standard deviation (of a sample, n - 1) are those of the group's responses of
    positive weight. "mean" is (n - 1) / n of "leave_one_out", for which it adds no bias; "standard"
    does: groups that nearly agree weigh more.

    Args:
        scores: [B], of responses whose groups lie one after another.
        group_size: Responses of a group G, at least 2.
        weights: [B], at least 0; responses of weight 0 (unscored) do not count and get 0.
        how: Which of the three.

    Returns:
        Advantages float64 [B], and bool [B / G]: the groups in which there is nothing to learn,
        because all scores are equal or fewer than two responses have one.

    Raises:
        ValueError: If B is no multiple of `group_size`, shapes differ, or a score is not finite.
    """
    w = check_vector("weights", weights, len(scores))
    used = w > 0
    r = check_vector("scores", np.where(used, scores, 0.0))
    if group_size < 2 or len(r) % group_size:
        raise ValueError(
            f"group_size must be at least 2 and divide the episodes, got {group_size} for {len(r)}"
        )
    r, used = r.reshape(-1, group_size), used.reshape(-1, group_size)
    n = used.sum(axis=1, keepdims=True)
    mean = r.sum(axis=1, keepdims=True) / np.maximum(n, 1)
    off = np.where(used, r - mean, 0.0)
    spread = np.sqrt(np.square(off).sum(axis=1, keepdims=True) / np.maximum(n - 1, 1))
    largest = np.abs(off).max(axis=1)
    flat = largest <= 1e-9 * np.maximum(1.0, np.abs(mean[:, 0]))
    off[flat] = 0.0  # what is left there is rounding
    if how == "standard":
        off = off / (spread + 1e-4)
    elif how == "leave_one_out":
        off = off * n / np.maximum(n - 1, 1)
    elif how != "mean":
        raise ValueError(f"how must be one of {list(get_args(GroupAdvantage))}, got {how!r}")
    return off.reshape(-1), flat


def best_of_groups(
    scores: Any, group_size: int, weights: Any, responses: Sequence[Hashable], best: int | None
) -> NDArray[np.bool_]:
    """The best responses of each group, each different one once.

    Of equal scores the earlier response is taken; responses are drawn independently, so their
    order says nothing.

    Args:
        scores: [B], of responses whose groups lie one after another.
        group_size: Responses of a group, at least 1.
        weights: [B], at least 0; responses of weight 0 (unscored) are not taken.
        responses: B things that are equal where responses are.
        best: How many of a group are taken at most; None: all that are different.

    Returns:
        Bool [B].

    Raises:
        ValueError: If B is no multiple of `group_size`, shapes differ, a score is not finite, or
            `best` is below 1.
    """
    w = check_vector("weights", weights, len(scores))
    r = check_vector("scores", np.where(w > 0, scores, 0.0), len(responses))
    if group_size < 1 or len(r) % group_size:
        raise ValueError(
            f"group_size must be at least 1 and divide the responses, got {group_size} for {len(r)}"
        )
    if best is not None and best < 1:
        raise ValueError(f"best must be at least 1, or None, got {best}")
    taken = np.zeros(len(r), np.bool_)
    for first in range(0, len(r), group_size):
        seen: set[Hashable] = set()
        for b in first + np.argsort(-r[first : first + group_size], kind="stable"):
            if best is not None and len(seen) == best:
                break
            if w[b] > 0 and responses[b] not in seen:
                seen.add(responses[b])
                taken[b] = True
    return taken
