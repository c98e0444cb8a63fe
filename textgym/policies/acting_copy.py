"""The model in a narrower dtype, to act with; what is trained stays as exact as it is."""

from __future__ import annotations

import copy
from typing import Any

import torch

from textgym.policies.loading import is_lora, without_adapters
from textgym.policies.logits import LogitHead


class ActingCopy:
    """A copy of a model in another dtype that follows its weights.

    A decoding step reads every weight once, so it takes half the time where they take half the
    bytes; and nothing is cast at every token, as autocast would do.

    Args:
        model: What is copied, with or without adapters.
        head: Its output layer.
        dtype: Of the copy.
        adapters_off: Copy the model before adaptation.
    """

    def __init__(
        self, model: Any, head: LogitHead, dtype: torch.dtype, *, adapters_off: bool
    ) -> None:
        plain = without_adapters(model, merge=False) if adapters_off else model
        self._source = plain
        twin: Any = copy.deepcopy(plain)
        twin.requires_grad_(False)
        twin.to(dtype)
        self._twin = twin
        self.core: Any = twin.get_base_model() if is_lora(twin) else twin
        self.head = head.of(self.core)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights as they are now, in place."""
        for mine, theirs in zip(self._twin.parameters(), self._source.parameters(), strict=True):
            mine.copy_(theirs)
        for held, now in zip(self._twin.buffers(), self._source.buffers(), strict=True):
            held.copy_(now)
