"""What is asked of a reward: jobs for a guarded child, each of which returns JSON values."""

from __future__ import annotations

import copy
import pickle
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from textgym.rewards.base import Cursor, Example, Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.schedules import dense

Scored = dict[str, list[Any]]
"""`{"values": [...], "status": [...]}`, an entry a text."""

_TIMED_SECONDS = 0.2
_PIECE = 7  # characters: more than a token, and it ends inside words


def as_batch(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> TextBatch:
    """Make a batch of finished responses; each word, split at spaces, counts as a token."""
    batch = TextBatch.from_texts(texts, rows)
    ids = [list(range(len(text.split()))) for text in texts]
    return replace(batch, token_ids=ids, stop_reasons=["stop_id"] * len(batch))


def scored(reward: Reward, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Scored:
    """Score texts together."""
    found = reward.evaluate(as_batch(texts, rows))
    return {"values": found.values.tolist(), "status": list(found.status)}


def one_by_one(reward: Reward, examples: Sequence[Example]) -> Scored:
    """Score each example in a batch of its own."""
    parts = [scored(reward, [example.text], [example.row]) for example in examples]
    return {key: [part[key][0] for part in parts] for key in ("values", "status")}


def reversed_order(reward: Reward, examples: Sequence[Example]) -> Scored:
    """Score the examples backwards; the answer is in their own order."""
    found = together(reward, examples[::-1])
    return {key: values[::-1] for key, values in found.items()}


def together(reward: Reward, examples: Sequence[Example]) -> Scored:
    """Score the examples as one batch."""
    return scored(reward, [e.text for e in examples], [e.row for e in examples])


def pickled(reward: Reward, examples: Sequence[Example]) -> Scored:
    """Score with the reward as it comes out of a pickle."""
    return together(pickle.loads(pickle.dumps(reward)), examples)


def deepcopied(reward: Reward, examples: Sequence[Example]) -> Scored:
    """Score with a deep copy."""
    return together(copy.deepcopy(reward), examples)


def changes_its_batch(reward: Reward, examples: Sequence[Example]) -> bool:
    """Tell whether scoring changes the batch that it is given."""
    batch = as_batch([e.text for e in examples], [e.row for e in examples])
    before = repr(batch)
    reward.evaluate(batch)
    return repr(batch) != before


def cursor_errors(reward: Reward, example: Example, tolerance: float) -> str | None:
    """Compare a cursor with the score at every prefix, and that of a copy; None if it has none.

    The text is pushed character by character, then piece by piece with a copy that goes on in
    another way.

    Returns:
        An empty string where all is equal, else what is not.
    """
    cursor = reward.begin(example.row)
    if cursor is None:
        return None
    text = example.text
    prefixes = [text[: i + 1] for i in range(len(text))]
    expected = scored(reward, prefixes, [example.row] * len(prefixes))["values"]
    for prefix, value in zip(prefixes, expected, strict=True):
        if found := _differs(cursor.push(prefix[-1]), value, prefix, tolerance):
            return found
    fresh = reward.begin(example.row)
    assert fresh is not None
    return _copies(fresh, text, expected, tolerance)


def _copies(cursor: Cursor, text: str, expected: list[float], tolerance: float) -> str:
    """Push pieces, and something else into a copy each time, which must change nothing."""
    for start in range(0, len(text), _PIECE):
        value = cursor.push(text[start : start + _PIECE])
        end = min(len(text), start + _PIECE)
        if found := _differs(value, expected[end - 1], text[:end], tolerance):
            return found
        cursor.copy().push(" something else entirely")
        cursor = cursor.copy()
    return ""


def _differs(value: float, expected: float, text: str, tolerance: float) -> str:
    if abs(value - expected) <= tolerance:
        return ""
    return f"cursor {value!r}, score {expected!r} at {text[-60:]!r}"


def dense_sums(reward: Reward, examples: Sequence[Example]) -> list[list[float]]:
    """Pay each example by pieces under a dense schedule: (the sum paid, the terminal score)."""
    schedule = dense(reward)
    warnings.simplefilter("ignore")  # of a reward without a cursor; this runs in a child
    sums = []
    for example in examples:
        pieces = [example.text[i : i + _PIECE] for i in range(0, len(example.text), _PIECE)] or [""]
        track, text, total = schedule.begin(example.row, ""), "", 0.0
        for k, piece in enumerate(pieces):
            text += piece
            last = np.array([k == len(pieces) - 1])
            batch = as_batch([text], [example.row])
            total += float(schedule.pay([track], batch, last, ~last).reward[0])
        sums.append([total, together(reward, [example])["values"][0]])
    return sums


def hostile_cursor(reward: Reward, row: Mapping[str, Any], text: str) -> list[float] | None:
    """Push a text in three parts: (the last value, the score); None if there is no cursor."""
    cursor = reward.begin(row)
    if cursor is None:
        return None
    third = len(text) // 3 + 1
    value = 0.0
    for start in range(0, max(1, len(text)), third):
        value = cursor.push(text[start : start + third])
    return [value, scored(reward, [text], [row])["values"][0]]


def cost(reward: Reward, examples: Sequence[Example]) -> dict[str, float]:
    """Measure scoring the examples together, caches filled: seconds an item, CPU and wall."""
    together(reward, examples)
    count, cpu, wall = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() - wall < _TIMED_SECONDS:
        together(reward, examples)
        count += len(examples)
    return {
        "cpu_us": (time.process_time() - cpu) / count * 1e6,
        "wall_us": (time.perf_counter() - wall) / count * 1e6,
    }
