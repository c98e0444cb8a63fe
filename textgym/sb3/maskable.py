"""The policy and the buffer for sb3-contrib's `MaskablePPO`."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.buffers import DictRolloutBuffer

from textgym.sb3.buffer import SequenceRollouts
from textgym.sb3.policy import CausalLMActorCritic

try:
    from sb3_contrib.common.maskable.buffers import (
        MaskableDictRolloutBuffer,
        MaskableDictRolloutBufferSamples,
    )
    from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
except ImportError as error:
    raise ImportError('MaskablePPO needs sb3-contrib: pip install "textgym[sb3]"') from error


class MaskableCausalLMActorCriticPolicy(CausalLMActorCritic, MaskableActorCriticPolicy):
    """A causal language model for `MaskablePPO`, unchanged.

    A masked token has probability 0, in sampling and in training. Give the algorithm a
    `MaskableSequenceRolloutBuffer` too.
    """

    _takes_use_sde = False
    _buffer_name = "MaskableSequenceRolloutBuffer"


class MaskableSequenceRolloutBuffer(SequenceRollouts, MaskableDictRolloutBuffer):
    """`SequenceRolloutBuffer` with action masks, a bit for each token of the vocabulary.

    Arguments: see `SequenceRollouts`.
    """

    def reset(self) -> None:
        """Empty the buffer; neither `[T, N, L]` nor a float `[T, N, V]` is made."""
        super().reset()
        self.mask_dims = int(self.action_space.n)  # type: ignore[attr-defined]
        self.packed_masks: list[NDArray[np.uint8] | None] = [None] * self.buffer_size

    def add(  # type: ignore[override]
        self,
        obs: dict[str, NDArray[Any]],
        action: NDArray[Any],
        reward: NDArray[Any],
        episode_start: NDArray[Any],
        value: torch.Tensor,
        log_prob: torch.Tensor,
        action_masks: NDArray[Any] | None = None,
    ) -> None:
        """Store one step of every environment, and the masks [N, V] it was drawn with."""
        if action_masks is not None:
            masks = np.asarray(action_masks, np.bool_).reshape(self.n_envs, self.mask_dims)
            self.packed_masks[self.pos] = np.packbits(masks, axis=1)
        self.add_sequences(obs, action, reward, episode_start)
        DictRolloutBuffer.add(self, obs, action, reward, episode_start, value, log_prob)

    def action_mask(self, step: NDArray[np.int64], env: NDArray[np.int64]) -> torch.Tensor:
        """What the tokens at these places were drawn under, bool [M, V]."""
        masks = np.ones((len(step), self.mask_dims), np.bool_)
        for k, (t, n) in enumerate(zip(step, env, strict=True)):
            packed = self.packed_masks[t]
            if packed is not None:
                masks[k] = np.unpackbits(packed[n], count=self.mask_dims)
        return torch.from_numpy(masks).to(self.device)

    def get(self, batch_size: int | None = None) -> Generator[Any, None, None]:
        """Minibatches of whole sequences, of at least `batch_size` tokens each."""
        for numbers in self.minibatches(batch_size):
            samples, _ = self.samples(numbers)
            allowed = samples[0].batch.action_mask
            yield MaskableDictRolloutBufferSamples._make((*samples, allowed))
