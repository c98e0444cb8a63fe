"""What the agents share: plain functions between a rollout and an optimizer step.

Rewards become shaped rewards (`shape_rewards`), episodes become microbatches (`microbatches`), and
gradients become steps that are skipped where they are not finite (`GuardedOptimizer`). The
mathematics is in `returns`, `losses` and `kl`; the bookkeeping of a run is in `runs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from textgym.kl import AdaptiveKL, FixedKL, KLController, k1
from textgym.returns import FloatArray, IntArray

if TYPE_CHECKING:
    from textgym.episodes import Episodes
    from textgym.policies import CausalLMPolicy
    from textgym.vector import TextGenVectorEnv

Cut = Literal["keep", "mask"]


class UnscoredError(RuntimeError):
    """Too many episodes of a batch have no score. The message holds the first traceback."""


class NonFiniteError(RuntimeError):
    """Loss or gradient was not finite too many times in a row."""


# ------------------------------------------------------------------------------------ before a run


def check_setup(
    policy: CausalLMPolicy,
    envs: TextGenVectorEnv,
    *,
    gamma: float,
    reference: CausalLMPolicy | None = None,
    needs_values: bool = False,
) -> None:
    """Refuse what could not be learned from, before anything is sampled.

    Raises:
        ValueError: If the environment resets by itself, the policy samples another distribution
            than it scores, sizes do not fit, gamma differs from the reward schedule's, or a value
            head is needed and missing.
    """
    mode = envs.metadata["autoreset_mode"].value
    if mode != "Disabled":
        raise ValueError(
            f"agents need a vector environment made with autoreset_mode='Disabled', got {mode!r}"
        )
    if not policy.is_exact:
        raise ValueError(
            "agents train the distribution that was sampled, but this policy's sampler cuts it "
            "(greedy, top_k or top_p): after an update the cut may exclude a stored token; make "
            "the policy with sampler='inverse_cdf' and without top_k and top_p"
        )
    task = envs.unwrapped.task
    for name, model in (("policy", policy), ("reference", reference)):
        if model is None:
            continue
        if model.vocab_size != task.vocab_size:
            raise ValueError(
                f"the {name} has {model.vocab_size} actions and the environment "
                f"{task.vocab_size}: make the policy with vocab_size={task.vocab_size}"
            )
        if model.context_length is not None and model.context_length < task.max_length:
            raise ValueError(
                f"the {name}'s context holds {model.context_length} tokens, an episode up to "
                f"{task.max_length}: lower max_new_tokens or max_prompt_tokens"
            )
    if reference is not None and reference.temperature != policy.temperature:
        raise ValueError(
            f"the reference has temperature {reference.temperature}, the policy "
            f"{policy.temperature}: they must be equal, or the KL would not start at 0"
        )
    expected = task.schedule.gamma
    if expected is not None and expected != gamma:
        raise ValueError(
            f"the reward's dense schedule has gamma {expected}, the agent {gamma}: make them equal"
        )
    if needs_values and policy.value_head is None:
        raise ValueError("this agent learns values: make the policy with value_head=True")


def check_scored(episodes: Episodes, limit: float = 0.2) -> None:
    """Stop when more than `limit` of a batch has no score.

    Raises:
        UnscoredError: With the reasons, counted, and the first traceback.
    """
    reasons = [status for status in episodes.status if status is not None]
    if len(reasons) > limit * len(episodes):
        counted = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
        shown = ", ".join(f"{reason} ({n})" for reason, n in list(counted.items())[:5])
        raise UnscoredError(
            f"{len(reasons)} of {len(episodes)} episodes are unscored, more than {limit:.0%}: "
            f"{shown}. The first failure was:\n{episodes.traceback or '(no traceback)'}"
        )


def check_positive(config: Any, *names: str) -> None:
    """Check that fields of a config are at least 1.

    Raises:
        ValueError: Naming the first that is not.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def kl_controller(coef: float, target: float | None, horizon: float) -> KLController:
    """A fixed price where there is no target, an adaptive one where there is."""
    return FixedKL(coef) if target is None else AdaptiveKL(coef, target=target, horizon=horizon)


# ------------------------------------------------------------------------------------ rewards


