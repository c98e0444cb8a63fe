"""Masks for vector environments; the twins of those in `textgym.wrappers`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper

from textgym.wrappers import Bools, allowed_tokens, only, prefix_tokens


class Masked(VectorWrapper):
    """A vector environment with masks of its own, on top of those that it has.

    `task` and `mdp` are those of the environment within.
    """

    masks_actions = True

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        inner: Any = env.unwrapped
        self.task, self.mdp = inner.task, inner.mdp

    def action_masks(self) -> Bools:
        """Allowed actions, bool `[N, V]`."""
        inner: Any = self.env
        masks: Bools = inner.action_masks()
        return masks


class AllowedTokens(Masked):
    """Allow a part of the vocabulary only; see `textgym.wrappers.AllowedTokens`."""

    def __init__(self, env: VectorEnv[Any, Any, Any], ids: Iterable[int]) -> None:
        super().__init__(env)
        self.allowed = allowed_tokens([int(i) for i in ids], self.task.vocab_size)

    def action_masks(self) -> Bools:
        """Allowed actions, bool `[N, V]`."""
        return super().action_masks() & self.allowed


class ForcedPrefix(Masked):
    """Have every response begin with given tokens; see `textgym.wrappers.ForcedPrefix`."""

    def __init__(self, env: VectorEnv[Any, Any, Any], prefix: str | Iterable[int]) -> None:
        super().__init__(env)
        self.prefix = prefix_tokens(prefix, self.task)

    def action_masks(self) -> Bools:
        """Allowed actions, bool `[N, V]`."""
        masks = super().action_masks()
        for i in np.flatnonzero(self.mdp.steps < len(self.prefix)):
            masks[i] = only(self.prefix[self.mdp.steps[i]], masks[i])
        return masks
