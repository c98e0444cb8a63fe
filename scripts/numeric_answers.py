"""The part of `bench_rewards.py` on final numbers: `Numeric` against math-verify.

Every problem of GSM8K's test file gets its right answer and wrong ones, written in several ways;
each verdict of the two must be the same. The worked solutions of the file, whole, are judged too:
there the two may differ, and the differences are counted.
"""

from __future__ import annotations

import json
import logging
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import math_verify

from textgym.rewards import Numeric, TextBatch

TARGET = 100.0
SENTENCES = (
    "#### {}",
    "The answer is {}.",
    "So it is \\boxed{{{}}}.",
    "The answer is ${}.",
    "She has 3 left. The final answer is {} dollars.",
)


class Library:
    """math-verify with the right answers parsed beforehand, and without its alarm signals."""

    def __init__(self, golds: Sequence[str]) -> None:
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        self.golds = [math_verify.parse(gold, parsing_timeout=None) for gold in golds]

    def score(self, texts: Sequence[str]) -> list[float]:
        """The verdicts on a text for each right answer."""
        return [
            float(
                math_verify.verify(
                    gold, math_verify.parse(text, parsing_timeout=None), timeout_seconds=None
                )
            )
            for gold, text in zip(self.golds, texts, strict=True)
        ]


def answers(golds: Sequence[str], rng: random.Random) -> list[list[str]]:
    """Right and wrong numbers, one for each right answer in each list."""
    plain = [int(gold.replace(",", "")) for gold in golds]
    return [
        list(golds),
        [f"{number:,}" for number in plain],
        [f"{gold}.00" for gold in golds],
        rng.sample(list(golds), len(golds)),
        [str(number + 1) for number in plain],
        [str(number * 10) for number in plain],
        [str(-number) for number in plain],
        [f"{gold}.5" for gold in golds],
    ]


def judged(groups: Sequence[list[str]], golds: Sequence[str], rounds: int) -> dict[str, Any]:
    """Judge groups of texts, one text for each right answer, by both.

    Returns:
        The first texts whose verdicts differ, and microseconds of CPU time a text.
    """
    reward, library = Numeric(), Library(golds)
    rows: list[dict[str, Any]] = [{"answer": gold} for gold in golds]
    mine = [0.0] * (rounds + 1)  # the first one warms up
    right, theirs, differ = 0.0, 0.0, []
    for texts in groups:
        batch = TextBatch.from_texts(texts, rows)
        for turn in range(rounds + 1):
            start = time.process_time()
            values = reward.score(batch)
            mine[turn] += time.process_time() - start
        start = time.process_time()
        verdicts = library.score(texts)
        theirs += time.process_time() - start
        right += sum(values)
        differ += [
            {"ends": text[-60:], "right": gold, "ours": a, "library": b}
            for text, gold, a, b in zip(texts, golds, values, verdicts, strict=True)
            if a != b
        ]
    number, middle = len(golds) * len(groups), statistics.median(mine[1:])
    return {
        "texts": number,
        "share_right": round(right / number, 4),
        "us_per_text": round(1e6 * middle / number, 2),
        "us_per_text_library": round(1e6 * theirs / number, 1),
        "times": round(theirs / middle, 1),
        "target": TARGET,
        "verdicts_that_differ": len(differ),
        "differences": differ[:5],
    }


def compare(folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Compare verdicts and CPU time on the file `test.jsonl` of a folder.

    Raises:
        SystemExit: If a verdict on a final answer differs.
    """
    lines = (folder / "test.jsonl").read_text().splitlines()
    solutions = [json.loads(line)["answer"] for line in lines]
    golds = [solution.rpartition("####")[2].strip() for solution in solutions]
    rng = random.Random(0)
    sentences = [
        [rng.choice(SENTENCES).format(number) for number in numbers]
        for numbers in answers(golds, rng)
    ]
    wholes = [solutions, rng.sample(solutions, len(solutions))]
    result = {
        "final answers": judged(sentences, golds, rounds),
        "own solutions": judged(wholes[:1], golds, rounds),
        "others' solutions": judged(wholes[1:], golds, rounds),
    }
    if result["final answers"]["verdicts_that_differ"]:
        raise SystemExit(f"verdicts differ: {result['final answers']['differences']}")
    return result
