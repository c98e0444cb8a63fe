"""The tensors of the slot cache, in the form in which transformers models take a cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from textgym.policies.results import to_device

Ints = NDArray[np.int64]


class Plan(NamedTuple):
    """Where one forward writes and what it attends to.

    `slots` [n] are written at the columns `pos` [n, m]. The keys read are those of the forward
    itself when `fresh` (nothing came before), else the first `kv` columns of the slots; `start` is
    set when the slots are a range, so that reading needs no copy, and `column` when all rows write
    the same single column.
    """

    slots: Tensor
    pos: Tensor
    kv: int
    fresh: bool = False
    start: int | None = None
    column: int | None = None


class _SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, [slots, heads, columns, head size]."""

    is_sliding = False

    def __init__(self, store: SlotStore) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.store = store

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._empty(key_states), self._empty(value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def _empty(self, like: Tensor) -> Tensor:
        # Zeros, never uninitialised memory: a masked column has weight 0, and 0 * NaN would be NaN.
        store = self.store
        return like.new_zeros(store.num_slots, like.shape[1], store.num_columns, like.shape[3])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        return self._write_read(self.keys, key_states), self._write_read(self.values, value_states)

    def _write_read(self, held: Tensor, new: Tensor) -> Tensor:
        plan = self.store.plan
        n = new.shape[0]
        if plan.column is not None and plan.start is not None:
            held[plan.start : plan.start + n, :, plan.column] = new[:, :, 0]
        else:
            held[plan.slots[:, None], :, plan.pos] = new.transpose(1, 2)
        if plan.fresh:
            return new
        if plan.start is not None:
            return held[plan.start : plan.start + n, :, : plan.kv]
        return held[plan.slots, :, : plan.kv]

    def resize(self) -> None:
        """Give the layer the store's present size, keeping what it holds."""
        if self.keys is None or self.values is None:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._empty(old)
            new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)

    def drop(self) -> None:
        """Free the memory."""
        self.keys = self.values = None
        self.is_initialized = False

    def wipe(self) -> None:
        """Forget what is held, and stay where it was."""
        for held in (self.keys, self.values):
            if held is not None:
                held.zero_()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.plan.kv, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.store.num_columns


class SlotStore(Cache):
    """The tensors of the slot cache, in the form in which transformers models take a cache."""

    plan: Plan

    def __init__(self, num_layers: int) -> None:
        self.num_slots = 0
        self.num_columns = 0
        self.stays = False
        """Whether tensors stay in place when what they hold is forgotten: graphs refer to them."""
        self.version = 0
        """Raised when tensors move."""
        self.slot_layers = [_SlotLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self.slot_layers))

    def grow(self, num_slots: int, num_columns: int) -> None:
        """Make room for at least this many slots and columns."""
        if num_slots > self.num_slots or num_columns > self.num_columns:
            self.num_slots = max(num_slots, self.num_slots)
            self.num_columns = max(num_columns, self.num_columns)
            self.version += 1
            for layer in self.slot_layers:
                layer.resize()

    def copy(self, target: Ints, source: Ints, columns: int) -> None:
        """Copy the first columns of some slots into others (both may be the same: read first)."""
        for layer in self.slot_layers:
            for held in (layer.keys, layer.values):
                if held is not None:
                    to, of = to_device(target, held.device), to_device(source, held.device)
                    held[to, :, :columns] = held[of, :, :columns]

    @torch.inference_mode()
    def forget(self) -> None:
        """Forget what is held; free the memory, unless it is to stay."""
        for layer in self.slot_layers:
            if self.stays:
                layer.wipe()
            else:
                layer.drop()
        self.version += not self.stays
