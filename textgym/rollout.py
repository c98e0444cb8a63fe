"""`collect`: run a policy in a vector environment until B episodes have ended.

Exactly B episodes are started, from a queue, and all of them are finished. Stopping on a token
budget or keeping the first finishers would prefer short responses. A finished row is given the
queue's next episode at once; an episode and its draws depend on the run's seed and the episode's
index only, so the number of rows changes nothing but speed.

Shapes: B episodes, N rows of the environment, n of them live.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from textgym.episodes import Episodes
from textgym.parallel import share, shared
from textgym.policies.results import ActResult
from textgym.streams import mix64

if TYPE_CHECKING:
    from textgym.policies import CausalLMPolicy
    from textgym.vector import TextGenVectorEnv

Observations = dict[str, NDArray[np.int64]]


class PromptQueue:
    """Order of the prompts in training: shuffled epochs, each prompt once an epoch.

    Args:
        num_prompts: Rows of the prompt table.
        seed: Key of the shuffles.

    Raises:
        ValueError: There is no prompt.
    """

    def __init__(self, num_prompts: int, seed: int) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
        self.num_prompts = num_prompts
        self.seed = seed
        self.position = 0
        self._shuffled = -1, np.zeros(0, np.int64)  # the last epoch asked for, and its order

    def take(self, count: int) -> NDArray[np.int64]:
        """The next `count` prompt rows, int64 `[count]`."""
        rows = np.arange(self.position, self.position + count)
        self.position += count
        epochs = {e: self._order(e) for e in np.unique(rows // self.num_prompts).tolist()}
        taken = [epochs[r // self.num_prompts][r % self.num_prompts] for r in rows.tolist()]
        return np.array(taken, np.int64)

    def state_dict(self) -> dict[str, int]:
        """Where the queue stands."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where a queue of the same seed stood."""
        self.position = int(state["position"])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._shuffled[0] != epoch:
            keys = mix64(self.seed, epoch, np.arange(self.num_prompts))
            self._shuffled = epoch, np.argsort(keys, kind="stable")
        return self._shuffled[1]


def collect(
    policy: CausalLMPolicy,
    envs: TextGenVectorEnv,
    episodes: int,
    *,
    group_size: int = 1,
    seed: int = 0,
    first_episode: int = 0,
    prompt_rows: NDArray[np.int64] | None = None,
    path: Literal["step", "sequence"] = "step",
) -> Episodes:
    """Start B episodes and finish all of them.

    Several processes (see `textgym.parallel`) sample a share each, and each gets all of them.

    Args:
        policy: What chooses the tokens.
        envs: A vector environment with `autoreset_mode="Disabled"`.
        episodes: Number of episodes B, a multiple of `group_size`.
        group_size: Episodes that share a prompt and a stream and differ in their sample index.
        seed: The run's seed. An episode's stream is hash(seed, `first_episode` + index of its
            group).
        first_episode: Groups collected before in this run.
        prompt_rows: int64 `[B / group_size]`, the groups' prompts; default: each is drawn from its
            stream.
        path: `"step"`: one decoding step, one `env.step`. `"sequence"`: the device writes whole
            responses and the same ids are replayed through `env.step`; both give the same tokens
            and rewards.

    Returns:
        The episodes, in the order in which they were queued.

    Raises:
        ValueError: An argument is out of range, or the environment resets by itself, or replies on
            the sequence path.
        ProcessError: Another process failed while it sampled its share.
    """
    if envs.metadata["autoreset_mode"] is not AutoresetMode.DISABLED:
        raise ValueError(
            "collect needs a vector environment made with autoreset_mode='Disabled', got "
            f"{envs.metadata['autoreset_mode'].value!r}"
        )
    if group_size < 1 or episodes < 1 or episodes % group_size:
        raise ValueError(
            f"episodes must be a positive multiple of group_size, got {episodes} and {group_size}"
        )
    groups = episodes // group_size
    if prompt_rows is not None and len(prompt_rows) != groups:
        raise ValueError(
            f"prompt_rows must hold one row a group ({groups}), got {len(prompt_rows)}"
        )
    plan = _Plan(
        stream=np.repeat(mix64(seed, first_episode + np.arange(groups)), group_size),
        sample_index=np.tile(np.arange(group_size), groups),
        prompt_row=None if prompt_rows is None else np.repeat(prompt_rows, group_size),
    )
    if path not in ("step", "sequence"):
        raise ValueError(f"path must be 'step' or 'sequence', got {path!r}")
    mine = plan.part(share(episodes))
    parts = shared(lambda: _sampled(policy, envs, mine, group_size, path))
    found = [part for part in parts if part is not None]
    if len(found) == 1:
        return found[0]
    together = Episodes.join(found)
    together.group = np.arange(episodes) // group_size  # one may lie across two shares
    return together


