"""PPO: several clipped gradient steps on each batch of responses, with a learned value function.

Schulman et al. 2017, "Proximal policy optimization algorithms", as it is used on language models
by Ziegler et al. 2019 and Stiennon et al. 2020.

Where this departs from Schulman et al. 2017:

1. A batch is whole episodes: a fixed number of responses is started and all of them are finished;
   no episode spans an update, and minibatches are whole sequences.
2. A price per token for leaving a frozen reference is subtracted from the reward (k1; fixed, or
   adapted to a target), where the paper's adaptive KL penalty is toward the last policy.
3. Gamma is 1 by default: the horizon is part of the task and is observed.
4. Advantages are whitened over the action tokens of the whole batch, not of each minibatch.
5. Losses are summed over action tokens and divided by the number of action tokens of the batch
   (`normaliser="token"`); a minibatch counts by its share of them.
6. The value head is a linear layer on the language model's last hidden state, starts at zero and
   shares the trunk; its loss is clipped as well (`vf_clip_coef`).
7. An update ends early when a minibatch's approximate KL to the sampling policy exceeds
   1.5 x `target_kl` (off by default); that minibatch's step is not taken.
8. Adam's epsilon is 1e-5 and gradients are clipped (Huang et al. 2022).
9. Unscored episodes, and cut ones if asked (`cut="mask"`), have no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from textgym.credit import Credit, check_credit
from textgym.learning import (
    GuardedOptimizer,
    check_above_0,
    check_positive,
    check_rl_config,
    check_scored,
    check_setup,
    learning_rate,
    microbatches,
    to_device,
)
from textgym.losses import (
    Normaliser,
    clipped_surrogate_loss,
    clipped_value_loss,
    entropy_loss,
    token_weights,
    truncated_importance,
    value_loss,
)
from textgym.metrics import Tally, finite_means, rollout_metrics, sample_records, spread
from textgym.parallel import deal
from textgym.returns import (
    FloatArray,
    IntArray,
    check_unit,
    explained_variance,
    gae,
    whiten,
)
from textgym.rollout import PromptQueue, check_path, collect
from textgym.runs import Result, Run, Stateful, evaluate_policy
from textgym.shaping import (
    Cut,
    OldLogprob,
    RewardScale,
    check_credit_fits,
    fit_scale,
    kl_controller,
    learned_weights,
    priced_rewards,
    reward_range,
)
from textgym.streams import generator, mix64

if TYPE_CHECKING:
    from torch import Tensor

    from textgym.episodes import Episodes
    from textgym.policies import CausalLMPolicy
    from textgym.vector import TextGenVectorEnv

_QUEUE, _ROLLOUT, _SCALE, _SHUFFLE = 1, 2, 3, 4  # keys that the run's seed is hashed with


@dataclass(frozen=True)
class PPOConfig:
    """What PPO does; every number of it."""

    seed: int = 0
    """Seed of prompts, draws and shuffles."""
    episodes: int = 64
    """Episodes of an update."""
    group_size: int = 1
    """Episodes that share a prompt."""
    path: Literal["step", "sequence"] = "step"
    """How responses are sampled; both give the same tokens (see `collect`)."""
    epochs: int = 4
    """Passes over each batch."""
    minibatches: int = 4
    """Gradient steps of a pass, on equal numbers of whole sequences."""
    microbatch: int | None = None
    """Sequences in one forward; None: as many as fit `forward_tokens`. Changes memory only."""
    lr: float = 1e-4
    """Highest learning rate."""
    warmup_updates: int = 0
    """Updates of linear warm-up."""
    lr_final: float = 1.0
    """Learning rate at the end, as a share of `lr`; decays linearly over tokens."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    gamma: float = 1.0
    """Discount per action."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip_coef: float = 0.2
    """Ratios are clipped to 1 - this .. 1 + this."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    vf_clip_coef: float | None = 0.2
    """How far the value may move in an update, in units of return; None: any way."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    whiten: bool = True
    """Whether advantages are given mean 0 and standard deviation 1 over action tokens."""
    whiten_floor: float = 0.05
    """Standard deviation that whitening takes at least, as a share of the range of the reward."""
    normaliser: Normaliser = "token"
    """What the sum over tokens is divided by."""
    target_kl: float | None = None
    """Approximate KL to the sampling policy, nats per token, at 1.5 times which an update ends."""
    kl_coef: float = 0.0
    """Price of one nat of KL to the reference; with `kl_target`, its first value."""
    kl_target: float | None = None
    """KL in nats per response that the price is adapted to; None: a fixed price."""
    kl_horizon: float = 10_000
    """Episodes over which the price adapts."""
    exact_kl_episodes: int = 32
    """Episodes of each batch on which the exact KL is measured; 0: none."""
    importance_cap: float | None = None
    """Cap of the importance weights that make up for a sampler of another precision; None: none."""
    cut: Cut = "keep"
    """Whether responses cut by the token budget are learned from ("keep") or not ("mask")."""
    cut_penalty: float = 0.0
    """Subtracted from the reward of a cut response."""
    credit: Credit = "last"
    """How a response's score is spread over its tokens: not ("last"), evenly, or discounted back
    from the end; the latter two bias the gradient (see `textgym.credit.assign_credit`)."""
    credit_discount: float = 0.95
    """Share of credit that a token has of the next one's (credit discounted)."""
    scale_episodes: int = 0
    """Samples of the reference by which rewards get mean 0 and variance 1; 0: as they are."""
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
        check_rl_config(self)
        check_credit(self.credit, self.credit_discount)
        check_positive(self, "epochs", "minibatches")
        check_unit("gae_lambda", self.gae_lambda)
        check_above_0(self, "clip_coef", "vf_clip_coef", "target_kl", "importance_cap")


