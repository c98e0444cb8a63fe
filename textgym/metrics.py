"""What agents log of a rollout and of an update."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from textgym.parallel import gather
from textgym.returns import FloatArray
from textgym.task import STOP_REASONS

if TYPE_CHECKING:
    from textgym.episodes import Episodes

_How = Literal["sum", "mean", "peak"]


class Tally:
    """Numbers of the steps of an update, left on the device until the update is done.

    A number that the host reads makes it wait for the device, and a loop that reads some in every
    minibatch keeps the device waiting for the host. With several processes the numbers of all are
    put together.
    """

    def __init__(self) -> None:
        self._steps: list[dict[str, tuple[_How, Tensor, float]]] = []

    def next_step(self) -> None:
        """Begin with the next step; what is added from now on is of it."""
        self._steps.append({})

    def sum(self, **values: Tensor) -> None:
        """Add to sums over all that a step looks at, 0-d tensors."""
        for name, value in values.items():
            self._take("sum", name, value, 0.0)

    def mean(self, weight: float = 1.0, **values: Tensor) -> None:
        """Take into weighted means, 0-d tensors."""
        for name, value in values.items():
            self._take("mean", name, weight * value, weight)

    def peak(self, **values: Tensor) -> None:
        """Take into maxima, 0-d tensors."""
        for name, value in values.items():
            self._take("peak", name, value, 0.0)

    def _take(self, how: _How, name: str, value: Tensor, weight: float) -> None:
        step, value = self._steps[-1], torch.as_tensor(value).detach()
        if name in step:
            _, before, already = step[name]
            value = torch.maximum(before, value) if how == "peak" else before + value
            weight += already
        step[name] = (how, value, weight)

    def result(self, first: int = 0) -> dict[str, FloatArray]:
        """The numbers by name, float64 [steps]; NaN in a step that has none of that name.

        All processes must ask. This waits for the device.

        Args:
            first: The first step that is asked for; -1 for the last one only.
        """
        steps = self._steps[first:]
        kept = [(k, name) for k, step in enumerate(steps) for name in step]
        values = [steps[k][name][1].float() for k, name in kept]
        read = torch.stack(values).tolist() if values else []
        mine = {
            at: (steps[at[0]][at[1]][0], number, steps[at[0]][at[1]][2])
            for at, number in zip(kept, read, strict=True)
        }
        everyone = gather(mine)
        found: dict[str, FloatArray] = {}
        for k, name in dict.fromkeys(at for one in everyone for at in one):
            parts = [one[k, name] for one in everyone if (k, name) in one]
            numbers = [number for _, number, _ in parts]
            how = parts[0][0]
            number = max(numbers) if how == "peak" else sum(numbers)
            if how == "mean":
                number /= sum(weight for _, _, weight in parts)
            found.setdefault(name, np.full(len(steps), np.nan))[k] = number
        return found


def finite_means(values: Mapping[str, FloatArray]) -> dict[str, float]:
    """Mean of the finite numbers of each array; an array without any is left out."""
    kept = {name: array[np.isfinite(array)] for name, array in values.items()}
    return {name: float(array.mean()) for name, array in kept.items() if len(array)}


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
