"""The rewards that are learned from: scaled, fined where cut, less the price of KL.

An environment cannot see log pi, so what depends on it is added here, between rollout and update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from textgym.credit import Credit, assign_credit
from textgym.kl import AdaptiveKL, FixedKL, KLController, k1, kl_per_response
from textgym.learning import check_scored, microbatches, to_device
from textgym.parallel import deal, total, world
from textgym.returns import FloatArray, episode_sums
from textgym.rollout import collect

if TYPE_CHECKING:
    from textgym.episodes import Episodes
    from textgym.policies import CausalLMPolicy
    from textgym.rewards import Schedule
    from textgym.vector import TextGenVectorEnv

Cut = Literal["keep", "mask"]


def kl_controller(config: Any) -> KLController:
    """A fixed price of KL where the config has no `kl_target`, an adaptive one where it has.

    Raises:
        ValueError: If the price is negative, or target or horizon do not fit the batches.
    """
    if config.kl_target is None:
        return FixedKL(config.kl_coef)
    controller = AdaptiveKL(config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)
    controller.check(config.episodes)
    return controller


class RewardScale:
    """Shifts and scales episode scores by mean and standard deviation of samples of the reference.

        score' = (score - mean) / std

    Ziegler et al. 2019, section 2.2: rewards start with mean 0 and variance 1, so that one beta
    suits them all. Before `fit` it changes nothing.
    """

    def __init__(self) -> None:
        self.mean, self.std = 0.0, 1.0

    def fit(self, scores: FloatArray, weights: FloatArray) -> None:
        """Take the moments of scores [B], those of weight 0 left out; equal scores keep std 1.

        An episode that was truncated has no outcome, hence no score: give it weight 0.
        """
        used = scores[weights > 0]
        if len(used):
            self.mean = float(used.mean())
            self.std = float(used.std()) if used.std() > 1e-8 else 1.0

    def state_dict(self) -> dict[str, float]:
        """Everything that `load_state_dict` needs."""
        return {"mean": self.mean, "std": self.std}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state`."""
        self.mean, self.std = float(state["mean"]), float(state["std"])


def shape_rewards(
    episodes: Episodes,
    kl: FloatArray | None,
    *,
    beta: float,
    scale: RewardScale | None = None,
    cut_penalty: float = 0.0,
    credit: Credit = "last",
    credit_discount: float = 0.95,
) -> FloatArray:
    """The rewards that are learned from.

        r'_t = (r_t - [t = T] * ([terminated] * mean + [cut] * penalty)) / std - beta * k1_t

    Stiennon et al. 2020, equation 2, per token as in Ziegler et al. 2019, equation 2. What belongs
    to the whole response is paid on its last action token, whatever ended the episode. The mean is
    that of outcomes: a truncated episode has none yet, and the value that it bootstraps from is
    less the mean already. `credit` spreads all of that, before the price of KL, which is each
    token's own.

    Args:
        episodes: M action tokens in B episodes.
        kl: k1 of each action token [M]; None without a reference.
        beta: Price of one nat.
        scale: Mean and std of the environment's scores; None is 0 and 1.
        cut_penalty: Subtracted from the score of a response that the token budget cut.
        credit: How the score of a response is spread; "last" leaves rewards where they were paid.
        credit_discount: See `assign_credit`.

    Returns:
        float64 [M].
    """
    shaped = episodes.reward.astype(np.float64)
    last = episodes.offsets[1:] - 1
    shaped[last] -= cut_penalty * was_cut(episodes)
    if scale is not None:
        shaped[last] -= scale.mean * episodes.terminated
        shaped /= scale.std
    if credit != "last":
        scores = episode_sums(shaped, episodes.offsets)
        shaped = assign_credit(scores, episodes.offsets, credit, credit_discount)
    if kl is not None:
        shaped -= beta * kl
    return shaped


def check_credit_fits(config: Any, schedule: Schedule) -> None:
    """Check that the credit of a config does not undo what a schedule pays token by token.

    Raises:
        ValueError: If it does.
    """
    if config.credit != "last" and schedule.every_step:
        raise ValueError(
            f"credit={config.credit!r} spreads a score that is paid at the end, but this reward is "
            f"paid token by token ({schedule!r}): use credit='last', which leaves it as it is, or "
            "a reward without dense and steps"
        )


def reward_range(schedule: Schedule, scale: RewardScale | None = None) -> float:
    """From the worst to the best outcome, in units of the scaled reward."""
    return (schedule.high - schedule.low) / (1.0 if scale is None else scale.std)


