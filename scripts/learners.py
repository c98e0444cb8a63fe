"""What compare_agents.py and compare_sb3.py train: environments, and policies to begin with."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from textgym.policies import CausalLMPolicy, random_causal_lm


def vector(task: str, rows: int, mode: str = "Disabled", **knobs: Any) -> Any:
    """A vector environment."""
    return gym.make_vec(task, rows, "vector_entry_point", autoreset_mode=mode, **knobs).unwrapped


def make_policy(envs: Any, seed: int, *, embedded: bool) -> CausalLMPolicy:
    """The embedded model, or a small one of random weights for a diagnostic."""
    if embedded:
        return CausalLMPolicy.from_pretrained("embedded", device="cpu", seed=seed)
    model = random_causal_lm(
        envs.task.vocab_size,
        hidden_size=64,
        num_layers=1,
        num_heads=4,
        max_positions=64,
        initializer_range=0.06,
        seed=seed,
    )
    return CausalLMPolicy(model, device="cpu", seed=seed)
