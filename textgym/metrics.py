"""What agents log of a rollout and of an update."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from textgym.returns import FloatArray
from textgym.task import STOP_REASONS

if TYPE_CHECKING:
    from textgym.episodes import Episodes


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


def rollout_metrics(episodes: Episodes) -> dict[str, float]:
    """Scores, lengths, ends and reward components of a batch, by glossary name.

    Episodes without a score count in `rollout/unscored`, in `unscored/<reason>` and nowhere else.
    """
    scored = episodes.weight > 0
    scores = episodes.scores[scored]
    reasons = np.array(episodes.stop_reason)[scored]
    metrics = {
        "rollout/reward_mean": _mean(scores),
        "rollout/reward_std": float(scores.std()) if len(scores) else math.nan,
        "rollout/response_length": _mean(episodes.lengths[scored]),
        "rollout/unscored": float(1.0 - scored.mean()),
    }
    for reason in STOP_REASONS:
        metrics[f"rollout/{reason}"] = _mean(reasons == reason)
    failures = Counter(_reason(status) for status in episodes.status if status is not None)
    metrics |= {f"unscored/{why}": n / len(episodes) for why, n in failures.items()}
    for name, values in episodes.components.items():
        applies = np.add.reduceat(~np.isnan(values), episodes.offsets[:-1]) > 0
        metrics[f"reward/{name}"] = _mean(episodes.per_episode(values)[scored & applies])
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


def _reason(status: str) -> str:
    """What kind of failure a status tells: `"error: ValueError: boom"` is a `ValueError`."""
    parts = status.split(": ")
    return parts[1] if parts[0] == "error" and len(parts) > 1 else parts[0]


def _mean(values: NDArray[Any]) -> float:
    """The mean; NaN of nothing."""
    return float(values.mean()) if len(values) else math.nan
