"""Decoding on a GPU with little of the host: whole responses, and one token ahead.

What is drawn becomes the next input on the device (`graph_step`). The host looks once for several
tokens of whole responses. With an environment between the tokens (`act`) it starts the next step
before the environment has answered: while that steps, the device computes the next token of every
row as if nothing had ended. Rows whose observation then says just that take it, or, where the draw
has another key or a mask that only the environment knew, draw from what was computed; the others
are computed as usual.

Shapes: n rows of a call, R rows known to the slot cache, S slots, k draws, L columns.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from textgym import streams
from textgym.policies.cache_support import relative_error, tolerance
from textgym.policies.graph_step import StepGraphs
from textgym.policies.results import ActResult, packed, to_device, unpacked
from textgym.policies.slot_store import Ints

if TYPE_CHECKING:
    from textgym.policies.causal_lm import CausalLMPolicy
    from textgym.policies.slot_cache import SlotDecoder
    from textgym.sampling import Sampler

DEVICES = ("cuda",)


def graphs_for(
    policy: CausalLMPolicy, sampler: Sampler, rows: Ints, columns: int
) -> GraphDecode | None:
    """Give what decodes a policy by graphs, or None where they do not apply.

    Args:
        policy: Whose tokens.
        sampler: How they will be drawn.
        rows: [n], the rows that will be used.
        columns: How long they may become.

    Raises:
        RuntimeError: They were asked for, and the model cannot be captured.
    """
    if not policy.cuda_graphs or policy.device.type not in DEVICES or sampler.truncates:
        return None
    decoder = policy._slot_decoder()
    if decoder is None:
        return None
    if decoder.graphs is None:
        decoder.reserve(int(rows.max()) + 1, columns)  # growing later would make all graphs again
        decoder.graphs = GraphDecode(policy, decoder)
        reason = decoder.graphs.refusal(sampler)
        if reason is not None:
            decoder.graphs.refused = True
            message = f"{type(policy._core).__name__} decodes without CUDA graphs: {reason}"
            if policy.cuda_graphs != "auto":
                raise RuntimeError(message)
            warnings.warn(message, UserWarning, stacklevel=4)
    return None if decoder.graphs.refused else decoder.graphs


def check_cuda_graphs(
    setting: bool | Literal["auto", "compile"], device: torch.device
) -> bool | Literal["auto", "compile"]:
    """Give the setting of a policy on that device.

    Raises:
        ValueError: There is no such setting, or it needs another device.
    """
    if setting not in (False, True, "auto", "compile"):
        raise ValueError(f'cuda_graphs: expected True, False, "auto" or "compile", got {setting!r}')
    if setting in (True, "compile") and device.type not in DEVICES:
        raise ValueError(
            f'cuda_graphs={setting!r} needs a policy on a CUDA device, this one is on "{device}"; '
            'leave it at "auto"'
        )
    return setting


@dataclass(frozen=True)
class _Ahead:
    """Tokens that are computed before they are asked for."""

    drawn: Tensor
    """float64 [3, S], by slot, still on the device."""
    hidden: Tensor
    """[s, D], by slot, from which they were drawn."""
    slot: Ints
    """[R] where each row was then."""
    length: Ints
    """[R] at which length each row draws; 0: none."""
    key: NDArray[np.uint64]
    """[R] with which key."""
    sampler: Sampler
    times_cleared: int


class GraphDecode:
    """Decodes a policy by graphs over the slots of its cache.

    Args:
        policy: Whose tokens.
        decoder: Its slot cache.
    """

    def __init__(self, policy: CausalLMPolicy, decoder: SlotDecoder) -> None:
        self.steps = StepGraphs(policy, decoder)
        self.refused = False
        self._ahead: _Ahead | None = None

    def refusal(self, sampler: Sampler) -> str | None:
        """Try a step, which empties the cache: why there can be no graphs of this model, or None.

        Raises:
            FloatingPointError: The ordinary step is not finite either.
        """
        policy, decoder = self.steps.policy, self.steps.decoder
        rows = np.arange(min(3, len(decoder.slot)))
        columns = min(8, decoder.tokens.shape[1])
        length = np.maximum(1, columns - np.array([3, 0, 5])[rows])
        ids = np.random.default_rng(0).integers(0, policy.vocab_size, (len(rows), columns))
        try:
            decoder.fill(ids, length, rows)
            key = streams.mix64(0, rows[:, None])
            found = self.steps.run(rows, ids[rows, length - 1], length - 1, key, sampler)
            found = found[to_device(decoder.slot[rows], found.device)].clone()
            error = relative_error(found, decoder.hidden(ids, length, rows))
        except FloatingPointError:
            raise
        except Exception as problem:  # whatever a foreign model does that a graph cannot hold
            return f"a step cannot be captured: {type(problem).__name__}: {problem}"
        finally:
            decoder.clear()
        if not error <= tolerance(decoder.base.dtype):
            return f"a captured step differs from the ordinary one by {error:.1e} (relative)"
        return None

    @torch.inference_mode()
    def write(
        self, rows: Ints, token: Ints, position: Ints, key: NDArray[np.uint64], sampler: Sampler
    ) -> ActResult:
        """Append a token to each row and draw the k next ones; the host waits once.

        Args:
            rows: [n], with columns for all that is to be kept.
            token: [n], the last token of each row, which its slot does not hold yet.
            position: [n], its column. All columns before it are held.
            key: [n, k], keys of the draws, k at most `graph_step.STEPS`.
            sampler: How to draw.

        Returns:
            Fields [k, n]. What was drawn after a row's end is for the caller to drop.
        """
        decoder, count = self.steps.decoder, key.shape[1]
        self._ahead = None
        with decoder._all_or_nothing():
            self.steps.run(rows, token, position, key, sampler)
            host = self.steps.log[:count].cpu().numpy().swapaxes(0, 1)
            made = unpacked(host[:, :, decoder.slot[rows]])
        columns = decoder.tokens.shape[1]
        for step, tokens in enumerate([token, *made.action]):
            inside = position + step < columns
            decoder.tokens[rows[inside], (position + step)[inside]] = tokens[inside]
        decoder.held[rows] = np.minimum(position + count, columns)
        return made

    @torch.inference_mode()
    def act(
        self,
        ids: Ints,
        length: Ints,
        rows: Ints,
        stream: NDArray[Any],
        sample_index: NDArray[Any],
        mask: Tensor | None,
        sampler: Sampler,
    ) -> ActResult:
        """`CausalLMPolicy.act`; the host waits once.

        Args:
            ids: [n, L], right-padded.
            length: [n].
            rows: [n].
            stream: [n].
            sample_index: [n].
            mask: Bool [n, V] on the device, or None.
            sampler: How to draw.
        """
        policy, decoder, ahead = self.steps.policy, self.steps.decoder, self._ahead
        key = streams.mix64(policy.seed, stream, sample_index, length)
        forwarded = self._forwarded(ids, length, rows)
        known = np.zeros(len(rows), np.bool_)
        if ahead is not None and ahead.sampler == sampler and mask is None:
            known[forwarded] = ahead.key[rows[forwarded]] == key[forwarded]
        hidden, drawn = [], []
        where = np.zeros(len(rows), np.int64)  # in which column of what is fetched each row is
        if ahead is not None and known.any():
            drawn.append(ahead.drawn)
            where[known] = ahead.slot[rows[known]]
        redrawn, computed = np.flatnonzero(forwarded & ~known), np.flatnonzero(~forwarded)
        if ahead is not None and len(redrawn):
            slots = to_device(ahead.slot[rows[redrawn]], ahead.hidden.device)
            hidden.append(ahead.hidden.index_select(0, slots))
        if len(computed):
            hidden.append(decoder.hidden(ids[computed], length[computed], rows[computed]))
        if hidden:
            rest = np.concatenate([redrawn, computed])
            where[rest] = np.arange(len(rest)) + (drawn[0].shape[1] if drawn else 0)
            keys = to_device(key[rest].view(np.int64), hidden[0].device)
            some = None if mask is None else mask[to_device(rest, mask.device)]
            drawn.append(packed(policy._draw(torch.cat(hidden), keys, some, sampler)))
        made = unpacked(torch.cat(drawn, 1).cpu().numpy()[:, where])
        following = streams.mix64(policy.seed, stream, sample_index, length + 1)
        self._look_ahead(rows, made.action, length, following, sampler)
        return made

    def _forwarded(self, ids: Ints, length: Ints, rows: Ints) -> NDArray[np.bool_]:
        """For which rows the step ahead was that of their last id: their slots hold just these."""
        ahead, decoder = self._ahead, self.steps.decoder
        if (
            ahead is None
            or ahead.times_cleared != decoder.times_cleared
            or int(rows.max()) >= len(ahead.length)
            or int(length.max()) > decoder.tokens.shape[1]
        ):
            return np.zeros(len(rows), np.bool_)
        found: NDArray[np.bool_] = (ahead.length[rows] == length) & (
            decoder.agreeing(ids, length, rows) >= length
        )
        return found

    def _look_ahead(
        self, rows: Ints, token: Ints, position: Ints, key: NDArray[np.uint64], sampler: Sampler
    ) -> None:
        """Start the next step as if every row went on with its token, and do not wait for it."""
        decoder = self.steps.decoder
        self._ahead = None
        inside = position < decoder.tokens.shape[1]
        if not inside.any():
            return
        rows, token, position, key = rows[inside], token[inside], position[inside], key[inside]
        with decoder._all_or_nothing():
            hidden = self.steps.run(rows, token, position, key[:, None], sampler)
        decoder.tokens[rows, position], decoder.held[rows] = token, position + 1
        lengths, keys = (
            np.zeros(len(decoder.held), np.int64),
            np.zeros(len(decoder.held), np.uint64),
        )
        lengths[rows], keys[rows] = position + 1, key
        self._ahead = _Ahead(
            drawn=self.steps.log[0],
            hidden=hidden,
            slot=decoder.slot.copy(),
            length=lengths,
            key=keys,
            sampler=sampler,
            times_cleared=decoder.times_cleared,
        )
