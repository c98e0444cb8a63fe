"""Algorithms on Echo with a language model small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("sb3_contrib")

from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C, PPO

from textgym.sb3 import (
    CausalLMActorCriticPolicy,
    MaskableCausalLMActorCriticPolicy,
    MaskableSequenceRolloutBuffer,
    SB3VecEnv,
    SequenceRolloutBuffer,
    make_sb3_vec_env,
)

ALGORITHMS = {"PPO": PPO, "A2C": A2C, "TRPO": TRPO, "MaskablePPO": MaskablePPO}


@pytest.fixture
def make_vec_env() -> Callable[..., SB3VecEnv]:
    def make(num_envs: int = 4, env: str = "Echo", seed: int = 0, **knobs: Any) -> SB3VecEnv:
        return make_sb3_vec_env(f"textgym:textgym/{env}-v0", num_envs, seed, env_kwargs=knobs)

    return make


@pytest.fixture
def make_algorithm(make_vec_env: Callable[..., SB3VecEnv]) -> Callable[..., Any]:
    def make(name: str = "PPO", env: Any = None, stock: bool = False, **changes: Any) -> Any:
        masked = name == "MaskablePPO"
        policy = MaskableCausalLMActorCriticPolicy if masked else CausalLMActorCriticPolicy
        buffer = MaskableSequenceRolloutBuffer if masked else SequenceRolloutBuffer
        options: dict[str, Any] = {
            "n_steps": 10,
            "gamma": 1.0,
            "learning_rate": 1e-3,
            "seed": 0,
            "device": "cpu",
            "rollout_buffer_class": None if stock else buffer,
        }
        if name != "A2C":
            options["batch_size"] = 2 * changes.get("n_steps", 10)
        if name in ("PPO", "MaskablePPO"):
            options["n_epochs"] = 1
        return ALGORITHMS[name](policy, make_vec_env() if env is None else env, **options | changes)

    return make


@pytest.fixture
def collect_once() -> Callable[[Any], Any]:
    """Fill the rollout buffer once, as `learn` does."""

    def collect(algorithm: Any, callbacks: Any = None) -> Any:
        _, callback = algorithm._setup_learn(10**6, callbacks)
        callback.on_training_start({}, {})
        extra = {"use_masking": True} if isinstance(algorithm, MaskablePPO) else {}
        algorithm.collect_rollouts(
            algorithm.env, callback, algorithm.rollout_buffer, algorithm.n_steps, **extra
        )
        return algorithm.rollout_buffer

    return collect
