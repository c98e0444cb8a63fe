"""stable-baselines3 on token environments: policies, rollout buffers, a vector environment, extras.

Standard `PPO`, `A2C`, `TRPO` and `MaskablePPO` train with these, unchanged. Nothing here is
imported before it is asked for; what needs sb3-contrib says so.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textgym.sb3.buffer import SequenceRolloutBuffer
    from textgym.sb3.callbacks import SampleTextCallback, TextMetricsCallback
    from textgym.sb3.kl import ReferenceKL
    from textgym.sb3.maskable import (
        MaskableCausalLMActorCriticPolicy,
        MaskableSequenceRolloutBuffer,
    )
    from textgym.sb3.policy import CausalLMActorCriticPolicy
    from textgym.sb3.vec_env import SB3VecEnv, make_sb3_vec_env

_WHERE = {
    "CausalLMActorCriticPolicy": "policy",
    "MaskableCausalLMActorCriticPolicy": "maskable",
    "MaskableSequenceRolloutBuffer": "maskable",
    "ReferenceKL": "kl",
    "SB3VecEnv": "vec_env",
    "SampleTextCallback": "callbacks",
    "SequenceRolloutBuffer": "buffer",
    "TextMetricsCallback": "callbacks",
    "make_sb3_vec_env": "vec_env",
}

__all__ = [
    "CausalLMActorCriticPolicy",
    "MaskableCausalLMActorCriticPolicy",
    "MaskableSequenceRolloutBuffer",
    "ReferenceKL",
    "SB3VecEnv",
    "SampleTextCallback",
    "SequenceRolloutBuffer",
    "TextMetricsCallback",
    "make_sb3_vec_env",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
