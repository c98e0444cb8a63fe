"""How far the policy is from a reference: estimators, the exact value, and the price of a nat.

With r = log pi(a|s) - log ref(a|s) of an action sampled from pi (Schulman 2020, "Approximating KL
divergence"):

    k1 = r                    unbiased; can be negative
    k2 = r**2 / 2             biased; small variance near the reference
    k3 = exp(-r) - 1 + r      unbiased; never negative

That is about their *values*. As something to learn from they differ: with a ~ pi and the estimate
subtracted from the reward, return-to-go at gamma 1 of k1 gives the exact gradient of the KL of
whole responses. The same k1 used as a loss has expected gradient 0. k3 used as a loss (GRPO) has
the gradient of the *forward* KL(ref || pi) in each visited state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from textgym.returns import check_vector, episode_sums


def k1(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """Per-token k1 = log pi - log ref.

    Schulman 2020, first estimator. Its sum over a response is the log ratio of the whole response.

    Args:
        logprob: [M], log pi of the sampled actions.
        ref_logprob: [M], log ref of the same actions.

    Returns:
        [M], in nats.

    Raises:
        ValueError: If shapes differ.
    """
    return _log_ratio(logprob, ref_logprob)


def k2(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """Per-token k2 = (log pi - log ref)**2 / 2.

    Schulman 2020, second estimator. As a loss its gradient is that of the KL in each visited state.

    Args:
        logprob: [M], log pi of the sampled actions.
        ref_logprob: [M], log ref of the same actions.

    Returns:
        [M], at least 0.

    Raises:
        ValueError: If shapes differ.
    """
    return 0.5 * _log_ratio(logprob, ref_logprob).square()


def k3(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """Per-token k3 = exp(-r) - 1 + r with r = log pi - log ref.

    Schulman 2020, third estimator; Shao et al. 2024, equation 4 (GRPO).

    Args:
        logprob: [M], log pi of the sampled actions.
        ref_logprob: [M], log ref of the same actions.

    Returns:
        [M], at least 0.

    Raises:
        ValueError: If shapes differ.
    """
    r = _log_ratio(logprob, ref_logprob)
    return torch.expm1(-r) + r


def categorical_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Exact KL(pi || ref) of each pair of categorical distributions, in nats.

        sum_v p_v * (log p_v - log q_v),    p = softmax(logits), q = softmax(ref_logits)

    A term with p_v = 0 is 0.

    Args:
        logits: [..., V] of pi; masked entries are -inf.
        ref_logits: [..., V] of ref, under the same temperature and mask.

    Returns:
        [...]; infinite where pi allows what ref forbids.

    Raises:
        ValueError: If shapes differ.
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(
            f"logits and ref_logits must have one shape, "
            f"got {list(logits.shape)} and {list(ref_logits.shape)}"
        )
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    p = log_p.exp()
    never = p == 0
    return (p * (log_p.masked_fill(never, 0.0) - log_q.masked_fill(never, 0.0))).sum(-1)


def kl_per_response(per_token: Any, offsets: Any, episode_weights: Any) -> float:
    """Mean over episodes of the KL summed over their action tokens: nats per response.

    Args:
        per_token: [M].
        offsets: int64 [B + 1].
        episode_weights: [B], at least 0; unscored episodes have 0 and do not count.

    Returns:
        The weighted mean, or NaN where no episode has weight.

    Raises:
        ValueError: If shapes differ or a weight is not finite.
    """
    sums = episode_sums(per_token, offsets)
    u = check_vector("episode_weights", episode_weights, len(sums))
    return float((u * sums).sum() / u.sum()) if u.sum() > 0 else math.nan


class KLController(Protocol):
    """Sets beta, the price of one nat in units of reward."""

    @property
    def beta(self) -> float:
        """The price for the next batch."""

    def update(self, kl: float, episodes: int) -> None:
        """Take in the KL (nats per response) of a batch of `episodes`."""

    def state_dict(self) -> dict[str, float]:
        """Everything that `load_state_dict` needs to go on exactly."""

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state`."""


class FixedKL:
    """A price that stays: `beta` nats cost `beta` times their number."""

    def __init__(self, beta: float) -> None:
        """Set the price.

        Raises:
            ValueError: If `beta` is negative or not finite.
        """
        self._beta = _check_beta(beta)

    @property
    def beta(self) -> float:
        """The price of one nat."""
        return self._beta

    def update(self, kl: float, episodes: int) -> None:
        """Leave the price as it is."""

    def state_dict(self) -> dict[str, float]:
        """Everything that `load_state_dict` needs."""
        return {"beta": self._beta}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state`."""
        self._beta = _check_beta(state["beta"])


class AdaptiveKL:
    """A price that steers the KL of responses to a target.

        e    = clip(KL / target - 1, -0.2, 0.2)
        beta <- beta * (1 + e * episodes / horizon)

    Ziegler et al. 2019, section 2.2 (a proportional controller in log space).

    Attributes:
        target: KL aimed at, in nats per response.
        horizon: Episodes over which an error of e changes the price by about a factor exp(e).
    """

    def __init__(self, beta: float, *, target: float, horizon: float = 10_000) -> None:
        """Start at `beta`.

        Raises:
            ValueError: If `beta`, `target` or `horizon` is not above 0 (a price of 0 could never
                rise again).
        """
        self._beta = _check_beta(beta)
        for name, value in (("beta", beta), ("target", target), ("horizon", horizon)):
            if not value > 0:
                raise ValueError(
                    f"{name} of an adaptive KL coefficient must be above 0, got {value}"
                )
        self.target = float(target)
        self.horizon = float(horizon)

    @property
    def beta(self) -> float:
        """The price of one nat."""
        return self._beta

    def update(self, kl: float, episodes: int) -> None:
        """Move the price after a batch.

        Args:
            kl: Measured KL in nats per response.
            episodes: How many episodes it was measured on.

        Raises:
            ValueError: If `kl` is not finite, or `episodes` is so large for the horizon that the
                price could reach 0 in one step.
        """
        if not math.isfinite(kl):
            raise ValueError(f"the measured KL must be finite, got {kl}")
        self.check(episodes)
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self._beta *= 1.0 + error * episodes / self.horizon

    def check(self, episodes: int) -> None:
        """Check that a batch of so many episodes leaves the price above 0.

        Raises:
            ValueError: If the horizon is too short for it.
        """
        if 0.2 * episodes >= self.horizon:
            raise ValueError(
                f"horizon {self.horizon:g} is too short for batches of {episodes} episodes: "
                f"choose more than {0.2 * episodes:g}"
            )

    def state_dict(self) -> dict[str, float]:
        """Everything that `load_state_dict` needs; target and horizon are configuration."""
        return {"beta": self._beta}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state`."""
        self._beta = _check_beta(state["beta"])


def _check_beta(beta: float) -> float:
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta must be finite and at least 0, got {beta}")
    return float(beta)


def _log_ratio(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    if logprob.shape != ref_logprob.shape:
        raise ValueError(
            f"logprob and ref_logprob must have one shape, "
            f"got {list(logprob.shape)} and {list(ref_logprob.shape)}"
        )
    return logprob - ref_logprob
