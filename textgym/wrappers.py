"""Views that some users expect: text, an attention mask, the action mask; and what sets masks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray

from textgym.env import Observation
from textgym.task import positive

Env = gym.Env[Observation, np.int64]
Bools = NDArray[np.bool_]

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


class AllowedTokens(
    gym.Wrapper[Observation, np.int64, Observation, np.int64], RecordConstructorArgs
):
    """Allow a part of the vocabulary only: `action_masks()` is False elsewhere.

    For agents that obey masks (`MaskablePPO`, `collect`); the environment itself refuses no token.
    `textgym.vector_wrappers` has the same for vector environments.

    Args:
        env: An environment of textgym.
        ids: Allowed token ids; a stop id should be among them.

    Raises:
        ValueError: `ids` is empty, or holds one outside the vocabulary.
    """

    masks_actions = True

    def __init__(self, env: Env, ids: Iterable[int]) -> None:
        chosen = sorted({int(i) for i in ids})
        RecordConstructorArgs.__init__(self, ids=chosen)
        super().__init__(env)
        self.allowed = allowed_tokens(chosen, env.get_wrapper_attr("task").vocab_size)

    def action_masks(self) -> Bools:
        """Allowed actions, bool `[V]`."""
        inner: Bools = self.env.get_wrapper_attr("action_masks")()
        return inner & self.allowed


class ForcedPrefix(
    gym.Wrapper[Observation, np.int64, Observation, np.int64], RecordConstructorArgs
):
    """Have every response begin with given tokens: the mask allows each of them alone, in turn.

    Args:
        env: An environment of textgym.
        prefix: Token ids, or text that the environment's tokenizer encodes.

    Raises:
        ValueError: The prefix is empty, longer than a response may be, or outside the vocabulary.
    """

    masks_actions = True

    def __init__(self, env: Env, prefix: str | Iterable[int]) -> None:
        self.prefix = prefix_tokens(prefix, env.get_wrapper_attr("task"))
        RecordConstructorArgs.__init__(self, prefix=self.prefix)
        super().__init__(env)

    def action_masks(self) -> Bools:
        """Allowed actions, bool `[V]`."""
        inner: Bools = self.env.get_wrapper_attr("action_masks")()
        written = int(self.get_wrapper_attr("mdp").steps[0])
        return inner if written >= len(self.prefix) else only(self.prefix[written], inner)


def allowed_tokens(ids: Iterable[int], vocab_size: int) -> Bools:
    """Mask [V] that allows some ids.

    Raises:
        ValueError: There are none, or one is outside the vocabulary.
    """
    chosen = list(ids)
    bad = [i for i in chosen if not 0 <= i < vocab_size]
    if not chosen or bad:
        raise ValueError(
            f"expected token ids in 0..{vocab_size - 1}, got {bad[0] if bad else 'none'}"
        )
    mask = np.zeros(vocab_size, np.bool_)
    mask[chosen] = True
    return mask


def reference_tokens(task: Any, column: str = "references") -> list[int]:
    """The ids that references are written with, and those that end a response; sorted.

    `AllowedTokens(envs, reference_tokens(envs.task))` forbids all others.

    Args:
        task: Prompts and tokenizer.
        column: Of the prompt table; one text or a list of texts a row.

    Raises:
        ValueError: The prompts have no such column.
    """
    if column not in task.prompts.columns:
        raise ValueError(
            f"the prompt table has no column {column!r} to take the allowed tokens from; its "
            f"columns are {list(task.prompts.columns)}"
        )
    found = set(task.stop_ids)
    endings = ["", *task.stop_strings]  # each may be written in one token with what is before it
    for row in range(len(task.prompts)):
        references = task.prompts[row][column]
        for text in [references] if isinstance(references, str) else references:
            for ending in endings:
                found.update(task.tokenizer.encode_plain(text + ending))
    return sorted(int(i) for i in found)


def prefix_tokens(prefix: str | Iterable[int], task: Any) -> list[int]:
    """The ids of a forced prefix.

    Raises:
        ValueError: It is empty, longer than a response may be, or outside the vocabulary.
    """
    ids = task.tokenizer.encode_plain(prefix) if isinstance(prefix, str) else prefix
    chosen = [int(i) for i in ids]
    allowed_tokens(chosen, task.vocab_size)
    if len(chosen) > task.max_new_tokens:
        raise ValueError(
            f"a prefix of {len(chosen)} tokens does not fit into {task.max_new_tokens} new ones"
        )
    return chosen


def only(token: int, inner: Bools) -> Bools:
    """A mask like `inner` that allows one token at most."""
    mask = np.zeros_like(inner)
    mask[token] = inner[token]
    return mask
