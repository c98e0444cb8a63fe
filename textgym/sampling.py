"""Counter-based sampling of tokens: pure functions from logits and keys to actions.

A key is a 64-bit hash of what the draw is for (policy seed, episode stream, sample index,
position), so a draw never depends on the batch around it or on draws before it. `mix64` and
`uniform53` are the torch twins of the functions in `textgym.streams`, bit for bit on every device.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from textgym.streams import GOLDEN, MULTIPLIERS

Method = Literal["inverse_cdf", "gumbel", "greedy"]
NEG_INF = float("-inf")
BLOCK = 128  # tokens summed at once by the inverse CDF
FEW = 1024  # tokens below which blocks do not pay


@dataclass(frozen=True)
class Sampler:
    """How a token is drawn from logits.

    The distribution that training samples and scores is the full one: softmax(logits / temperature)
    over the tokens that the action mask allows. `top_k` and `top_p` cut it further, for playing and
    evaluating only.
    """

    method: Method = "inverse_cdf"
    """`inverse_cdf` (one uniform number a row), `gumbel` (one a token, steadier across devices) or
    `greedy`."""
    temperature: float = 1.0
    """Divides the logits; positive and finite."""
    top_k: int | None = None
    """Keep the k most likely tokens (and those that tie with the k-th)."""
    top_p: float | None = None
    """Keep the smallest set of most likely tokens whose probability reaches top_p."""

    def __post_init__(self) -> None:
        """Raise ValueError for a setting that gives no distribution."""
        if self.method not in get_args(Method):
            raise ValueError(f"sampler: expected one of {get_args(Method)}, got {self.method!r}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature: expected a positive number, got {self.temperature!r}; "
                'for the most likely token use sampler="greedy"'
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"top_k: expected at least 1 (or None for all tokens), got {self.top_k!r}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1] (or None), got {self.top_p!r}")

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p removes tokens from the distribution."""
        return self.top_k is not None or self.top_p is not None

    @property
    def is_exact(self) -> bool:
        """Whether draws come from the full tempered distribution, which is what training scores."""
        return self.method != "greedy" and not self.truncates