def _sampled(
    policy: CausalLMPolicy, envs: TextGenVectorEnv, plan: _Plan, group_size: int, path: str
) -> Episodes | None:
    """The episodes of a plan; None of an empty one."""
    if not len(plan.stream):
        return None
    recorder = _Recorder(policy, envs, plan)
    run = _step_path if path == "step" else _sequence_path
    run(policy, envs, plan, recorder)
    return recorder.episodes(group_size)


@dataclass
class _Plan:
    """The queue: stream, sample index and prompt of each of the B episodes."""

    stream: NDArray[np.uint64]
    sample_index: NDArray[np.int64]
    prompt_row: NDArray[np.int64] | None

    def part(self, which: slice) -> _Plan:
        """A stretch of the queue."""
        rows = None if self.prompt_row is None else self.prompt_row[which]
        return _Plan(self.stream[which], self.sample_index[which], rows)

    def begin(
        self, envs: TextGenVectorEnv, rows: NDArray[np.int64], episodes: NDArray[np.int64]
    ) -> tuple[Observations, dict[str, Any]]:
        """Reset `rows` into `episodes` of the queue."""
        number = envs.num_envs
        mask = np.zeros(number, np.bool_)
        mask[rows] = True
        stream = np.zeros(number, np.uint64)
        stream[rows] = self.stream[episodes]
        options: dict[str, Any] = {"reset_mask": mask, "stream": stream}
        if self.prompt_row is not None:
            options["prompt_row"] = np.zeros(number, np.int64)
            options["prompt_row"][rows] = self.prompt_row[episodes]
        return envs.reset(options=options)


def check_path(path: Literal["step", "sequence"], envs: TextGenVectorEnv) -> None:
    """Check that responses can be sampled in this way.

    Raises:
        ValueError: Whole responses are asked for, but the environment has its say at every token.
    """
    if path == "sequence" and (envs.unwrapped.task.respond is not None or envs.masks_actions):
        raise ValueError(
            "path='sequence' writes whole responses before the environment sees them, but this "
            "environment replies or masks actions; use path='step'"
        )


def _step_path(
    policy: CausalLMPolicy, envs: TextGenVectorEnv, plan: _Plan, recorder: _Recorder
) -> None:
    """One decoding step, one step of the environment."""

    def choose(
        obs: Observations,
        rows: NDArray[np.int64],
        playing: NDArray[np.int64],
        mask: NDArray[np.bool_] | None,
    ) -> ActResult:
        everyone = len(rows) == envs.num_envs
        return policy.act(
            obs if everyone else {k: v[rows] for k, v in obs.items()},
            plan.stream[playing],
            plan.sample_index[playing],
            rows=None if everyone else rows,
            action_mask=mask,
        )

    rows = np.arange(min(envs.num_envs, len(plan.stream)))
    _play(envs, plan, recorder, choose, plan.begin(envs, rows, rows))


