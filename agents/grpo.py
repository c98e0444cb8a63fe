"""GRPO and its family: responses to one prompt are judged by one another, without a value function.

Shao et al. 2024, "DeepSeekMath: pushing the limits of mathematical reasoning in open language
models" (group relative policy optimisation, outcome supervision). Each update samples groups of
responses, gives every token of a response the advantage of the whole response over its group, and
takes clipped steps on it. The variants differ in a few numbers of the config; `GRPOConfig.variant`
has them by name:

- `"grpo"`: advantage (r - mean) / std of the group, averaged over the tokens of each response.
- `"dr_grpo"`: Liu et al. 2025, "Understanding R1-Zero-like training": no std, a constant
  normaliser; the expected gradient is the policy gradient times (G - 1) / G.
- `"dapo"`: Yu et al. 2025: the upper clip is higher, all tokens count alike, no KL, and groups in
  which all earn the same are replaced by groups of the next prompts (`resample`, section 3.2).
- `"gspo"`: Zheng et al. 2025: one ratio for a response, the geometric mean of its tokens'.
- `"rloo"`: Ahmadian et al. 2024, "Back to basics": the mean of the others as baseline, KL in the
  reward, a constant normaliser, one step.
- `"reinforce++"`: Hu 2025: the return-to-go of rewards less KL, whitened over the batch.

Where this departs from Shao et al. 2024:

1. By default there is no KL (as in most later work). `kl_in="loss"` is theirs, k3, whose gradient
   is that of a forward KL; `kl_in="reward"` is k1, with the gradient of the reverse KL.
2. The std of a group is that of a sample (n - 1), as implementations have it, plus 1e-4.
3. The reference is the policy at the start of training and is not replaced.
4. Rewards that are paid token by token count by their sum: supervision is of outcomes.
5. Unscored responses have no weight and do not enter the mean and std of their group.
6. DAPO samples until its batch is full of groups that differ. Here it stops after `resample` times,
   and the places that are left keep flat groups: where everything is solved, or nothing is, each
   update would last for ever. All tokens count toward the run's; `rollout/` is of all that was
   sampled, the rest (`kl/` too) of what is learned from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from textgym.episodes import Episodes
from textgym.groups import group_advantages
from textgym.kl import k3
from textgym.learning import (
    GuardedOptimizer,
    check_above_0,
    check_not_negative,
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
    entropy_loss,
    token_weights,
    truncated_importance,
)
from textgym.metrics import Tally, finite_means, rollout_metrics, sample_records, spread
from textgym.parallel import deal
from textgym.returns import FloatArray, IntArray, discounted_returns, whiten
from textgym.rollout import PromptQueue, check_path, collect
from textgym.runs import Result, Run, Stateful, evaluate_policy
from textgym.shaping import (
    Cut,
    OldLogprob,
    kl_controller,
    learned_weights,
    measured_kl,
    reward_range,
    shape_rewards,
)
from textgym.streams import generator, mix64

if TYPE_CHECKING:
    from torch import Tensor

    from textgym.policies import CausalLMPolicy
    from textgym.vector import TextGenVectorEnv

_QUEUE, _ROLLOUT, _SHUFFLE = 1, 2, 4  # keys that the run's seed is hashed with

Variant = Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce++"]
VARIANTS: dict[Variant, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"advantage": "mean", "normaliser": "constant"},
    "dapo": {"clip_coef_high": 0.28, "normaliser": "token", "resample": 4},
    "gspo": {"ratio": "sequence", "clip_coef": 3e-4, "clip_coef_high": 4e-4},
    "rloo": {
        "advantage": "leave_one_out",
        "normaliser": "constant",
        "kl_in": "reward",
        "epochs": 1,
        "minibatches": 1,
    },
    "reinforce++": {
        "advantage": "batch",
        "normaliser": "token",
        "kl_in": "reward",
        "group_size": 1,
    },
}
"""What differs from the defaults of `GRPOConfig`, by the variant's name; papers: see the module."""


