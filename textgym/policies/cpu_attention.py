"""Attention on a CPU, where PyTorch's fused one is slow: one query a row, and bfloat16.

It is written for many queries. With one a row, plain products take 0.5 to 0.75 of its time in
float32, and a third of it in bfloat16, where it takes longer than in float32. With many, its
backward pass takes three times as long in bfloat16 as in float32, so that float32 it is; and where
all scores fit into the processor's caches, plain products take 0.75 to 0.9 of its time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from textgym.sampling import NEG_INF

ATTENTION = "textgym_cpu"
FEW_SCORES = 1 << 21
"""Scores of one layer up to which products are faster; they are kept for the backward pass."""
_FIELD = "_attn_implementation_internal"


@contextmanager
def cpu_attention(base: Any, *, applies: bool) -> Iterator[None]:
    """Let a model that attends by "sdpa" attend as below where it is on a CPU.

    Not one that compares the name itself instead of asking transformers for what bears it (Falcon):
    by another name it attends in another way.
    """
    # The field itself: the property that sets it validates the whole configuration, which takes
    # longer than a layer of a small model.
    fields = vars(base.config)
    before = fields.get(_FIELD)
    asks = applies and before == "sdpa" and base._supports_attention_backend
    if not (asks and base.device.type == "cpu"):
        yield
        return
    fields[_FIELD] = ATTENTION
    try:
        yield
    finally:
        fields[_FIELD] = before


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of [n, heads, queries, size] over [n, groups, columns, size]."""
    rows, heads, length, size = query.shape
    groups = key.shape[1]
    added = attention_mask is not None and attention_mask.dtype != torch.bool
    if length == 1 and not added and not dropout and kwargs.get("position_bias") is None:
        scale = size**-0.5 if scaling is None else scaling
        grouped = query.reshape(rows, groups, heads // groups, size) * scale
        out = attend(grouped, key, value, None if attention_mask is None else ~attention_mask)
        return out.reshape(rows, 1, heads, value.shape[-1]), None
    options = {"dropout": dropout, "scaling": scaling, **kwargs}
    if value.dtype != torch.bfloat16:
        return _attend_by_many(module, query, key, value, attention_mask, **options), None
    # Under autocast rotated queries and keys are float32, until attention makes them bfloat16.
    if attention_mask is not None and attention_mask.dtype == torch.bfloat16:
        attention_mask = attention_mask.float()
    exact = query.float(), key.float(), value.float()
    with torch.autocast("cpu", enabled=False):
        return _attend_by_many(module, *exact, attention_mask, **options).bfloat16(), None


def _attend_by_many(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> Tensor:
    """Attention of [n, heads, queries, size]: [n, queries, heads, size]."""
    rows, heads, length, size = query.shape
    columns = key.shape[2]
    plain = heads == key.shape[1] and query.dtype == value.dtype == torch.float32
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        one_mask = causal and length == columns
    else:
        one_mask = mask.is_floating_point() and mask.shape[:2] == (1, 1)
    different = dropout or kwargs.get("position_bias") is not None
    few = rows * heads * length * columns <= FEW_SCORES
    if not (plain and one_mask and few) or different:
        found, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout, scaling, **kwargs
        )
        return found
    if mask is None:
        unseen = query.new_full((length, columns), NEG_INF).triu_(1)
    else:
        unseen = mask[0, 0]
    query = query * (size**-0.5 if scaling is None else scaling)
    score = torch.baddbmm(unseen, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2))
    found = torch.bmm(torch.softmax(score, -1), value.flatten(0, 1))
    return found.view(rows, heads, length, -1).transpose(1, 2).contiguous()  # as the fused one is


def attend(query: Tensor, key: Tensor, value: Tensor, unseen: Tensor | None) -> Tensor:
    """Attention of one query a row and head; those that share a key-value head stand together.

    Args:
        query: [n, groups, heads / groups, size], scaled.
        key: [n, groups, columns, size].
        value: Like the keys.
        unseen: Bool [n, 1, 1, columns], columns that are not looked at; None: there are none.

    Returns:
        [n, groups, heads / groups, size].
    """
    flat, keys = query.flatten(0, 1), key.flatten(0, 1)
    if query.dtype == torch.bfloat16:  # the product of this order and shape is the fast one
        score = torch.bmm(keys, flat.transpose(1, 2)).transpose(1, 2).float()
    else:
        score = torch.bmm(flat, keys.transpose(1, 2))  # [n groups, heads / groups, columns]
    if unseen is not None:
        score = score.view(*query.shape[:3], -1).masked_fill(unseen, NEG_INF).flatten(0, 1)
    weight = torch.softmax(score, -1).to(value.dtype)
    return torch.bmm(weight, value.flatten(0, 1)).view(*query.shape[:3], -1)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
