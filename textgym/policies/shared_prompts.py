"""Forwards of groups for learning: a prompt that several sequences begin with is computed once.

The prompts are one forward, and what comes after them another that attends to the prompts' keys and
values; gradients flow back through these. Hidden states are those of whole sequences, up to
rounding. With groups of 8, a prompt of 256 tokens and responses of 64 this is a third of the work.

Shapes: B sequences, P prompts of at most L tokens, S tokens of the longest rest, M action tokens,
D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from textgym.episodes import FORWARD_TOKENS, SequenceBatch
from textgym.policies.cache_support import refuses, relative_error, tolerance
from textgym.sampling import NEG_INF

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SharedPrompts:
    """What to forward of sequences that begin with few prompts.

    A sequence's prompt are its tokens before the first action token. The last token of a sequence
    is not forwarded: nothing was drawn after it.

    Attributes:
        alike: Whether all prompts are of one length.
        prompts: int64 [P, L], right-padded.
        rest: int64 [B, S], right-padded.
        owner: int64 [B], the prompt of each sequence.
        begin: int64 [B], its length.
        column: int64 [B, S], of the rest's tokens in their sequences; 0 in padding.
    """

    alike: bool
    prompts: Tensor
    rest: Tensor
    owner: Tensor
    begin: Tensor
    column: Tensor

    @classmethod
    def of(cls, batch: SequenceBatch) -> SharedPrompts | None:
        """Split a batch on the host where that saves tokens; None where it does not pay."""
        if batch.ids.device.type != "cpu" or not len(batch.row):
            return None
        ids, length = batch.ids.numpy(), batch.lengths.numpy()
        begin = length.copy()  # of a sequence without action tokens all is prompt
        np.minimum.at(begin, batch.row.numpy(), batch.col.numpy())
        found: dict[bytes, int] = {}
        owner = np.array([found.setdefault(ids[b, :k].tobytes(), b) for b, k in enumerate(begin)])
        leaders, owner = np.unique(owner, return_inverse=True)
        longest, rest = int(begin[leaders].max()), int((length - begin).max()) - 1
        tokens = len(leaders) * longest + len(ids) * rest
        if rest < 1 or tokens + FORWARD_TOKENS >= len(ids) * (int(length.max()) - 1):
            return None
        offset = begin[:, None] + np.arange(rest)
        inside = offset < length[:, None]
        place = np.where(inside, offset, 0)
        after = np.where(inside, np.take_along_axis(ids, place, 1), 0)
        prompts = np.where(np.arange(longest) < begin[leaders, None], ids[leaders, :longest], 0)
        alike = bool((begin == longest).all())
        return cls(alike, *(torch.from_numpy(x) for x in (prompts, after, owner, begin, place)))

    def to(self, device: torch.device) -> SharedPrompts:
        """The same on a device."""
        fields = (self.prompts, self.rest, self.owner, self.begin, self.column)
        return SharedPrompts(self.alike, *(x.to(device, non_blocking=True) for x in fields))

    def hidden(self, base: PreTrainedModel, row: Tensor, column: Tensor) -> Tensor:
        """Hidden states [M, D] at some places [M] of the sequences, all on the model's device."""
        held = _Held(int(base.config.get_text_config(decoder=True).num_hidden_layers), self.owner)
        number, longest = self.prompts.shape
        width = self.rest.shape[1]
        of_prompts = base(
            input_ids=self.prompts,
            position_ids=torch.arange(longest, device=self.prompts.device)[None],
            past_key_values=held,
            use_cache=True,
        ).last_hidden_state
        held.columns = longest + width
        of_rest = base(
            input_ids=self.rest,
            attention_mask=self._mask(of_prompts.dtype),
            position_ids=self.column,
            past_key_values=held,
            use_cache=True,
        ).last_hidden_state
        begin = self.begin[row]
        at = number * longest + row * width + column - begin
        at = torch.where(column < begin, self.owner[row] * longest + column, at)
        return _rows(torch.cat([of_prompts.flatten(0, 1), of_rest.flatten(0, 1)]), at)

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """What is added to the scores, [1 or B, 1, S, L + S]: a prompt, and what went before."""
        width, longest = self.rest.shape[1], self.prompts.shape[1]
        step = torch.arange(width, device=self.rest.device)
        begin = self.begin[:1] if self.alike else self.begin  # one mask for all
        unseen = torch.arange(longest, device=begin.device) >= begin[:, None, None, None]
        later = (step > step[:, None]).expand(len(begin), 1, -1, -1)
        unseen = torch.cat([unseen.expand(-1, -1, width, -1), later], -1)
        return torch.zeros(unseen.shape, dtype=dtype, device=begin.device).masked_fill_(
            unseen, NEG_INF
        )


def _rows(held: Tensor, which: Tensor) -> Tensor:
    """`held[which]`, by what sums its gradient in a fixed order; threads sum that of an index."""
    rows = torch.nn.functional.embedding(which, held.flatten(1))
    return rows.view(-1, *held.shape[1:])


class _HeldLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer: the prompts' own, and then those of each sequence."""

    is_sliding = False

    def __init__(self, held: _Held) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = held
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        owner = self.held.owner
        return (
            torch.cat([_rows(self.keys, owner), key_states], 2),
            torch.cat([_rows(self.values, owner), value_states], 2),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held.columns or query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class _Held(Cache):
    """Keys and values of prompts, in the form in which transformers models take a cache."""

    def __init__(self, num_layers: int, owner: Tensor) -> None:
        self.owner = owner
        self.columns = 0
        super().__init__(layers=[_HeldLayer(self) for _ in range(num_layers)])


@torch.no_grad()
def can_share(base: PreTrainedModel, vocab_size: int) -> bool:
    """Whether a model computes the same in this way: asked of its configuration and of a trial.

    Args:
        base: The model without its head.
        vocab_size: Number of ids that the trial may feed.
    """
    config = base.config.get_text_config(decoder=True)
    if refuses(config) is not None or config._attn_implementation != "sdpa":
        return False
    ids = np.random.default_rng(0).integers(0, vocab_size, (4, 7))
    owner, begin = np.array([0, 0, 1, 1]), np.array([4, 4, 2, 2])
    ids[1, :4], ids[3, :2] = ids[0, :4], ids[2, :2]
    prompts = np.where(np.arange(4) < begin[::2, None], ids[::2, :4], 0)
    column = begin[:, None] + np.arange(2)
    rest = ids[np.arange(4)[:, None], column]
    arrays = (prompts, rest, owner, begin, column)
    trial = SharedPrompts(False, *(torch.from_numpy(x) for x in arrays)).to(base.device)
    row, column = np.array([(0, 3), (0, 5), (1, 5), (2, 1), (2, 3), (3, 2)]).T
    places = torch.from_numpy(row).to(base.device), torch.from_numpy(column).to(base.device)
    try:
        found = trial.hidden(base, *places)
        whole = base(input_ids=torch.from_numpy(ids).to(base.device), use_cache=False)
        return relative_error(found, whole.last_hidden_state[places]) <= tolerance(base.dtype)
    except Exception:  # whatever a foreign model does with a cache it does not know
        return False
