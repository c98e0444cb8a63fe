"""Views that some users expect: text, an attention mask, the action mask in the info."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from textgym.env import Observation
from textgym.task import positive

Env = gym.Env[Observation, np.int64]

_PRINTABLE = frozenset(chr(c) for c in range(32, 0x3000)) | {"\n", "\t"}


class TextObservation(gym.ObservationWrapper[str, np.int64, Observation], RecordConstructorArgs):
    """Observe the text of prompt and response instead of ids, to look at; learning needs the ids.

    The text is decoded from the ids, special tokens skipped. Its space is `Text(max_length)`.

    Args:
        env: An environment of textgym.
        max_length: Longest text in characters; longer ones keep their end. Default: sixteen
            characters a token.

    Raises:
        ValueError: `max_length` is not positive.
    """

    def __init__(self, env: Env, max_length: int | None = None) -> None:
        RecordConstructorArgs.__init__(self, max_length=max_length)
        super().__init__(env)
        self._tokenizer = env.get_wrapper_attr("task").tokenizer
        columns: int = env.get_wrapper_attr("task").max_length
        self.max_length = positive("max_length", 16 * columns if max_length is None else max_length)
        self.observation_space = spaces.Text(self.max_length, min_length=0, charset=_PRINTABLE)

    def observation(self, observation: Observation) -> str:
        """Decode one observation; characters outside the space become `?`."""
        ids = observation["input_ids"][: observation["length"][0]]
        text = self._tokenizer.decode(ids.tolist())[-self.max_length :]
        return "".join(c if c in _PRINTABLE else "?" for c in text)


class AttentionMask(
    gym.ObservationWrapper[dict[str, Any], np.int64, Observation], RecordConstructorArgs
):
    """Add `attention_mask`, int8 `[L]`: 1 where `input_ids` holds a token."""

    def __init__(self, env: Env) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        inner: Any = env.observation_space
        mask = spaces.Box(0, 1, inner["input_ids"].shape, np.int8)
        self.observation_space = spaces.Dict({**inner.spaces, "attention_mask": mask})

    def observation(self, observation: Observation) -> dict[str, Any]:
        """Add the mask to one observation."""
        columns = np.arange(len(observation["input_ids"]))
        mask = (columns < observation["length"][0]).astype(np.int8)
        return {**observation, "attention_mask": mask}


class ActionMaskInfo(
    gym.Wrapper[Observation, np.int64, Observation, np.int64], RecordConstructorArgs
):
    """Put `action_masks()` into the info of `reset` and `step` as `action_mask`, int8 `[V]`.

    int8 is what `Discrete.sample(mask)` takes: `env.action_space.sample(info["action_mask"])`.
    """

    def __init__(self, env: Env) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Reset, with the mask of the first action."""
        obs, info = self.env.reset(seed=seed, options=options)
        return obs, {**info, "action_mask": self._mask()}

    def step(self, action: np.int64) -> tuple[Observation, Any, bool, bool, dict[str, Any]]:
        """Step, with the mask of the next action."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {**info, "action_mask": self._mask()}

    def _mask(self) -> Any:
        return self.get_wrapper_attr("action_masks")().astype(np.int8)
