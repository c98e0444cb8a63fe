"""Expert iteration: sample several responses to each prompt, and imitate the best of them.

Anthony, Tian & Barber 2017, "Thinking fast and slow with deep learning and tree search" (ExIt):
an expert better than the policy is had by search, and the policy learns to do without the search by
imitating it. Here the search is rejection sampling: each update samples a group of responses to
each prompt, keeps the good ones, and fine-tunes on them by cross-entropy over their action tokens.
Which are good is set by the config:

- `best=1`: the best response of each group. Dong et al. 2023, "RAFT: reward ranked finetuning for
  generative foundation model alignment".
- `best=None, threshold=1.0, flat="keep"`: every right response. Zelikman et al. 2022, "STaR:
  bootstrapping reasoning with reasoning" (without its hints); Singh et al. 2024, "Beyond human
  data" (ReST-EM), who also limit how many a prompt may have (`best`).
- A `threshold` raised from run to run, with many `epochs` on large batches: Gulcehre et al. 2023,
  "Reinforced self-training (ReST) for language modeling".

Where this departs from those papers:

1. There is one policy, fine-tuned on and on, in many small rounds. STaR and ReST-EM go back to the
   first weights in every round; ReST learns several times from what was sampled once.
2. Identical responses of a group count once: what the policy writes anyway, it need not learn most.
3. A group whose responses all earn the same has no best one, be they right or wrong, and is left
   out (`flat`): imitating one's own samples has no direction and takes away variety. An update in
   which nothing is kept takes no step.
4. Responses are ordered by reward less the price of KL, where there is a price (as in RAFT), and
   that price is paid for the choice only: the fine-tuning has none. `threshold` and what is flat
   are judged before it.
5. Unscored and truncated responses are never kept, and cut ones not if asked (`cut="mask"`).

What is best may have been lucky: where the score depends on what the policy is not shown, as in
HighLow, it imitates luck, and falls short of agents that weigh good and bad against each other.
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

from textgym.groups import best_of_groups, group_advantages
from textgym.learning import (
    GuardedOptimizer,
    check_positive,
    check_rl_config,
    check_scored,
    check_setup,
    learning_rate,
    microbatches,
    to_device,
)
from textgym.losses import Normaliser, token_weights
from textgym.metrics import Tally, finite_means, rollout_metrics, sample_records, spread
from textgym.parallel import deal
from textgym.returns import FloatArray, IntArray
from textgym.rollout import PromptQueue, check_path, collect
from textgym.runs import Result, Run, Stateful, evaluate_policy
from textgym.shaping import Cut, kl_controller, learned_weights, measured_kl, shape_rewards
from textgym.streams import generator, mix64

if TYPE_CHECKING:
    from torch import Tensor

    from textgym.episodes import Episodes
    from textgym.policies import CausalLMPolicy
    from textgym.vector import TextGenVectorEnv

_QUEUE, _ROLLOUT, _SHUFFLE = 1, 2, 4  # keys that the run's seed is hashed with


@dataclass(frozen=True)
class ExpertIterationConfig:
    """What expert iteration does; every number of it."""

    seed: int = 0
    """Seed of prompts, draws and shuffles."""
    episodes: int = 64
    """Episodes of an update, those that are not kept included."""
    group_size: int = 8
    """Episodes that share a prompt."""
    path: Literal["step", "sequence"] = "step"
    """How responses are sampled; both give the same tokens (see `collect`)."""
    best: int | None = 1
    """How many different responses of a group are kept at most, the best ones; None: any number."""
    threshold: float | None = None
    """What a response has to earn to be kept; None: anything."""
    flat: Literal["skip", "keep"] = "skip"
    """Whether groups whose responses all earn the same are left out or are treated as others."""
    epochs: int = 1
    """Passes over the responses that were kept."""
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
    normaliser: Normaliser = "token"
    """What the sum over the tokens that were kept is divided by."""
    kl_coef: float = 0.0
    """Price of one nat of KL to the reference; with `kl_target`, its first value."""
    kl_target: float | None = None
    """KL in nats per response that the price is adapted to; None: a fixed price."""
    kl_horizon: float = 10_000
    """Episodes over which the price adapts."""
    exact_kl_episodes: int = 32
    """Episodes of each batch on which the exact KL is measured; 0: none."""
    cut: Cut = "keep"
    """Whether responses cut by the token budget may be learned from ("keep") or not ("mask")."""
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
        if self.gamma != 1.0:
            raise ValueError(f"gamma must be 1: responses are judged as a whole; got {self.gamma}")
        if self.best is not None:
            check_positive(self, "best")
        if self.threshold is None and (self.best is None or self.best >= self.group_size):
            raise ValueError(
                "something must be left out, or there is nothing to learn: give a threshold, or a "
                f"best below group_size ({self.group_size}), got {self.best}"
            )
        if self.group_size == 1 and self.flat == "skip":
            raise ValueError(
                "a group of one is always flat: use flat='keep', or a group_size of at least 2"
            )


class ExpertIteration:
    """The agent; `learn` trains `policy` in place."""

    def __init__(
        self,
        policy: CausalLMPolicy,
        envs: TextGenVectorEnv,
        config: ExpertIterationConfig | None = None,
        *,
        eval_envs: TextGenVectorEnv | None = None,
        reference: CausalLMPolicy | None = None,
        folder: str | Path | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            policy: What is trained; a value head is not used.
            envs: Made with `autoreset_mode="Disabled"`.
            config: Default: `ExpertIterationConfig()`.
            eval_envs: Held-out prompts, made likewise; None: no evaluation.
            reference: What `kl_coef` prices the distance to. None: the policy as it is now, where
                there is a price.
            folder: Where logs and checkpoints go; None: nowhere.

        Raises:
            ValueError: If the parts do not fit (see `textgym.learning.check_setup`).
        """
        self.config = cfg = config or ExpertIterationConfig()
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
            total_tokens: Of the whole run, those of responses that are not kept counted.
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
        }
        with Run(
            "ExpertIteration",
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
                kept, found = self._choose(episodes, shaped)
                metrics |= found
                metrics |= self._update(episodes, kept, run.counters.update)
                metrics |= {"optim/lr": lr, "optim/skipped": self.optimizer.skipped}
                samples = partial(self._samples, episodes, shaped)
                run.finish_update(metrics, episodes.num_tokens, samples)
            return run.result()

    def _shape(self, episodes: Episodes) -> tuple[FloatArray, dict[str, float]]:
        """Rewards with the price of KL, and what to log."""
        cfg, metrics, kl, beta = self.config, rollout_metrics(episodes), None, self.kl.beta
        if self.reference is not None:
            kl, measured = measured_kl(
                self.policy, self.reference, episodes, controller=self.kl, config=cfg
            )
            metrics |= measured
        return shape_rewards(episodes, kl, beta=beta, cut_penalty=cfg.cut_penalty), metrics

    def _choose(
        self, episodes: Episodes, shaped: FloatArray
    ) -> tuple[NDArray[np.bool_], dict[str, float]]:
        """Which responses are learned from, bool [B], and what to log of them."""
        cfg, size = self.config, self.config.group_size
        # What was truncated has no outcome, and no value stands in for it.
        weights = learned_weights(episodes, cfg.cut) * episodes.terminated
        unpriced = shape_rewards(episodes, None, beta=0.0, cut_penalty=cfg.cut_penalty)
        earned = episodes.per_episode(unpriced)
        flat = np.ones(len(episodes), np.bool_)
        if size > 1:
            flat = np.repeat(group_advantages(earned, size, weights, "mean")[1], size)
        if cfg.flat == "skip":
            weights[flat] = 0.0
        if cfg.threshold is not None:
            weights[earned < cfg.threshold] = 0.0
        written = [episodes.sequence(b).tobytes() for b in range(len(episodes))]
        scores = episodes.per_episode(shaped)
        kept = best_of_groups(scores, size, weights, written, cfg.best)
        metrics = {
            "expert/kept": float(kept.mean()),
            "expert/flat_groups": float(flat.mean()),
        }
        if kept.any():
            metrics["expert/reward_mean"] = float(episodes.scores[kept].mean())
        return kept, metrics

    def _update(self, episodes: Episodes, kept: NDArray[np.bool_], update: int) -> dict[str, float]:
        """Epochs of minibatch steps on the responses that were kept."""
        cfg = self.config
        usable = np.flatnonzero(kept)
        if not len(usable):
            return {}
        steps = min(cfg.minibatches, len(usable))
        # Normalised over all that is kept, once; a minibatch is `steps` times its part of that sum.
        weight = to_device(
            steps
            * token_weights(
                episodes.offsets, kept.astype(np.float64), cfg.normaliser, self.task.max_new_tokens
            ),
            self.policy.device,
        )
        tally = Tally()
        for epoch in range(cfg.epochs):
            order = generator(cfg.seed, _SHUFFLE, update, epoch).permutation(usable)
            for part in np.array_split(order, steps):
                tally.next_step()
                loss = self._gradient(episodes, weight, part, tally, first=not epoch)
                tally.mean(grad_norm=self.optimizer.step(loss))
        self.optimizer.settle()
        found = tally.result()
        means = {
            "loss/policy": found["policy"],
            "optim/grad_norm": found["grad_norm"],
            "policy/entropy": found["entropy"][:steps],  # of the sampling policy
        }
        return finite_means(means) | {"optim/steps": steps * cfg.epochs}

    def _gradient(
        self,
        episodes: Episodes,
        weight: Tensor,
        minibatch: IntArray,
        tally: Tally,
        *,
        first: bool,
    ) -> Tensor:
        """Accumulate the gradient of this process's share of a minibatch; returns its loss, 0-d.

        The entropy is computed in the `first` epoch only, to be logged.
        """
        cfg, device = self.config, self.policy.device
        total = torch.zeros((), device=device)
        mine = minibatch[deal(np.diff(episodes.starts)[minibatch])]
        for part in microbatches(mine, episodes, cfg.microbatch, self.policy.forward_tokens):
            tokens = torch.from_numpy(episodes.tokens(part)).to(device, non_blocking=True)
            scored = self.policy.evaluate(
                episodes.batch(part), entropy=first, entropy_gradient=False
            )
            loss = -(weight[tokens] * scored.logprob).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            tally.sum(policy=loss)
            if scored.entropy is not None:
                tally.mean(len(tokens), entropy=scored.entropy.mean())
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
