"""Credit assignment: how the score of a whole response is spread over its actions."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from textgym.returns import FloatArray, check_offsets, check_unit, check_vector, episode_sums

Credit = Literal["last", "even", "discounted"]
"""How the score of a whole response is spread over its actions; see `assign_credit`."""


def assign_credit(scores: Any, offsets: Any, how: Credit, discount: float = 0.95) -> FloatArray:
    """Spread the score of each episode over its T actions; the total stays the score.

        "last"        r_T = R, the others 0
        "even"        r_t = R / T
        "discounted"  r_t = R * d**(T - t) / sum_k d**(T - k),    k = 1 ... T

    What it does to the gradient. R depends on every action, also on those after the token that a
    share of it is paid to. A return-to-go at gamma 1 leaves out the shares paid before an action,
    which the action did help to earn: under "even" an action at t is credited with (T - t + 1) / T
    of the score. So only "last" has the policy gradient as its expected step; the others trade a
    bias (early actions count more than late ones, and the more so the longer the response) for
    rewards that are near what they judge. They suit learners that look only a little ahead: gamma
    or lambda far below 1, where "last" would not reach the early tokens. At gamma 0 and "even"
    every action gets R / T, and the expected step is the gradient of E[R / T]: unbiased, for a
    score per token. A baseline has to be one per token, of the share that is still to come: the
    learned value, or a reward-to-go averaged by position; the mean of whole returns is too large
    for late tokens (which biases nothing and adds noise).

    Density without bias is a matter of the schedule: potentials (`dense`), or a response's steps
    (`steps`).

    Args:
        scores: [B].
        offsets: int64 [B + 1].
        how: See above.
        discount: d, in [0, 1], of "discounted". 1 is "even", 0 is "last".

    Returns:
        float64 [M].

    Raises:
        ValueError: If `how` is none of these, an episode has a score and no action to pay it to, a
            shape is wrong, a score is not finite or `discount` is outside [0, 1].
    """
    check_credit(how, discount)
    cuts = np.asarray(offsets)
    cuts = check_offsets(offsets, int(cuts[-1]) if cuts.ndim == 1 and len(cuts) else 0)
    lengths = np.diff(cuts)
    total = check_vector("scores", scores, len(lengths))
    if total[lengths == 0].any():
        b = int(np.flatnonzero((lengths == 0) & (total != 0))[0])
        raise ValueError(f"episode {b} has the score {total[b]} and no action to pay it to")
    after = np.repeat(cuts[1:], lengths) - 1 - np.arange(cuts[-1])  # actions that follow
    if how == "even":
        share = np.ones(len(after))
    else:
        share = (discount if how == "discounted" else 0.0) ** after.astype(np.float64)
    return np.repeat(total, lengths) * share / np.repeat(episode_sums(share, cuts), lengths)


def check_credit(how: str, discount: float) -> None:
    """Check the arguments of `assign_credit`.

    Raises:
        ValueError: If they are not what it takes.
    """
    if how not in get_args(Credit):
        raise ValueError(f"credit must be one of {list(get_args(Credit))}, got {how!r}")
    check_unit("credit_discount", discount)