def _sequence_path(
    policy: CausalLMPolicy, envs: TextGenVectorEnv, plan: _Plan, recorder: _Recorder
) -> None:
    """Whole responses on the device; then the environment steps through what was written.

    The prompts are what resetting says. Where there are more than rows, these are reset once more
    to play them.
    """
    task = envs.unwrapped.task
    check_path("sequence", envs)
    total, number = len(plan.stream), envs.num_envs
    prompts: list[Observations] = []
    for first in range(0, total, number):
        episodes = np.arange(first, min(total, first + number))
        rows = np.arange(len(episodes))
        begun = plan.begin(envs, rows, episodes)
        prompts.append({k: v[rows].copy() for k, v in begun[0].items()})
    made = policy.generate(
        {k: np.concatenate([obs[k] for obs in prompts]) for k in prompts[0]},
        plan.stream,
        plan.sample_index,
        max_new_tokens=task.max_new_tokens,
        stop_ids=task.stop_ids,
        num_rows=number,
    )
    written = np.zeros(total, np.int64)

    def choose(
        obs: Observations,
        rows: NDArray[np.int64],
        playing: NDArray[np.int64],
        mask: NDArray[np.bool_] | None,
    ) -> ActResult:
        at = playing, written[playing]
        written[playing] += 1
        return ActResult(made.tokens[at], made.logprob[at], made.value[at])

    if len(prompts) > 1:  # the rows have gone on to the last prompts of the queue
        rows = np.arange(number)
        begun = plan.begin(envs, rows, rows)
    _play(envs, plan, recorder, choose, begun)


def _play(
    envs: TextGenVectorEnv,
    plan: _Plan,
    recorder: _Recorder,
    choose: Callable[..., ActResult],
    begun: tuple[Observations, dict[str, Any]],
) -> None:
    """Step through all episodes of the queue; a row that has ended is given the next one at once.

    Args:
        envs: Their first rows have begun the first episodes.
        plan: The queue.
        recorder: Writes it down.
        choose: From observations, live rows [n], their episodes [n] and action masks to tokens.
        begun: Observations and infos of that beginning.
    """
    total, number = len(plan.stream), envs.num_envs
    episode = np.full(number, -1, np.int64)  # which episode of the queue a row plays; -1: none
    rows = np.arange(min(number, total))
    episode[rows] = rows
    queued = len(rows)
    obs, info = begun
    recorder.began(rows, rows, info)
    actions = np.zeros(number, np.int64)
    while len(rows):
        playing = episode[rows]
        mask = envs.action_masks()[rows] if recorder.masked else None
        act = choose(obs, rows, playing, mask)
        actions[rows] = act.action
        column = obs["length"][rows, 0].copy()
        obs, reward, terminated, truncated, info = envs.step(actions)
        recorder.stepped(
            rows,
            playing,
            column,
            (act.logprob, act.value),
            reward,
            terminated,
            truncated,
            obs,
            info,
            mask,
        )
        ended = (terminated | truncated)[rows]
        if ended.any():
            free = rows[ended]
            fresh = np.arange(queued, min(total, queued + len(free)))
            queued += len(fresh)
            episode[free] = -1
            if len(fresh):
                free = free[: len(fresh)]
                episode[free] = fresh
                obs, info = plan.begin(envs, free, fresh)
                recorder.began(free, fresh, info)
            rows = np.flatnonzero(episode >= 0)


