"""Baselines and advantages of groups against numbers worked by hand and a full enumeration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from textgym.groups import best_of_groups, group_advantages, leave_one_out


def test_leave_one_out_by_hand() -> None:
    # Groups (1, 2, 6) and (3, unscored, 5); the last group has one scored episode, so it is judged
    # by the other five: (1 + 2 + 6 + 3 + 5) / 5.
    returns = [1, 2, 6, 3, math.nan, 5, 7, math.nan, math.nan]
    weights = [1, 1, 1, 1, 0, 1, 1, 0, 0]
    got = leave_one_out(returns, 3, weights)
    np.testing.assert_allclose(got[[0, 1, 2, 3, 5, 6]], [4, 3.5, 1.5, 5, 3, 3.4])
    np.testing.assert_array_equal(leave_one_out([9.0, 1.0], 2, [1, 0])[0], 0.0)
    for size, count in ((1, 4), (3, 4)):
        with pytest.raises(ValueError, match="group_size must be at least 2 and divide"):
            leave_one_out(np.zeros(count), size)


def test_advantages_by_hand() -> None:
    scores, weights = [1.0, 0.0, 0.0, 1.0, 3.0, 9.0, 5.0, 5.0], [1, 1, 1, 1, 1, 0, 1, 1]
    # The second group has scores 3, 5, 5: mean 13/3, variance ((4/3)**2 + 2 * (2/3)**2) / 2 = 4/3.
    off = np.array([0.5, -0.5, -0.5, 0.5, -4 / 3, 0.0, 2 / 3, 2 / 3])
    std = np.repeat([np.sqrt(1 / 3), np.sqrt(4 / 3)], 4) + 1e-4
    for how, expected in (
        ("mean", off),
        ("standard", off / std),
        ("leave_one_out", off * np.repeat([4 / 3, 3 / 2], 4)),
    ):
        found, flat = group_advantages(scores, 4, weights, how)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, expected, atol=1e-12)
        assert not flat.any()


@pytest.mark.parametrize("how", ["standard", "mean", "leave_one_out"])
def test_groups_in_which_there_is_nothing_to_learn(how: Any) -> None:
    scores = [0.1, 0.1, 0.1, 0.7, np.nan, np.nan, 0.0, 1.0, np.nan]
    weights = [1, 1, 1, 1, 0, 0, 1, 1, 0]
    found, flat = group_advantages(scores, 3, weights, how)
    assert flat.tolist() == [True, True, False]
    assert not found[:6].any() and found[8] == 0.0 and found[7] == -found[6] > 0


@pytest.mark.parametrize(("how", "share"), [("mean", 2 / 3), ("leave_one_out", 1.0)])
def test_the_expected_gradient_is_the_policy_gradient(how: Any, share: float) -> None:
    """Every group of three pulls of a bandit with three arms, weighted with its probability."""
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    rewards = np.array([1.0, 0.2, -0.4])
    logp = logits.log_softmax(-1)
    p = logp.detach().exp().numpy()
    (expected,) = torch.autograd.grad((logp.exp() * torch.from_numpy(rewards)).sum(), logits)
    total: Any = 0.0
    for group in np.ndindex(3, 3, 3):
        arms = list(group)
        advantages, _ = group_advantages(rewards[arms], 3, np.ones(3), how)
        weighted = torch.from_numpy(advantages) * logits.log_softmax(-1)[arms]
        total = total + float(p[arms].prod()) * weighted.mean()
    (found,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(found, share * expected)


def test_an_unknown_comparison_is_refused() -> None:
    with pytest.raises(ValueError, match="one of"):
        group_advantages([0.0, 1.0], 2, [1, 1], "median")  # type: ignore[arg-type]


def test_the_best_of_groups_by_hand() -> None:
    scores = [3.0, 5.0, 5.0, 1.0, 2.0, 2.0, math.nan, 7.0]
    weights = [1, 1, 1, 1, 1, 1, 0, 1]
    written = ["a", "b", "c", "d", "a", "e", "f", "a"]
    for best, expected in (
        (1, [1, 7]),
        (2, [1, 2, 5, 7]),  # the response that is "a" twice is taken where it earned most
        (3, [0, 1, 2, 5, 7]),
        (None, [0, 1, 2, 3, 5, 7]),
    ):
        taken = best_of_groups(scores, 4, weights, written, best)
        assert np.flatnonzero(taken).tolist() == expected
    assert not best_of_groups(scores, 4, np.zeros(8), written, None).any()
    assert best_of_groups(scores[:2], 1, [1, 1], ["a", "a"], 1).all()
    assert best_of_groups([], 4, [], [], 1).tolist() == []


def test_what_has_no_best_is_refused() -> None:
    with pytest.raises(ValueError, match="divide the responses, got 3 for 4"):
        best_of_groups(np.zeros(4), 3, np.ones(4), "abcd", 1)
    with pytest.raises(ValueError, match="best must be at least 1, or None, got 0"):
        best_of_groups(np.zeros(4), 2, np.ones(4), "abcd", 0)
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        best_of_groups(np.zeros(4), 2, np.ones(4), "abc", 1)
    with pytest.raises(ValueError, match="scores must be finite"):
        best_of_groups([0.0, math.inf], 2, np.ones(2), "ab", 1)
