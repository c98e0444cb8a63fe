"""`TextGenEnv`: the token decision process as a standard Gymnasium environment, one row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from textgym.mdp import Outcome, RowState, Task, TokenMDP

Observation = dict[str, NDArray[np.int64]]


class TextGenEnv(gym.Env[Observation, np.int64]):
    """One response to one prompt, token by token.

    ## Observation Space
    `Dict(input_ids=Box(0, V-1, (L,)), length=Box(1, L, (1,)), prompt_length=Box(1, L, (1,)))`, all
    int64: prompt and response from column 0 and zeros after `length`, with `L = max_prompt_tokens +
    max_new_tokens`.

    ## Action Space
    `Discrete(V)`: the id of the next token.

    ## Rewards
    What the task's schedule pays for this token: by default the reward's value once, on the token
    that ends the response.

    ## Episode End
    `terminated` by a stop id, a stop string, the environment itself or, with `budget="terminate"`,
    the last token of the budget; `truncated` by the budget with `budget="truncate"`.

    ## Information
    After `reset`: `prompt_row`, the row of the prompt table, and `stream`, a `np.uint64` that
    identifies the episode. At the end: `text`, `stop_reason` and `reward`, the unweighted
    components by name. `reward_status` and `reward_traceback` tell why an episode is unscored, and
    are absent where it is scored.

    ## Arguments
    `reset(options=...)` takes `prompt_row`, which prompt, and `stream`, whose draws.

    Args:
        task: What is played. Environments of the suite leave it out: their class names `make_task`.
        render_mode: `"ansi"`: `render()` returns prompt, response so far and reward as a string.
            `"human"`: tokens are printed as they come. `"rgb_array"`: nothing is drawn.
        **knobs: Arguments of the class's `make_task`.

    Raises:
        ValueError: `render_mode` is not among those in `metadata`, or a knob is out of range.
        TypeError: `make_task` has no such knob.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "human"], "render_fps": 10}  # noqa: RUF012
    make_task: ClassVar[Callable[..., Task]] = Task
    masks_actions = False  # classes and wrappers whose `action_masks` forbids something say True

    def __init__(
        self, task: Task | None = None, *, render_mode: str | None = None, **knobs: Any
    ) -> None:
        # stable-baselines3 asks for pictures of what it makes from an id: there are none.
        check_render_mode(render_mode, [*self.metadata["render_modes"], "rgb_array"])
        task = self.task = task_of(type(self).make_task, task, knobs)
        self.render_mode = render_mode
        self.observation_space = cast("spaces.Space[Observation]", task.observation_space())
        self.action_space = spaces.Discrete(task.vocab_size)
        self.mdp = TokenMDP(task, 1)
        self._seeded = False
        self._last: dict[str, Any] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Restarts the row's episodes; None goes on to the next episode.
            options: `prompt_row` (int) and `stream` (64-bit int), both optional.

        Raises:
            ValueError: An option is unknown or out of range.
        """
        super().reset(seed=seed)
        if seed is not None or not self._seeded:
            drawn = int(self.np_random.integers(2**31)) if seed is None else int(seed)
            self.mdp.seed[0] = np.uint64(drawn % 2**64)
            self.mdp.episode[0] = 0
            self._seeded = True
        options = checked_options(options, {"prompt_row", "stream"})
        row = options.get("prompt_row")
        stream = options.get("stream")
        self.mdp.begin(
            np.zeros(1, np.int64),
            None if row is None else _single("prompt_row", row),
            None if stream is None else as_streams(_single("stream", stream)),
        )
        self._last = {}
        info = {"prompt_row": int(self.mdp.prompt_row[0]), "stream": self.mdp.stream[0]}
        if self.render_mode == "human":
            print(f"\n{_shown(self.task.prompt_text(info['prompt_row']))}\n> ", end="", flush=True)
        return self._observation(), info

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Append one token.

        Raises:
            TypeError: The action is not an integer.
            ValueError: It is outside the vocabulary.
            gymnasium.error.ResetNeeded: The episode has ended or was never begun.
            textgym.rewards.RewardError: The reward failed and is strict.
        """
        chosen = np.asarray(action)
        if chosen.ndim:
            raise ValueError(
                f"expected one action, a single integer, got an array of shape {chosen.shape}"
            )
        before = int(self.mdp.length[0])
        outcome = self.mdp.step(chosen[None])
        self._last = row_info(outcome)
        terminated, truncated = bool(outcome.terminated[0]), bool(outcome.truncated[0])
        if self.render_mode == "human":
            fresh = self.mdp.ids[0, before : self.mdp.length[0]]  # the action and any reply
            print(*map(self.task.tokenizer.piece, fresh), sep="", end="", flush=True)
            if terminated or truncated:
                print(f"\n{_footer(self.mdp, 0, self._last)}", flush=True)
        return self._observation(), float(outcome.reward[0]), terminated, truncated, self._last

    def render(self) -> str | None:
        """Prompt, response and reward so far; None in mode `"human"`, which prints as it steps."""
        return rendered(self.mdp, 0, self._last) if self.render_mode == "ansi" else None

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are allowed, bool `[V]` (the sb3-contrib convention); here all are."""
        return np.ones(self.task.vocab_size, np.bool_)

    def get_state(self) -> RowState:
        """Copy the episode: ids, counters, draws and the reward's state."""
        return self.mdp.get_state(0)

    def set_state(self, state: RowState) -> Observation:
        """Continue a copied episode; returns its observation.

        Raises:
            ValueError: The state does not fit this task.
        """
        self.mdp.set_state(0, state)
        self._seeded = True
        return self._observation()

    def _observation(self) -> Observation:
        return {k: v[0] for k, v in self.mdp.observation().items()}


