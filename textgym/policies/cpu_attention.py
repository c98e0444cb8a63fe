"""Attention of one query a row on a CPU, as two batched products of matrices.

PyTorch's fused attention is written for many queries. With one a row, plain products take 0.5 to
0.75 of its time in float32, and a third of it in bfloat16, where it takes longer than in float32.
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
    """Let a model that attends by "sdpa" attend as fits one query a row on a CPU."""
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


def _one_query(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of [n, heads, 1, size] over [n, groups, columns, size]."""
    rows, heads, length, size = query.shape
    groups = key.shape[1]
    if length != 1 or dropout or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    scale = size**-0.5 if scaling is None else scaling
    # The queries that share a key-value head stand together.
    grouped = query.reshape(rows, groups, heads // groups, size) * scale
    if query.dtype == torch.bfloat16:  # the product of this order and shape is the fast one
        flat = grouped.flatten(0, 1).transpose(1, 2)
        score = torch.bmm(key.flatten(0, 1), flat).transpose(1, 2)
        score = score.view(rows, groups, *score.shape[1:]).float()
    else:
        score = torch.matmul(grouped, key.transpose(2, 3))  # [n, groups, heads / groups, columns]
    if attention_mask is not None:
        score = score.masked_fill(~attention_mask, NEG_INF)
    out = torch.matmul(torch.softmax(score, -1).to(value.dtype), value)
    return out.reshape(rows, 1, heads, value.shape[-1]), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _one_query)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
