"""What a policy gives back, and how it leaves the device; and what goes there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NOT_FINITE = (
    "the model's outputs are not finite: its weights hold NaN or infinity, or overflow in their "
    "dtype; load weights from before that happened"
)


class ActResult(NamedTuple):
    """What `act` chose for n rows."""

    action: NDArray[np.int64]
    """[n] token ids."""
    logprob: NDArray[np.float32]
    """[n] their log-probabilities under the distribution that was sampled, nats."""
    value: NDArray[np.float32]
    """[n] state values; 0 without a value head."""


@dataclass(frozen=True)
class Generation:
    """Responses of n rows; entries at and beyond `count` are 0."""

    tokens: NDArray[np.int64]
    """[n, T] token ids."""
    logprob: NDArray[np.float32]
    """[n, T] log-probabilities, nats."""
    value: NDArray[np.float32]
    """[n, T] values of the states in which the tokens were drawn."""
    count: NDArray[np.int64]
    """[n] number of tokens, the stop id included."""


class Evaluation(NamedTuple):
    """Scores of M action tokens, float32, differentiable."""

    logprob: Tensor
    """[M], nats."""
    value: Tensor | None
    """[M], or None without a value head."""
    entropy: Tensor | None
    """[M], nats, or None when it was not asked for."""


@dataclass(frozen=True)
class Drawn:
    """One token for each of n rows, still on the device."""

    action: Tensor
    logprob: Tensor
    value: Tensor

    def take(self, index: Tensor) -> Drawn:
        """The rows of an index."""
        return Drawn(self.action[index], self.logprob[index], self.value[index])


def packed(drawn: Drawn) -> Tensor:
    """Action, log-probability and value as one float64 [3, n], which holds ids exactly."""
    return torch.stack([drawn.action.double(), drawn.logprob.double(), drawn.value.double()])


def unpacked(host: NDArray[np.float64]) -> ActResult:
    """Read [3, ...] that came from the device.

    Raises:
        FloatingPointError: When a log-probability or value is not finite.
    """
    return _checked(
        host[0].astype(np.int64), host[1].astype(np.float32), host[2].astype(np.float32)
    )


def _checked(*fields: NDArray[Any]) -> ActResult:
    found = ActResult(*fields)
    if not (np.isfinite(found.logprob).all() and np.isfinite(found.value).all()):
        raise FloatingPointError(NOT_FINITE)
    return found


def to_host(steps: list[Drawn]) -> ActResult:
    """Fetch k steps of n rows in one transfer, each field [k, n].

    Raises:
        FloatingPointError: When a log-probability or value is not finite.
    """
    if steps[0].action.device.type == "cpu":  # nothing is transferred, so nothing is packed
        if len(steps) == 1:
            (one,) = steps
            return _checked(*(x.numpy()[None] for x in (one.action, one.logprob, one.value)))
        fields = zip(*((step.action, step.logprob, step.value) for step in steps), strict=True)
        return _checked(*(torch.stack(field).numpy() for field in fields))
    return unpacked(torch.stack([packed(step) for step in steps], 1).cpu().numpy())


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Send an array without waiting for what an accelerator still has to do."""
    here = torch.from_numpy(values)
    if device.type == "cuda":  # from pageable memory a transfer may wait
        return here.pin_memory().to(device, non_blocking=True)
    return here.to(device)
