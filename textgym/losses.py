"""Losses over a flat list of action tokens, and the normaliser that makes one number of them.

Every loss is `sum(w * l)` over tokens. The weights `w` are computed once, by `token_weights`, on
the global batch, before it is split into minibatches, microbatches or processes; so the parts of a
split add up to the whole exactly, and no loss here divides by the size of what it happens to be
given.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from textgym.returns import FloatArray, check_offsets, check_vector

Normaliser = Literal["constant", "token", "sequence"]


def token_weights(
    offsets: Any, episode_weights: Any, normaliser: Normaliser, max_new_tokens: int | None = None
) -> FloatArray:
    """Weight of each action token in the loss of the global batch.

        "constant":  w_t = u_b / (sum(u) * max_new_tokens)
        "token":     w_t = u_b / sum(u * length)
        "sequence":  w_t = u_b / (sum(u) * length_b)

    with u_b the weight of the token's episode b. "constant" is that of REINFORCE, RLOO and Dr. GRPO
    (Liu et al. 2025, section 3.1); "token" of PPO and DAPO (Yu et al. 2025, equation 8); "sequence"
    of GRPO (Shao et al. 2024, equation 3) and GSPO. Only "constant" leaves the expected gradient
    proportional to the policy gradient. "sequence" gives a token of a long response less weight
    than one of a short response. "token" divides by a random number that depends on the actions: a
    bias that vanishes as the batch grows.

    Args:
        offsets: int64 [B + 1].
        episode_weights: [B], at least 0; 0 for an unscored episode.
        normaliser: Which of the three.
        max_new_tokens: Token budget of the task; for "constant" only.

    Returns:
        float64 [M]. All 0 where no episode has weight.

    Raises:
        ValueError: If shapes differ, a weight is negative or not finite, the normaliser is unknown,
            or "constant" comes without a positive `max_new_tokens`.
    """
    if normaliser not in get_args(Normaliser):
        raise ValueError(
            f"normaliser must be one of {list(get_args(Normaliser))}, got {normaliser!r}"
        )
    u = check_vector("episode_weights", episode_weights)
    if (u < 0).any():
        raise ValueError(f"episode_weights must be at least 0, got {u.min()}")
    cuts = check_offsets(offsets, int(np.asarray(offsets)[-1]))
    lengths = np.diff(cuts)
    if len(lengths) != len(u):
        raise ValueError(f"offsets cut {len(lengths)} episodes, but episode_weights has {len(u)}")
    if normaliser == "constant":
        if max_new_tokens is None or max_new_tokens < 1:
            raise ValueError(
                f'normaliser="constant" needs max_new_tokens of at least 1, got {max_new_tokens}'
            )
        denominator = np.full(len(u), u.sum() * max_new_tokens)
    elif normaliser == "token":
        denominator = np.full(len(u), (u * lengths).sum())
    else:
        denominator = u.sum() * lengths
    per_token = np.divide(u, denominator, out=np.zeros_like(u), where=denominator > 0)
    return np.repeat(per_token, lengths)


def policy_gradient_loss(logprob: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """Loss whose gradient is the negative policy gradient.

        L = -sum_t w_t * A_t * log pi(a_t | s_t)

    Williams 1992 (REINFORCE); Sutton & Barto 2018, equation 13.11, without its discount of the
    state.

    Args:
        logprob: [M], differentiable.
        advantages: [M], taken as constants.
        weights: [M], from `token_weights`.

    Returns:
        0-d tensor.

    Raises:
        ValueError: If shapes differ.
    """
    _same_shape(logprob=logprob, advantages=advantages, weights=weights)
    return -(weights * advantages.detach() * logprob).sum()


class SurrogateLoss(NamedTuple):
    """PPO's loss and what to watch beside it, all 0-d; means are over tokens of positive weight."""

    loss: Tensor
    approx_kl: Tensor
    """Mean of (rho - 1) - log rho: k3 of KL(old || new), in nats per token (Schulman 2020)."""
    clip_fraction: Tensor
    """Share of tokens whose ratio lies outside of what it is clipped to."""
    tokens: Tensor
    """How many tokens the means are over."""


