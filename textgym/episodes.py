"""`Episodes`: what a rollout collected, every sequence stored once.

Memory is O(tokens): sequences are ragged and concatenated, and everything that is learned is a flat
array over the M action tokens, the tokens that the policy chose. Tokens that the environment wrote
are in the sequences and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

FORWARD_TOKENS = 256
"""Padding that a forward of its own is worth: what one costs beside its tokens, in tokens."""
FORWARD_LIMIT = 4096
"""Padded tokens that one forward holds at most, where hidden states are 256 wide."""


@dataclass(frozen=True)
class SequenceBatch:
    """Whole sequences for one forward, and where their action tokens are.

    Attributes:
        ids: Long `[B, T]`, right-padded with zeros.
        lengths: Long `[B]`.
        row: Long `[M]`, sequence of each action token.
        col: Long `[M]`, its column; it was drawn from the distribution at column `col - 1`.
        action_mask: Bool `[M, V]`, allowed actions, or None where all are.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    row: torch.Tensor
    col: torch.Tensor
    action_mask: torch.Tensor | None = None


@dataclass
class Episodes:
    """B finished episodes with M action tokens in all.

    Attributes:
        ids: int64 `[S]`, the sequences (prompt and response) one after another.
        starts: int64 `[B+1]`, where each sequence starts in `ids`.
        prompt_length: int64 `[B]`.
        column: int64 `[M]`, column of each action token in its own sequence.
        offsets: int64 `[B+1]`; episode b owns action tokens `offsets[b]:offsets[b+1]`.
        logprob: float32 `[M]`, log pi of each action token when it was sampled.
        value: float32 `[M]`, value of the state in which it was sampled.
        reward: float64 `[M]`, what the environment paid for it.
        components: The reward's unweighted parts by name, float64 `[M]`, NaN where a part does not
            apply.
        terminated: bool `[B]`.
        truncated: bool `[B]`.
        bootstrap_value: float32 `[B]`, value of the final state of truncated episodes, else 0.
        stop_reason: Why each ended; `"time_limit"` for `max_episode_steps`.
        texts: Responses as text.
        prompts: Prompts as text or messages.
        prompt_row: int64 `[B]`, rows of the prompt table.
        stream: uint64 `[B]`, identities of the episodes.
        sample_index: int64 `[B]`, index in the group.
        group: int64 `[B]`.
        weight: float64 `[B]`, 1, or 0 for unscored episodes.
        status: Why an episode is unscored; None where it is scored.
        traceback: First traceback of a reward that failed, if one did.
        packed_masks: uint8 `[M, ceil(V/8)]`, allowed actions bit by bit, or None where all are.
        vocab_size: Number of actions V.
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    prompt_length: NDArray[np.int64]
    column: NDArray[np.int64]
    offsets: NDArray[np.int64]
    logprob: NDArray[np.float32]
    value: NDArray[np.float32]
    reward: NDArray[np.float64]
    components: dict[str, NDArray[np.float64]]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    bootstrap_value: NDArray[np.float32]
    stop_reason: list[str]
    texts: list[str]
    prompts: list[Any]
    prompt_row: NDArray[np.int64]
    stream: NDArray[np.uint64]
    sample_index: NDArray[np.int64]
    group: NDArray[np.int64]
    weight: NDArray[np.float64]
    status: list[str | None]
    traceback: str | None
    packed_masks: NDArray[np.uint8] | None
    vocab_size: int

    def __len__(self) -> int:
        return len(self.prompt_length)

    @property
    def num_tokens(self) -> int:
        """Action tokens M, those of unscored episodes included."""
        return len(self.column)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Action tokens of each episode, int64 `[B]`."""
        return np.diff(self.offsets)

    @property
    def scores(self) -> NDArray[np.float64]:
        """Sum of each episode's rewards, float64 `[B]`."""
        return self.per_episode(self.reward)

    @property
    def token_weight(self) -> NDArray[np.float64]:
        """Each action token's episode weight, float64 `[M]`."""
        return np.repeat(self.weight, self.lengths)

    def per_episode(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Sum a per-token array `[M]` over each episode, float64 `[B]`; NaN counts as 0."""
        owner = np.repeat(np.arange(len(self)), self.lengths)
        weights = np.nan_to_num(np.asarray(values, np.float64))
        return np.bincount(owner, weights, minlength=len(self)).astype(np.float64)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Episodes:
        """Some of the episodes, in the order of `indices`; they keep their group."""
        chosen = np.asarray(indices, np.int64)
        tokens = self.tokens(chosen)
        sequences = [self.sequence(int(b)) for b in chosen]
        parts: dict[str, Any] = {name: getattr(self, name)[tokens] for name in _OF_TOKENS}
        parts |= {name: getattr(self, name)[chosen] for name in _OF_EPISODES}
        parts |= {name: [getattr(self, name)[b] for b in chosen] for name in _LISTS}
        return Episodes(
            ids=np.concatenate([*sequences, np.zeros(0, np.int64)]),
            starts=_bounds([len(sequence) for sequence in sequences]),
            offsets=_bounds(self.lengths[chosen]),
            components={name: values[tokens] for name, values in self.components.items()},
            packed_masks=None if self.packed_masks is None else self.packed_masks[tokens],
            traceback=self.traceback,
            vocab_size=self.vocab_size,
            **parts,
        )

    @classmethod
    def join(cls, parts: Sequence[Episodes]) -> Episodes:
        """Several collections as one; groups are numbered on, one after another.

        Raises:
            ValueError: There is no part, or they are of different vocabularies, or some have masks
                and some have none.
        """
        if len({(part.vocab_size, part.packed_masks is None) for part in parts}) != 1:
            raise ValueError(
                "join needs at least one part, all of one vocabulary and all with action masks or "
                f"all without; got {[(p.vocab_size, p.packed_masks is not None) for p in parts]}"
            )
        names = dict.fromkeys(name for part in parts for name in part.components)
        first = np.cumsum([0, *(int(part.group.max(initial=-1)) + 1 for part in parts)])
        tracebacks = [part.traceback for part in parts if part.traceback is not None]
        masks = [part.packed_masks for part in parts if part.packed_masks is not None]
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("ids", *_OF_TOKENS, *_OF_EPISODES)
        }
        joined |= {name: [x for part in parts for x in getattr(part, name)] for name in _LISTS}
        joined["group"] = np.concatenate(
            [part.group + number for part, number in zip(parts, first, strict=False)]
        )
        return cls(
            starts=_bounds(np.concatenate([np.diff(part.starts) for part in parts])),
            offsets=_bounds(np.concatenate([part.lengths for part in parts])),
            components={
                name: np.concatenate(
                    [part.components.get(name, np.full(part.num_tokens, np.nan)) for part in parts]
                )
                for name in names
            },
            packed_masks=np.concatenate(masks) if masks else None,
            traceback=tracebacks[0] if tracebacks else None,
            vocab_size=parts[0].vocab_size,
            **joined,
        )

    def sequence(self, index: int) -> NDArray[np.int64]:
        """Prompt and response of one episode."""
        return self.ids[self.starts[index] : self.starts[index + 1]]

    def tokens(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Flat positions `[m]` of the action tokens of some episodes, in the order of `indices`."""
        spans = [np.arange(self.offsets[b], self.offsets[b + 1]) for b in indices]
        return np.concatenate(spans) if spans else np.zeros(0, np.int64)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> SequenceBatch:
        """Whole sequences of some episodes, on the CPU, ready for `policy.evaluate`.

        Its action tokens are in the order of `tokens(indices)`.
        """
        import torch

        lengths = np.array([self.starts[b + 1] - self.starts[b] for b in indices], np.int64)
        ids = np.zeros((len(lengths), int(lengths.max(initial=1))), np.int64)
        for k, b in enumerate(indices):
            ids[k, : lengths[k]] = self.sequence(int(b))
        tokens = self.tokens(indices)
        row = np.repeat(np.arange(len(lengths)), [self.lengths[b] for b in indices])
        mask = None
        if self.packed_masks is not None:
            bits = np.unpackbits(self.packed_masks[tokens], axis=1, count=self.vocab_size)
            mask = torch.from_numpy(bits.astype(np.bool_))
        return SequenceBatch(
            ids=torch.from_numpy(ids),
            lengths=torch.from_numpy(lengths),
            row=torch.from_numpy(row),
            col=torch.from_numpy(self.column[tokens]),
            action_mask=mask,
        )


_OF_TOKENS = ("column", "logprob", "value", "reward")
_OF_EPISODES = (
    "prompt_length",
    "terminated",
    "truncated",
    "bootstrap_value",
    "prompt_row",
    "stream",
    "sample_index",
    "group",
    "weight",
)
_LISTS = ("stop_reason", "texts", "prompts", "status")


def _bounds(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of several stretches starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])
