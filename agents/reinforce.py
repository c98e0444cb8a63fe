"""REINFORCE: the policy gradient itself, with a baseline.

Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement
learning". Each update samples a batch of responses, and raises the log-probability of each token by
its return-to-go minus a baseline, once.

Where this departs from the paper:

1. The return of a token is the discounted sum of rewards from it on, not the whole episode's.
2. The sum over tokens is divided by episodes x `max_new_tokens`, a constant, so that the gradient
   is proportional to the policy gradient; see `textgym.losses.token_weights`.
3. Adam with clipped gradients in place of plain gradient ascent.
4. A price per token for leaving a frozen reference (`kl_coef`), paid through the reward.
5. An entropy bonus (`ent_coef`; off).
6. Unscored episodes, and cut ones if asked (`cut="mask"`), have no weight.
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
from textgym.groups import leave_one_out
from textgym.learning import (
    GuardedOptimizer,
    check_above_0,
    check_rl_config,
    check_scored,
    check_setup,
    learning_rate,
    microbatches,
    to_device,
)
from textgym.losses import (
    Normaliser,
    entropy_loss,
    policy_gradient_loss,
    token_weights,
    truncated_importance,
    value_loss,
)
from textgym.metrics import Tally, finite_means, rollout_metrics, sample_records, spread
from textgym.parallel import deal
from textgym.returns import (
    FloatArray,
    MovingAverageBaseline,
    discounted_returns,
    explained_variance,
    whiten,
)
from textgym.rollout import PromptQueue, check_path, collect
from textgym.runs import Result, Run, Stateful, evaluate_policy
from textgym.shaping import (
    Cut,
    RewardScale,
    check_credit_fits,
    fit_scale,
    kl_controller,
    learned_weights,
    priced_rewards,
    reward_range,
)
from textgym.streams import mix64

if TYPE_CHECKING:
    from textgym.episodes import Episodes
    from textgym.policies import CausalLMPolicy
    from textgym.vector import TextGenVectorEnv

_QUEUE, _ROLLOUT, _SCALE = 1, 2, 3  # keys of what the run's seed is hashed with


@dataclass(frozen=True)
class REINFORCEConfig:
    """What REINFORCE does; every number of it."""

    seed: int = 0
    """Seed of prompts and draws."""
    episodes: int = 64
    """Episodes of an update."""
    group_size: int = 1
    """Episodes that share a prompt."""
    path: Literal["step", "sequence"] = "step"
    """How responses are sampled; both give the same tokens (see `collect`)."""
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
    microbatch: int | None = None
    """Sequences in one forward; None: as many as fit `forward_tokens`. Changes memory only."""
    baseline: Literal["none", "moving_average", "learned", "group"] = "moving_average"
    """What is subtracted from returns: nothing, their running mean, the value head, or the mean
    return of the other episodes of the group (`group_size` of at least 2)."""
    baseline_decay: float = 0.9
    """Share of the old mean in the running mean, per update."""
    vf_coef: float = 0.1
    """Weight of the value loss (baseline learned)."""
    gamma: float = 1.0
    """Discount per action."""
    whiten: bool = False
    """Whether advantages are given mean 0 and standard deviation 1 over action tokens."""
    whiten_floor: float = 0.05
    """Standard deviation that whitening takes at least, as a share of the range of the reward."""
    normaliser: Normaliser = "constant"
    """What the sum over tokens is divided by; only "constant" gives the policy gradient."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
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
    """Samples of the first policy by which rewards get mean 0 and variance 1; 0: as they are."""
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
        check_above_0(self, "importance_cap")
        check_credit(self.credit, self.credit_discount)
        if self.baseline == "group" and self.group_size < 2:
            raise ValueError(
                f"baseline='group' needs a group_size of at least 2, got {self.group_size}"
            )


