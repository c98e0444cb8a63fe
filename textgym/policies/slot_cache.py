"""Slot cache: keys and values of N sequences that grow, reset and are rewritten independently.

Every environment row owns a slot with its own write position. A call names the ids of the rows;
what a slot already holds is kept, what differs is prefilled, equal sequences are prefilled once and
copied. Column and position agree, because every sequence starts at column 0.

The bookkeeping is on the host (NumPy), so a decode step on an accelerator waits for nothing but its
tokens.

Shapes: n rows of a call, L columns, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from textgym.policies.cpu_attention import cpu_attention
from textgym.policies.results import to_device
from textgym.policies.slot_store import Ints, Plan, SlotStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from textgym.policies.graph_decode import GraphDecode
    from textgym.policies.joined_step import JoinedStep

PREFILL_TOKENS = 32_768  # the most padded tokens in one prefill forward; bounds its memory


class SlotDecoder:
    """Incremental forward of a causal LM over slots.

    `hidden(ids, length)` equals the full forward of every row, read at its last token.

    Args:
        base: The model without its head: called with `input_ids`, `attention_mask` (4-D or None),
            `position_ids` and `past_key_values`, it returns `last_hidden_state`.
        num_layers: Number of layers that hold keys and values.
        float_mask: Whether the attention adds its mask (eager) instead of taking a boolean one
            (sdpa).
    """

    def __init__(self, base: PreTrainedModel, num_layers: int, *, float_mask: bool) -> None:
        self.base = base
        self.float_mask = float_mask
        self.store = SlotStore(num_layers)
        self.step: JoinedStep | None = None
        """Computes decoding steps in the model's stead, as long as nobody looks into the model."""
        # The ids that row r holds are the first held[r] columns of tokens[r].
        self.tokens: Ints = np.zeros((0, 0), np.int64)
        self.held: Ints = np.zeros(0, np.int64)
        self.slot: Ints = np.zeros(0, np.int64)  # the slot of row r
        self._last_rows: Ints | None = None
        self._ordered: tuple[bytes, int] = b"", 0  # rows whose slots are a range, and its start
        self.graphs: GraphDecode | None = None
        self.prefilled_rows = 0
        self.prefilled_tokens = 0
        self.times_cleared = 0

    def __del__(self) -> None:
        for layer in self.store.slot_layers:  # they and the store hold each other
            layer.drop()

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.base.parameters()).device

    def clear(self) -> None:
        """Forget everything (the weights have changed) and free the memory until the next call."""
        self.times_cleared += 1
        self.held[:] = 0
        # Rows go back to slots of their own: the order of rows in a matrix product decides how it
        # rounds, and a run that goes on must round as one that was resumed.
        self.slot = np.arange(len(self.slot))
        self._ordered = b"", 0
        self._last_rows = None
        self.store.forget()
        if self.step is not None:
            self.step.forget()

    @torch.inference_mode()  # always the same mode: tensors of one may not be written in the other
    def hidden(self, ids: Ints, length: Ints, rows: Ints | None = None) -> Tensor:
        """Hidden state of each row's last token, computing only what the slots do not hold.

        Args:
            ids: [n, L], right-padded; what the padding holds does not matter.
            length: [n], at least 1.
            rows: [n], the slot that each row uses, all different; None means 0 to n - 1.

        Returns:
            [n, D] in the model's dtype.
        """
        n, columns = ids.shape
        rows = np.arange(n) if rows is None else rows
        self.reserve(int(rows.max()) + 1, columns)
        keep = self._borrow(ids, length, rows)
        missing = length - 1 - keep
        with self._all_or_nothing():
            if missing.any() and not keep.any():
                hidden = self._prefill_all(ids, length, rows)
            else:
                if missing.any():
                    self._prefill_missing(ids, keep, missing, rows)
                last = to_device(ids[np.arange(n), length - 1], self.device)
                hidden = self._decode(last, length - 1, rows)
        self.tokens[rows, :columns] = ids
        self.held[rows] = length
        return hidden

    @torch.inference_mode()
    def fill(self, ids: Ints, length: Ints, rows: Ints) -> None:
        """Compute what is missing before the last token of each row; arguments as in `hidden`."""
        self.reserve(int(rows.max()) + 1, ids.shape[1])
        keep = self._borrow(ids, length, rows)
        with self._all_or_nothing():
            if (keep < length - 1).any():
                self._prefill_missing(ids, keep, length - 1 - keep, rows)
        self.tokens[rows, : ids.shape[1]] = ids
        self.held[rows] = length - 1

    def agreeing(self, ids: Ints, length: Ints, rows: Ints) -> Ints:
        """How many of its first ids each row holds, [n]; at least its length when it holds all."""
        longest = int(length.max())
        differs = ids[:, :longest] != self.tokens[rows, :longest]
        differs &= np.arange(longest) < np.minimum(length, self.held[rows])[:, None]
        return np.where(differs.any(1), differs.argmax(1), self.held[rows])

    def _borrow(self, ids: Ints, length: Ints, rows: Ints) -> Ints:
        """How many ids before the last one each row holds, [n], once it has copied from others.

        A group's members begin at different times where rows are refilled; the later ones find the
        prompt in the slots of the earlier.
        """
        keep = np.minimum(self.agreeing(ids, length, rows), length - 1)
        to, of = [], []
        for i in np.flatnonzero(keep < length - 1):
            stop = int(length[i]) - 1
            others = np.flatnonzero(self.held >= stop)
            same = (self.tokens[others, :stop] == ids[i, :stop]).all(1)
            if same.any():
                to.append(rows[i])
                of.append(others[same.argmax()])
                keep[i] = stop
        if to:
            with self._all_or_nothing():
                width = int(length.max()) - 1
                self.store.copy(self.slot[np.array(to)], self.slot[np.array(of)], width)
        return keep

    def append(self, tokens: Tensor, rows: Ints) -> Tensor:
        """Append one token to each row without looking at it on the host; the loop of `generate`.

        In inference mode, as all that writes into slots: here it is the caller's.

        Args:
            tokens: int64 [n] on the model's device.
            rows: [n].

        Returns:
            Hidden state of the appended tokens, [n, D]. Until `note` says what they were, no ids
            match them.
        """
        pos = self.held[rows]
        self.reserve(int(rows.max()) + 1, int(pos.max()) + 1)
        with self._all_or_nothing():
            hidden = self._decode(tokens, pos, rows)
        self.tokens[rows, pos] = -1
        self.held[rows] = pos + 1
        return hidden

    def note(self, rows: Ints, ids: Ints) -> None:
        """Tell which ids [n, L] the rows hold after `append`."""
        self.tokens[rows, : ids.shape[1]] = ids[:, : self.tokens.shape[1]]

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Forget everything when a forward is interrupted (Ctrl-C, no memory) half-way."""
        try:
            yield
        except BaseException:
            self.clear()
            raise

    def reserve(self, num_rows: int, columns: int) -> None:
        """Make room for at least so many rows and columns."""
        old_rows, old_columns = self.tokens.shape
        if num_rows > old_rows or columns > old_columns:
            shape = (max(num_rows, old_rows), max(columns, old_columns))
            tokens = np.full(shape, -1, np.int64)
            tokens[:old_rows, :old_columns] = self.tokens
            held = np.zeros(shape[0], np.int64)
            held[:old_rows] = self.held
            slot = np.arange(shape[0])
            slot[:old_rows] = self.slot
            self.tokens, self.held, self.slot = tokens, held, slot
            self._ordered = b"", 0
            # One spare column takes what the padding of a ragged prefill writes.
            self.store.grow(shape[0], shape[1] + 1)

    def _forward(self, tokens: Tensor, plan: Plan) -> Tensor:
        self.store.plan = plan
        mask: Tensor | None = None
        if self.float_mask or not (plan.fresh or plan.column is not None):
            mask = torch.arange(plan.kv, device=tokens.device) <= plan.pos[:, None, :, None]
            if self.float_mask:
                lowest = torch.finfo(self.base.dtype).min
                mask = torch.where(mask, 0.0, lowest).to(self.base.dtype)
        position_ids = plan.pos.clamp(max=self.store.num_columns - 2)
        with cpu_attention(self.base, applies=not plan.fresh and tokens.shape[1] == 1):
            out = self.base(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=self.store,
                use_cache=True,
            )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _decode(self, tokens: Tensor, pos: Ints, rows: Ints) -> Tensor:
        """Forward one token a row, at column `pos` [n]; all earlier columns are held."""
        last = int(pos.max())
        start, order = self._place(rows, last)
        if order is not None:
            on_device = to_device(order, tokens.device)
            tokens, pos, rows = tokens[on_device], pos[order], rows[order]
        plan = Plan(
            slots=to_device(self.slot[rows], tokens.device),
            pos=to_device(pos[:, None], tokens.device),
            kv=last + 1,
            start=start,
            column=last if start is not None and int(pos.min()) == last else None,
        )
        if self.step is not None and self.step.applies:
            self.store.plan = plan
            hidden = self.step(tokens, plan)
        else:
            hidden = self._forward(tokens[:, None], plan)[:, 0]
        if order is not None:
            hidden = torch.empty_like(hidden).index_copy_(0, on_device, hidden)
        return hidden

    def _place(self, rows: Ints, columns: int) -> tuple[int | None, Ints | None]:
        """Find or make a range of slots for the rows, so that attention reads a view, not a copy.

        Rows that finish leave holes. Filling a hole moves one slot once, while reading around it
        copies every slot at every step; but callers may also alternate between groups of rows, and
        then moving would never end. So slots move only when few have to, or when the same rows come
        a second time.

        Returns:
            The start of the range (None: no range) and the order in which the rows fill it (None:
            as they are).
        """
        asked = rows.tobytes()
        if asked == self._ordered[0]:
            return self._ordered[1], None
        slots = self.slot[rows]
        n, low = len(rows), int(slots.min())
        if int(slots.max()) + 1 - low != n:
            holes = np.setdiff1d(np.arange(n), slots)
            again = self._last_rows is not None and np.array_equal(rows, self._last_rows)
            self._last_rows = rows.copy()
            if 3 * len(holes) > n and not again:
                return None, None
            self.move(rows[slots >= n], holes, columns)
            slots, low = self.slot[rows], 0
        if (slots == np.arange(low, low + n)).all():
            self._ordered = asked, low
            return low, None
        return low, np.argsort(slots)

    def move(self, rows: Ints, slots: Ints, columns: int = 0) -> None:
        """Move rows into slots, and who is there into theirs; at least the first columns."""
        others = np.argsort(self.slot)[slots]  # every slot is some row's
        theirs = self.slot[rows].copy()
        both, swapped = np.concatenate([slots, theirs]), np.concatenate([theirs, slots])
        width = max(columns, int(self.held[others].max()), int(self.held[rows].max()))
        self.store.copy(both, swapped, width)
        self.slot[others], self.slot[rows] = theirs, slots
        self._ordered = b"", 0

    def _prefill_all(self, ids: Ints, length: Ints, rows: Ints) -> Tensor:
        """Compute whole sequences, equal ones once: the hidden states of their last tokens."""
        groups: dict[bytes, list[int]] = {}
        for i, stop in enumerate(length):
            groups.setdefault(ids[i, :stop].tobytes(), []).append(i)
        leaders = np.array([members[0] for members in groups.values()])
        hidden: Tensor | None = None
        for part in _batches(length[leaders]):
            some = leaders[part]
            out = self._prefill(ids, np.zeros(len(some), np.int64), length[some], some, rows)
            last = to_device(length[some] - 1, out.device)
            out = out[torch.arange(len(some), device=out.device), last]
            if hidden is None:
                hidden = out.new_empty(len(rows), out.shape[-1])
            hidden[to_device(some, out.device)] = out
        assert hidden is not None
        followers = [(i, members[0]) for members in groups.values() for i in members[1:]]
        if followers:
            to, of = np.array(followers).T
            self.store.copy(self.slot[rows[to]], self.slot[rows[of]], int(length[of].max()))
            hidden[to_device(to, hidden.device)] = hidden[to_device(of, hidden.device)]
        return hidden

    def _prefill_missing(self, ids: Ints, keep: Ints, missing: Ints, rows: Ints) -> None:
        """Compute what lies between the kept prefix and the last token of each row."""
        fresh = np.flatnonzero((missing > 0) & (keep == 0))
        if len(fresh):
            # All but the last token, as sequences of their own.
            self._prefill_all(ids[fresh], missing[fresh], rows[fresh])
        partial = np.flatnonzero((missing > 0) & (keep > 0))
        for part in _batches(missing[partial]):
            some = partial[part]
            self._prefill(ids, keep[some], missing[some], some, rows)

    def _prefill(self, ids: Ints, keep: Ints, count: Ints, some: Ints, rows: Ints) -> Tensor:
        """Forward `count` [k] tokens after the `keep` [k] held ones, for rows `some` of a call.

        Returns:
            Hidden states [k, largest count, D].
        """
        width = int(count.max())
        self.prefilled_rows += len(some)
        self.prefilled_tokens += int(count.sum())
        offset = np.arange(width)
        pos = keep[:, None] + offset
        real = offset < count[:, None]
        columns = np.where(real, pos, 0)
        tokens = np.where(real, ids[some[:, None], columns], 0)
        # Padding writes beyond the row's own columns, where nothing is held yet, and at most to the
        # spare column.
        pos = np.where(real, pos, np.minimum(pos, self.store.num_columns - 1))
        plan = Plan(
            slots=to_device(self.slot[rows[some]], self.device),
            pos=to_device(pos, self.device),
            kv=int((keep + count).max()) if keep.any() else width,
            fresh=not keep.any(),
        )
        return self._forward(to_device(tokens, self.device), plan)


def _batches(count: Ints) -> list[Ints]:
    """Split sequences into prefill forwards with little padding: indices, the longest first.

    A forward holds sequences at least a quarter as long as its longest one, up to `PREFILL_TOKENS`
    padded tokens.
    """
    batches: list[Ints] = []
    order = np.argsort(-count, kind="stable")
    begin = 0
    while begin < len(order):
        longest = int(count[order[begin]])
        limit = begin + max(1, PREFILL_TOKENS // longest)
        end = begin + int(np.count_nonzero(count[order[begin:limit]] * 4 >= longest))
        batches.append(order[begin:end])
        begin = end
    return batches
