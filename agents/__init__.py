"""Agents: one algorithm a file, each read from top to bottom.

`from textgym.agents import PPO, PPOConfig` imports only the file that holds the name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textgym.agents.expert_iteration import ExpertIteration as ExpertIteration
    from textgym.agents.expert_iteration import ExpertIterationConfig as ExpertIterationConfig
    from textgym.agents.grpo import GRPO as GRPO
    from textgym.agents.grpo import GRPOConfig as GRPOConfig
    from textgym.agents.ppo import PPO as PPO
    from textgym.agents.ppo import PPOConfig as PPOConfig
    from textgym.agents.reinforce import REINFORCE as REINFORCE
    from textgym.agents.reinforce import REINFORCEConfig as REINFORCEConfig
    from textgym.agents.sb3_a2c import SB3A2C as SB3A2C
    from textgym.agents.sb3_a2c import SB3A2CConfig as SB3A2CConfig
    from textgym.agents.sb3_maskable_ppo import SB3MaskablePPO as SB3MaskablePPO
    from textgym.agents.sb3_maskable_ppo import SB3MaskablePPOConfig as SB3MaskablePPOConfig
    from textgym.agents.sb3_ppo import SB3PPO as SB3PPO
    from textgym.agents.sb3_ppo import SB3PPOConfig as SB3PPOConfig
    from textgym.agents.sb3_trpo import SB3TRPO as SB3TRPO
    from textgym.agents.sb3_trpo import SB3TRPOConfig as SB3TRPOConfig
    from textgym.agents.sft import SFT as SFT
    from textgym.agents.sft import SFTConfig as SFTConfig

WHERE = {  # name -> module
    "ExpertIteration": "expert_iteration",
    "ExpertIterationConfig": "expert_iteration",
    "GRPO": "grpo",
    "GRPOConfig": "grpo",
    "PPO": "ppo",
    "PPOConfig": "ppo",
    "REINFORCE": "reinforce",
    "REINFORCEConfig": "reinforce",
    "SB3A2C": "sb3_a2c",
    "SB3A2CConfig": "sb3_a2c",
    "SB3MaskablePPO": "sb3_maskable_ppo",
    "SB3MaskablePPOConfig": "sb3_maskable_ppo",
    "SB3PPO": "sb3_ppo",
    "SB3PPOConfig": "sb3_ppo",
    "SB3TRPO": "sb3_trpo",
    "SB3TRPOConfig": "sb3_trpo",
    "SFT": "sft",
    "SFTConfig": "sft",
}

__all__ = [
    "GRPO",
    "PPO",
    "REINFORCE",
    "SB3A2C",
    "SB3PPO",
    "SB3TRPO",
    "SFT",
    "ExpertIteration",
    "ExpertIterationConfig",
    "GRPOConfig",
    "PPOConfig",
    "REINFORCEConfig",
    "SB3A2CConfig",
    "SB3MaskablePPO",
    "SB3MaskablePPOConfig",
    "SB3PPOConfig",
    "SB3TRPOConfig",
    "SFTConfig",
]


def __getattr__(name: str) -> Any:
    """Import an agent when it is first used."""
    if name in WHERE:
        return getattr(import_module(f"{__name__}.{WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
