"""SB3-PPO: the PPO of stable-baselines3, unchanged, with hyperparameters that work for text.

Schulman et al. 2017, "Proximal policy optimization algorithms"; the implementation is
`stable_baselines3.PPO`. This file is a recipe: what to give it for a language model, and why.

1. Gamma is 1. An episode is one response, its horizon is observed, and a discount would only say
   that words matter less the earlier they stand before the score.
2. The end of the budget terminates (`budget="terminate"`, the environments' default), so that
   nothing is bootstrapped from a state that cannot go on.
3. Observations are token ids and are never normalised; rewards are between known bounds and need
   not be.
4. A rollout is `n_steps` of every row, by default three times the budget of a response, and rows
   are few: a response that the end of a rollout cuts is bootstrapped, from values that know little
   of text. 25 rows of 40 steps learn less from the same tokens than 8 rows of 125.
5. `SequenceRolloutBuffer`: minibatches are whole sequences, one forward each.
6. GAE lambda is near 1, since most rewards are paid on the last token: what it does not look at
   must come from values, and those of text explain little.
7. A few epochs only, and a price for leaving the reference: text is easily ruined.
8. Advantages are whitened over the rollout, by the buffer, and not over each minibatch, by SB3.
   Where all responses of a batch are right, only the error of the values is left, which would be
   made as large as any signal: on `Chain-v0` one run in ten fell from 1 to 0 that way, in a few
   updates. The smaller the batch the more often; `whiten_floor` ends it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_baselines3 import PPO

from textgym.learning import check_above_0, check_positive
from textgym.returns import check_unit
from textgym.runs import Result
from textgym.sb3 import CausalLMActorCriticPolicy, SequenceRolloutBuffer
from textgym.sb3.training import Training, check_config, whole_sequences
from textgym.shaping import reward_range

if TYPE_CHECKING:
    from textgym.policies import CausalLMPolicy
    from textgym.vector import TextGenVectorEnv


@dataclass(frozen=True)
class SB3PPOConfig:
    """What SB3's PPO does; every number of it."""

    seed: int = 0
    """Seed of episodes, draws and shuffles."""
    n_steps: int | None = None
    """Steps of every row in a rollout; None: three times the budget of a response."""
    epochs: int = 4
    """Passes over each rollout."""
    minibatches: int = 4
    """Gradient steps of a pass, on about equal numbers of tokens of whole sequences."""
    lr: float = 1e-4
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
    clip_coef: float = 0.2
    """Ratios are clipped to 1 - this .. 1 + this."""
    vf_coef: float = 0.25
    """Weight of the value loss, a mean of squares without the half."""
    vf_clip_coef: float | None = 0.2
    """How far the value may move in an update, in units of return; None: any way."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    whiten: bool = True
    """Whether advantages are given mean 0 and standard deviation 1 over the rollout."""
    whiten_floor: float = 0.05
    """Standard deviation that whitening takes at least, as a share of the range of the reward."""
    target_kl: float | None = None
    """Approximate KL to the sampling policy, nats per token, at 1.5 times which an update ends."""
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
        check_positive(self, "epochs", "minibatches")
        check_unit("gae_lambda", self.gae_lambda)
        check_above_0(self, "clip_coef", "vf_clip_coef", "target_kl", "max_grad_norm")


class SB3PPO:
    """The recipe; `learn` trains `policy` in place, `algorithm` is SB3's own object."""

    autoreset_mode = "SameStep"
    masks = False  # whether the algorithm heeds those of the environment

    def __init__(
        self,
        policy: CausalLMPolicy,
        envs: TextGenVectorEnv,
        config: SB3PPOConfig | None = None,
        *,
        eval_envs: TextGenVectorEnv | None = None,
        reference: CausalLMPolicy | None = None,
        folder: str | Path | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            policy: What is trained; needs a value head.
            envs: Made with `autoreset_mode="SameStep"`; their number of rows is SB3's `n_envs`.
            config: Default: `SB3PPOConfig()`.
            eval_envs: Held-out prompts, made with `autoreset_mode="Disabled"`; None: no evaluation.
            reference: What `kl_coef` prices the distance to. None: the policy as it is now, where
                there is a price.
            folder: Where logs and checkpoints go; None: nowhere.

        Raises:
            ValueError: If the parts do not fit (see `textgym.learning.check_setup`).
        """
        self.config = config or SB3PPOConfig()
        self.policy, self.folder = policy, folder
        self.training = Training(
            policy,
            envs,
            self.config,
            type(self).__name__,
            eval_envs=eval_envs,
            reference=reference,
            folder=folder,
            masks=self.masks,
        )
        options = self.training.options | ppo_options(self.config, self.training)
        with whole_sequences():
            self.algorithm = self.make(options)

    def make(self, options: dict[str, Any]) -> Any:
        """The algorithm."""
        return PPO(CausalLMActorCriticPolicy, rollout_buffer_class=SequenceRolloutBuffer, **options)

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


def ppo_options(config: SB3PPOConfig, training: Training) -> dict[str, Any]:
    """Arguments of SB3's PPO and of MaskablePPO, besides those that every algorithm is given."""
    return {
        "n_epochs": config.epochs,
        # A minibatch is filled with whole sequences until it has as many tokens.
        "batch_size": training.batch_size(config.minibatches),
        "clip_range": config.clip_coef,
        "clip_range_vf": config.vf_clip_coef,
        "ent_coef": config.ent_coef,
        "vf_coef": config.vf_coef,
        "max_grad_norm": config.max_grad_norm,
        "target_kl": config.target_kl,
        "normalize_advantage": False,  # which is by minibatch
        "rollout_buffer_kwargs": {
            "seed": config.seed,
            "whiten": config.whiten,
            "whiten_floor": config.whiten_floor * reward_range(training.task.schedule),
        },
    }
