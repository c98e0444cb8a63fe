"""Row-steps per CPU-second of the native vector environment against the usual wrappers.

`python scripts/bench_env.py` steps `TextGen-v0` with random tokens to a horizon of 64, as
`TextGenVectorEnv`, as Gymnasium's `SyncVectorEnv` and as SB3's `DummyVecEnv` of the same single
environment, in turns. One table pays 1.0 for every text (so that text is decoded and nothing is
computed), one pays the default BLEU. The last line is JSON.
"""

from __future__ import annotations

import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch: one thread, so CPU time is comparable

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.vector import SyncVectorEnv
from machine import described
from stable_baselines3.common.vec_env import DummyVecEnv

from textgym.envs.data_to_text import data_to_text_task

HORIZON = 64
KINDS = ("native", "sync", "dummy")


@dataclass(frozen=True)
class Args:
    """What to measure."""

    num_envs: tuple[int, ...] = (1, 16, 256, 4096)
    """Numbers of rows N."""
    rounds: int = 3
    """Measurements of each kind, taken in turns; tables show the median."""
    seconds: float = 0.5
    """CPU time of one measurement, at least; it always covers whole episodes."""


def make(kind: str, num_envs: int, knobs: dict[str, Any]) -> Any:
    """One of `KINDS` with N rows; the single environments go without Gymnasium's checker."""
    if kind == "native":
        return gym.make_vec("TextGen-v0", num_envs, "vector_entry_point", **knobs)

    def single() -> gym.Env[Any, Any]:
        return gym.make("TextGen-v0", disable_env_checker=True, **knobs)

    singles: list[Callable[[], gym.Env[Any, Any]]] = [single] * num_envs
    return SyncVectorEnv(singles) if kind == "sync" else DummyVecEnv(singles)


class Runner:
    """Steps one environment by whole episodes and counts row-steps and CPU time."""

    def __init__(self, kind: str, num_envs: int, knobs: dict[str, Any]) -> None:
        self.envs = make(kind, num_envs, knobs)
        self.num_envs = num_envs
        if kind == "dummy":  # its rows get seed + i too, so all kinds play the same episodes
            self.envs.seed(0)
            self.envs.reset()
        else:
            self.envs.reset(seed=0)

    def measure(self, actions: np.ndarray[Any, np.dtype[np.int64]], seconds: float) -> float:
        """Row-steps per CPU-second over at least `seconds` and whole cycles of `actions`."""
        steps = 0
        start = time.process_time()
        while True:
            for action in actions:
                self.envs.step(action)
            steps += len(actions)
            spent = time.process_time() - start
            if spent >= seconds:
                return steps * self.num_envs / spent


def warmed(knobs: dict[str, Any]) -> int:
    """Score every prompt once, so that cached references favour nobody; returns the vocabulary."""
    number = len(knobs["prompts"])
    envs = make("native", number, knobs)
    envs.reset(options={"prompt_row": np.arange(number)})
    for _ in range(HORIZON):
        envs.step(np.zeros(number, np.int64))
    return int(envs.unwrapped.task.vocab_size)


def table(args: Args, knobs: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure every kind at every N; one row of results an N."""
    rows = []
    vocab_size = warmed(knobs)
    for num_envs in args.num_envs:
        runners = {kind: Runner(kind, num_envs, knobs) for kind in KINDS}
        # HORIZON tokens and, in Gymnasium's vector environments, the step that resets.
        shape = (HORIZON + 1, num_envs)
        actions = np.random.default_rng(0).integers(vocab_size, size=shape)
        speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for turn in range(args.rounds + 1):
            for kind, runner in runners.items():
                speed = runner.measure(actions, args.seconds if turn else 0.0)
                if turn:  # the first one warms up
                    speeds[kind].append(speed)
        row: dict[str, Any] = {"num_envs": num_envs}
        row |= {kind: round(statistics.median(speeds[kind])) for kind in KINDS}
        row["over_sync"] = round(row["native"] / row["sync"], 2)
        row["over_dummy"] = round(row["native"] / row["dummy"], 2)
        row["spread"] = {k: [round(min(s)), round(max(s))] for k, s in speeds.items()}
        rows.append(row)
        print(
            f"{num_envs:>6} {row['native']:>13,} {row['sync']:>13,} {row['dummy']:>13,}"
            f" {row['over_sync']:>12.1f}x {row['over_dummy']:>12.1f}x",
            flush=True,
        )
    return rows


def main(args: Args) -> None:
    """Print both tables and the JSON line."""
    result: dict[str, Any] = {"benchmark": "bench_env", "horizon": HORIZON}
    result |= described(("gymnasium", "stable-baselines3", "numpy", "tokenizers", "sacrebleu"))
    for key in ("processor", "cores", "system", "python", "versions", "command", "commit"):
        print(f"{key:<10} {result[key]}")
    # Nothing but the budget ends a response, so every episode has HORIZON tokens.
    prompts = data_to_text_task().prompts
    common: dict[str, Any] = {"prompts": prompts, "max_new_tokens": HORIZON, "stop": ()}
    rewards = {"constant": {"reward": lambda text: 1.0}, "bleu": {}}
    for name, knobs in rewards.items():
        print(f"\nreward: {name}; row-steps per CPU-second, median of {args.rounds}")
        heads = ("native", "SyncVectorEnv", "DummyVecEnv", "over Sync", "over Dummy")
        print(f"{'N':>6} " + " ".join(f"{head:>13}" for head in heads))
        result[name] = table(args, common | knobs)
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
