"""Attention of one bfloat16 query a row on a CPU, which reads keys and values once.

PyTorch's fused attention is written for many queries. With one, it takes twice as long in bfloat16
as in float32; two batched products of matrices take half. `scripts/bench_rollout.py` measures it.
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


@contextmanager
def cpu_attention(base: Any, *, applies: bool) -> Iterator[None]:
    """Let a model that attends by "sdpa" attend as fits one bfloat16 query a row on a CPU."""
    config = base.config
    before = config._attn_implementation
    if applies and before == "sdpa" and base.device.type == "cpu" and base.dtype == torch.bfloat16:
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


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
    groups, columns = key.shape[1:3]
    if length != 1 or dropout or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    # The queries that share a key-value head stand side by side: [n * groups, size, heads / groups]
    grouped = query.reshape(rows * groups, heads // groups, size).transpose(1, 2)
    score = torch.bmm(key.flatten(0, 1), grouped).float()
    score *= size**-0.5 if scaling is None else scaling
    if attention_mask is not None:
        hidden = ~attention_mask.expand(rows, groups, 1, columns).reshape(-1, columns, 1)
        score.masked_fill_(hidden, NEG_INF)
    weight = torch.softmax(score, 1).to(value.dtype).transpose(1, 2)
    out = torch.bmm(weight, value.flatten(0, 1))  # [n * groups, heads / groups, size]
    return out.reshape(rows, 1, heads, value.shape[-1]), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _one_query)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