@dataclass(frozen=True)
class GRPOConfig:
    """What GRPO does; every number of it."""

    seed: int = 0
    """Seed of prompts, draws and shuffles."""
    episodes: int = 64
    """Episodes of an update."""
    group_size: int = 8
    """Episodes that share a prompt."""
    resample: int = 0
    """How often, at most, an update samples groups of the next prompts in place of those whose
    responses all earn the same."""
    path: Literal["step", "sequence"] = "step"
    """How responses are sampled; both give the same tokens (see `collect`)."""
    epochs: int = 1
    """Passes over each batch."""
    minibatches: int = 1
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
    advantage: Literal["standard", "mean", "leave_one_out", "batch"] = "standard"
    """What a response is compared with: mean and std of its group, the group's mean, the mean of
    the others; or, token by token, the whole batch (returns-to-go, whitened)."""
    whiten_floor: float = 0.05
    """Standard deviation of the batch that is taken at least, as a share of the reward's range."""
    ratio: Literal["token", "sequence"] = "token"
    """Whether each token has its own ratio to the sampling policy, or the response has one."""
    clip_coef: float = 0.2
    """Ratios are clipped below at 1 - this."""
    clip_coef_high: float | None = None
    """Ratios are clipped above at 1 + this; None: `clip_coef`."""
    normaliser: Normaliser = "sequence"
    """What the sum over tokens is divided by."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Where the price of KL is paid: as k1 in the reward, or as k3 in the loss."""
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
    gamma: float = 1.0
    """Discount per action; a response is judged as a whole, so it must be 1."""

    def __post_init__(self) -> None:
        """Refuse numbers that could not be trained with."""
        check_rl_config(self)
        check_positive(self, "epochs", "minibatches")
        check_above_0(self, "clip_coef", "clip_coef_high", "importance_cap")
        check_not_negative(self, "resample")
        if self.gamma != 1.0:
            raise ValueError(f"gamma must be 1: responses are judged as a whole; got {self.gamma}")
        if self.advantage != "batch" and self.group_size < 2:
            raise ValueError(
                f"advantage={self.advantage!r} compares responses to one prompt: it needs a "
                f"group_size of at least 2, got {self.group_size}"
            )
        if self.advantage == "batch" and self.resample:
            raise ValueError(
                "resample replaces groups in which there is nothing to learn, but advantage="
                f"'batch' learns from all of them: it needs resample=0, got {self.resample}"
            )

    @classmethod
    def variant(cls, name: Variant, **changes: Any) -> GRPOConfig:
        """The config of a published variant, with changes.

        Raises:
            ValueError: If there is no such variant.
        """
        if name not in VARIANTS:
            raise ValueError(f"no variant {name!r}, there are {', '.join(VARIANTS)}")
        return cls(**{**VARIANTS[name], **changes})


