"""One decoding step with static shapes, and CUDA graphs of it.

A decoding step is a thousand small kernels, and starting them one by one takes many times longer
than they run. A graph starts all of them at once. Its shapes and addresses are fixed, so there is
one for each number of rows and of columns that are read, in coarse steps, all over the tensors of
the slot cache.

Shapes: S slots, s rows of a graph, c columns that it reads, k draws between two uploads, D hidden
size.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from textgym.policies.results import packed, to_device
from textgym.policies.slot_store import Ints
from textgym.policies.slot_window import SlotWindow, window_attention

if TYPE_CHECKING:
    from textgym.policies.causal_lm import CausalLMPolicy
    from textgym.policies.slot_cache import SlotDecoder
    from textgym.sampling import Sampler

STEPS = 8  # the most draws between two uploads
FEWEST_ROWS = 8
FEWEST_COLUMNS = 64
TOKEN, POSITION, KEYS = 0, 1, 2  # rows of the input; from KEYS on one for each draw


def decode_step(
    policy: CausalLMPolicy,
    decoder: SlotDecoder,
    window: SlotWindow,
    inputs: Tensor,
    turn: Tensor,
    log: Tensor,
    columns: Tensor,
    sampler: Sampler,
) -> Tensor:
    """Forward one token a row and draw the next: static shapes, and nothing the host must see.

    Args:
        policy: Draws.
        decoder: Forwards.
        window: What the forward writes and reads.
        inputs: int64 [2 + k, s]: tokens, the columns they are written to, keys of k draws.
        turn: int64 [1], which of the k draws this is.
        log: float64 [k, 3, s], gets what is drawn.
        columns: int64 [c], the columns that are read: 0 to c - 1.
        sampler: How to draw.

    Returns:
        Hidden states [s, D]. `inputs` and `turn` are those of the next step then.
    """
    base, spare = decoder.base, decoder.store.num_columns - 1
    token, position = inputs[TOKEN], inputs[POSITION]
    unseen = columns > position[:, None, None, None]
    lowest = torch.finfo(base.dtype).min if decoder.float_mask else float("-inf")
    # Added to the scores: as bool, every layer would turn it into numbers for itself.
    mask = torch.zeros(unseen.shape, dtype=base.dtype, device=unseen.device)
    window.position, window.width = position, len(columns)
    hidden: Tensor = base(
        input_ids=token[:, None],
        attention_mask=mask.masked_fill(unseen, lowest),
        position_ids=position.clamp(max=spare - 1)[:, None],
        past_key_values=window,
        use_cache=True,
    ).last_hidden_state[:, 0]
    key = inputs.index_select(0, turn + KEYS)[0]
    drawn = policy._draw(hidden, key, None, sampler)
    log.index_copy_(0, turn, packed(drawn)[None])
    turn.add_(1)
    token.copy_(drawn.action)
    # A row that has ended goes on through its own columns, and at last stays at the spare one.
    position.add_(1).clamp_(max=spare)
    return hidden


class StepGraphs:
    """Decoding steps over the slots of a decoder: captured on CUDA, the same step run elsewhere.

    Weights are updated in place, so graphs outlive updates. They are made again when the slot cache
    has grown, a weight has moved, or adapters were switched.

    Args:
        policy: Draws.
        decoder: Its slot cache.
    """

    def __init__(self, policy: CausalLMPolicy, decoder: SlotDecoder) -> None:
        # Weak, because they hold this: without a policy its memory must be free at once.
        self._policy, self._decoder = weakref.ref(policy), weakref.ref(decoder)
        self._window = SlotWindow(decoder.store)
        self.device = decoder.device
        self.graph_bytes = 0
        """Memory of the graphs' own tensors, which the slot cache is not one of."""
        self.captures = 0
        self._programs: dict[tuple[int, int, Sampler], Callable[[], Tensor]] = {}
        self._made_for: tuple[Any, ...] = ()
        self._weights: tuple[tuple[Any, ...], tuple[Any, ...]] = ((), ())
        self._compiled = policy.cuda_graphs == "compile"
        self._body = torch.compile(decode_step, fullgraph=True) if self._compiled else decode_step
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @property
    def policy(self) -> CausalLMPolicy:
        """Who draws."""
        found = self._policy()
        assert found is not None
        return found

    @property
    def decoder(self) -> SlotDecoder:
        """Whose slots."""
        found = self._decoder()
        assert found is not None
        return found

    def run(
        self, rows: Ints, token: Ints, position: Ints, key: NDArray[np.uint64], sampler: Sampler
    ) -> Tensor:
        """Forward a token of each row and draw the next one, k times, without waiting.

        Args:
            rows: [n]; they may be given other slots.
            token: [n], the last token of each row, which its slot does not hold yet.
            position: [n], its column. All columns before it are held.
            key: [n, k], keys of the draws, k at most `STEPS`.
            sampler: How to draw.

        Returns:
            Hidden states [s, D] of the last step, by slot. `log` holds what was drawn.
        """
        count, size = key.shape[1], self._seat(rows)
        self._fit()
        slots = self.decoder.slot[rows]
        inputs = np.zeros(self._inputs.shape, np.int64)
        # Slots without a row write to the spare column, which nobody reads.
        inputs[POSITION] = self.decoder.store.num_columns - 1
        inputs[TOKEN, slots], inputs[POSITION, slots] = token, position
        inputs[KEYS : KEYS + count, slots] = key.T.view(np.int64)
        self._load(to_device(inputs, self.device))
        step = self._program(size, self._width(int(position.max()) + count), sampler)
        for _ in range(count):
            hidden = step()
        return hidden

    @property
    def log(self) -> Tensor:
        """What `run` drew, float64 [STEPS, 3, S], by slot; see `packed`."""
        return self._log

    def _load(self, inputs: Tensor) -> None:
        self._inputs.copy_(inputs)
        self._turn.zero_()

    def _seat(self, rows: Ints) -> int:
        """Bring rows into the slots of the smallest graph that holds them: its number of rows.

        The sizes halve, so rows that end leave their places empty until half of the places are.
        """
        decoder = self.decoder
        size = decoder.store.num_slots
        while size > FEWEST_ROWS and len(rows) <= -(-size // 2):
            size = -(-size // 2)
        slots = decoder.slot[rows]
        outside = rows[slots >= size]
        if len(outside):
            decoder.move(outside, np.setdiff1d(np.arange(size), slots)[: len(outside)])
        return size

    def _width(self, needed: int) -> int:
        """Columns to read: a multiple of 64, for long sequences of a quarter of a power of two."""
        step = max(FEWEST_COLUMNS, (1 << needed.bit_length()) // 8)
        return min(-(-needed // step) * step, self.decoder.store.num_columns)

    def _fit(self) -> None:
        """Drop graphs whose tensors have moved."""
        decoder = self.decoder
        seen = (decoder.times_cleared, id(self.policy.value_head))
        if seen != self._weights[0]:
            self._weights = (seen, self._addresses())
        made_for = (decoder.store.version, *self._weights[1])
        if made_for == self._made_for:
            return
        if self.device.type == "cuda" and self._programs:
            torch.cuda.synchronize(self.device)  # none of them may still run
        self._programs.clear()
        self._made_for, self.graph_bytes = made_for, 0
        # One place more than slots: a view of all slots is then strided as one of some is, and what
        # was compiled for one serves the other.
        slots, device = decoder.store.num_slots + 1, self.device
        self._inputs = torch.zeros(KEYS + STEPS, slots, dtype=torch.int64, device=device)
        self._turn = torch.zeros(1, dtype=torch.int64, device=device)
        self._log = torch.zeros(STEPS, 3, slots, dtype=torch.float64, device=device)
        self._columns = torch.arange(decoder.store.num_columns, device=device)
        if device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()

    def _addresses(self) -> tuple[Any, ...]:
        """Where the weights are, and which adapters are on: what a graph has for good."""
        policy, base = self.policy, self.decoder.base
        tensors = itertools.chain(policy.parameters(), base.parameters(), base.buffers())
        modules: Iterator[Any] = base.modules()
        adapters = (
            (module.merged, module.disable_adapters, tuple(module.active_adapters))
            for module in modules
            if hasattr(module, "active_adapters") and hasattr(module, "merged")
        )
        return (*(tensor.data_ptr() for tensor in tensors), *adapters)

    def _program(self, size: int, width: int, sampler: Sampler) -> Callable[[], Tensor]:
        """The step for the first `size` slots and `width` columns, with the inputs as they are."""
        known = self._programs.get((size, width, sampler))
        if known is None:
            known = self._programs[size, width, sampler] = self._make(size, width, sampler)
        return known

    def _make(self, size: int, width: int, sampler: Sampler) -> Callable[[], Tensor]:
        inputs, log = self._inputs[:, :size], self._log[:, :, :size]
        columns = self._columns[:width]
        if self._compiled:  # else every size would be compiled for itself
            torch._dynamo.maybe_mark_dynamic(inputs, 1)
            torch._dynamo.maybe_mark_dynamic(log, 2)
            torch._dynamo.maybe_mark_dynamic(columns, 0)
        step = partial(
            self._body,
            self.policy,
            self.decoder,
            self._window,
            inputs,
            self._turn,
            log,
            columns,
            sampler,
        )

        def run() -> Tensor:
            with window_attention(self.decoder.base):
                return step()

        if self.device.type != "cuda":
            return run
        saved = self._inputs.clone()
        graph, hidden = self._capture(run)
        self._load(saved)

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay

    def _capture(self, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Capture a step; its inputs are not those of now afterwards."""
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                run()  # kernels, workspaces and slots are set up at their first use
                with nullcontext() if self.captures else _no_waits():
                    run()
        finally:
            here.wait_stream(self._stream)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the GPU meanwhile (rewards that run a model, process groups).
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                hidden = run()
        except BaseException:
            torch.cuda.set_stream(here)  # a capture that fails leaves its own stream behind
            raise
        self.graph_bytes += torch.cuda.memory_reserved(self.device) - before
        self.decoder.store.stays = True
        self.captures += 1
        return graph, hidden


@contextmanager
def _no_waits() -> Iterator[None]:
    """Make waiting for the device an error, before a capture: one that fails leaves traces."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
