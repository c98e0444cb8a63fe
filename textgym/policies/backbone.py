"""The language model inside a policy: hidden states, logits, values, and the slot cache."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from textgym.episodes import FORWARD_LIMIT
from textgym.policies.acting_copy import ActingCopy
from textgym.policies.cache_support import make_slot_decoder
from textgym.policies.checkpointing import computed_again
from textgym.policies.cpu_attention import cpu_attention
from textgym.policies.cpu_linear import use_onednn
from textgym.policies.cpu_norm import use_fast_norms
from textgym.policies.loading import (
    add_lora,
    context_length,
    is_lora,
    load_model,
    resolve_compute_dtype,
    resolve_device,
    resolve_dtype,
)
from textgym.policies.logits import LogitHead
from textgym.policies.shared_prompts import SharedPrompts, can_share
from textgym.policies.slot_cache import SlotDecoder
from textgym.policies.slot_store import Ints
from textgym.policies.weight_watch import WeightWatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORWARD_BYTES = 1 << 22
"""More makes an update slower, since it leaves the caches."""
_NO_CACHE: dict[str, Any] = {
    "_watch": None,
    "_decoder": None,
    "_acting": None,
    "_no_cache": False,
    "_sharing": None,
}
"""What a policy knows of its caches before it has acted or scored."""


class Backbone(nn.Module):
    """A causal language model, always in eval mode, with an optional value head and a slot cache.

    Args:
        model: A Hugging Face causal LM, or the folder or hub name of one.
        vocab_size: V; default all logits of the model.
        device: `"auto"` or a torch device.
        dtype: Of the weights.
        lora: What adapters to add.
        seed: Seed of the adapters' weights.
        value_head: Whether to add a linear value head, which starts at zero.
        compute_dtype: What forwards compute in; None: the dtype of the weights.
        gradient_checkpointing: Whether layers are computed again in the backward pass.
    """

    _watch: WeightWatch | None
    _decoder: SlotDecoder | None
    _no_cache: bool
    _acting: ActingCopy | None
    _sharing: bool | None

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        *,
        vocab_size: int | None,
        device: str | torch.device,
        dtype: str | torch.dtype | None,
        lora: int | Mapping[str, Any] | Any | None,
        seed: int,
        value_head: bool,
        compute_dtype: str | torch.dtype | None,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.compute_dtype = resolve_compute_dtype(compute_dtype)
        loaded = load_model(model, resolve_device(device), resolve_dtype(dtype))
        self.model: Any = loaded if lora is None else add_lora(loaded, lora, seed)
        use_onednn(self.model)
        use_fast_norms(self.model)
        self._adapters_off = False
        self._head = LogitHead(self._core)
        self.vocab_size = self._head.size if vocab_size is None else vocab_size
        if not 0 < self.vocab_size <= self._head.size:
            raise ValueError(
                f"vocab_size: expected at most the {self._head.size} logits of the model, "
                f"got {self.vocab_size}; use the tokenizer that belongs to the model, "
                "or resize the model's embeddings"
            )
        self.context_length: int | None = context_length(self._core.config)
        self.value_head: nn.Linear | None = None
        if value_head:
            # skip_init: the usual random start would draw from torch's global generator.
            self.value_head = skip_init(  # type: ignore[no-untyped-call]
                nn.Linear,
                self._core.get_output_embeddings().weight.shape[1],
                1,
                device=self.device,
                dtype=torch.float32,
            )
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self._reset_cache()
        self.eval()

    @property
    def _core(self) -> Any:
        """The Hugging Face model under any adapters."""
        return self.model.get_base_model() if is_lora(self.model) else self.model

    @property
    def config(self) -> Any:
        """Configuration of the Hugging Face model."""
        return self._core.config

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = self._core.device
        return device

    @property
    def forward_tokens(self) -> int:
        """How many padded tokens a forward for learning holds at most.

        On a CPU the hidden states of one layer then take `FORWARD_BYTES`.
        """
        if self.device.type != "cpu":
            return FORWARD_LIMIT
        width: int = self._core.get_output_embeddings().weight.shape[1]
        return min(4 * FORWARD_LIMIT, max(FORWARD_LIMIT // 2, FORWARD_BYTES // (4 * width)))

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: dropout would make the first ratio of PPO differ from 1."""
        return super().train(False)

    @contextmanager
    def _forward_mode(self) -> Iterator[None]:
        """Eval mode, and adapters off in the frozen copy of a LoRA policy."""
        if self._core.training:  # somebody called model.train()
            self.model.eval()
        with self.model.disable_adapter() if self._adapters_off else nullcontext():
            yield

    def _autocast(self) -> AbstractContextManager[Any]:
        """What a forward for learning runs in."""
        if self.compute_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)

    def _all_logits(self, hidden: Tensor) -> Tensor:
        """All logits [n, V'] of hidden states [n, D], as the model computes them."""
        with self._autocast():
            return self._head(hidden)

    def _raw_logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [n, V] of hidden states [n, D], the model's surplus ones dropped."""
        return self._all_logits(hidden)[:, : self.vocab_size].float()

    def _acting_logits(self, hidden: Tensor) -> Tensor:
        """As `_raw_logits`, by the copy that acts where there is one."""
        if self._acting is None:
            return self._raw_logits(hidden)
        return self._acting.head(hidden)[:, : self.vocab_size].float()

    def _values(self, hidden: Tensor) -> Tensor | None:
        """Values, float32 [n], of hidden states [n, D]; None without a value head."""
        if self.value_head is None:
            return None
        value: Tensor = self.value_head(hidden.to(self.value_head.weight.dtype))[:, 0]
        return value.float()

    def _hidden_all(self, ids: Tensor) -> Tensor:
        """Hidden states [B, T, D] of right-padded ids [B, T].

        Causal attention never looks to the right, so that padding needs no mask.
        """
        # A mask of ones changes nothing; without one some models look for padding ids and warn.
        ones = torch.ones_like(ids)
        with self._learning():
            hidden: Tensor = self._core.base_model(
                input_ids=ids, attention_mask=ones, use_cache=False
            ).last_hidden_state
        return hidden

    def _hidden_after(self, split: SharedPrompts, row: Tensor, column: Tensor) -> Tensor:
        """Hidden states [M, D] at some places of sequences that share prompts."""
        with self._learning():
            return split.to(self.device).hidden(self._core.base_model, row, column)

    def _shares_prompts(self) -> bool:
        """Whether prompts that several sequences begin with may be computed once."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return False  # keys and values leave the layers by a way that it does not see
        if self._sharing is None:
            self._sharing = can_share(self._core.base_model, self.vocab_size)
        return self._sharing

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """What forwards of whole sequences compute in."""
        base = self._core.base_model
        attending = partial(cpu_attention, base, applies=True)
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        layers = computed_again(self._core, attending) if again else nullcontext()
        with self._autocast(), attending(), layers:
            yield

    def _hidden_last(self, ids: Ints, length: Ints, rows: Ints) -> Tensor:
        """Hidden state [n, D] of each row's last token, through the slot cache where it works."""
        decoder = self._slot_decoder()
        if decoder is not None:
            return decoder.hidden(ids, length, rows)
        longest = int(length.max())
        inside = np.arange(longest) < length[:, None]
        tokens = torch.from_numpy(np.where(inside, ids[:, :longest], 0)).to(self.device)
        return self._hidden_all(tokens)[torch.arange(len(ids)), torch.from_numpy(length - 1)]

    def _slot_decoder(self) -> SlotDecoder | None:
        """The slot cache, empty if the weights have changed; None where the model refuses it."""
        if self._no_cache:
            return None
        if self._decoder is None or self._watch is None:
            if self.compute_dtype is not None:
                self._acting = ActingCopy(
                    self.model, self._head, self.compute_dtype, adapters_off=self._adapters_off
                )
            core = self._core if self._acting is None else self._acting.core
            made = make_slot_decoder(core.base_model, self.vocab_size)
            if isinstance(made, str):
                self._no_cache, self._acting = True, None
                warnings.warn(
                    f"{type(self._core).__name__} runs without the slot cache, "
                    f"with a full forward for every token: {made}",
                    UserWarning,
                    stacklevel=4,
                )
                return None
            self._decoder, self._watch = made, WeightWatch(self.model)
        if self._watch.changed():
            self._decoder.clear()
            if self._acting is not None:
                self._acting.refresh()
        return self._decoder

    def _reset_cache(self) -> None:
        self.__dict__.update(_NO_CACHE)

    def invalidate_cache(self) -> None:
        """Forget all cached keys and values.

        Needed only when weights change in a way that nothing shows: a write into `.data` outside an
        optimizer, or adapters switched by hand.
        """
        if self._decoder is not None:
            self._decoder.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._reset_cache()  # to another device or dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies and pickles."""
        return self.__dict__ | _NO_CACHE
