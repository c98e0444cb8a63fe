"""Log-probabilities, entropies and divergences of tokens, a chunk of logits at a time.

A float copy of all logits [M, V] would be the largest tensor of training. Here one chunk of them
exists at a time; under autograd each chunk is computed again in the backward pass (checkpointing).

Shapes: M tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from textgym.sampling import NEG_INF

Logits = Callable[[Tensor], Tensor]
"""From hidden states [m, D] to tempered float32 logits [m, V]."""


def score_tokens(
    hidden: Tensor,
    logits: Logits,
    action: Tensor,
    action_mask: Tensor | None = None,
    *,
    entropy: bool = True,
    entropy_gradient: bool = True,
    chunk: int = 2048,
) -> tuple[Tensor, Tensor | None]:
    """Score tokens under the tempered, masked distribution.

    log p(a) = z_a - logsumexp(z);   H = logsumexp(z) - sum_v p_v z_v

    Args:
        hidden: [M, D], the hidden state from which each token was drawn.
        logits: From hidden states to tempered float32 logits.
        action: int64 [M].
        action_mask: Bool [M, V] or None.
        entropy: Whether to compute the entropy (exact, over the whole vocabulary).
        entropy_gradient: Whether it is differentiable, which takes longer.
        chunk: Number of tokens whose logits exist at once.

    Returns:
        Log-probabilities and entropies in nats, float32 [M]; None for the entropy when it was not
        asked for.
    """

    def part(some: Tensor, taken: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scored: tuple[Tensor, Tensor | None] = _Scores.apply(  # type: ignore[no-untyped-call]
            _masked(logits(some), mask), taken, mask, entropy, entropy_gradient
        )
        return scored

    logprobs, entropies = [], []
    for rows in _chunks(len(action), chunk):
        mask = None if action_mask is None else action_mask[rows]
        if torch.is_grad_enabled() and len(action) > chunk:
            logprob, h = checkpoint(
                part,
                hidden[rows],
                action[rows],
                mask,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            logprob, h = part(hidden[rows], action[rows], mask)
        logprobs.append(logprob)
        if h is not None:
            entropies.append(h)
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


class _Scores(torch.autograd.Function):
    """Log-probability and entropy from logits, keeping one [m, V] tensor, the probabilities p.

    d log p(a) / dz = 1_a - p;   dH / dz = -p (log p + H)
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, action: Tensor, mask: Tensor | None, entropy: bool, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        p = torch.softmax(z, -1)
        normaliser = z.amax(-1) - p.amax(-1).log()  # the greatest p is at least 1 / V
        logprob = z.gather(-1, action[:, None])[:, 0] - normaliser
        h = None
        if entropy:
            finite = z if mask is None else z.masked_fill(~mask, 0.0)  # 0 * -inf would be NaN
            h = normaliser - torch.linalg.vecdot(p, finite)
            if not gradient:
                ctx.mark_non_differentiable(h)
        ctx.save_for_backward(p, action, h if gradient else None)
        ctx.set_materialize_grads(False)
        return logprob, h

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_logprob: Tensor | None, of_h: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        p, action, h = ctx.saved_tensors
        of_z: Tensor | None = None
        if of_logprob is not None:
            of_z = (p * -of_logprob[:, None]).scatter_add_(-1, action[:, None], of_logprob[:, None])
        if of_h is not None and h is not None:
            slope = (torch.special.xlogy(p, p) + p * h[:, None]) * of_h[:, None]
            of_z = -slope if of_z is None else of_z.sub_(slope)
        return of_z, None, None, None, None


@torch.no_grad()
def divergence(
    hidden: Tensor,
    logits: Logits,
    reference_hidden: Tensor,
    reference_logits: Logits,
    action_mask: Tensor | None = None,
    *,
    chunk: int = 2048,
) -> Tensor:
    """Exact Kullback-Leibler divergence of each token's distribution from the reference's.

    KL(pi || ref) = sum_v pi_v (log pi_v - log ref_v), in nats; never negative.

    Args:
        hidden: [M, D], hidden states of the policy.
        logits: Its logits.
        reference_hidden: [M, D'], hidden states of the reference at the same places.
        reference_logits: Its logits, of the same V.
        action_mask: Bool [M, V] or None; applies to both.
        chunk: Number of tokens whose logits exist at once.

    Returns:
        float32 [M].
    """
    parts = [hidden.new_zeros(0, dtype=torch.float32)]
    for rows in _chunks(len(hidden), chunk):
        mask = None if action_mask is None else action_mask[rows]
        ours = torch.log_softmax(_masked(logits(hidden[rows]), mask), -1)
        theirs = torch.log_softmax(_masked(reference_logits(reference_hidden[rows]), mask), -1)
        gap = ours - theirs
        if mask is not None:
            gap = gap.masked_fill(~mask, 0.0)  # -inf - -inf
        parts.append((ours.exp() * gap).sum(-1).clamp(min=0.0))
    return torch.cat(parts)


def _masked(z: Tensor, mask: Tensor | None) -> Tensor:
    return z if mask is None else z.masked_fill(~mask, NEG_INF)


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size`; one empty slice for nothing, so that results keep their type."""
    for begin in range(0, max(count, 1), size):
        yield slice(begin, begin + size)