Advantage = Callable[["Episodes", FloatArray, PPOConfig], tuple[FloatArray, FloatArray]]
"""`f(episodes, shaped_rewards [M], config)` -> advantages [M] and value targets [M]."""


def gae_advantage(
    episodes: Episodes, rewards: FloatArray, config: PPOConfig
) -> tuple[FloatArray, FloatArray]:
    """Generalised advantage estimates and lambda-returns; bootstraps truncated episodes only."""
    return gae(
        rewards,
        episodes.value,
        episodes.offsets,
        terminated=episodes.terminated,
        last_value=episodes.bootstrap_value,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
    )


class PPO:
    """The agent; `learn` trains `policy` in place."""

    def __init__(
        self,
        policy: CausalLMPolicy,
        envs: TextGenVectorEnv,
        config: PPOConfig | None = None,
        *,
        eval_envs: TextGenVectorEnv | None = None,
        reference: CausalLMPolicy | None = None,
        folder: str | Path | None = None,
        advantage: Advantage = gae_advantage,
    ) -> None:
        """Put the parts together.

        Args:
            policy: What is trained; needs a value head.
            envs: Made with `autoreset_mode="Disabled"`.
            config: Default: `PPOConfig()`.
            eval_envs: Held-out prompts, made likewise; None: no evaluation.
            reference: What `kl_coef` prices the distance to. None: the policy as it is now, where
                there is a price.
            folder: Where logs and checkpoints go; None: nowhere.
            advantage: Advantages and value targets of a batch.

        Raises:
            ValueError: If the parts do not fit (see `textgym.learning.check_setup`).
        """
        self.config = cfg = config or PPOConfig()
        self.policy, self.envs, self.eval_envs, self.folder = policy, envs, eval_envs, folder
        if reference is None and (cfg.kl_coef > 0 or cfg.kl_target is not None):
            reference = policy.frozen_copy()
        self.reference = reference
        self.advantage = advantage
        for each in (envs, eval_envs):
            if each is not None:
                check_setup(policy, each, gamma=cfg.gamma, reference=reference, needs_values=True)
                check_path(cfg.path, each)
        check_credit_fits(cfg, envs.unwrapped.task.schedule)
        self.task = envs.unwrapped.task
        self.optimizer = GuardedOptimizer(
            policy, lr=cfg.lr, max_grad_norm=cfg.max_grad_norm, weight_decay=cfg.weight_decay
        )
        self.queue = PromptQueue(len(self.task.prompts), int(mix64(cfg.seed, _QUEUE)))
        self.kl = kl_controller(cfg)
        self.scale = RewardScale()

    def learn(
        self,
        total_tokens: int,
        *,
        resume: bool = False,
        quiet: bool = False,
        max_updates: int | None = None,
    ) -> Result:
        """Train until `total_tokens` action tokens were sampled.

        Args:
            total_tokens: Of the whole run, unscored and discarded ones counted.
            resume: Go on from the newest checkpoint in `folder`, if there is one.
            quiet: No progress on standard error.
            max_updates: End this call, not the run, after so many updates.

        Raises:
            UnscoredError: If more than 20 % of a batch has no score.
            NonFiniteError: If five steps in a row were not finite.
        """
        cfg, rollout_seed = self.config, int(mix64(self.config.seed, _ROLLOUT))
        parts: dict[str, Stateful] = {
            "optimizer": self.optimizer,
            "queue": self.queue,
            "kl": self.kl,
            "scale": self.scale,
        }
        with Run(
            "PPO",
            self.policy,
            cfg,
            parts,
            folder=self.folder,
            total_tokens=total_tokens,
            resume=resume,
            quiet=quiet,
            max_updates=max_updates,
            evaluate=None if self.eval_envs is None else self._evaluate,
            reference=self.reference,
            task=self.task,
        ) as run:
            if cfg.scale_episodes and not run.resumed:
                start, seed = self.reference or self.policy, int(mix64(cfg.seed, _SCALE))
                run.counters.tokens += fit_scale(
                    self.scale, start, self.envs, cfg.scale_episodes, seed
                )
            run.begin()
            while run.wants_more:
                groups = cfg.episodes // cfg.group_size
                episodes = collect(
                    self.policy,
                    self.envs,
                    cfg.episodes,
                    group_size=cfg.group_size,
                    seed=rollout_seed,
                    first_episode=run.counters.groups,
                    prompt_rows=self.queue.take(groups),
                    path=cfg.path,
                )
                run.rollout_done()
                check_scored(episodes)
                lr = learning_rate(
                    cfg.lr,
                    run.counters.update,
                    run.progress,
                    warmup_updates=cfg.warmup_updates,
                    final=cfg.lr_final,
                )
                self.optimizer.set_lr(lr)
                run.counters.groups += groups
                shaped, metrics = self._shape(episodes)
                metrics |= self._update(episodes, shaped, run.counters.update)
                metrics |= {"optim/lr": lr, "optim/skipped": self.optimizer.skipped}
                samples = partial(self._samples, episodes, shaped)
                run.finish_update(metrics, episodes.num_tokens, samples)
            return run.result()

    def _shape(self, episodes: Episodes) -> tuple[FloatArray, dict[str, float]]:
        """Rewards with the price of KL, and what to log of it."""
        shaped, metrics = priced_rewards(
            self.policy,
            self.reference,
            episodes,
            controller=self.kl,
            scale=self.scale,
            config=self.config,
        )
        return shaped, rollout_metrics(episodes) | metrics

    def _update(self, episodes: Episodes, shaped: FloatArray, update: int) -> dict[str, float]:
        """Epochs of minibatch steps on one batch."""
        cfg, device = self.config, self.policy.device
        weights = learned_weights(episodes, cfg.cut)
        token_weight = np.repeat(weights, episodes.lengths)
        advantages, returns = self.advantage(episodes, shaped, cfg)
        metrics = {
            "value/explained_variance": explained_variance(episodes.value, returns, token_weight),
        }
        usable = np.flatnonzero(weights > 0)
        if not len(usable):
            return metrics
        metrics["policy/logprob"] = float(np.average(episodes.logprob, weights=token_weight))
        if cfg.whiten:
            floor = cfg.whiten_floor * reward_range(self.task.schedule, self.scale)
            advantages = whiten(advantages, token_weight, floor=floor)
        steps = min(cfg.minibatches, len(usable))
        # Normalised over the batch, once; a minibatch is `steps` times its part of that sum.
        per_token = steps * token_weights(
            episodes.offsets, weights, cfg.normaliser, self.task.max_new_tokens
        )
        old = OldLogprob(self.policy, episodes, cfg.microbatch, steps=steps)
        batch = _Batch(
            old,
            *(
                to_device(x, device)
                for x in (per_token, advantages, returns, episodes.logprob, episodes.value)
            ),
        )
        tally, stop, taken, epoch = Tally(), False, 0, 0
        for epoch in range(cfg.epochs):
            if epoch:
                old.settle()
            order = generator(cfg.seed, _SHUFFLE, update, epoch).permutation(usable)
            for part in np.array_split(order, steps):
                tally.next_step()
                loss = self._gradient(episodes, batch, part, tally, first=not epoch)
                if cfg.target_kl is not None and self._too_far(tally, cfg.target_kl):
                    self.optimizer.zero_grad()
                    stop = True
                    break
                tally.mean(grad_norm=self.optimizer.step(loss))
                taken += 1
            if stop:
                break
        self.optimizer.settle()
        found = tally.result()
        metrics["ppo/first_ratio_error"] = float(found["ratio_error"][0])
        means = {
            "loss/policy": found["policy"][:taken],
            "loss/value": found["value"][:taken],
            "ppo/approx_kl": found["approx_kl"][:taken],
            "ppo/clip_fraction": found["clip_fraction"][:taken],
            "optim/grad_norm": found.get("grad_norm", np.zeros(0)),
            "policy/entropy": found["entropy"][: min(taken, steps)],  # of the sampling policy
        }
        if self.policy.is_mixed:
            means |= {"sampler/gap": found["sampler_gap"]}
            metrics["sampler/max_ratio"] = float(found["sampler_ratio"].max())
        return metrics | finite_means(means) | {"ppo/epochs": epoch + 1, "optim/steps": taken}

    def _too_far(self, tally: Tally, target: float) -> bool:
        """Whether the last minibatch shows a policy that has left the one that sampled."""
        return bool(tally.result(-1)["approx_kl"][0] > 1.5 * target)

    def _gradient(
        self, episodes: Episodes, batch: _Batch, minibatch: IntArray, tally: Tally, *, first: bool
    ) -> Tensor:
        """Accumulate the gradient of this process's share of a minibatch; returns its loss, 0-d.

        The entropy is computed where it is learned from, and in the `first` epoch, to be logged.
        """
        cfg, device = self.config, self.policy.device
        total = torch.zeros((), device=device)
        mine = minibatch[deal(np.diff(episodes.starts)[minibatch])]
        for part in microbatches(mine, episodes, cfg.microbatch, self.policy.forward_tokens):
            tokens = torch.from_numpy(episodes.tokens(part)).to(device, non_blocking=True)
            new = self.policy.evaluate(
                episodes.batch(part),
                entropy=first or cfg.ent_coef != 0,
                entropy_gradient=cfg.ent_coef != 0,
            )
            assert new.value is not None
            sampled, old = batch.logprob[tokens], batch.old.of(tokens, new.logprob)
            w = batch.weight[tokens] * truncated_importance(old, sampled, cfg.importance_cap)
            surrogate = clipped_surrogate_loss(
                new.logprob, old, batch.advantage[tokens], w, clip_coef=cfg.clip_coef
            )
            if cfg.vf_clip_coef is None:
                v_loss = value_loss(new.value, batch.returns[tokens], w)
            else:
                v_loss = clipped_value_loss(
                    new.value,
                    batch.value[tokens],
                    batch.returns[tokens],
                    w,
                    clip_coef=cfg.vf_clip_coef,
                )
            loss = surrogate.loss + cfg.vf_coef * v_loss
            if cfg.ent_coef and new.entropy is not None:
                loss = loss + cfg.ent_coef * entropy_loss(new.entropy, w)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            tally.sum(policy=surrogate.loss, value=v_loss)
            tally.mean(
                len(tokens),
                approx_kl=surrogate.approx_kl,
                clip_fraction=surrogate.clip_fraction,
            )
            if new.entropy is not None:
                tally.mean(len(tokens), entropy=new.entropy.detach().mean())
            tally.peak(ratio_error=(new.logprob.detach() - old).exp().sub(1.0).abs().max())
            if self.policy.is_mixed:
                tally.mean(len(tokens), sampler_gap=(old - sampled).abs().mean())
                tally.peak(sampler_ratio=(old - sampled).exp().max())
        return total

    def _evaluate(self) -> tuple[dict[str, float], float]:
        cfg = self.config
        assert self.eval_envs is not None
        metrics, _ = evaluate_policy(
            self.policy, self.eval_envs, cfg.eval_episodes, seed=cfg.seed, path=cfg.path
        )
        return metrics, metrics["eval/reward_mean"]

    def _samples(self, episodes: Episodes, shaped: FloatArray) -> Iterator[dict[str, Any]]:
        chosen = spread(len(episodes), self.config.samples)
        return sample_records(episodes, self.task.tokenizer, chosen, shaped)


@dataclass(frozen=True)
class _Batch:
    """What the losses need of each action token, float32 [M] on the policy's device."""

    old: OldLogprob
    """As the learner has it before the update."""
    weight: Tensor
    advantage: Tensor
    returns: Tensor
    logprob: Tensor
    """As sampled."""
    value: Tensor