def rendered(mdp: TokenMDP, row: int, info: dict[str, Any]) -> str:
    """One row as people read it: prompt, response so far, and reward so far.

    Args:
        mdp: Where the row is.
        row: Which one.
        info: What `row_info` says of its last step; empty before the first.
    """
    prompt = _shown(mdp.task.prompt_text(int(mdp.prompt_row[row])))
    return f"{prompt}\n> {mdp.response_text(row)}\n{_footer(mdp, row, info)}"


def as_streams(value: Any) -> NDArray[np.uint64]:
    """Streams as `uint64`; negative ones count modulo 2**64.

    Raises:
        TypeError: They are not integers.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"options['stream'] must hold 64-bit integers, got {value!r:.80}")
    return array.astype(np.uint64)


def row_info(outcome: Outcome, row: int = 0) -> dict[str, Any]:
    """Info of one row after a step; what does not apply is absent."""
    info: dict[str, Any] = {}
    if row in outcome.text:
        info = {"text": outcome.text[row], "stop_reason": outcome.stop_reason[row]}
    payment = outcome.payment
    if payment is not None and row in outcome.paid_rows:
        k = int(np.flatnonzero(outcome.paid_rows == row)[0])
        parts = {n: float(v[k]) for n, v in payment.components.items() if not np.isnan(v[k])}
        if parts:
            info["reward"] = parts
        if payment.status[k] is not None:
            info["reward_status"] = payment.status[k]
            info["reward_traceback"] = payment.traceback or ""
    return info


def checked_options(options: dict[str, Any] | None, known: set[str]) -> dict[str, Any]:
    """Reset options, or a ValueError that names one that does not exist."""
    options = options or {}
    for name in options:
        if name not in known:
            raise ValueError(f"unknown reset option {name!r}; the options are {sorted(known)}")
    return options


def task_of(make_task: Callable[..., Task], task: Task | None, knobs: dict[str, Any]) -> Task:
    """The task that was given, or the one that `make_task` builds from the knobs.

    Equal hashable knobs share one task in a process; a file among them counts with its time and
    size, so that an edited file is read again.

    Raises:
        TypeError: Both a task and knobs were given.
    """
    if task is not None:
        if knobs:
            raise TypeError(f"a task was given, so the arguments {sorted(knobs)} have no place")
        return task
    key = (make_task, *((name, _identity(knobs[name])) for name in sorted(knobs)))
    try:
        hash(key)
    except TypeError:
        return make_task(**knobs)
    if key not in _TASKS:
        while len(_TASKS) >= 64:
            _TASKS.pop(next(iter(_TASKS)))
        _TASKS[key] = make_task(**knobs)
    return _TASKS[key]


_TASKS: dict[Any, Task] = {}


def _identity(knob: Any) -> Any:
    """What tells one knob from another: its value and type, and for a file what it holds."""
    if isinstance(knob, str | Path):
        path = Path(knob).absolute()
        try:
            stat = path.stat()
        except (OSError, ValueError):  # not a path, or none that can be
            return type(knob), knob
        return type(knob), knob, path, stat.st_mtime_ns, stat.st_size
    return type(knob), knob


def check_render_mode(mode: str | None, modes: list[str]) -> None:
    """Raise a ValueError unless `mode` is None or one of `modes`."""
    if mode is not None and mode not in modes:
        raise ValueError(f"render_mode must be None or one of {modes}, got {mode!r}")


def _single(name: str, value: Any) -> NDArray[Any]:
    array = np.asarray(value)
    if array.ndim:
        raise ValueError(f"options[{name!r}] must be one integer, got shape {array.shape}")
    return array[None]


def _footer(mdp: TokenMDP, row: int, info: dict[str, Any]) -> str:
    parts = [f"{name}={value:.3f}" for name, value in info.get("reward", {}).items()]
    end = [f"end: {info['stop_reason']}"] if "stop_reason" in info else []
    return f"[{' '.join([f'reward {mdp.paid[row]:.3f}', *parts, *end])}]"


def _shown(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