def was_cut(episodes: Episodes) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which responses the token budget cut, bool [B], whatever flag the environment set."""
    return np.array([reason == "length" for reason in episodes.stop_reason], bool)


def learned_weights(episodes: Episodes, cut: Cut) -> FloatArray:
    """Loss weights of the episodes [B]: 0 for unscored and, if `cut` is "mask", for cut ones."""
    weights = episodes.weight.astype(np.float64)
    if cut == "mask":
        weights[was_cut(episodes)] = 0.0
    return weights


def fit_scale(
    scale: RewardScale,
    policy: CausalLMPolicy,
    envs: TextGenVectorEnv,
    episodes: int,
    seed: int,
) -> int:
    """Fit a reward's scale on the outcomes of samples of `policy`; returns their action tokens.

    Raises:
        UnscoredError: If more than 20 % of them have no score.
    """
    found = collect(policy, envs, episodes, seed=seed)
    check_scored(found)
    scale.fit(found.scores, found.weight * found.terminated)
    return found.num_tokens


def priced_rewards(
    policy: CausalLMPolicy,
    reference: CausalLMPolicy | None,
    episodes: Episodes,
    *,
    controller: KLController,
    scale: RewardScale,
    config: Any,
) -> tuple[FloatArray, dict[str, float]]:
    """Shape the rewards of a batch at the present price of KL, then let the price follow the KL.

    Args:
        policy: What sampled the episodes.
        reference: What the distance is to; None for no price.
        episodes: M action tokens.
        controller: Sets the price.
        scale: Mean and std of the environment's scores.
        config: The agent's; reads `cut_penalty`, `credit`, `credit_discount`, `exact_kl_episodes`
            and `microbatch`.

    Returns:
        Shaped rewards float64 [M], and what to log, by glossary name.
    """
    beta, kl = controller.beta, None
    metrics: dict[str, float] = {}
    if reference is not None:
        kl, metrics = measured_kl(policy, reference, episodes, controller=controller, config=config)
    shaped = shape_rewards(
        episodes,
        kl,
        beta=beta,
        scale=scale,
        cut_penalty=config.cut_penalty,
        credit=config.credit,
        credit_discount=config.credit_discount,
    )
    return shaped, metrics


def measured_kl(
    policy: CausalLMPolicy,
    reference: CausalLMPolicy,
    episodes: Episodes,
    *,
    controller: KLController,
    config: Any,
) -> tuple[FloatArray, dict[str, float]]:
    """Measure the distance to a reference, and let the price follow it.

    Args:
        policy: What sampled the episodes.
        reference: What the distance is to.
        episodes: M action tokens.
        controller: Sets the price; read its `beta` before, for this batch's.
        config: The agent's; reads `exact_kl_episodes` and `microbatch`.

    Returns:
        k1 of each action token float64 [M], and what to log, by glossary name.
    """
    metrics = {"kl/beta": controller.beta}
    kl = reference_k1(reference, episodes, config.microbatch)
    metrics["kl/ref"] = kl_per_response(kl, episodes.offsets, episodes.weight)
    if config.exact_kl_episodes:
        metrics["kl/ref_exact"] = exact_kl(
            policy, reference, episodes, config.exact_kl_episodes, config.microbatch
        )
    adapt(controller, metrics["kl/ref"], episodes)
    return kl, metrics


def reference_k1(reference: CausalLMPolicy, episodes: Episodes, size: int | None) -> FloatArray:
    """k1 of every action token, log pi (as sampled) minus log reference, float64 [M]."""
    theirs = torch.from_numpy(score_actions(reference, episodes, size))
    return k1(torch.from_numpy(episodes.logprob).double(), theirs).numpy()


@torch.no_grad()
def score_actions(policy: CausalLMPolicy, episodes: Episodes, size: int | None) -> FloatArray:
    """Log-probability of every action token as `evaluate` has it, float64 [M], nats.

    Args:
        policy: Whose.
        episodes: M action tokens.
        size: Sequences in one forward.
    """
    scores, places = [], []
    for part in microbatches(deal(np.diff(episodes.starts)), episodes, size, policy.forward_tokens):
        scores.append(policy.evaluate(episodes.batch(part), entropy=False).logprob)
        places.append(episodes.tokens(part))
    mine = np.zeros(episodes.num_tokens)
    if scores:  # read once, so that nothing waits for the device before
        mine[np.concatenate(places)] = torch.cat(scores).cpu().numpy()
    return total(mine)


class OldLogprob:
    """Log-probability of every action token before an update: what its ratios are to.

    That is what was sampled with, unless the sampler computes in another precision than the
    learner: then ratios to it would differ from 1 before anything was learned. The learner's own
    are computed beforehand, or, where the first pass is a single step, taken from its forwards,
    which come before any change of the weights.
    """

    def __init__(
        self, policy: CausalLMPolicy, episodes: Episodes, size: int | None, *, steps: int
    ) -> None:
        """Score the episodes, unless that can wait.

        Args:
            policy: What learns.
            episodes: M action tokens.
            size: Sequences in one forward.
            steps: Gradient steps of a pass over the batch.
        """
        self._waits = policy.is_mixed and steps == 1
        found: Any = episodes.logprob
        if self._waits:
            found = np.zeros(episodes.num_tokens)
        elif policy.is_mixed:
            found = score_actions(policy, episodes, size)
        self._logprob = to_device(found, policy.device)

    def of(self, tokens: Tensor, now: Tensor) -> Tensor:
        """Those of some tokens [m], without gradient; in a first pass that is waited for, `now`."""
        if self._waits:
            self._logprob[tokens] = now.detach()
        return self._logprob[tokens]

    def settle(self) -> None:
        """Hold on to what the first pass said; to be called before a second."""
        if self._waits:
            self._waits = False
            if world().size > 1:  # another process may have those tokens in the next pass
                whole = total(self._logprob.cpu().numpy())
                self._logprob = to_device(whole, self._logprob.device)


def exact_kl(
    policy: CausalLMPolicy,
    reference: CausalLMPolicy,
    episodes: Episodes,
    count: int,
    size: int | None,
) -> float:
    """Exact KL to the reference over the first `count` scored episodes, nats per response."""
    chosen = np.flatnonzero(episodes.weight > 0)[:count]
    mine = chosen[deal(np.diff(episodes.starts)[chosen])]
    sums = [
        policy.kl(reference, episodes.batch(part)).double().sum()
        for part in microbatches(mine, episodes, size, policy.forward_tokens)
    ]
    whole: float = total(sum(torch.stack(sums).tolist()) if sums else 0.0)
    return whole / len(chosen) if len(chosen) else math.nan


def adapt(controller: KLController, kl: float, episodes: Episodes) -> None:
    """Let the price follow the measured KL; a batch without any score says nothing."""
    if math.isfinite(kl):
        controller.update(kl, int((episodes.weight > 0).sum()))
