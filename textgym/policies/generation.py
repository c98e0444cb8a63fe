"""Whole responses without an environment: the device loop.

The tokens are those of a loop of `act` and `step`: the same keys, the same slots, the same forward.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from textgym import streams
from textgym.policies.results import Drawn, Generation, to_host

if TYPE_CHECKING:
    from textgym.policies.causal_lm import CausalLMPolicy

Ints = NDArray[np.int64]
ACCELERATOR_STEPS = 8


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
) -> Generation:
    """Draw tokens until every row has ended.

    On the CPU a row leaves the batch with its last token. On an accelerator the host looks only
    every few tokens, so that it never waits for one: what is drawn after a row's end is thrown
    away.

    Args:
        policy: Whose tokens.
        ids: [n, L] prompts.
        length: [n].
        stream: [n].
        sample_index: [n].
        max_new_tokens: T, the longest response.
        stop_ids: Ids that end a response.
        mask: Bool [n, V] or None.
    """
    n, device = len(ids), policy.device
    rows = np.arange(n)
    buffer = np.zeros((n, int(length.max()) + max_new_tokens), np.int64)
    buffer[:, : ids.shape[1]] = ids[:, : buffer.shape[1]]
    stop = np.array(sorted(stop_ids), np.int64)
    tokens = np.zeros((n, max_new_tokens), np.int64)
    logprob, value = np.zeros((2, n, max_new_tokens), np.float32)
    count = np.zeros(n, np.int64)
    position = length[:, None] + np.arange(max_new_tokens)
    key = streams.mix64(policy.seed, stream[:, None], sample_index[:, None], position)
    keys = torch.from_numpy(key.view(np.int64)).to(device)
    decoder = policy._slot_decoder()
    every = 1 if decoder is None else steps_between_looks(device)
    live = rows
    hidden = policy._hidden_last(ids, length, rows)
    waiting: list[Drawn] = []
    here = torch.from_numpy(rows).to(device)
    for step in range(max_new_tokens):
        drawn = policy._draw(hidden, keys[here, step], None if mask is None else mask[here])
        waiting.append(drawn)
        last = step + 1 == max_new_tokens
        if len(waiting) == every or last:
            begin = step + 1 - len(waiting)
            got = to_host(waiting)
            waiting = []
            now = np.arange(begin, step + 1)
            ended = np.isin(got.action, stop)  # [k, live]
            kept = np.where(ended.any(0), ended.argmax(0) + 1, len(now))
            real = np.arange(len(now))[:, None] < kept
            for held, field in ((tokens, got.action), (logprob, got.logprob), (value, got.value)):
                held[live[None, :], now[:, None]] = np.where(real, field, 0)
            buffer[live[None, :], length[live] + now[:, None]] = got.action
            count[live] += kept
            staying = np.flatnonzero(~ended.any(0))
            if last or not len(staying):
                break
            if len(staying) < len(live):
                live = live[staying]
                chosen = torch.from_numpy(staying).to(device)
                here, drawn = here[chosen], drawn.take(chosen)
        if decoder is None:
            hidden = policy._hidden_last(buffer[live], length[live] + step + 1, live)
        else:
            hidden = decoder.append(drawn.action, live)
    if decoder is not None:
        decoder.note(rows, buffer)
    longest = int(count.max())
    return Generation(tokens[:, :longest], logprob[:, :longest], value[:, :longest], count)
