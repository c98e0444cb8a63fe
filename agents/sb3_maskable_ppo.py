"""SB3-MaskablePPO: the MaskablePPO of sb3-contrib, unchanged: PPO where some tokens are forbidden.

Huang and Ontañón 2022, "A closer look at invalid action masking in policy gradient algorithms"; the
implementation is `sb3_contrib.MaskablePPO`. The recipe is that of `SB3PPO` (see there), and:

1. Masks are the environment's: give it `AllowedTokens` or `ForcedPrefix` of
   `textgym.vector_wrappers` (`--allowed-tokens references` on the command line). Without any it is
   PPO, and every token is allowed.
2. A forbidden token has probability 0 in sampling, in training and in the price of KL; the buffer
   keeps the masks bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from textgym.agents.sb3_ppo import SB3PPO, SB3PPOConfig
from textgym.sb3 import MaskableCausalLMActorCriticPolicy, MaskableSequenceRolloutBuffer


@dataclass(frozen=True)
class SB3MaskablePPOConfig(SB3PPOConfig):
    """What MaskablePPO does: the numbers of `SB3PPOConfig`."""


class SB3MaskablePPO(SB3PPO):
    """The recipe; `learn` trains `policy` in place, `algorithm` is sb3-contrib's own object."""

    masks = True

    def make(self, options: dict[str, Any]) -> Any:
        """The algorithm."""
        policy = MaskableCausalLMActorCriticPolicy  # says how to install sb3-contrib
        from sb3_contrib import MaskablePPO

        return MaskablePPO(policy, rollout_buffer_class=MaskableSequenceRolloutBuffer, **options)
