"""Reading of observations: to the host, checked against what the policy can take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Ints = NDArray[np.int64]


def read_observation(obs: Mapping[str, Any], vocab_size: int) -> tuple[Ints, Ints]:
    """Give the ids [n, L] and the lengths [n] of an observation of arrays or tensors.

    Raises:
        ValueError: For shapes that do not fit, a length outside 1..L, or an id outside the
            vocabulary. Ids in the padding do not matter.
    """
    ids, length = _integers(obs["input_ids"]), _integers(obs["length"]).reshape(-1)
    if ids.ndim != 2 or len(ids) != len(length) or not len(ids):
        raise ValueError(
            "obs: expected input_ids [n, L] and length [n, 1] with n >= 1, "
            f"got {list(ids.shape)} and {len(length)} lengths"
        )
    columns = ids.shape[1]
    if length.min() < 1 or length.max() > columns:
        raise ValueError(
            f"obs: expected lengths in 1..{columns} (L), got {length.min()} to {length.max()}"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:  # perhaps only in the padding
        real = np.arange(columns) < length[:, None]
        bad = ids[real & ((ids < 0) | (ids >= vocab_size))]
        if bad.size:
            raise ValueError(f"obs: expected ids in 0..{vocab_size - 1} (V - 1), got {bad[0]}")
    return ids, length


def read_rows(rows: ArrayLike | None, n: int) -> Ints:
    """Give the slots [n] that the rows of an observation use; None means 0 to n - 1."""
    if rows is None:
        return np.arange(n)
    given = np.asarray(rows, np.int64).reshape(-1)
    if len(given) != n or len(np.unique(given)) != n or given.min() < 0:
        raise ValueError(
            f"rows: expected {n} different slots, one for each row of obs, got {given.tolist()}"
        )
    return given


def read_stream(stream: ArrayLike, n: int, name: str = "stream") -> NDArray[Any]:
    """Give one integer for each of n rows.

    Raises:
        ValueError: For another number of entries.
        TypeError: For anything but integers.
    """
    given = np.asarray(stream)
    if given.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got an array of {given.dtype}")
    if given.size not in (1, n):
        raise ValueError(f"{name}: expected one entry or {n}, got {given.size}")
    return np.broadcast_to(given.reshape(-1), (n,))


def check_context(columns: int, limit: int | None) -> None:
    """Raise ValueError when a model cannot take sequences of so many columns."""
    if limit is not None and columns > limit:
        raise ValueError(
            f"the model's context holds {limit} tokens, but prompt and response may take "
            f"{columns}: lower max_prompt_tokens or max_new_tokens, or use a longer context"
        )


def _integers(values: Any) -> Ints:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise TypeError(f"obs: expected integers, got an array of {array.dtype}")
    return array.astype(np.int64, copy=False)