class RewardScale:
    """Shifts and scales episode scores by mean and standard deviation of samples of the reference.

        score' = (score - mean) / std

    Ziegler et al. 2019, section 2.2: rewards start with mean 0 and variance 1, so that one beta
    suits them all. Before `fit` it changes nothing.
    """

    def __init__(self) -> None:
        self.mean, self.std = 0.0, 1.0

    def fit(self, scores: FloatArray, weights: FloatArray) -> None:
        """Take the moments of scores [B], those of weight 0 left out; equal scores keep std 1."""
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
) -> FloatArray:
    """The rewards that are learned from.

        r'_t = (r_t - [t = T] * (mean + [cut] * penalty)) / std - beta * k1_t

    Stiennon et al. 2020, equation 2, per token as in Ziegler et al. 2019, equation 2. What belongs
    to the whole response is paid on its last action token, whatever ended the episode.

    Args:
        episodes: M action tokens in B episodes.
        kl: k1 of each action token [M]; None without a reference.
        beta: Price of one nat.
        scale: Mean and std of the environment's scores; None is 0 and 1.
        cut_penalty: Subtracted from the score of a response that the token budget cut.

    Returns:
        float64 [M].
    """
    shaped = episodes.reward.astype(np.float64)
    last = episodes.offsets[1:] - 1
    shaped[last] -= cut_penalty * was_cut(episodes)
    if scale is not None:
        shaped[last] -= scale.mean
        shaped /= scale.std
    if kl is not None:
        shaped -= beta * kl
    return shaped


def was_cut(episodes: Episodes) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which responses the token budget cut, bool [B], whatever flag the environment set."""
    return np.array([reason == "length" for reason in episodes.stop_reason], bool)


def learned_weights(episodes: Episodes, cut: Cut) -> FloatArray:
    """Loss weights of the episodes [B]: 0 for unscored and, if `cut` is "mask", for cut ones."""
    weights = episodes.weight.astype(np.float64)
    if cut == "mask":
        weights[was_cut(episodes)] = 0.0
    return weights


# ------------------------------------------------------------------------------------ forwards


def microbatches(indices: IntArray, episodes: Episodes, size: int | None) -> Iterator[IntArray]:
    """Split episodes into groups of at most `size`, of similar length: little is padding."""
    if size is None or size >= len(indices):
        yield indices
        return
    lengths = np.diff(episodes.starts)[indices]
    ordered = indices[np.argsort(-lengths, kind="stable")]
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]


@torch.no_grad()
def reference_k1(reference: CausalLMPolicy, episodes: Episodes, size: int | None) -> FloatArray:
    """k1 of every action token, log pi (as sampled) minus log reference, float64 [M]."""
    theirs = torch.zeros(episodes.num_tokens, dtype=torch.float64)
    for part in microbatches(np.arange(len(episodes)), episodes, size):
        scored = reference.evaluate(episodes.batch(part, reference.device), entropy=False)
        theirs[torch.from_numpy(episodes.tokens(part))] = scored.logprob.double().cpu()
    return k1(torch.from_numpy(episodes.logprob).double(), theirs).numpy()


def exact_kl(
    policy: CausalLMPolicy,
    reference: CausalLMPolicy,
    episodes: Episodes,
    count: int,
    size: int | None,
) -> float:
    """Exact KL to the reference over the first `count` scored episodes, nats per response."""
    chosen = np.flatnonzero(episodes.weight > 0)[:count]
    total = 0.0
    for part in microbatches(chosen, episodes, size):
        total += float(policy.kl(reference, episodes.batch(part, policy.device)).double().sum())
    return total / len(chosen) if len(chosen) else math.nan


def adapt(controller: KLController, kl: float, episodes: Episodes) -> None:
    """Let the price follow the measured KL; a batch without any score says nothing."""
    if math.isfinite(kl):
        controller.update(kl, int((episodes.weight > 0).sum()))


def to_device(values: Any, device: torch.device) -> Tensor:
    """A float32 copy on the policy's device."""
    return torch.as_tensor(np.asarray(values), dtype=torch.float32, device=device)


# ------------------------------------------------------------------------------------ steps


def learning_rate(
    base: float, update: int, progress: float, *, warmup_updates: int, final: float
) -> float:
    """Linear warm-up over updates, times linear decay over tokens.

        lr = base * min(1, (update + 1) / (warmup_updates + 1)) * (1 - (1 - final) * progress)

    Args:
        base: Highest learning rate.
        update: Updates done before this one.
        progress: Share of the run's tokens done, clipped to [0, 1].
        warmup_updates: Updates before the full rate.
        final: Rate at the end, as a share of `base`.
    """
    warm = min(1.0, (update + 1) / (warmup_updates + 1))
    return base * warm * (1.0 - (1.0 - final) * min(1.0, max(0.0, progress)))


