import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from stable_baselines3.common.buffers import RolloutBuffer

from textgym.returns import (
    MovingAverageBaseline,
    discounted_returns,
    episode_sums,
    explained_variance,
    gae,
    whiten,
)

lengths_strategy = st.lists(st.integers(1, 6), min_size=1, max_size=5)
unit = st.floats(0.0, 1.0)


def cuts(lengths: list[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def test_discounted_returns_by_hand() -> None:
    # Episode 1 is (1, 2, 4) at gamma 1/2: 4; 2 + 2 = 4; 1 + 2 = 3. Episode 2 is (8) and then worth
    # 6.
    got = discounted_returns([1, 2, 4, 8], [0, 3, 4], 0.5, last_value=[0, 6])
    np.testing.assert_array_equal(got, [3, 4, 4, 11])


def test_gae_by_hand() -> None:
    # gamma 1/2, lambda 1/2, so decay 1/4. Terminated: deltas 1 + 2/2 - 0 = 2 and 4 + 0 - 2 = 2.
    # Truncated, then worth 4: delta 1 + 4/2 - 1 = 2.
    advantages, returns = gae(
        [1, 4, 1],
        [0, 2, 1],
        [0, 2, 3],
        terminated=[True, False],
        last_value=[100.0, 4.0],
        gamma=0.5,
        gae_lambda=0.5,
    )
    np.testing.assert_array_equal(advantages, [2.5, 2, 2])
    np.testing.assert_array_equal(returns, [2.5, 4, 3])


def test_terminated_is_asked_before_last_value() -> None:
    kwargs = {"gamma": 1.0, "gae_lambda": 0.9}
    for last in (0.0, 7.0, math.nan, math.inf):
        advantages, _ = gae([1.0], [0.5], [0, 1], terminated=[True], last_value=[last], **kwargs)
        np.testing.assert_array_equal(advantages, [0.5])
    with pytest.raises(ValueError, match="truncated episodes must be finite, got nan"):
        gae([1.0], [0.5], [0, 1], terminated=[False], last_value=[math.nan], **kwargs)


@given(lengths_strategy, unit, st.integers(0, 2**32 - 1))
def test_gae_at_lambda_one_is_return_minus_value(
    lengths: list[int], gamma: float, seed: int
) -> None:
    rng, offsets = np.random.default_rng(seed), cuts(lengths)
    rewards, values = rng.normal(size=(2, offsets[-1]))
    terminated = rng.random(len(lengths)) < 0.5
    last = rng.normal(size=len(lengths))
    advantages, returns = gae(
        rewards,
        values,
        offsets,
        terminated=terminated,
        last_value=last,
        gamma=gamma,
        gae_lambda=1.0,
    )
    expected = discounted_returns(
        rewards, offsets, gamma, last_value=np.where(terminated, 0.0, last)
    )
    np.testing.assert_allclose(returns, expected, atol=1e-12)
    np.testing.assert_allclose(advantages, expected - values, atol=1e-12)


@given(lengths_strategy, unit, unit, st.integers(0, 2**32 - 1))
def test_an_episode_does_not_see_its_neighbours(
    lengths: list[int], gamma: float, gae_lambda: float, seed: int
) -> None:
    rng, offsets = np.random.default_rng(seed), cuts(lengths)
    rewards, values = rng.normal(size=(2, offsets[-1]))
    terminated, last = rng.random(len(lengths)) < 0.5, rng.normal(size=len(lengths))
    factors = {"gamma": gamma, "gae_lambda": gae_lambda}
    whole, _ = gae(rewards, values, offsets, terminated=terminated, last_value=last, **factors)
    for b, length in enumerate(lengths):
        own = slice(offsets[b], offsets[b + 1])
        alone, _ = gae(
            rewards[own],
            values[own],
            [0, length],
            terminated=terminated[b : b + 1],
            last_value=last[b : b + 1],
            **factors,
        )
        np.testing.assert_array_equal(whole[own], alone)


@given(lengths_strategy, unit, unit, st.integers(0, 2**32 - 1))
def test_gae_equals_stable_baselines3(
    lengths: list[int], gamma: float, gae_lambda: float, seed: int
) -> None:
    """Episodes end to end in one SB3 environment, which adds gamma * V(final) to the reward."""
    rng, offsets = np.random.default_rng(seed), cuts(lengths)
    m = int(offsets[-1])
    rewards, values = rng.normal(size=(2, m)).astype(np.float32)
    terminated = rng.random(len(lengths)) < 0.5
    last = rng.normal(size=len(lengths)).astype(np.float32)
    box = spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(m, box, box, device="cpu", gae_lambda=gae_lambda, gamma=gamma)
    starts = np.zeros(m, np.float32)
    starts[offsets[:-1]] = 1
    paid = rewards.copy()
    paid[offsets[1:] - 1] += np.where(terminated, 0.0, gamma * last)
    for t in range(m):
        dummy = np.zeros((1, 1))
        value = torch.tensor([values[t]])
        buffer.add(
            dummy, dummy, paid[t : t + 1], starts[t : t + 1].astype(bool), value, torch.zeros(1)
        )
    buffer.compute_returns_and_advantage(torch.zeros(1), np.ones(1, bool))
    advantages, returns = gae(
        rewards,
        values,
        offsets,
        terminated=terminated,
        last_value=last,
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    np.testing.assert_allclose(advantages, buffer.advantages[:, 0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(returns, buffer.returns[:, 0], rtol=1e-4, atol=1e-4)


def test_whiten_by_hand() -> None:
    # Mean 2 and standard deviation 1 of the two tokens that count; the third never matters.
    got = whiten([1.0, 3.0, math.nan], [0.5, 0.5, 0.0])
    np.testing.assert_allclose(got, [-1, 1, 0], atol=1e-7)
    np.testing.assert_array_equal(whiten([5.0, 5.0], [1, 1]), [0, 0])
    np.testing.assert_array_equal(whiten([5.0, 6.0], [0, 0]), [0, 0])
    # A standard deviation of 0.01 is taken for 0.05, one of 1 for itself.
    np.testing.assert_allclose(whiten([0.99, 1.01], [1, 1], floor=0.05), [-0.2, 0.2], atol=1e-6)
    np.testing.assert_allclose(whiten([1.0, 3.0], [1, 1], floor=0.05), [-1, 1], atol=1e-6)


@given(st.integers(2, 30), st.integers(0, 2**32 - 1), st.floats(0.01, 100.0))
def test_whitened_moments_do_not_depend_on_the_scale_of_weights(
    m: int, seed: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    advantages, weights = rng.normal(size=m), rng.random(m) + 0.01
    white = whiten(advantages, weights)
    np.testing.assert_allclose(np.average(white, weights=weights), 0.0, atol=1e-9)
    np.testing.assert_allclose(np.average(white**2, weights=weights), 1.0, rtol=1e-4)
    np.testing.assert_allclose(white, whiten(advantages, weights * scale), atol=1e-9)


def test_whiten_equals_torch_on_equal_weights() -> None:
    a = np.random.default_rng(0).normal(size=50)
    tensor = torch.from_numpy(a)
    expected = (tensor - tensor.mean()) / (tensor.std(correction=0) + 1e-8)
    np.testing.assert_allclose(whiten(a, np.ones(50)), expected.numpy(), atol=1e-12)


def test_explained_variance() -> None:
    assert explained_variance([1, 2, 3], [1, 2, 3]) == 1.0
    assert explained_variance([7, 7, 7], [1, 2, 3]) == 0.0
    # Errors (0, 0, 3) have variance 2, returns (1, 2, 6) have 14/3: 1 - 3/7.
    assert explained_variance([1, 2, 3], [1, 2, 6]) == pytest.approx(4 / 7)
    assert math.isnan(explained_variance([1, 2, 3], [0.1, 0.1, 0.1]))
    assert explained_variance([1, 2, 99], [1, 2, 3], [1, 1, 0]) == 1.0


def test_moving_average_baseline() -> None:
    baseline = MovingAverageBaseline(0.5)
    assert baseline.value == 0.0
    baseline.update([1.0, 3.0, math.nan], [1, 1, 0])
    assert baseline.value == 2.0  # the correction makes the first value the first mean
    baseline.update([math.nan], [0])
    assert baseline.updates == 1
    baseline.update([5.0])
    assert baseline.value == pytest.approx((0.5 * 1.0 + 0.5 * 5.0) / 0.75)
    copy = MovingAverageBaseline(0.5)
    copy.load_state_dict(baseline.state_dict())
    for b in (copy, baseline):
        b.update([0.25])
    assert copy.value == baseline.value


def test_episode_sums() -> None:
    np.testing.assert_array_equal(episode_sums([1, 2, 4], [0, 2, 2, 3, 3]), [3, 0, 4, 0])


@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        ([0, 2], ValueError, r"number of action tokens \(3\)"),
        ([1, 3], ValueError, "rise from 0"),
        ([0, 2, 1, 3], ValueError, "must rise"),
        ([[0, 3]], ValueError, r"shape \[B \+ 1\]"),
        ([0.0, 3.0], TypeError, "integers"),
    ],
)
def test_bad_offsets_are_refused(offsets: list[int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        discounted_returns([1.0, 2.0, 3.0], offsets, 1.0)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="rewards must be finite, got nan at position 1"):
        discounted_returns([1.0, math.nan], [0, 2], 1.0)
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got 1.5"):
        discounted_returns([1.0], [0, 1], 1.5)
    with pytest.raises(ValueError, match=r"values must have shape \[1\]"):
        gae([1.0], [1.0, 2.0], [0, 1], terminated=[True], last_value=[0], gamma=1, gae_lambda=1)
    with pytest.raises(ValueError, match="one entry an episode"):
        gae([1.0], [1.0], [0, 1], terminated=[True] * 2, last_value=[0], gamma=1, gae_lambda=1)
    with pytest.raises(ValueError, match="at least 0"):
        whiten([1.0], [-1.0])
