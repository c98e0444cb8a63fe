"""Agents: one algorithm a file, each read from top to bottom.

`from textgym.agents import PPO, PPOConfig` imports only the file that holds the name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textgym.agents.ppo import PPO as PPO
    from textgym.agents.ppo import PPOConfig as PPOConfig
    from textgym.agents.reinforce import REINFORCE as REINFORCE
    from textgym.agents.reinforce import REINFORCEConfig as REINFORCEConfig
    from textgym.agents.sft import SFT as SFT
    from textgym.agents.sft import SFTConfig as SFTConfig

WHERE = {  # name -> module
    "PPO": "ppo",
    "PPOConfig": "ppo",
    "REINFORCE": "reinforce",
    "REINFORCEConfig": "reinforce",
    "SFT": "sft",
    "SFTConfig": "sft",
}

__all__ = ["PPO", "REINFORCE", "SFT", "PPOConfig", "REINFORCEConfig", "SFTConfig"]


def __getattr__(name: str) -> Any:
    """Import an agent when it is first used."""
    if name in WHERE:
        return getattr(import_module(f"{__name__}.{WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