class GuardedOptimizer:
    """Adam with gradient clipping that skips steps whose loss or gradient is not finite.

    Attributes:
        skipped: Steps skipped so far.
        in_a_row: Steps skipped since the last good one.
    """

    def __init__(
        self,
        policy: torch.nn.Module,
        *,
        lr: float,
        max_grad_norm: float,
        weight_decay: float = 0.0,
        limit: int = 5,
    ) -> None:
        """Optimise every parameter of `policy` that wants a gradient."""
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the policy has no parameter to train: every one is frozen")
        # eps 1e-5 and not 1e-8: Huang et al. 2022, "The 37 implementation details of PPO", detail
        # 3.
        self.adam = torch.optim.AdamW(self.parameters, lr=lr, eps=1e-5, weight_decay=weight_decay)
        self.max_grad_norm, self.limit = max_grad_norm, limit
        self.skipped, self.in_a_row = 0, 0

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next steps."""
        for group in self.adam.param_groups:
            group["lr"] = lr

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.adam.zero_grad(set_to_none=True)

    def step(self, loss: float) -> float:
        """Clip the accumulated gradients and step, or skip.

        Args:
            loss: The sum of what was differentiated, to look at.

        Returns:
            The gradient norm before clipping; NaN where the step was skipped.

        Raises:
            NonFiniteError: After `limit` skipped steps in a row.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        if math.isfinite(loss) and math.isfinite(norm):
            self.adam.step()
            self.in_a_row = 0
            self.zero_grad()
            return norm
        self.zero_grad()
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise NonFiniteError(
                f"loss ({loss}) or gradient norm ({norm}) was not finite {self.in_a_row} steps in "
                "a row: lower the learning rate, use float32, or look for an outlying reward"
            )
        return math.nan

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on exactly."""
        adam = self.adam.state_dict()
        return {"adam": adam, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.adam.load_state_dict(state["adam"])
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])


class Means:
    """Weighted means by name, of finite numbers only."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, weight: float = 1.0, **values: float) -> None:
        """Take in numbers of one weight; `__` in a name stands for `/`."""
        for name, value in values.items():
            if math.isfinite(value):
                key = name.replace("__", "/")
                total, count = self._sums.get(key, (0.0, 0.0))
                self._sums[key] = (total + weight * float(value), count + weight)

    def result(self) -> dict[str, float]:
        """The means; a name that was never added is not there."""
        return {k: total / count for k, (total, count) in self._sums.items() if count > 0}


# ------------------------------------------------------------------------------------ what to log


def rollout_metrics(episodes: Episodes) -> dict[str, float]:
    """Scores, lengths, ends and reward components of a batch, by glossary name."""
    scored = episodes.weight > 0
    scores = episodes.scores[scored]
    metrics = {
        "rollout/reward_mean": float(scores.mean()) if len(scores) else math.nan,
        "rollout/reward_std": float(scores.std()) if len(scores) else math.nan,
        "rollout/response_length": float(episodes.lengths.mean()),
        "rollout/unscored": float(1.0 - scored.mean()),
    }
    for reason in ("stop_id", "stop_string", "length", "env"):
        metrics[f"rollout/{reason}"] = episodes.stop_reason.count(reason) / len(episodes)
    for name, values in episodes.components.items():
        applies = np.add.reduceat(~np.isnan(values), episodes.offsets[:-1]) > 0
        chosen = episodes.per_episode(values)[scored & applies]
        metrics[f"reward/{name}"] = float(chosen.mean()) if len(chosen) else math.nan
    return metrics


def sample_records(
    episodes: Episodes, tokenizer: Any, indices: Iterable[int], shaped: FloatArray | None = None
) -> Iterator[dict[str, Any]]:
    """Some episodes as people read them, with the reward of each token."""
    for b in indices:
        own = slice(int(episodes.offsets[b]), int(episodes.offsets[b + 1]))
        ids = episodes.sequence(b)[episodes.column[own]]
        record: dict[str, Any] = {
            "prompt": episodes.prompts[b],
            "text": episodes.texts[b],
            "score": float(episodes.scores[b]),
            "stop_reason": episodes.stop_reason[b],
            "status": episodes.status[b],
            "components": {
                n: v[own][~np.isnan(v[own])].sum() for n, v in episodes.components.items()
            },
            "tokens": [tokenizer.piece(int(i)) for i in ids],
            "token_rewards": episodes.reward[own],
            "token_logprobs": episodes.logprob[own],
        }
        if shaped is not None:
            record["token_shaped_rewards"] = shaped[own]
        yield record


def spread(total: int, count: int) -> Sequence[int]:
    """`count` indices spread evenly over `range(total)`."""
    return [int(i) for i in np.linspace(0, total - 1, min(count, total)).round()] if total else []
