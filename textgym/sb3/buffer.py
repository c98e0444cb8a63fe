"""A rollout buffer that stores every sequence once and gives whole sequences to the policy.

stable-baselines3 keeps one observation, the whole prefix, for every token. Here the prefixes of one
episode are one sequence: memory is O(tokens), and one forward over it scores all of its tokens,
where the stock buffer has them scored one prefix at a time.

Shapes: N environments, T steps of the buffer, L columns, M tokens of a minibatch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.type_aliases import RolloutBufferSamples

from textgym.episodes import SequenceBatch
from textgym.learning import UNSCORED_LIMIT, UnscoredError
from textgym.returns import whiten

Ints = NDArray[np.int64]


class SequenceObservations:
    """What a minibatch holds in place of M prefixes: the sequences, and where the M tokens are.

    A slice takes some of the tokens, as `TRPO(sub_sampling_factor=...)` does.
    """

    def __init__(self, batch: SequenceBatch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        """M."""
        return len(self.batch.row)

    def __getitem__(self, some: slice) -> SequenceObservations:
        """Some of the tokens, of the same sequences."""
        mask = self.batch.action_mask
        return SequenceObservations(
            replace(
                self.batch,
                row=self.batch.row[some],
                col=self.batch.col[some],
                action_mask=None if mask is None else mask[some],
            )
        )


class SequenceStore:
    """The sequences of N environments over T steps.

    A prefix that goes on from the one before (its tokens, the action, perhaps what the environment
    appended) lengthens a sequence; any other begins a new one. So nothing depends on where episodes
    end: a token is scored after exactly the prefix that was observed.
    """

    def __init__(self, steps: int, envs: int, columns: int) -> None:
        self.sequence = np.zeros((steps, envs), np.int64)  # number of the sequence of each token
        self.column = np.zeros((steps, envs), np.int64)  # where in it
        self.finished: dict[int, Ints] = {}
        self._ids = np.zeros((envs, columns + 1), np.int64)  # + 1: an action at the budget's end
        self._length = np.zeros(envs, np.int64)
        self._number = np.full(envs, -1, np.int64)
        self._rows = np.arange(envs)
        self._next = 0

    def add(self, step: int, ids: Ints, length: Ints, action: Ints) -> None:
        """Store one step: prefixes [N, L] with their lengths [N], and the actions [N]."""
        before = np.arange(ids.shape[1]) < self._length[:, None]
        same = ~((ids != self._ids[:, :-1]) & before).any(1)
        broken = np.flatnonzero(~same | (length < self._length) | (self._number < 0))
        self._finish(broken)
        self._number[broken] = self._next + np.arange(len(broken))
        self._next += len(broken)
        self._ids[:, :-1] = ids
        self._ids[self._rows, length] = action
        self._length = length + 1
        self.sequence[step], self.column[step] = self._number, length

    def close(self) -> None:
        """Finish the sequences that are still growing."""
        self._finish(self._rows)

    def _finish(self, rows: Ints) -> None:
        for i in rows[self._number[rows] >= 0]:
            self.finished[int(self._number[i])] = self._ids[i, : self._length[i]].copy()


class SequenceRollouts:
    """What `SequenceRolloutBuffer` and its maskable twin share; mixed into SB3's buffers.

    Args:
        buffer_size: T, steps of every environment.
        observation_space: `input_ids` and `length`, as textgym's environments have it.
        action_space: `Discrete(V)`.
        device: Where minibatches go.
        gae_lambda: As in SB3.
        gamma: As in SB3.
        n_envs: N.
        seed: Of the shuffles; default `torch.initial_seed()`, which `PPO(seed=)` sets.
        whiten: Give the advantages mean 0 and standard deviation 1 over the whole rollout; then
            `PPO(normalize_advantage=False)`, which does it by minibatch, where the few responses
            that differ at the end of training can weigh as much as all others.
        whiten_floor: Standard deviation that whitening takes at least (see `textgym.returns`).

    Attributes:
        store: The sequences.
        counted: Bool `[T, N]`: tokens that are trained on; those of unscored episodes are not.
        ends: Bool `[T, N]`: the last tokens of episodes; known when returns are computed.
        before_returns: Called with the buffer when it is full, before returns are computed; may
            change `rewards` (`ReferenceKL` does). `reset` empties it, and callbacks add to it when
            a rollout starts, so that nothing stays of a callback that is gone.
    """

    buffer_size: int
    n_envs: int
    pos: int
    full: bool
    device: torch.device
    observation_space: Any
    actions: NDArray[Any]
    rewards: NDArray[np.float32]
    values: NDArray[np.float32]
    log_probs: NDArray[np.float32]
    advantages: NDArray[np.float32]
    returns: NDArray[np.float32]
    episode_starts: NDArray[np.float32]
    store: SequenceStore
    counted: NDArray[np.bool_]
    ends: NDArray[np.bool_]
    before_returns: list[Callable[[Any], None]]
    rng: np.random.Generator
    obs_shape: Any

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Dict,
        action_space: spaces.Discrete,
        device: torch.device | str = "auto",
        gae_lambda: float = 1.0,
        gamma: float = 0.99,
        n_envs: int = 1,
        seed: int | None = None,
        whiten: bool = False,
        whiten_floor: float = 0.0,
    ) -> None:
        self.whiten, self.whiten_floor = whiten, whiten_floor
        self.rng = np.random.default_rng(torch.initial_seed() if seed is None else seed)
        super().__init__(  # type: ignore[call-arg]
            buffer_size, observation_space, action_space, device, gae_lambda, gamma, n_envs
        )

    def reset(self) -> None:
        """Empty the buffer; nothing of size `[T, N, L]` is made."""
        shapes, self.obs_shape = self.obs_shape, {}
        DictRolloutBuffer.reset(cast(DictRolloutBuffer, self))
        self.obs_shape = shapes
        columns = int(self.observation_space["input_ids"].shape[0])
        self.store = SequenceStore(self.buffer_size, self.n_envs, columns)
        self.counted = np.ones((self.buffer_size, self.n_envs), np.bool_)
        self.ended = self.unscored = 0
        self.before_returns = []
        self._traceback = ""

    def add_sequences(
        self, obs: Any, action: NDArray[Any], reward: Any, episode_start: NDArray[Any]
    ) -> None:
        """Store the tokens of this step."""
        self.episode_starts[self.pos] = episode_start
        ids, length = np.asarray(obs["input_ids"]), np.asarray(obs["length"]).reshape(-1)
        self.store.add(self.pos, ids, length, action.reshape(-1))
        unscored = getattr(reward, "unscored", None)
        if unscored is not None:
            for i in np.flatnonzero(unscored):
                began = np.flatnonzero(self.episode_starts[: self.pos + 1, i])
                self.counted[began[-1] if len(began) else 0 : self.pos + 1, i] = False
            self.unscored += int(unscored.sum())
            self._traceback = self._traceback or reward.traceback

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: NDArray[Any]) -> None:
        """Compute returns by GAE, after `before_returns` has changed the rewards.

        Raises:
            UnscoredError: If more than 20 % of the episodes that ended have no score.
        """
        self.store.close()
        self.ends = np.vstack([self.episode_starts[1:], np.asarray(dones)[None]]).astype(np.bool_)
        self.ended = int(self.ends.sum())
        if self.unscored > UNSCORED_LIMIT * self.ended:
            raise UnscoredError(
                f"{self.unscored} of {self.ended} episodes have no score, more than "
                f"{UNSCORED_LIMIT:.0%}; the first failure:\n{self._traceback}"
            )
        for change in self.before_returns:
            change(self)
        super().compute_returns_and_advantage(last_values, dones)  # type: ignore[misc]
        if self.whiten:
            shape, weights = self.advantages.shape, self.counted.ravel().astype(np.float64)
            white = whiten(self.advantages.ravel(), weights, floor=self.whiten_floor)
            self.advantages = white.reshape(shape).astype(np.float32)

    def sequences(self, numbers: Ints) -> tuple[SequenceBatch, tuple[Ints, Ints]]:
        """Some sequences as a batch, and where in `[T, N]` their counted tokens are."""
        wanted = np.isin(self.store.sequence, numbers) & self.counted
        step, env = np.nonzero(wanted)
        of = self.store.sequence[step, env]
        order = np.lexsort((step, of))
        step, env, of = step[order], env[order], of[order]
        numbers = np.unique(numbers)
        texts = [self.store.finished[int(number)] for number in numbers]
        lengths = np.array([len(text) for text in texts], np.int64)
        ids = np.zeros((len(texts), int(lengths.max(initial=1))), np.int64)
        for k, text in enumerate(texts):
            ids[k, : len(text)] = text
        row = np.searchsorted(numbers, of)
        batch = SequenceBatch(
            ids=torch.from_numpy(ids).to(self.device),
            lengths=torch.from_numpy(lengths).to(self.device),
            row=torch.from_numpy(row).to(self.device),
            col=torch.from_numpy(self.store.column[step, env]).to(self.device),
            action_mask=self.action_mask(step, env),
        )
        return batch, (step, env)

    def action_mask(self, step: Ints, env: Ints) -> torch.Tensor | None:
        """What the tokens at these places were drawn under, bool [M, V]; None: everything."""
        return None

    def minibatches(self, batch_size: int | None) -> Iterator[Ints]:
        """Numbers of the sequences of each minibatch, shuffled.

        A minibatch is whole sequences with at least `batch_size` tokens; a rest of less than half
        of that, or of one token (which has no standard deviation), joins the one before it.
        """
        tokens = np.bincount(self.store.sequence[self.counted], minlength=len(self.store.finished))
        shuffled = self.rng.permutation(np.flatnonzero(tokens))
        if batch_size is None:
            if len(shuffled):
                yield shuffled
            return
        groups: list[list[int]] = [[]]
        size = 0
        for number in shuffled:
            if size >= batch_size:
                groups.append([])
                size = 0
            groups[-1].append(int(number))
            size += int(tokens[number])
        if len(groups) > 1 and (2 * size < batch_size or size < 2):
            rest = groups.pop()
            groups[-1] += rest
        yield from (np.array(group) for group in groups if group)

    def samples(self, numbers: Ints) -> tuple[tuple[Any, ...], tuple[Ints, Ints]]:
        """A minibatch, and where in `[T, N]` its tokens are.

        The minibatch: observations, actions, values, log-probabilities, advantages, returns.
        """
        batch, where = self.sequences(numbers)
        taken = [self.actions.reshape(self.buffer_size, self.n_envs, -1)[where]]
        for array in (self.values, self.log_probs, self.advantages, self.returns):
            taken.append(array.reshape(self.buffer_size, self.n_envs)[where])
        tensors = (torch.as_tensor(x, device=self.device) for x in taken)
        return (SequenceObservations(batch), *tensors), where


class SequenceRolloutBuffer(SequenceRollouts, DictRolloutBuffer):
    """A rollout buffer for causal language models: `PPO(..., rollout_buffer_class=...)`.

    It stores every sequence once, and `get` gives whole sequences; the loss and its gradient are
    those of the stock `DictRolloutBuffer` on the same tokens. Arguments: see `SequenceRollouts`.
    """

    def add(  # type: ignore[override]
        self,
        obs: dict[str, NDArray[Any]],
        action: NDArray[Any],
        reward: NDArray[Any],
        episode_start: NDArray[Any],
        value: torch.Tensor,
        log_prob: torch.Tensor,
    ) -> None:
        """Store one step of every environment."""
        self.add_sequences(obs, action, reward, episode_start)
        super().add(obs, action, reward, episode_start, value, log_prob)

    def get(  # type: ignore[override]
        self, batch_size: int | None = None
    ) -> Generator[RolloutBufferSamples, None, None]:
        """Minibatches of whole sequences, of at least `batch_size` tokens each."""
        for numbers in self.minibatches(batch_size):
            yield RolloutBufferSamples(*self.samples(numbers)[0])