@dataclass
class _Recorder:
    """Writes down steps as they happen and sorts them into `Episodes` at the end."""

    policy: Any
    envs: Any
    plan: _Plan
    masked: bool = field(init=False)

    def __post_init__(self) -> None:
        total = len(self.plan.stream)
        self.task = self.envs.unwrapped.task
        self.masked = bool(self.envs.masks_actions)
        self.steps: list[tuple[Any, ...]] = []  # (episodes, column, logprob, value, reward)
        self.masks: list[NDArray[np.uint8]] = []
        self.parts: dict[str, list[tuple[NDArray[np.int64], NDArray[np.float64]]]] = {}
        self.count = 0
        self.sequences: list[Any] = [None] * total
        self.texts: list[str | None] = [None] * total
        self.reasons: list[str] = ["time_limit"] * total
        self.status: list[str | None] = [None] * total
        self.traceback: str | None = None
        self.prompt_length = np.zeros(total, np.int64)
        self.prompt_row = np.zeros(total, np.int64)
        self.terminated = np.zeros(total, np.bool_)
        self.truncated = np.zeros(total, np.bool_)
        self.bootstrap = np.zeros(total, np.float32)

    def began(
        self, rows: NDArray[np.int64], episodes: NDArray[np.int64], info: dict[str, Any]
    ) -> None:
        self.prompt_row[episodes] = info["prompt_row"][rows]

    def stepped(
        self,
        rows: NDArray[np.int64],
        episodes: NDArray[np.int64],
        column: NDArray[np.int64],
        chosen: tuple[NDArray[np.float32], NDArray[np.float32]],
        reward: NDArray[np.float64],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        obs: Observations,
        info: dict[str, Any],
        mask: NDArray[np.bool_] | None,
    ) -> None:
        self.steps.append((episodes, column, *chosen, reward[rows]))
        if mask is not None:
            self.masks.append(np.packbits(mask, axis=1))
        for name, values in info.get("reward", {}).items():
            if not name.startswith("_"):
                there = np.flatnonzero(info["reward"][f"_{name}"][rows])
                found = (self.count + there, values[rows[there]])
                self.parts.setdefault(name, []).append(found)
        self.count += len(rows)
        self.terminated[episodes] = terminated[rows]
        self.truncated[episodes] = truncated[rows]
        if "reward_status" in info:
            for k in np.flatnonzero(info["_reward_status"][rows]):
                i, b = rows[k], episodes[k]
                self.status[b] = self.status[b] or info["reward_status"][i]
                self.traceback = self.traceback or info["reward_traceback"][i] or None
        for k in np.flatnonzero((terminated | truncated)[rows]):
            self._finished(int(rows[k]), int(episodes[k]), obs, info)
        cut = rows[truncated[rows]]
        if len(cut):
            which = episodes[truncated[rows]]
            final = self.policy.act(
                {k: v[cut] for k, v in obs.items()}, self.plan.stream[which], rows=cut
            )
            self.bootstrap[which] = final.value

    def _finished(self, i: int, b: int, obs: Observations, info: dict[str, Any]) -> None:
        self.sequences[b] = obs["input_ids"][i, : obs["length"][i, 0]].copy()
        self.prompt_length[b] = obs["prompt_length"][i, 0]
        if "text" in info and info["_text"][i]:
            self.texts[b], self.reasons[b] = info["text"][i], info["stop_reason"][i]

    def episodes(self, group_size: int) -> Episodes:
        owner, column, logprob, value, reward = (
            np.concatenate([step[k] for step in self.steps]) for k in range(5)
        )
        order = np.argsort(owner, kind="stable")
        total = len(self.sequences)
        components: dict[str, NDArray[np.float64]] = {}
        for name, found in self.parts.items():
            components[name] = np.full(self.count, np.nan)
            for where, values in found:
                components[name][where] = values
        texts = [
            self.task.tokenizer.decode(seq[n:]) if text is None else text
            for text, seq, n in zip(self.texts, self.sequences, self.prompt_length, strict=True)
        ]
        return Episodes(
            ids=np.concatenate(self.sequences),
            starts=np.concatenate([[0], np.cumsum([len(s) for s in self.sequences])]),
            prompt_length=self.prompt_length,
            column=column[order],
            offsets=np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=total))]),
            logprob=logprob[order].astype(np.float32),
            value=value[order].astype(np.float32),
            reward=reward[order],
            components={name: values[order] for name, values in components.items()},
            terminated=self.terminated,
            truncated=self.truncated,
            bootstrap_value=self.bootstrap,
            stop_reason=self.reasons,
            texts=texts,
            prompts=[self.task.prompt_text(int(p)) for p in self.prompt_row],
            prompt_row=self.prompt_row,
            stream=self.plan.stream,
            sample_index=self.plan.sample_index,
            group=np.arange(total) // group_size,
            weight=np.array([float(s is None) for s in self.status]),
            status=self.status,
            traceback=self.traceback,
            packed_masks=np.concatenate(self.masks)[order] if self.masks else None,
            vocab_size=self.task.vocab_size,
        )
