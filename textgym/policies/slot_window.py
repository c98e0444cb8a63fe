"""A window on the slot cache with static shapes: what a captured decoding step writes and reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from textgym.policies.slot_store import SlotStore

ATTENTION = "textgym_window"


class _WindowLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    is_sliding = False

    def __init__(self, window: SlotWindow, layer: CacheLayerMixin) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window, self.layer = window, layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.layer.lazy_initialization(key_states, value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.layer.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.layer.keys is not None and self.layer.values is not None
        return self._write_read(self.layer.keys, key_states), self._write_read(
            self.layer.values, value_states
        )

    def _write_read(self, held: Tensor, new: Tensor) -> Tensor:
        held = held[: len(new)]
        held.scatter_(2, self.window.position[:, None, None, None].expand_as(new), new)
        return held[:, :, : self.window.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.width, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.window.store.num_columns


class SlotWindow(Cache):
    """The first slots and columns of a store; each slot is written at a column of its own."""

    position: Tensor
    """int64 [s], the column that each slot writes."""
    width: int
    """How many columns are read."""

    def __init__(self, store: SlotStore) -> None:
        self.store = store
        super().__init__(layers=[_WindowLayer(self, layer) for layer in store.slot_layers])


def _window_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one query a row: [s, heads, 1, size] over [s, groups, columns, size].

    The queries that share a key-value head stand one below the other, so that keys and values are
    read once and never repeated, as they are where queries and keys must have as many heads.
    """
    rows, heads, length, size = query.shape
    groups = key.shape[1]
    grouped = query.reshape(rows, groups, heads // groups * length, size)
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, heads, length, value.shape[-1]).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _window_attention)


@contextmanager
def window_attention(base: Any) -> Iterator[None]:
    """Let a model that attends by "sdpa" attend as fits one query a row."""
    config = base.config
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
