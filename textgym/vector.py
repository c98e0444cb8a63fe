"""`TextGenVectorEnv`: N rows of the token decision process, stepped together on arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from textgym.env import as_streams, check_render_mode, checked_options, rendered, row_info, task_of
from textgym.mdp import Outcome, RowState, Task, TokenMDP

Observations = dict[str, NDArray[np.int64]]
Bools = NDArray[np.bool_]


class TextGenVectorEnv(VectorEnv[Observations, NDArray[np.int64], NDArray[Any]]):
    """N episodes side by side; row i of `reset(seed=s)` is `TextGenEnv` reset with `s + i`.

    Spaces, rewards, ends and information are those of `TextGenEnv`, batched in Gymnasium's layout.
    The reward is called once a step, with the rows that ended (all live rows where a schedule pays
    every token).

    Args:
        task: What is played. Environments of the suite leave it out: their class names `make_task`.
        num_envs: Number of rows N.
        autoreset_mode: `"NextStep"`, `"SameStep"` or `"Disabled"`, or Gymnasium's enum. With
            `"Disabled"` a finished row is frozen: its observation stays, its flags are reported
            once and its actions are ignored until it is reset.
        copy: Return copies; with False the observations are views that the next step overwrites.
        max_episode_steps: Actions after which a row is truncated, as Gymnasium's `TimeLimit` does.
        render_mode: `"ansi"`: `render()` returns a tuple of N strings.
        **knobs: Arguments of the class's `make_task`.

    Raises:
        ValueError: An argument is out of range.
        TypeError: `make_task` has no such knob.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 10}  # noqa: RUF012

    make_task: ClassVar[Callable[..., Task]] = Task
    masks_actions = False  # classes and wrappers whose `action_masks` forbids something say True

    def __init__(
        self,
        task: Task | None = None,
        num_envs: int = 1,
        *,
        autoreset_mode: str | AutoresetMode = "NextStep",
        copy: bool = True,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        **knobs: Any,
    ) -> None:
        check_render_mode(render_mode, self.metadata["render_modes"])
        task = self.task = task_of(type(self).make_task, task, knobs)
        self.mdp = TokenMDP(task, num_envs, max_episode_steps)
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.copy = copy
        self.autoreset_mode = _mode(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = task.observation_space()
        self.single_action_space = spaces.Discrete(task.vocab_size)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._seeded = False
        self._waiting = np.ones(num_envs, np.bool_)  # rows to reset at the next step, or frozen
        self._began = False
        self._outcome: Outcome | None = None

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Start episodes in all rows, or in those of `options["reset_mask"]`.

        Args:
            seed: Row i gets `seed + i`, or `seed[i]`; None goes on to each row's next episode.
            options: `reset_mask` (bool `[N]`), `prompt_row` (int64 `[N]` or one for all) and
                `stream` (uint64 `[N]`); of the latter two only the entries of rows that are reset
                count.

        Returns:
            Observations of all rows, and infos of those that were reset.

        Raises:
            TypeError: `reset_mask` is not a bool array.
            ValueError: A shape is wrong, the mask is empty, or an option is unknown.
        """
        options = checked_options(options, {"reset_mask", "prompt_row", "stream"})
        mask = self._mask(options.get("reset_mask"))
        self._seed(seed, mask)
        rows = np.flatnonzero(mask)
        prompt_row, stream = options.get("prompt_row"), options.get("stream")
        self.mdp.begin(
            rows,
            None if prompt_row is None else self._per_row("prompt_row", prompt_row)[rows],
            None if stream is None else self._per_row("stream", as_streams(stream))[rows],
        )
        self._waiting[rows] = False
        self._began = True
        return self._observation(), self._begin_info(mask)

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[Observations, NDArray[np.float64], Bools, Bools, dict[str, Any]]:
        """Append one token to every live row.

        Args:
            actions: Integers `[N]`; those of rows that reset or are frozen are ignored.

        Returns:
            Observations, rewards float64 `[N]`, terminated and truncated bool `[N]`, infos.

        Raises:
            TypeError, ValueError: The actions are not N ids of the vocabulary.
            gymnasium.error.ResetNeeded: The environment was never reset.
            textgym.rewards.RewardError: The reward failed and is strict.
        """
        waiting = self._waiting
        live = None if not waiting.any() or not self._began else ~waiting
        outcome = self._outcome = self.mdp.step(actions, live)
        ended = outcome.terminated | outcome.truncated
        infos: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            self._step_info(infos, outcome, ~ended)
            if ended.any():
                self._finals(infos, outcome, ended)
                self.mdp.begin(np.flatnonzero(ended))
                infos |= self._begin_info(ended)
            return self._result(outcome, infos)
        self._step_info(infos, outcome, np.ones(self.num_envs, np.bool_))
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            if live is not None:
                self.mdp.begin(np.flatnonzero(waiting))
                infos |= self._begin_info(waiting.copy())
            self._waiting = ended
        else:
            self._waiting = waiting | ended
        return self._result(outcome, infos)

    def render(self) -> tuple[str, ...] | None:
        """Prompt, response and reward so far of every row."""
        if self.render_mode != "ansi":
            return None
        return tuple(rendered(self.mdp, i, self._last_info(i)) for i in range(self.num_envs))

    def action_masks(self) -> Bools:
        """Which actions are allowed, bool `[N, V]`; here all are."""
        return np.ones((self.num_envs, self.task.vocab_size), np.bool_)

    def get_state(self, row: int) -> RowState:
        """Copy the episode of one row."""
        return self.mdp.get_state(row)

    def set_state(self, row: int, state: RowState) -> Observations:
        """Continue a copied episode in one row; returns the observations.

        Raises:
            ValueError: The state does not fit this task.
        """
        self._seed_once()
        self.mdp.set_state(row, state)
        self._waiting[row] = state.done
        self._began = True
        return self._observation()

    def _last_info(self, row: int) -> dict[str, Any]:
        """What the last step said of the episode that the row is in."""
        if self._outcome is None or not self.mdp.steps[row]:
            return {}
        return row_info(self._outcome, row)

    def _seed(self, seed: int | list[int | None] | None, mask: Bools) -> None:
        if isinstance(seed, list | tuple | np.ndarray):
            if len(seed) != self.num_envs:
                raise ValueError(f"expected {self.num_envs} seeds, got {len(seed)}")
            rows = [i for i in np.flatnonzero(mask) if seed[i] is not None]
            values = [int(seed[i]) for i in rows]  # type: ignore[arg-type]
        elif seed is not None:
            rows = list(np.flatnonzero(mask))
            values = [int(seed) + int(i) for i in rows]
        else:
            rows, values = [], []
        super().reset(seed=values[0] if values else None)
        self._seed_once()
        self.mdp.seed[rows] = np.array([v % 2**64 for v in values], np.uint64)
        self.mdp.episode[rows] = 0

    def _seed_once(self) -> None:
        """Draw a seed for each row of an environment that was never given any."""
        if not self._seeded:
            self.mdp.seed[:] = self.np_random.integers(2**31, size=self.num_envs)
            self._seeded = True

    def _mask(self, mask: Any) -> Bools:
        if mask is None:
            return np.ones(self.num_envs, np.bool_)
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            kind = mask.dtype if isinstance(mask, np.ndarray) else type(mask).__name__
            raise TypeError(f"options['reset_mask'] must be a bool array, got {kind}")
        if mask.shape != (self.num_envs,):
            raise ValueError(
                f"options['reset_mask'] must have shape ({self.num_envs},), got {mask.shape}"
            )
        if not mask.any():
            raise ValueError("options['reset_mask'] must select at least one row")
        return mask

    def _per_row(self, name: str, value: Any) -> NDArray[Any]:
        array = np.asarray(value)
        if array.shape not in ((), (self.num_envs,)):
            raise ValueError(
                f"options[{name!r}] must be one number or {self.num_envs}, got shape {array.shape}"
            )
        return np.broadcast_to(array, (self.num_envs,))

    def _observation(self) -> Observations:
        return self.mdp.observation(self.copy)

    def _result(
        self, outcome: Outcome, infos: dict[str, Any]
    ) -> tuple[Observations, NDArray[np.float64], Bools, Bools, dict[str, Any]]:
        return self._observation(), outcome.reward, outcome.terminated, outcome.truncated, infos

    def _begin_info(self, mask: Bools) -> dict[str, Any]:
        return {
            "prompt_row": np.where(mask, self.mdp.prompt_row, 0),
            "_prompt_row": mask.copy(),
            "stream": np.where(mask, self.mdp.stream, np.uint64(0)),
            "_stream": mask.copy(),
        }

    def _step_info(self, infos: dict[str, Any], outcome: Outcome, wanted: Bools) -> None:
        """Write what `row_info` says of the wanted rows, in the layout of `VectorEnv._add_info`."""
        ended = [i for i in outcome.text if wanted[i]]
        if ended:
            self._objects(infos, "text", {i: outcome.text[i] for i in ended})
            self._objects(infos, "stop_reason", {i: outcome.stop_reason[i] for i in ended})
        payment = outcome.payment
        if payment is None:
            return
        rows = outcome.paid_rows
        take = wanted[rows]
        parts: dict[str, Any] = {}
        any_part = np.zeros(self.num_envs, np.bool_)
        for name, values in payment.components.items():
            there = take & ~np.isnan(values)
            if there.any():
                parts[name] = np.zeros(self.num_envs)
                parts[name][rows[there]] = values[there]
                parts[f"_{name}"] = np.zeros(self.num_envs, np.bool_)
                parts[f"_{name}"][rows[there]] = True
                any_part |= parts[f"_{name}"]
        if parts:
            infos["reward"], infos["_reward"] = parts, any_part
        failed = {
            int(i): s
            for i, s, t in zip(rows, payment.status, take, strict=True)
            if t and s is not None
        }
        if failed:
            self._objects(infos, "reward_status", failed)
            self._objects(infos, "reward_traceback", dict.fromkeys(failed, payment.traceback or ""))

    def _objects(self, infos: dict[str, Any], name: str, values: dict[int, Any]) -> None:
        infos[name] = np.full(self.num_envs, None, object)
        infos[f"_{name}"] = np.zeros(self.num_envs, np.bool_)
        for i, value in values.items():
            infos[name][i] = value
            infos[f"_{name}"][i] = True

    def _finals(self, infos: dict[str, Any], outcome: Outcome, ended: Bools) -> None:
        """Write `final_obs` and `final_info` of the rows that ended."""
        observed = self.mdp.observation(copy=False)
        last = {
            int(i): {k: v[i].copy() for k, v in observed.items()} for i in np.flatnonzero(ended)
        }
        self._objects(infos, "final_obs", last)
        final: dict[str, Any] = {}
        self._step_info(final, outcome, ended)
        infos["final_info"], infos["_final_info"] = final, ended.copy()


def _mode(mode: str | AutoresetMode) -> AutoresetMode:
    try:
        return mode if isinstance(mode, AutoresetMode) else AutoresetMode(mode)
    except ValueError:
        names = [m.value for m in AutoresetMode]
        raise ValueError(f"autoreset_mode must be one of {names}, got {mode!r}") from None
