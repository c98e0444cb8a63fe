"""A native vector environment as a stable-baselines3 `VecEnv`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from textgym.mdp import RowState

Bools = NDArray[np.bool_]


class Rewards(np.ndarray[Any, np.dtype[np.float32]]):
    """Rewards of one step, float32 `[N]`, that know which episodes ended without a score.

    stable-baselines3 hands them from environment to buffer as they are, so this is how a
    `SequenceRolloutBuffer` learns what must not be trained on; to everyone else they are numbers.
    """

    unscored: Bools | None = None
    """Bool `[N]`: the episode that ended here has no score (its reward failed)."""
    traceback: str = ""
    """Of the first failure."""


class SB3VecEnv(VecEnv):
    """Adapter of a native vector environment, with the episode statistics of SB3's `Monitor`.

    Args:
        envs: Made with `autoreset_mode="SameStep"`: with any other, SB3 would store transitions
            that never were.

    Raises:
        ValueError: The environment resets otherwise.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        mode = envs.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            found = mode.value if isinstance(mode, AutoresetMode) else mode
            raise ValueError(
                "stable-baselines3 needs a vector environment made with "
                f"autoreset_mode='SameStep', got {found!r}; make_sb3_vec_env makes one"
            )
        self.envs = envs
        self._actions: NDArray[np.int64] = np.zeros(0, np.int64)
        self._returns = np.zeros(envs.num_envs)
        self._lengths = np.zeros(envs.num_envs, np.int64)
        self._began = time.time()
        self._failed: dict[int, str] = {}  # tracebacks of rewards that failed before the end
        super().__init__(
            envs.num_envs, envs.unwrapped.single_observation_space, envs.single_action_space
        )

    def reset(self) -> Any:
        """Start an episode in every row, with the seeds that `seed` has set."""
        seeds, options = list(self._seeds), self._options[0] or None
        seeded = any(seed is not None for seed in seeds)
        given: Any = seeds if seeded else None
        obs, infos = self.envs.reset(seed=given, options=options)
        self._reset_seeds()
        self._reset_options()
        self._returns[:], self._lengths[:] = 0.0, 0
        self._failed.clear()
        self.reset_infos = [_row(infos, i) for i in range(self.num_envs)]
        return obs

    def step_async(self, actions: NDArray[Any]) -> None:
        """Take the actions, int `[N]`."""
        self._actions = np.asarray(actions).reshape(self.num_envs)

    def step_wait(self) -> tuple[Any, Rewards, Bools, list[dict[str, Any]]]:
        """Step all rows; rows that ended have begun their next episode."""
        obs, reward, terminated, truncated, infos = self.envs.step(self._actions)
        done = terminated | truncated
        rewards = reward.astype(np.float32).view(Rewards)
        rows: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if "reward" in infos:
            for i in np.flatnonzero(infos["_reward"]):
                rows[i] = {"reward": _row(infos["reward"], i)}
        if "reward_traceback" in infos:
            for i in np.flatnonzero(infos["_reward_traceback"]):
                self._failed.setdefault(int(i), infos["reward_traceback"][i])
        self._returns += reward
        self._lengths += 1
        if done.any():
            rewards.unscored = np.zeros(self.num_envs, np.bool_)
        for i in np.flatnonzero(done):
            row = rows[i] = _row(infos["final_info"], i)
            row["terminal_observation"] = infos["final_obs"][i]
            row["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
            failed = self._failed.pop(int(i), "")
            if "reward_status" in row:
                row["reward_traceback"] = failed or row["reward_traceback"]
                rewards.unscored[i] = True
                rewards.traceback = rewards.traceback or row["reward_traceback"]
            else:  # what has no score is in no mean
                row["episode"] = {
                    "r": float(self._returns[i]),
                    "l": int(self._lengths[i]),
                    "t": round(time.time() - self._began, 6),
                }
        self._returns[done], self._lengths[done] = 0.0, 0
        return obs, rewards, done, rows

    def resume(self, states: Sequence[RowState]) -> Any:
        """Go on with copied episodes, one for each row; returns the observations [N, ...]."""
        inner: Any = self.envs.unwrapped
        for row, state in enumerate(states):
            obs = inner.set_state(row, state)
        self._returns[:], self._lengths[:] = inner.mdp.paid, inner.mdp.steps
        self._reset_seeds()
        return obs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the environments; the rows share it."""
        value = _attribute(self.envs, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of all rows.

        Raises:
            ValueError: Some rows are left out: they share their attributes.
        """
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError("the rows share their attributes: set them for all (indices=None)")
        setattr(self.envs.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the vector environment, and take apart what it gives for all rows."""
        result = _attribute(self.envs, method_name)(*method_args, **method_kwargs)
        if not isinstance(result, np.ndarray | list | tuple) or len(result) != self.num_envs:
            return [result for _ in self._get_indices(indices)]
        return [result[i] for i in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None
    ) -> list[bool]:
        """Whether rows are wrapped: as good as in `Monitor`, whose `info["episode"]` is here."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[NDArray[Any] | None]:
        """There are none: text is rendered as text."""
        return [None] * self.num_envs

    def close(self) -> None:
        """Close the environment."""
        self.envs.close()


def make_sb3_vec_env(
    env_id: str,
    n_envs: int = 1,
    seed: int | None = None,
    *,
    env_kwargs: dict[str, Any] | None = None,
) -> SB3VecEnv:
    """Make a vector environment for stable-baselines3, as its own `make_vec_env` does.

    Args:
        env_id: For example `"textgym:TextGen-v0"`.
        n_envs: Number of rows N.
        seed: Row i's first episode gets `seed + i`.
        env_kwargs: Arguments of the environment.
    """
    envs = gym.make_vec(
        env_id,
        num_envs=n_envs,
        vectorization_mode="vector_entry_point",
        autoreset_mode="SameStep",
        **(env_kwargs or {}),
    )
    made = SB3VecEnv(envs)
    made.seed(seed)
    return made


def _attribute(envs: Any, name: str) -> Any:
    """An attribute of the environment or of what it wraps; AttributeError where there is none."""
    while not hasattr(envs, name) and hasattr(envs, "env"):
        envs = envs.env
    return getattr(envs, name)


def _row(infos: dict[str, Any], row: Any) -> dict[str, Any]:
    """What a batched info says of one row."""
    return {
        name: _row(value, row) if isinstance(value, dict) else value[row]
        for name, value in infos.items()
        if not name.startswith("_") and infos[f"_{name}"][row]
    }
