"""Log-probabilities, entropies and divergences of tokens, a block of logits at a time.

A float copy of all logits [M, V] would be the largest tensor of training. Here one block of them
exists at a time. The backward pass needs the probabilities: those of the first `kept` tokens are
kept, those of further ones are computed again (checkpointing).

Shapes: M tokens, D hidden size, V vocabulary, V' >= V logits that the model has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from textgym.sampling import NEG_INF

Logits = Callable[[Tensor], Tensor]
"""From hidden states [m, D] to tempered float32 logits [m, V]."""

BLOCK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Float32 logits of one block: on a CPU they should stay in its caches, and be less than what
malloc maps anew each time (`textgym.malloc.LARGE`), which costs a fault a page."""
BLOCK_TOKENS = 256
"""A block has at least so many tokens (of a vocabulary beyond 24,576 that is more than
`BLOCK_BYTES`): products with fewer take longer than caches save."""
KEPT_BYTES = 1 << 30
"""Float32 probabilities that are kept for the backward pass where nothing else is asked for."""


def score_tokens(
    hidden: Tensor,
    logits: Logits,
    action: Tensor,
    action_mask: Tensor | None = None,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    entropy: bool = True,
    entropy_gradient: bool = True,
    kept: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Score tokens under the tempered, masked distribution.

    z = logits / temperature;   log p(a) = z_a - logsumexp(z);   H = logsumexp(z) - sum_v p_v z_v

    Args:
        hidden: [M, D], the hidden state from which each token was drawn.
        logits: From hidden states [m, D] to logits [m, V'] of any dtype.
        action: int64 [M].
        action_mask: Bool [M, V] or None.
        vocab_size: V; surplus logits are dropped.
        temperature: Divides the logits.
        entropy: Whether to compute the entropy (exact, over the whole vocabulary).
        entropy_gradient: Whether it is differentiable, which takes longer.
        kept: How many tokens' probabilities are kept for the backward pass, in the logits' dtype;
            those of further tokens are computed again. None: as many as `KEPT_BYTES` hold.

    Returns:
        Log-probabilities and entropies in nats, float32 [M]; None for the entropy when it was not
        asked for.
    """

    def part(some: Tensor, taken: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scored: tuple[Tensor, Tensor | None] = _Scores.apply(  # type: ignore[no-untyped-call]
            logits(some), taken, mask, vocab_size, temperature, entropy, entropy_gradient
        )
        return scored

    if kept is None:
        kept = max(1, KEPT_BYTES // (4 * vocab_size))
    logprobs, entropies = [], []
    for rows in _blocks(hidden, vocab_size, kept):
        mask = None if action_mask is None else action_mask[rows]
        if torch.is_grad_enabled() and rows.start >= kept:
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
        ctx: Any,
        logits: Tensor,
        action: Tensor,
        mask: Tensor | None,
        vocab_size: int,
        temperature: float,
        entropy: bool,
        gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        z = logits[:, :vocab_size].float()
        if temperature != 1.0:
            z = z / temperature
        z = _masked(z, mask)
        p = torch.softmax(z, -1)
        normaliser = z.amax(-1) - p.amax(-1).log()  # the greatest p is at least 1 / V
        logprob = z.gather(-1, action[:, None])[:, 0] - normaliser
        h = None
        if entropy:
            finite = z if mask is None else z.masked_fill(~mask, 0.0)  # 0 * -inf would be NaN
            h = normaliser - torch.linalg.vecdot(p, finite)
            if not gradient:
                ctx.mark_non_differentiable(h)
        ctx.save_for_backward(p.to(logits.dtype), action, h if gradient else None)
        ctx.temperature, ctx.surplus = temperature, logits.shape[1] - vocab_size
        ctx.set_materialize_grads(False)
        return logprob, h

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_logprob: Tensor | None, of_h: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None, None, None]:
        p, action, h = ctx.saved_tensors
        of_z: Tensor | None = None
        if of_logprob is not None:
            slope = (of_logprob / ctx.temperature).to(p.dtype)[:, None]
            of_z = (p * -slope).scatter_add_(-1, action[:, None], slope)
        if of_h is not None and h is not None:
            exact = p.float()
            curve = torch.special.xlogy(exact, exact) + exact * h[:, None]
            curve *= of_h[:, None] / ctx.temperature
            of_z = -curve.to(p.dtype) if of_z is None else of_z.sub_(curve.to(p.dtype))
        if of_z is not None and ctx.surplus:
            of_z = torch.nn.functional.pad(of_z, (0, ctx.surplus))
        return of_z, None, None, None, None, None, None


@torch.no_grad()
def divergence(
    hidden: Tensor,
    logits: Logits,
    reference_hidden: Tensor,
    reference_logits: Logits,
    action_mask: Tensor | None = None,
    *,
    vocab_size: int,
) -> Tensor:
    """Exact Kullback-Leibler divergence of each token's distribution from the reference's.

    KL(pi || ref) = sum_v pi_v (log pi_v - log ref_v), in nats; never negative.

    Args:
        hidden: [M, D], hidden states of the policy.
        logits: Its logits.
        reference_hidden: [M, D'], hidden states of the reference at the same places.
        reference_logits: Its logits, of the same V.
        action_mask: Bool [M, V] or None; applies to both.
        vocab_size: V.

    Returns:
        float32 [M].
    """
    parts = [hidden.new_zeros(0, dtype=torch.float32)]
    for rows in _blocks(hidden, vocab_size):
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


def _blocks(hidden: Tensor, vocab_size: int, border: int | None = None) -> Iterator[slice]:
    """Slices of M tokens, none across the border; one empty slice for nothing, to keep types."""
    count, device = len(hidden), hidden.device.type
    size = BLOCK_BYTES.get(device, BLOCK_BYTES["cuda"]) // (4 * vocab_size)
    size = max(BLOCK_TOKENS, size)
    borders = [0, count] if border is None or border >= count else [0, border, count]
    for first, last in itertools.pairwise(borders):
        for begin in range(first, max(last, 1), size):
            yield slice(begin, min(begin + size, last))