class GRPO:
    """The agent; `learn` trains `policy` in place."""

    def __init__(
        self,
        policy: CausalLMPolicy,
        envs: TextGenVectorEnv,
        config: GRPOConfig | None = None,
        *,
        eval_envs: TextGenVectorEnv | None = None,
        reference: CausalLMPolicy | None = None,
        folder: str | Path | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            policy: What is trained; a value head is not used.
            envs: Made with `autoreset_mode="Disabled"`.
            config: Default: `GRPOConfig()`.
            eval_envs: Held-out prompts, made likewise; None: no evaluation.
            reference: What `kl_coef` prices the distance to. None: the policy as it is now, where
                there is a price.
            folder: Where logs and checkpoints go; None: nowhere.

        Raises:
            ValueError: If the parts do not fit (see `textgym.learning.check_setup`).
        """
        self.config = cfg = config or GRPOConfig()
        self.policy, self.envs, self.eval_envs, self.folder = policy, envs, eval_envs, folder
        if reference is None and (cfg.kl_coef > 0 or cfg.kl_target is not None):
            reference = policy.frozen_copy()
        self.reference = reference
        for each in (envs, eval_envs):
            if each is not None:
                check_setup(policy, each, gamma=cfg.gamma, reference=reference)
                check_path(cfg.path, each)
        self.task = envs.unwrapped.task
        self.optimizer = GuardedOptimizer(
            policy, lr=cfg.lr, max_grad_norm=cfg.max_grad_norm, weight_decay=cfg.weight_decay
        )
        self.queue = PromptQueue(len(self.task.prompts), int(mix64(cfg.seed, _QUEUE)))
        self.kl = kl_controller(cfg)

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
        cfg = self.config
        parts: dict[str, Stateful] = {
            "optimizer": self.optimizer,
            "queue": self.queue,
            "kl": self.kl,
        }
        with Run(
            "GRPO",
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
            run.begin()
            while run.wants_more:
                sampled, episodes, metrics = self._sample(run)
                run.rollout_done()
                check_scored(sampled)
                lr = learning_rate(
                    cfg.lr,
                    run.counters.update,
                    run.progress,
                    warmup_updates=cfg.warmup_updates,
                    final=cfg.lr_final,
                )
                self.optimizer.set_lr(lr)
                shaped, reference, measured = self._shape(episodes)
                metrics |= measured
                metrics |= self._update(episodes, shaped, reference, run.counters.update)
                metrics |= {"optim/lr": lr, "optim/skipped": self.optimizer.skipped}
                samples = partial(self._samples, episodes, shaped)
                run.finish_update(metrics, sampled.num_tokens, samples)
            return run.result()

    def _sample(self, run: Run) -> tuple[Episodes, Episodes, dict[str, float]]:
        """Everything that was sampled, the batch that is learned from, and what to log of them."""
        cfg = self.config
        batch = np.arange(cfg.episodes // cfg.group_size)  # which of the groups sampled are in it
        sampled = self._collect(run, len(batch))
        flat = self._flat(sampled)
        for _ in range(cfg.resample):
            again = np.flatnonzero(flat[batch])
            if not len(again):
                break
            batch[again] = len(flat) + np.arange(len(again))
            sampled = Episodes.join([sampled, self._collect(run, len(again))])
            flat = self._flat(sampled)
        metrics = rollout_metrics(sampled)
        if cfg.advantage != "batch":
            metrics["grpo/flat_groups"] = float(flat[batch].mean())
        if not cfg.resample:
            return sampled, sampled, metrics
        metrics["grpo/resampled"] = len(flat) / len(batch) - 1.0
        members = batch[:, None] * cfg.group_size + np.arange(cfg.group_size)
        return sampled, sampled.take(members.reshape(-1)), metrics

    def _collect(self, run: Run, groups: int) -> Episodes:
        """Responses to the next prompts."""
        cfg = self.config
        episodes = collect(
            self.policy,
            self.envs,
            groups * cfg.group_size,
            group_size=cfg.group_size,
            seed=int(mix64(cfg.seed, _ROLLOUT)),
            first_episode=run.counters.groups,
            prompt_rows=self.queue.take(groups),
            path=cfg.path,
        )
        run.counters.groups += groups
        return episodes

    def _weights(self, episodes: Episodes) -> FloatArray:
        """Loss weights [B]. What was truncated has no outcome, and no value stands in for it."""
        return learned_weights(episodes, self.config.cut) * episodes.terminated

    def _flat(self, episodes: Episodes) -> NDArray[np.bool_]:
        """Groups whose responses all earn the same, the price of KL left out, bool [B / G]."""
        cfg = self.config
        if cfg.group_size < 2:
            return np.zeros(len(episodes), np.bool_)
        earned = shape_rewards(episodes, None, beta=0.0, cut_penalty=cfg.cut_penalty)
        scores, weights = episodes.per_episode(earned), self._weights(episodes)
        return group_advantages(scores, cfg.group_size, weights, "mean")[1]

    def _shape(self, episodes: Episodes) -> tuple[FloatArray, _PricedReference, dict[str, float]]:
        """Rewards, what the loss needs of the reference, and what to log."""
        cfg, kl, beta = self.config, None, self.kl.beta
        metrics: dict[str, float] = {}
        if self.reference is not None:
            kl, measured = measured_kl(
                self.policy, self.reference, episodes, controller=self.kl, config=cfg
            )
            metrics |= measured
        in_reward = kl if cfg.kl_in == "reward" else None
        shaped = shape_rewards(episodes, in_reward, beta=beta, cut_penalty=cfg.cut_penalty)
        if kl is None or in_reward is not None:
            return shaped, _PricedReference(episodes.logprob, 0.0), metrics
        return shaped, _PricedReference(episodes.logprob - kl, beta), metrics

    def _advantages(
        self, episodes: Episodes, shaped: FloatArray, weights: FloatArray
    ) -> FloatArray:
        """Advantage of each action token [M]."""
        cfg = self.config
        if cfg.advantage == "batch":
            returns = discounted_returns(shaped, episodes.offsets, 1.0)
            floor = cfg.whiten_floor * reward_range(self.task.schedule)
            return whiten(returns, np.repeat(weights, episodes.lengths), floor=floor)
        scores = episodes.per_episode(shaped)
        advantages, _ = group_advantages(scores, cfg.group_size, weights, cfg.advantage)
        return np.repeat(advantages, episodes.lengths)

    def _update(
        self, episodes: Episodes, shaped: FloatArray, reference: _PricedReference, update: int
    ) -> dict[str, float]:
        """Epochs of minibatch steps on one batch."""
        cfg, device = self.config, self.policy.device
        weights = self._weights(episodes)
        advantages = self._advantages(episodes, shaped, weights)
        usable = np.flatnonzero(weights > 0)
        metrics: dict[str, float] = {}
        if not len(usable):
            return metrics
        token_weight = np.repeat(weights, episodes.lengths)
        metrics["policy/logprob"] = float(np.average(episodes.logprob, weights=token_weight))
        steps = min(cfg.minibatches, len(usable))
        # Normalised over the batch, once; a minibatch is `steps` times its part of that sum.
        per_token = steps * token_weights(
            episodes.offsets, weights, cfg.normaliser, self.task.max_new_tokens
        )
        weight, advantage, logprob, theirs = (
            to_device(x, device)
            for x in (per_token, advantages, episodes.logprob, reference.logprob)
        )
        old = OldLogprob(self.policy, episodes, cfg.microbatch, steps=steps)
        batch = _Batch(weight, advantage, logprob, old, theirs, reference.beta)
        tally = Tally()
        for epoch in range(cfg.epochs):
            if epoch:
                old.settle()
            order = generator(cfg.seed, _SHUFFLE, update, epoch).permutation(usable)
            for part in np.array_split(order, steps):
                tally.next_step()
                loss = self._gradient(episodes, batch, part, tally)
                tally.mean(grad_norm=self.optimizer.step(loss))
        self.optimizer.settle()
        found = tally.result()
        metrics["ppo/first_ratio_error"] = float(found["ratio_error"][0])
        means = {
            "loss/policy": found["policy"],
            "loss/kl": found["kl"],
            "ppo/approx_kl": found["approx_kl"],
            "ppo/clip_fraction": found["clip_fraction"],
            "optim/grad_norm": found["grad_norm"],
            "policy/entropy": found["entropy"][:steps],  # of the sampling policy
        }
        if self.policy.is_mixed:
            means |= {"sampler/gap": found["sampler_gap"]}
            metrics["sampler/max_ratio"] = float(found["sampler_ratio"].max())
        return metrics | finite_means(means) | {"optim/steps": steps * cfg.epochs}

    def _gradient(
        self, episodes: Episodes, batch: _Batch, minibatch: IntArray, tally: Tally
    ) -> Tensor:
        """Accumulate the gradient of this process's share of a minibatch; returns its loss, 0-d."""
        cfg, device = self.config, self.policy.device
        total = torch.zeros((), device=device)
        mine = minibatch[deal(np.diff(episodes.starts)[minibatch])]
        for part in microbatches(mine, episodes, cfg.microbatch, self.policy.forward_tokens):
            tokens = torch.from_numpy(episodes.tokens(part)).to(device, non_blocking=True)
            sequences = episodes.batch(part)
            new = self.policy.evaluate(sequences, entropy_gradient=cfg.ent_coef != 0)
            assert new.entropy is not None
            sampled = batch.logprob[tokens]
            old = batch.old.of(tokens, new.logprob)
            w = batch.weight[tokens] * truncated_importance(old, sampled, cfg.importance_cap)
            surrogate = clipped_surrogate_loss(
                new.logprob,
                old,
                batch.advantage[tokens],
                w,
                clip_coef=cfg.clip_coef,
                clip_coef_high=cfg.clip_coef_high,
                sequence=sequences.row if cfg.ratio == "sequence" else None,
            )
            loss, divergence = surrogate.loss, torch.zeros_like(surrogate.loss)
            if batch.beta:
                divergence = (w * k3(new.logprob, batch.reference[tokens])).sum()
                loss = loss + batch.beta * divergence
            if cfg.ent_coef:
                loss = loss + cfg.ent_coef * entropy_loss(new.entropy, w)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            tally.sum(policy=surrogate.loss, kl=divergence)
            tally.mean(
                len(tokens),
                approx_kl=surrogate.approx_kl,
                clip_fraction=surrogate.clip_fraction,
                entropy=new.entropy.detach().mean(),
            )
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
class _PricedReference:
    """Log-probabilities under the reference [M], and the price of k3 in the loss."""

    logprob: Any
    beta: float


@dataclass(frozen=True)
class _Batch:
    """What the losses need of each action token, float32 [M] on the policy's device."""

    weight: Tensor
    advantage: Tensor
    logprob: Tensor
    """As sampled."""
    old: OldLogprob
    """As the learner has it before the update."""
    reference: Tensor
    beta: float
    """Price of k3 in the loss."""