def _signed(value: int) -> int:
    """Give the int64 number with the same 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right filling with zeros; torch's own shift repeats the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix64(*parts: Tensor | int, device: torch.device | str | None = None) -> Tensor:
    """Hash broadcastable integer tensors into 64 bits; the torch twin of `textgym.streams.mix64`.

    Args:
        *parts: Integers or integer tensors (uint64 bits held in int64), broadcast against each
            other.
        device: Where the result lives when no part is a tensor.

    Returns:
        int64 tensor of the broadcast shape, holding the bits of the unsigned hash.
    """
    device = next((p.device for p in parts if isinstance(p, Tensor)), device)
    golden, first, second = _signed(GOLDEN), _signed(MULTIPLIERS[0]), _signed(MULTIPLIERS[1])
    # Filled on the device: a tensor made of a number would be sent there, which no graph can do.
    h = torch.full((), golden, dtype=torch.int64, device=device)
    for part in parts:
        bits = part.to(torch.int64) if isinstance(part, Tensor) else _signed(part)
        h = (h ^ bits) + golden
        h = (h ^ _shift_right(h, 30)) * first
        h = (h ^ _shift_right(h, 27)) * second
        h = h ^ _shift_right(h, 31)
    return h


def uniform53(h: Tensor) -> Tensor:
    """Turn hashes (int64) into float64 uniform numbers in [0, 1) from their top 53 bits."""
    return _shift_right(h, 11).to(torch.float64) * 2.0**-53


def mask_logits(logits: Tensor, action_mask: Tensor | None) -> Tensor:
    """Set the logits of forbidden tokens to minus infinity, so that their probability is exactly 0.

    Args:
        logits: [N, V].
        action_mask: Bool [N, V], True where the token is allowed; None allows all.

    Raises:
        ValueError: When shapes differ, or a row allows no token.
    """
    if action_mask is None:
        return logits
    check_action_mask(action_mask, logits.shape)
    return logits.masked_fill(~action_mask, NEG_INF)


def check_action_mask(action_mask: Tensor, shape: torch.Size | tuple[int, ...]) -> None:
    """Raise ValueError unless the mask is Bool of that shape and every row allows a token."""
    if action_mask.dtype != torch.bool or tuple(action_mask.shape) != tuple(shape):
        raise ValueError(
            f"action_mask: expected bool {list(shape)} (True = allowed), "
            f"got {action_mask.dtype} {list(action_mask.shape)}"
        )
    allowed = action_mask.any(-1)
    if not bool(allowed.all()):
        row = int((~allowed).nonzero()[0, 0])
        raise ValueError(
            f"action_mask: row {row} allows no token; every row must allow at least one"
        )


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest logits of each row [N, V] to -inf; ties with the k-th stay."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, NEG_INF)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the nucleus: the smallest set of most likely tokens with probability at least p.

    Holtzman et al. 2020, "The curious case of neural text degeneration", section 3.1.

    Args:
        logits: [N, V]; the most likely token always stays.
        p: Probability that the kept set reaches, in (0, 1].
    """
    probs, order = torch.softmax(logits.float(), -1).sort(dim=-1, descending=True, stable=True)
    before = probs.double().cumsum(-1) - probs  # probability of the more likely tokens
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    drop.scatter_(-1, order[..., :1], False)
    return logits.masked_fill(drop, NEG_INF)


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """Invert the cumulative distribution: the first token whose cumulated probability exceeds u.

    The sums are float64: in float32 the tail of a large vocabulary (probabilities below 6e-8) could
    never be drawn. Where there are more than `FEW` tokens, they run over blocks of them first, then
    inside one block a row, which takes a third of the time of a cumulated sum over V. A token of
    probability 0 is never returned.

    Args:
        probs: [N, V], non-negative; rows need not sum to exactly 1.
        u: Float64 [N] in [0, 1).

    Returns:
        Token ids, int64 [N].
    """
    if probs.shape[-1] <= FEW:
        cumulated = probs.cumsum(-1, dtype=torch.float64)
        return _first_above(cumulated, u[:, None] * cumulated[:, -1:])[:, 0]
    whole = probs.shape[-1] // BLOCK * BLOCK
    blocks = probs[:, :whole].view(len(probs), whole // BLOCK, BLOCK).sum(-1, dtype=torch.float64)
    if whole < probs.shape[-1]:
        tail = probs[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
        blocks = torch.cat([blocks, tail], -1)
    cumulated = blocks.cumsum(-1)
    target = u[:, None] * cumulated[:, -1:]
    block = _first_above(cumulated, target)
    target = target - (cumulated.gather(-1, block) - blocks.gather(-1, block))
    token = block * BLOCK + torch.arange(BLOCK, device=probs.device)
    inside = probs.gather(-1, token.clamp(max=probs.shape[-1] - 1)).to(torch.float64)
    inside = inside.masked_fill(token >= probs.shape[-1], 0.0).cumsum(-1)
    # NaN sends the search beyond the end; the log-probability of any token then tells.
    return (block * BLOCK + _first_above(inside, target)).clamp_(max=probs.shape[-1] - 1)[:, 0]


def _first_above(cumulated: Tensor, target: Tensor) -> Tensor:
    """First index [N, 1] at which a non-decreasing row exceeds its target [N, 1].

    A target that rounding brought up to the total counts as just below it, and one below 0 as 0, so
    that the index is one at which the sum grew.
    """
    total = cumulated[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))
    index = torch.searchsorted(cumulated, torch.minimum(target, below).clamp_(min=0.0), right=True)
    return index.clamp_(max=cumulated.shape[-1] - 1)


def gumbel_noise(key: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, a stateless hash of (key, token).

    Args:
        key: int64 [N].
        vocab_size: V.

    Returns:
        Float64 [N, V]: -log(-log(u)) with u of 52 bits inside (0, 1), so that the noise is finite.
    """
    token = torch.arange(vocab_size, device=key.device)
    u = (_shift_right(mix64(key[:, None], token[None, :]), 12).to(torch.float64) + 0.5) * 2.0**-52
    return -torch.log(-torch.log(u))


def draw(logits: Tensor, key: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Draw one token a row.

    Args:
        logits: Float32 [N, V], already divided by the temperature and masked.
        key: int64 [N], the hash that identifies each draw.
        sampler: Method, top_k and top_p (its temperature is not applied again).

    Returns:
        Token ids int64 [N] and their log-probabilities float32 [N] under the distribution that
        `logits` (after top-k and top-p) describe. Greedy tokens get their probability under that
        distribution, not 1.
    """
    if sampler.top_k is not None:
        logits = keep_top_k(logits, sampler.top_k)
    if sampler.top_p is not None:
        logits = keep_top_p(logits, sampler.top_p)
    if sampler.method == "inverse_cdf":
        probs = torch.softmax(logits, -1)
        action = inverse_cdf(probs, uniform53(key))
        return action, probs.gather(-1, action[:, None])[:, 0].log()
    if sampler.method == "gumbel":
        action = (logits + gumbel_noise(key, logits.shape[-1])).argmax(-1)
    else:
        action = logits.argmax(-1)
    return action, logits.gather(-1, action[:, None])[:, 0] - logits.logsumexp(-1)