class REINFORCE:
    """The agent; `learn` trains `policy` in place."""

    def __init__(
        self,
        policy: CausalLMPolicy,
        envs: TextGenVectorEnv,
        config: REINFORCEConfig | None = None,
        *,
        eval_envs: TextGenVectorEnv | None = None,
        reference: CausalLMPolicy | None = None,
        folder: str | Path | None = None,
        advantage: Callable[[Episodes, FloatArray, FloatArray], FloatArray] | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            policy: What is trained.
            envs: Made with `autoreset_mode="Disabled"`.
            config: Default: `REINFORCEConfig()`.
            eval_envs: Held-out prompts, made likewise; None: no evaluation.
            reference: What `kl_coef` prices the distance to. None: the policy as it is now, where
                there is a price.
            folder: Where logs and checkpoints go; None: nowhere.
            advantage: `f(episodes, returns_to_go [M], values [M]) -> [M]` in place of the baseline.

        Raises:
            ValueError: If the parts do not fit (see `textgym.learning.check_setup`).
        """
        self.config = cfg = config or REINFORCEConfig()
        self.policy, self.envs, self.eval_envs, self.folder = policy, envs, eval_envs, folder
        if reference is None and (cfg.kl_coef > 0 or cfg.kl_target is not None):
            reference = policy.frozen_copy()
        self.reference = reference
        self.advantage = advantage
        for each in (envs, eval_envs):
            if each is not None:
                check_setup(
                    policy,
                    each,
                    gamma=cfg.gamma,
                    reference=reference,
                    needs_values=cfg.baseline == "learned",
                )
                check_path(cfg.path, each)
        check_credit_fits(cfg, envs.unwrapped.task.schedule)
        self.task = envs.unwrapped.task
        self.optimizer = GuardedOptimizer(
            policy, lr=cfg.lr, max_grad_norm=cfg.max_grad_norm, weight_decay=cfg.weight_decay
        )
        self.queue = PromptQueue(len(self.task.prompts), int(mix64(cfg.seed, _QUEUE)))
        self.kl = kl_controller(cfg)
        self.baseline = MovingAverageBaseline(cfg.baseline_decay)
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
            "baseline": self.baseline,
            "scale": self.scale,
        }
        with Run(
            "REINFORCE",
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
                metrics |= self._update(episodes, shaped)
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

    def _update(self, episodes: Episodes, shaped: FloatArray) -> dict[str, float]:
        """One gradient step on one batch."""
        cfg, device = self.config, self.policy.device
        weights = learned_weights(episodes, cfg.cut)
        token_weight = np.repeat(weights, episodes.lengths)
        values = episodes.value.astype(np.float64)
        last = np.where(episodes.terminated, 0.0, episodes.bootstrap_value)
        returns = discounted_returns(shaped, episodes.offsets, cfg.gamma, last_value=last)

        metrics: dict[str, float] = {}
        if self.advantage is not None:
            advantages = self.advantage(episodes, returns, values)
        elif cfg.baseline == "moving_average":
            metrics["baseline/value"] = self.baseline.value
            advantages = returns - self.baseline.value
            self.baseline.update(returns[episodes.offsets[:-1]], weights)
        elif cfg.baseline == "learned":
            metrics["value/explained_variance"] = explained_variance(values, returns, token_weight)
            advantages = returns - values
        elif cfg.baseline == "group":
            whole = returns[episodes.offsets[:-1]]
            others = leave_one_out(whole, cfg.group_size, weights)
            advantages = returns - np.repeat(others, episodes.lengths)
        else:
            advantages = returns
        if cfg.whiten:
            floor = cfg.whiten_floor * reward_range(self.task.schedule, self.scale)
            advantages = whiten(advantages, token_weight, floor=floor)

        per_token = token_weights(
            episodes.offsets, weights, cfg.normaliser, self.task.max_new_tokens
        )
        w_all, a_all, g_all, sampled_all = (
            to_device(x, device) for x in (per_token, advantages, returns, episodes.logprob)
        )
        usable = np.flatnonzero(weights > 0)
        if not len(usable):
            return metrics
        metrics["policy/logprob"] = float(np.average(episodes.logprob, weights=token_weight))
        tally, total = Tally(), torch.zeros((), device=device)
        tally.next_step()
        mine = usable[deal(np.diff(episodes.starts)[usable])]
        for part in microbatches(mine, episodes, cfg.microbatch, self.policy.forward_tokens):
            tokens = torch.from_numpy(episodes.tokens(part)).to(device, non_blocking=True)
            batch = episodes.batch(part)
            scored = self.policy.evaluate(batch, entropy_gradient=cfg.ent_coef != 0)
            assert scored.entropy is not None
            advantage, target, sampled = a_all[tokens], g_all[tokens], sampled_all[tokens]
            old = scored.logprob.detach()
            w = w_all[tokens] * truncated_importance(old, sampled, cfg.importance_cap)
            policy_loss = policy_gradient_loss(scored.logprob, advantage, w)
            loss = policy_loss
            if cfg.ent_coef:
                loss = loss + cfg.ent_coef * entropy_loss(scored.entropy, w)
            if cfg.baseline == "learned" and scored.value is not None:
                v_loss = value_loss(scored.value, target, w)
                loss = loss + cfg.vf_coef * v_loss
                tally.sum(value=v_loss)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            tally.sum(policy=policy_loss)
            tally.mean(len(tokens), entropy=scored.entropy.detach().mean())
            if self.policy.is_mixed:
                tally.mean(len(tokens), sampler_gap=(old - sampled).abs().mean())
                tally.peak(sampler_ratio=(old - sampled).exp().max())
        tally.mean(grad_norm=self.optimizer.step(total))
        self.optimizer.settle()
        found = tally.result()
        metrics["loss/policy"] = float(found["policy"][0])
        if cfg.baseline == "learned":
            metrics["loss/value"] = float(found["value"][0])
        metrics["optim/grad_norm"] = float(found["grad_norm"][0])
        if self.policy.is_mixed:
            metrics["sampler/gap"] = float(found["sampler_gap"][0])
            metrics["sampler/max_ratio"] = float(found["sampler_ratio"][0])
        return metrics | finite_means({"policy/entropy": found["entropy"]})

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
