"""SB3-TRPO: the TRPO of sb3-contrib, unchanged, with hyperparameters that work for text.

Schulman et al. 2015, "Trust region policy optimization"; the implementation is `sb3_contrib.TRPO`.
The recipe, as far as it differs from `SB3PPO`'s:

1. The trust region is per token: `target_kl` is a mean over states of the KL between two
   distributions over the vocabulary, so that a response of T tokens may move T times as far.
2. The policy's step has no learning rate. `lr` is that of the values, and it is high: sb3-contrib
   keeps value losses from what policy and values share, so that only the value head learns.
3. It is slow: sb3-contrib differentiates once for each tensor of weights, so that every product
   with the Fisher matrix costs as many backward passes as there are tensors (measured in
   docs/experiments.md). And whole distributions [M, V] are in memory, several times. So
   `sub_sampling` takes one token in eight for the policy's step, and the conjugate gradient has
   fewer steps than elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from textgym.learning import check_above_0, check_positive
from textgym.returns import check_unit
from textgym.runs import Result
from textgym.sb3 import CausalLMActorCriticPolicy, SequenceRolloutBuffer
from textgym.sb3.training import Training, check_config, whole_sequences

if TYPE_CHECKING:
    from textgym.policies import CausalLMPolicy
    from textgym.vector import TextGenVectorEnv

try:
    from sb3_contrib import TRPO
except ImportError as error:
    raise ImportError('TRPO needs sb3-contrib: pip install "textgym[sb3]"') from error


@dataclass(frozen=True)
class SB3TRPOConfig:
    """What sb3-contrib's TRPO does; every number of it."""

    seed: int = 0
    """Seed of episodes, draws and shuffles."""
    n_steps: int | None = None
    """Steps of every row in a rollout; None: three times the budget of a response."""
    target_kl: float = 0.005
    """Trust region: mean KL to the sampling policy, nats per token."""
    cg_steps: int = 5
    """Most steps of the conjugate gradient."""
    cg_damping: float = 0.1
    """Multiple of the identity that is added to the Fisher matrix."""
    line_search_steps: int = 10
    """Most shortenings of the step until it is inside the region and improves the objective."""
    sub_sampling: int = 8
    """One in so many tokens is used for the policy's step."""
    lr: float = 1e-3
    """Highest learning rate of the value head."""
    warmup_updates: int = 0
    """Updates of linear warm-up."""
    lr_final: float = 1.0
    """Learning rate at the end, as a share of `lr`; decays linearly over tokens."""
    value_epochs: int = 2
    """Passes of the value function over each rollout."""
    value_minibatches: int = 4
    """Gradient steps of a pass."""
    gamma: float = 1.0
    """Discount per action."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    kl_coef: float = 0.0
    """Price of one nat of KL to the reference; with `kl_target`, its first value."""
    kl_target: float | None = None
    """KL in nats per response that the price is adapted to; None: a fixed price."""
    kl_horizon: float = 10_000
    """Episodes over which the price adapts."""
    exact_kl_episodes: int = 32
    """Sequences of each rollout on which the exact KL is measured; 0: none."""
    eval_every: int = 10
    """Updates between held-out evaluations; 0: only before and after."""
    eval_episodes: int = 64
    """Held-out prompts of an evaluation."""
    checkpoint_every: int = 10
    """Updates between checkpoints."""
    keep: int = 2
    """Newest checkpoints kept; the best is kept besides."""
    samples: int = 4
    """Responses written to samples.jsonl at every evaluation."""

    def __post_init__(self) -> None:
        """Refuse numbers that could not be trained with."""
        check_config(self)
        check_positive(self, "cg_steps", "line_search_steps", "sub_sampling")
        check_positive(self, "value_epochs", "value_minibatches")
        check_unit("gae_lambda", self.gae_lambda)
        check_above_0(self, "target_kl", "cg_damping")


class SB3TRPO:
    """The recipe; `learn` trains `policy` in place, `algorithm` is sb3-contrib's own object."""

    autoreset_mode = "SameStep"

    def __init__(
        self,
        policy: CausalLMPolicy,
        envs: TextGenVectorEnv,
        config: SB3TRPOConfig | None = None,
        *,
        eval_envs: TextGenVectorEnv | None = None,
        reference: CausalLMPolicy | None = None,
        folder: str | Path | None = None,
    ) -> None:
        """Put the parts together; arguments and errors as in `SB3PPO`."""
        self.config = cfg = config or SB3TRPOConfig()
        self.policy, self.folder = policy, folder
        self.training = Training(
            policy,
            envs,
            cfg,
            type(self).__name__,
            eval_envs=eval_envs,
            reference=reference,
            folder=folder,
        )
        self.training.batch_size(cfg.sub_sampling)  # the policy's step must have two tokens, too
        with whole_sequences():
            self.algorithm = TRPO(
                CausalLMActorCriticPolicy,
                rollout_buffer_class=SequenceRolloutBuffer,
                target_kl=cfg.target_kl,
                cg_max_steps=cfg.cg_steps,
                cg_damping=cfg.cg_damping,
                line_search_max_iter=cfg.line_search_steps,
                sub_sampling_factor=cfg.sub_sampling,
                n_critic_updates=cfg.value_epochs,
                batch_size=self.training.batch_size(cfg.value_minibatches),
                **self.training.options,
            )

    def learn(
        self,
        total_tokens: int,
        *,
        resume: bool = False,
        quiet: bool = False,
        max_updates: int | None = None,
    ) -> Result:
        """Train until `total_tokens` action tokens were sampled; see `Training.learn`."""
        return self.training.learn(
            self.algorithm, total_tokens, resume=resume, quiet=quiet, max_updates=max_updates
        )
