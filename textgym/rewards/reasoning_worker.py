"""Inside a worker of `textgym.sandbox.pool`: score an answer with reasoning-gym.

Importing this takes the evaluation of answers out of the library: never import it in the caller.
"""

from __future__ import annotations

import ast
import functools
import re
from typing import Any

import reasoning_gym

from textgym.rewards.reasoning_guard import disarm, vet

# A number that is none is as near to the right one as any: `min(1.0, nan)` is 1.0, which is what
# complex_arithmetic pays for it (0.1.25).
NAN = re.compile(r"(?<![a-z])nan[ij]?(?![a-z])", re.I)

disarm()


def score(name: str, config: str, entry: str, answer: str) -> float | str:
    """Score an answer.

    Args:
        name: The name of the dataset.
        config: Its configuration, size and seed included, as a Python literal.
        entry: The entry as a Python literal; or, of one that cannot be written so, its index and
            its question.
        answer: What the model answers.

    Returns:
        The score; or the status of an answer at which the scorer fails.

    Raises:
        RuntimeError: If the entry cannot be made again.
    """
    dataset = _dataset(name, config)
    known = _entry(name, config, entry)
    if NAN.search(answer) and not NAN.search(str(known["answer"])):
        return 0.0
    try:
        return float(dataset.score_answer(answer=answer, entry=known))
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        # The same scorer accepts the right answer, so what it fails at is this one.
        return f"scorer: {type(error).__name__}"


@functools.lru_cache(maxsize=16)
def _dataset(name: str, config: str) -> Any:
    dataset = reasoning_gym.create_dataset(name, **ast.literal_eval(config))
    vet(dataset)
    return dataset


@functools.lru_cache(maxsize=1024)
def _entry(name: str, config: str, entry: str) -> dict[str, Any]:
    known: dict[str, Any] = ast.literal_eval(entry)
    if "answer" in known:
        return known
    made: dict[str, Any] = _dataset(name, config)[known["index"]]
    if made["question"] != known["question"]:
        raise RuntimeError(
            f"{name} gives another entry {known['index']} here than in the caller's process"
        )
    return made
