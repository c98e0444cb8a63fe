"""What `Math` runs in the worker pool: math-verify, without time limits of its own."""

from __future__ import annotations

import functools
import logging
from typing import Any

import math_verify

logging.getLogger("math_verify").setLevel(logging.CRITICAL)

UNPARSABLE = "unparsable"


def judge(gold: str, claims: list[str]) -> float | str:
    """Tell whether every claim equals the right answer.

    Raises:
        ValueError: If the right answer cannot be read.
    """
    right = list(_gold(gold))
    for claim in claims:
        try:
            read = math_verify.parse(claim, parsing_timeout=None)
            good = bool(read) and math_verify.verify(right, read, timeout_seconds=None)
        except (MemoryError, RecursionError):
            raise
        except Exception:
            return UNPARSABLE
        if not good:
            return 0.0
    return 1.0


@functools.lru_cache(4096)
def _gold(text: str) -> tuple[Any, ...]:
    bare = "$" not in text.replace("\\$", "") and "\\boxed" not in text
    for way in (f"\\boxed{{{text}}}", text) if bare else (text,):
        read = math_verify.parse(way, parsing_timeout=None)
        if read:
            return tuple(read)
    raise ValueError(f"math-verify cannot read the right answer {text!r:.200}")


# Grammars, and what SymPy imports late, are set up by their first use, which is not to be paid for
# by an item, nor again in each new child of the worker's guard.
for _right, _claim in (
    ("(x+1)^2", r"\boxed{x^2+2x+1}"),
    ("2x+2=4", r"\boxed{x+1=2}"),
    ("1<x<2", r"\boxed{(1,2)}"),
    (r"\sin(2x)", r"\boxed{2\sin(x)\cos(x)}"),
    (r"\{1,2\}", r"\boxed{2,1}"),
    (r"\frac{1}{2}", r"$\sqrt{4}/4$"),
):
    _verdict = judge(_right, [_claim])
if _verdict != 1.0:
    raise RuntimeError("math-verify does not find that √4 / 4 is 1/2: its version is not supported")
