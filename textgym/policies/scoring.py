"""Log-probabilities, entropies and divergences of tokens, a chunk of logits at a time.

A float copy of all logits [M, V] would be the largest tensor of training. Here one chunk of them
exists at a time; under autograd each chunk is computed again in the backward pass (checkpointing).

Shapes: M tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
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
        entropy_gradient: Whether it is differentiable; without, it keeps nothing for the backward
            pass, where it would keep a second [m, V] tensor.
        chunk: Number of tokens whose logits exist at once.

    Returns:
        Log-probabilities and entropies in nats, float32 [M]; None for the entropy when it was not
        asked for.
    """

    def part(some: Tensor, taken: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        z = _masked(logits(some), mask)
        normaliser = z.logsumexp(-1)
        logprob = z.gather(-1, taken[:, None])[:, 0] - normaliser
        if not entropy:
            return logprob, None
        # Last, so that the second forward of a checkpoint, which ends with the last saved tensor,
        # leaves an entropy without gradient out.
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            finite = z if mask is None else z.masked_fill(~mask, 0.0)  # 0 * -inf would be NaN
            return logprob, normaliser - (torch.softmax(z, -1) * finite).sum(-1)

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