def clipped_surrogate_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_coef: float,
    clip_coef_high: float | None = None,
    sequence: Tensor | None = None,
) -> SurrogateLoss:
    """PPO's clipped surrogate.

        rho_t = exp(log pi(a_t | s_t) - log pi_old(a_t | s_t))
        L     = -sum_t w_t * min(rho_t * A_t, clip(rho_t, 1 - c, 1 + c') * A_t)

    Schulman et al. 2017, equation 7, where c' is c; Yu et al. 2025, equation 10 (clip-higher). At
    the first minibatch rho is 1 and the gradient is the policy gradient. With `sequence` all tokens
    of a response have one ratio, the geometric mean of theirs (GSPO, Zheng et al. 2025, equation
    7): then the weights must be those of "sequence" for the loss to be theirs (equation 5).

    Args:
        logprob: [M], differentiable.
        old_logprob: [M], of the policy that sampled.
        advantages: [M], taken as constants.
        weights: [M], from `token_weights`.
        clip_coef: c, above 0.
        clip_coef_high: c', above 0; None: c.
        sequence: int64 [M], the response of each token, counted from 0; all tokens of a response
            must be there. On the CPU, so that nobody waits for a device to count them.

    Raises:
        ValueError: If shapes differ, or a coefficient is not above 0.
    """
    _same_shape(logprob=logprob, old_logprob=old_logprob, advantages=advantages, weights=weights)
    high = clip_coef if clip_coef_high is None else clip_coef_high
    _positive("clip_coef", clip_coef)
    _positive("clip_coef_high", high)
    advantages = advantages.detach()
    log_ratio = logprob - old_logprob.detach()
    if sequence is not None:
        _same_shape(logprob=logprob, sequence=sequence)
        length = torch.bincount(sequence).to(log_ratio.device, non_blocking=True)
        sequence = sequence.to(log_ratio.device, non_blocking=True)
        mean = log_ratio.new_zeros(len(length)).index_add(0, sequence, log_ratio)
        log_ratio = (mean / length.clamp(min=1))[sequence]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_coef, 1.0 + high)
    loss = -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()
    with torch.no_grad():
        used = weights > 0
        tokens = used.sum()
        count = tokens.clamp(min=1)
        k3 = torch.where(used, torch.expm1(log_ratio) - log_ratio, 0.0)
        outside = used & ((ratio < 1.0 - clip_coef) | (ratio > 1.0 + high))
        return SurrogateLoss(loss, k3.sum() / count, outside.sum() / count, tokens)


def truncated_importance(learner: Tensor, sampler: Tensor, cap: float | None) -> Tensor:
    """Weights that make up for a sampler that is not quite the policy that learns.

        rho_t = min(exp(log pi_learner(a_t | s_t) - log pi_sampler(a_t | s_t)), C)

    Ionides 2008 (truncated importance sampling); Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training", for samplers of another precision.

    Args:
        learner: [M], of the policy before the update.
        sampler: [M], as sampled.
        cap: C, above 0; None: no correction, all 1.

    Returns:
        [M], constants.
    """
    _same_shape(learner=learner, sampler=sampler)
    if cap is None:
        return torch.ones_like(learner)
    _positive("cap", cap)
    return (learner - sampler).detach().exp().clamp(max=cap)


def value_loss(value: Tensor, returns: Tensor, weights: Tensor) -> Tensor:
    """Half the weighted squared error of the value function.

        L = 1/2 * sum_t w_t * (V_t - G_t)**2

    Args:
        value: [M], differentiable.
        returns: [M], the targets, taken as constants.
        weights: [M], from `token_weights`.

    Returns:
        0-d tensor.

    Raises:
        ValueError: If shapes differ.
    """
    _same_shape(value=value, returns=returns, weights=weights)
    return 0.5 * (weights * (value - returns.detach()).square()).sum()


def clipped_value_loss(
    value: Tensor, old_value: Tensor, returns: Tensor, weights: Tensor, *, clip_coef: float
) -> Tensor:
    """Half the weighted squared error, with the step of the value function clipped.

        L = 1/2 * sum_t w_t * max((V_t - G_t)**2, (clip(V_t, Vold_t - c, Vold_t + c) - G_t)**2)

    The pessimistic form of OpenAI's ppo2, written out in Engstrom et al. 2020, section 3 (item 1).
    `c` is in units of return.

    Args:
        value: [M], differentiable.
        old_value: [M], predicted while sampling.
        returns: [M], the targets, taken as constants.
        weights: [M], from `token_weights`.
        clip_coef: c, above 0.

    Returns:
        0-d tensor.

    Raises:
        ValueError: If shapes differ or `clip_coef` is not above 0.
    """
    _same_shape(value=value, old_value=old_value, returns=returns, weights=weights)
    _positive("clip_coef", clip_coef)
    old_value, returns = old_value.detach(), returns.detach()
    clipped = torch.clamp(value, old_value - clip_coef, old_value + clip_coef)
    error = torch.maximum((value - returns).square(), (clipped - returns).square())
    return 0.5 * (weights * error).sum()


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of each categorical distribution, in nats.

        H = -sum_v p_v * log p_v,    p = softmax(logits),    0 * log 0 = 0

    Args:
        logits: [..., V]; masked entries are -inf.

    Returns:
        [...], differentiable.
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)


def entropy_loss(entropy: Tensor, weights: Tensor) -> Tensor:
    """Negative weighted entropy; add `ent_coef` times it to a loss to keep the policy random.

        L = -sum_t w_t * H_t

    Williams & Peng 1991; Mnih et al. 2016, section 4. Its gradient is that of the entropy in the
    states that were visited; how the policy changes which states those are is left out, as
    everywhere.

    Args:
        entropy: [M], differentiable.
        weights: [M], from `token_weights`.

    Returns:
        0-d tensor.

    Raises:
        ValueError: If shapes differ.
    """
    _same_shape(entropy=entropy, weights=weights)
    return -(weights * entropy).sum()


def _same_shape(**tensors: Tensor) -> None:
    """Broadcasting [M] against [M, 1] gives [M, M] and a wrong loss without a word; refuse it."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    first = next(iter(shapes.values()))
    if len(first) != 1 or any(shape != first for shape in shapes.values()):
        raise ValueError(f"expected tensors of one shape [M], got {shapes}")


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")
