"""Whole responses without an environment: the device loop.

The tokens are those of a loop of `act` and `step`: the same keys, the same slots, the same forward.

Shapes: B responses, N rows that decode at once, n live rows, T longest response, k draws.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from textgym import streams
from textgym.policies.graph_decode import GraphDecode, graphs_for
from textgym.policies.results import ActResult, Drawn, Generation, to_device, to_host

if TYPE_CHECKING:
    from textgym.policies.causal_lm import CausalLMPolicy

Ints = NDArray[np.int64]
ACCELERATOR_STEPS = 8
STRETCH = 8
"""Tokens that are written down at once where the host looks at each, and none ends a response."""
REFILL_SHARE = 8
"""Rows wait for new prompts until one in so many is free: prefills of a few rows cost too much."""


def steps_between_looks(device: torch.device) -> int:
    """How many tokens are drawn before the host looks which rows have ended."""
    return 1 if device.type == "cpu" else ACCELERATOR_STEPS


def write_responses(
    policy: CausalLMPolicy,
    ids: Ints,
    length: Ints,
    stream: NDArray[Any],
    sample_index: NDArray[Any],
    max_new_tokens: int,
    stop_ids: Collection[int],
    mask: Tensor | None,
    num_rows: int | None = None,
) -> Generation:
    """Draw tokens until every response has ended.

    A row that has ended leaves the batch, and is given the next prompt as soon as some more are
    free. On an accelerator the host looks only every few tokens, so that it never waits for one:
    what is drawn after a response's end is thrown away.

    Args:
        policy: Whose tokens.
        ids: [B, L] prompts.
        length: [B].
        stream: [B].
        sample_index: [B].
        max_new_tokens: T, the longest response.
        stop_ids: Ids that end a response.
        mask: Bool [B, V] or None.
        num_rows: N; None: all at once.
    """
    total = len(ids)
    number = total if num_rows is None else min(num_rows, total)
    graphs = None
    if mask is None:
        columns = int(length.max()) + max_new_tokens
        graphs = graphs_for(policy, policy.sampler, np.arange(number), columns)
    kind: Callable[..., _Responses] = (
        _Responses if graphs is None else partial(_GraphResponses, graphs)
    )
    made = kind(policy, ids, length, stream, sample_index, max_new_tokens, stop_ids, mask)
    playing = np.full(number, -1, np.int64)  # the response that a row writes; -1: none
    queued = 0
    live, hidden = np.zeros(0, np.int64), None
    while True:
        free = np.flatnonzero(playing < 0)
        if queued < total and (not len(live) or len(free) * REFILL_SHARE >= number):
            rows = free[: total - queued]
            playing[rows] = np.arange(queued, queued + len(rows))
            queued += len(rows)
            first = made.begin(rows, playing[rows])
            both = np.concatenate([live, rows])
            order = np.argsort(both)
            live = both[order]
            hidden = first if hidden is None else torch.cat([hidden, first])
            hidden = hidden[torch.from_numpy(order).to(hidden.device)]
        if hidden is None:
            return made.result()
        drawn, staying = made.draw(hidden, live, playing[live])
        if not staying.all():
            ended = live[~staying]
            made.end(ended, playing[ended])
            playing[ended] = -1
            live = live[staying]
        hidden = made.follow(drawn, staying, live, playing[live]) if len(live) else None


class _Responses:
    """What has been written so far, and how a few tokens more are."""

    def __init__(
        self,
        policy: CausalLMPolicy,
        ids: Ints,
        length: Ints,
        stream: NDArray[Any],
        sample_index: NDArray[Any],
        max_new_tokens: int,
        stop_ids: Collection[int],
        mask: Tensor | None,
    ) -> None:
        total, self.longest = len(ids), max_new_tokens
        self.policy, self.length, self.mask = policy, length, mask
        self.device = policy.device
        self.buffer = np.zeros((total, int(length.max()) + max_new_tokens), np.int64)
        self.buffer[:, : ids.shape[1]] = ids[:, : self.buffer.shape[1]]
        self.stop = np.array(sorted(stop_ids), np.int64)
        self.tokens = np.zeros((total, max_new_tokens), np.int64)
        self.logprob, self.value = np.zeros((2, total, max_new_tokens), np.float32)
        self.count = np.zeros(total, np.int64)
        position = length[:, None] + np.arange(max_new_tokens)
        self.bits = streams.mix64(policy.seed, stream[:, None], sample_index[:, None], position)
        self.decoder = policy._slot_decoder()
        self.every = 1 if self.decoder is None else steps_between_looks(self.device)
        on_host = self.decoder is not None and self.device.type == "cpu"
        self.peeks = on_host and self.every == 1  # looks at each token, which is there

    def begin(self, rows: Ints, which: Ints) -> Tensor:
        """Read the prompts of some responses into rows: hidden states [n, D] of their last ids."""
        return self.policy._hidden_last(self.buffer[which], self.length[which], rows)

    def draw(
        self, hidden: Tensor, rows: Ints, which: Ints
    ) -> tuple[Drawn | None, NDArray[np.bool_]]:
        """Draw the next tokens of some responses, and write down those before their ends.

        Returns:
            The last draw, and which responses go on, bool [n].
        """
        keys = self.keys(which)
        key = to_device(keys.view(np.int64), self.device)
        mask = None if self.mask is None else self.mask[to_device(which, self.device)]
        waiting: list[Drawn] = []
        for draw in range(keys.shape[1]):
            if waiting:
                assert self.decoder is not None
                hidden = self.decoder.append(waiting[-1].action, rows)
            waiting.append(self.policy._draw(hidden, key[:, draw], mask))
            if self.peeks and self._stops(waiting[-1].action.numpy()).any():
                break
        return waiting[-1], self._note(to_host(waiting), which)

    def keys(self, which: Ints) -> NDArray[np.uint64]:
        """Keys [n, k] of the next draws, until the host looks again."""
        count = self.count[which]
        if self.peeks:  # until the first of them is cut
            draws = min(STRETCH, self.longest - int(count.max()))
        else:
            draws = min(self.every, self.longest - int(count.min()))
        at = np.minimum(count[:, None] + np.arange(draws), self.longest - 1)
        bits: NDArray[np.uint64] = self.bits[which[:, None], at]
        return bits

    def _note(self, got: ActResult, which: Ints) -> NDArray[np.bool_]:
        """Write down k draws [k, n]; returns which responses go on."""
        action, logprob, value = got.action.T, got.logprob.T, got.value.T  # [n, k]
        draws = np.arange(action.shape[1])
        at = self.count[which][:, None] + draws
        ends = self._stops(action) | (at + 1 >= self.longest)
        staying = np.logical_not(ends.any(1))
        written = np.where(staying, len(draws), ends.argmax(1) + 1)
        row, draw = np.nonzero(draws < written[:, None])
        place = which[row], at[row, draw]
        self.tokens[place] = action[row, draw]
        self.logprob[place] = logprob[row, draw]
        self.value[place] = value[row, draw]
        self.buffer[which[row], self.length[which[row]] + place[1]] = action[row, draw]
        self.count[which] += written
        return staying

    def _stops(self, action: Ints) -> NDArray[np.bool_]:
        """Which tokens end a response."""
        if not len(self.stop):
            return np.zeros(action.shape, np.bool_)
        found: NDArray[np.bool_] = (action[..., None] == self.stop).any(-1)
        return found

    def follow(
        self, drawn: Drawn | None, staying: NDArray[np.bool_], rows: Ints, which: Ints
    ) -> Tensor:
        """Append what was drawn last to the rows that go on: hidden states [n, D]."""
        if self.decoder is None:
            return self.policy._hidden_last(
                self.buffer[which], self.length[which] + self.count[which], rows
            )
        assert drawn is not None
        action = drawn.action
        if not staying.all():
            action = action[torch.from_numpy(np.flatnonzero(staying)).to(action.device)]
        return self.decoder.append(action, rows)

    def end(self, rows: Ints, which: Ints) -> None:
        """Tell the cache which ids it holds: those up to the end, and not what came after."""
        if self.decoder is not None:
            self.decoder.note(rows, self.buffer[which])
            held = np.minimum(self.decoder.held[rows], self.length[which] + self.count[which])
            self.decoder.held[rows] = held

    def result(self) -> Generation:
        """All responses."""
        longest = int(self.count.max())
        return Generation(
            self.tokens[:, :longest], self.logprob[:, :longest], self.value[:, :longest], self.count
        )


class _GraphResponses(_Responses):
    """The same by graphs, which forward the last ids themselves: hidden states stay with them."""

    def __init__(self, graphs: GraphDecode, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.graphs, self.peeks = graphs, False

    def begin(self, rows: Ints, which: Ints) -> Tensor:
        assert self.decoder is not None
        self.decoder.fill(self.buffer[which], self.length[which], rows)
        return torch.empty(len(rows), 0)

    def draw(
        self, hidden: Tensor, rows: Ints, which: Ints
    ) -> tuple[Drawn | None, NDArray[np.bool_]]:
        position = self.length[which] + self.count[which] - 1
        token = self.buffer[which, position]
        got = self.graphs.write(rows, token, position, self.keys(which), self.policy.sampler)
        return None, self._note(got, which)

    def follow(
        self, drawn: Drawn | None, staying: NDArray[np.bool_], rows: Ints, which: Ints
    ) -> Tensor:
        return torch.empty(len(rows), 0)
