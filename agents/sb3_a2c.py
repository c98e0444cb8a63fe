"""SB3-A2C: the A2C of stable-baselines3, unchanged, with hyperparameters that work for text.

Mnih et al. 2016, "Asynchronous methods for deep reinforcement learning", in its synchronous form;
the implementation is `stable_baselines3.A2C`. The recipe, as far as it differs from `SB3PPO`'s:

1. A rollout is as long as a response. SB3's default of 5 steps would bootstrap every response
   several times from values that know little.
2. One gradient step on a whole rollout, so that the learning rate is higher than PPO's.
3. Adam, not RMSprop: it is what language models are trained with.
4. Advantages are whitened by the buffer, with a floor, as they are for PPO (see `SB3PPO`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stable_baselines3 import A2C

from textgym.learning import check_above_0
from textgym.returns import check_unit
from textgym.runs import Result
from textgym.sb3 import CausalLMActorCriticPolicy, SequenceRolloutBuffer
from textgym.sb3.training import Training, check_config
from textgym.shaping import reward_range

if TYPE_CHECKING:
    from textgym.policies import CausalLMPolicy
    from textgym.vector import TextGenVectorEnv


@dataclass(frozen=True)
class SB3A2CConfig:
    """What SB3's A2C does; every number of it."""

    seed: int = 0
    """Seed of episodes, draws and shuffles."""
    n_steps: int | None = None
    """Steps of every row in a rollout; None: three times the budget of a response."""
    lr: float = 3e-4
    """Highest learning rate."""
    warmup_updates: int = 0
    """Updates of linear warm-up."""
    lr_final: float = 1.0
    """Learning rate at the end, as a share of `lr`; decays linearly over tokens."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    gamma: float = 1.0
    """Discount per action."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    vf_coef: float = 0.25
    """Weight of the value loss, a mean of squares without the half."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    whiten: bool = True
    """Whether advantages are given mean 0 and standard deviation 1 over the rollout."""
    whiten_floor: float = 0.05
    """Standard deviation that whitening takes at least, as a share of the range of the reward."""
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
        check_unit("gae_lambda", self.gae_lambda)
        check_above_0(self, "max_grad_norm")


class SB3A2C:
    """The recipe; `learn` trains `policy` in place, `algorithm` is SB3's own object."""

    autoreset_mode = "SameStep"

    def __init__(
        self,
        policy: CausalLMPolicy,
        envs: TextGenVectorEnv,
        config: SB3A2CConfig | None = None,
        *,
        eval_envs: TextGenVectorEnv | None = None,
        reference: CausalLMPolicy | None = None,
        folder: str | Path | None = None,
    ) -> None:
        """Put the parts together; arguments and errors as in `SB3PPO`."""
        self.config = cfg = config or SB3A2CConfig()
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
        self.training.batch_size(1)  # one minibatch, which must have two tokens
        buffer = {
            "seed": cfg.seed,
            "whiten": cfg.whiten,
            "whiten_floor": cfg.whiten_floor * reward_range(self.training.task.schedule),
        }
        self.algorithm = A2C(
            CausalLMActorCriticPolicy,
            rollout_buffer_class=SequenceRolloutBuffer,
            use_rms_prop=False,
            ent_coef=cfg.ent_coef,
            vf_coef=cfg.vf_coef,
            max_grad_norm=cfg.max_grad_norm,
            normalize_advantage=False,  # which has no floor
            **self.training.options | {"rollout_buffer_kwargs": buffer},
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
