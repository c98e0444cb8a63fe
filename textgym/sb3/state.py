"""What a checkpoint keeps of an algorithm of stable-baselines3 and its environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from textgym.checkpoint import OtherRunError
from textgym.mdp import RowState, TokenMDP
from textgym.sb3.vec_env import SB3VecEnv


class AlgorithmState:
    """What a checkpoint keeps of an algorithm and its environment.

    The episodes of a rollout go on in the next one, so that those under way are kept too: as
    prompt and actions, which are taken again when they are loaded.
    """

    def __init__(self, algorithm: OnPolicyAlgorithm, envs: SB3VecEnv) -> None:
        self.algorithm, self.envs = algorithm, envs
        inner: Any = envs.envs.unwrapped
        self.mdp: TokenMDP = inner.mdp

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs."""
        algorithm: Any = self.algorithm
        rows = [saved_row(self.mdp.get_state(i)) for i in range(self.mdp.num_envs)]
        return {
            "num_timesteps": algorithm.num_timesteps,
            "n_updates": algorithm._n_updates,
            "optimizer": algorithm.policy.optimizer.state_dict(),
            "draws": algorithm.policy.draws.get_state(),
            "shuffles": algorithm.rollout_buffer.rng.bit_generator.state,
            "rows": rows if algorithm.num_timesteps else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            OtherRunError: The environment has another number of rows, or is another task.
        """
        algorithm: Any = self.algorithm
        rows = state["rows"]
        if rows and len(rows) != self.mdp.num_envs:
            raise OtherRunError(
                f"the run has {len(rows)} rows and this environment {self.mdp.num_envs}: resume it "
                f"with as many as it had (num_envs={len(rows)}, --num-envs {len(rows)})"
            )
        algorithm.num_timesteps = state["num_timesteps"]
        algorithm._n_updates = state["n_updates"]
        algorithm.policy.optimizer.load_state_dict(state["optimizer"])
        algorithm.policy.draws.set_state(state["draws"])
        algorithm.rollout_buffer.rng.bit_generator.state = state["shuffles"]
        algorithm._last_obs = None  # of a run that has not begun; `learn` starts its episodes
        if rows:
            algorithm._last_obs = self.envs.resume(replayed(self.mdp, rows))
            algorithm._last_episode_starts = self.mdp.steps == 0


def saved_row(state: RowState) -> dict[str, Any]:
    """An episode as plain numbers: its prompt, and the actions that were taken."""
    response = state.ids[state.prompt_length :]
    own = np.ones(len(response), bool)
    if state.replied is not None:
        own = ~state.replied[state.prompt_length : len(state.ids)]
    return {
        "prompt_row": state.prompt_row,
        "stream": state.stream,
        "seed": state.seed,
        "episode": state.episode,
        "actions": response[own].tolist(),
    }


def replayed(mdp: TokenMDP, rows: list[dict[str, Any]]) -> list[RowState]:
    """Take the actions of saved episodes again; what they were paid so far is paid again.

    Raises:
        OtherRunError: An episode would have ended before its last action, or has no such prompt.
    """
    again = TokenMDP(mdp.task, len(rows), mdp.max_episode_steps)
    prompts = np.array([row["prompt_row"] for row in rows])
    taken = np.array([len(row["actions"]) for row in rows])
    try:
        again.begin(
            np.arange(len(rows)), prompts, np.array([row["stream"] for row in rows], np.uint64)
        )
        for step in range(int(taken.max(initial=0))):
            actions = np.array([(row["actions"] + [0] * (step + 1))[step] for row in rows])
            again.step(actions, taken > step)
    except (ResetNeeded, ValueError) as error:
        raise OtherRunError(
            f"the episodes under way do not fit this environment ({error}): resume the run with "
            "the prompts, the stops and the budget that it had"
        ) from error
    return [
        replace(again.get_state(i), seed=row["seed"], episode=row["episode"])
        for i, row in enumerate(rows)
    ]
