"""Attention on a CPU, where PyTorch's fused one is slow: one query a row, and bfloat16.

It is written for many queries. With one a row, plain products take 0.5 to 0.75 of its time in
float32, and a third of it in bfloat16, where it takes longer than in float32. With many, its
backward pass takes three times as long in bfloat16 as in float32, so that float32 it is.
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
_FIELD = "_attn_implementation_internal"


@contextmanager
def cpu_attention(base: Any, *, applies: bool) -> Iterator[None]:
    """Let a model that attends by "sdpa" attend as below where it is on a CPU."""
    # The field itself: the property that sets it validates the whole configuration, which takes
    # longer than a layer of a small model.
    fields = vars(base.config)
    before = fields.get(_FIELD)
    if not (applies and before == "sdpa" and base.device.type == "cpu"):
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
    if value.dtype != torch.bfloat16:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    # Under autocast rotated queries and keys are float32, until attention makes them bfloat16.
    if attention_mask is not None and attention_mask.dtype == torch.bfloat16:
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        found, _ = sdpa_attention_forward(
            module,
            query.float(),
            key.float(),
            value.float(),
            attention_mask,
            dropout,
            scaling,
            **kwargs,
        )
    return found.bfloat16(), None


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
    if query.dtype == torch.bfloat16:  # the product of this order and shape is the fast one
        flat = query.flatten(0, 1).transpose(1, 2)
        score = torch.bmm(key.flatten(0, 1), flat).transpose(1, 2)
        score = score.view(*query.shape[:3], -1).float()
    else:
        score = torch.matmul(query, key.transpose(2, 3))  # [n, groups, heads / groups, columns]
    if unseen is not None:
        score = score.masked_fill(unseen, NEG_INF)
    return torch.matmul(torch.softmax(score, -1).to(value.dtype), value)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
