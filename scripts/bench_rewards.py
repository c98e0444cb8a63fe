"""What dense rewards cost: a value after every token, ours against scoring the prefix anew.

`python scripts/bench_rewards.py` plays 64 responses of 64 tokens (pieces of words), as an
environment would: one token of every response, then the next. Ours pushes each piece to a cursor;
the other way gives the whole prefix to a reused object of the library. Both take their turns, on
new texts in every round (the libraries remember texts that they have seen) with the same
references, whose set-up is counted apart, and all values must be equal. Terminal scoring gives
whole texts to both, with the references prepared for both. With `--gsm8k FOLDER` numeric answers
are judged by `Numeric` and by math-verify (`numeric_answers.py`). The clock is CPU time of one
thread. The last line is JSON.
"""

from __future__ import annotations

import functools
import gc
import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy: one thread, so CPU time is comparable

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import tyro
from machine import described
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics.bleu import BLEU

from textgym.rewards import Bleu, Cursor, Reward, Rouge, TextBatch

METRICS = ("bleu", "rouge1", "rouge2", "rougeL", "rougeLsum")
TARGETS = {("bleu", 1): 18.0, ("bleu", 4): 60.0, ("rougeL", 1): 45.0, ("rougeL", 4): 90.0}
TERMINAL_TARGET = 1.2

P = ParamSpec("P")
T = TypeVar("T")
Texts = list[list[str]]


@dataclass(frozen=True)
class Args:
    """What to measure."""

    rows: int = 64
    """Responses."""
    tokens: int = 64
    """Tokens of a response."""
    words: int = 40
    """Words of a reference."""
    references: tuple[int, ...] = (1, 4)
    """Numbers of references."""
    rounds: int = 3
    """Measurements of each kind, taken in turns; tables show the median."""
    gsm8k: Path | None = None
    """A folder with GSM8K's `test.jsonl`: also compare numeric answers with math-verify."""


class Writer:
    """Writes references of words of a made-up language, and responses that follow them loosely."""

    def __init__(self, args: Args) -> None:
        self.args, self.rng = args, random.Random(0)
        letters = "etaoinshrdlucmfwypvbgkqjxz"
        weights = range(len(letters), 0, -1)
        sizes = (1, 2, 3, 3, 4, 4, 5, 6, 7, 8, 9, 11)
        self.words = [
            "".join(self.rng.choices(letters, weights, k=self.rng.choice(sizes)))
            for _ in range(2000)
        ]
        self.weights = [1 / (rank + 3) for rank in range(len(self.words))]

    def word(self) -> str:
        """A word, common ones more often, now and then with punctuation."""
        return self.rng.choices(self.words, self.weights)[0] + self.rng.choice(
            [*[""] * 9, ",", "."]
        )

    def references(self) -> list[str]:
        """As many references as are ever asked for."""
        count = max(self.args.references)
        return [" ".join(self.word() for _ in range(self.args.words)) for _ in range(count)]

    def response(self, reference: str) -> list[str]:
        """Pieces of up to five characters, two of three words being the reference's."""
        pieces: list[str] = []
        given = reference.split()
        while len(pieces) < self.args.tokens:
            for i, word in enumerate(given):
                text = " " + (word if self.rng.random() < 2 / 3 else self.word())
                start = len(pieces) == 0 and i == 0
                pieces += [text[at : at + 5] for at in range(start, len(text), 5)]
        return pieces[: self.args.tokens]


def ours(metric: str) -> Reward:
    """Our reward."""
    return Bleu() if metric == "bleu" else Rouge(metric)


def rescorer(metric: str) -> Callable[[str, list[str]], float]:
    """The library's score of a text, by an object that is made once."""
    if metric == "bleu":
        bleu = BLEU(effective_order=True)
        return lambda text, references: float(bleu.sentence_score(text, references).score) / 100
    scorer = RougeScorer([metric])
    return lambda text, references: float(scorer.score_multi(references, text)[metric].fmeasure)


class RememberingTokenizer(DefaultTokenizer):  # type: ignore[misc]
    """rouge-score's tokenizer, which splits a reference once."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenize = functools.lru_cache(4096)(super().tokenize)


def prepared(metric: str, references: list[list[str]]) -> list[Callable[[str], float]]:
    """The library's scores of texts against references that are prepared once, row by row."""
    return [_prepared(metric, texts) for texts in references]


def _prepared(metric: str, references: list[str]) -> Callable[[str], float]:
    if metric == "bleu":
        bleu = BLEU(effective_order=True, references=[[text] for text in references])
        return lambda text: float(bleu.corpus_score([text], None).score) / 100
    scorer = RougeScorer([metric], tokenizer=RememberingTokenizer())
    scorer.score_multi(references, "")
    return lambda text: float(scorer.score_multi(references, text)[metric].fmeasure)


def timed(work: Callable[P, list[T]], *args: P.args, **kwargs: P.kwargs) -> tuple[float, list[T]]:
    """CPU seconds of some work, and what it gives."""
    gc.collect()  # what is left of others is not on this one's bill
    start = time.process_time()
    values = work(*args, **kwargs)
    return time.process_time() - start, values


def begun(reward: Reward, rows: list[dict[str, Any]]) -> list[Cursor]:
    """A cursor for each row; the first of a row prepares its references."""
    cursors = [reward.begin(row) for row in rows]
    return [cursor for cursor in cursors if cursor is not None]


def dense(reward: Reward, rows: list[dict[str, Any]], texts: Texts) -> list[float]:
    """A value after every token, by cursors."""
    cursors = begun(reward, rows)
    return [
        cursor.push(piece)
        for pieces in zip(*texts, strict=True)
        for cursor, piece in zip(cursors, pieces, strict=True)
    ]


def rescored(
    score: Callable[[str, list[str]], float], rows: list[dict[str, Any]], texts: Texts
) -> list[float]:
    """A value after every token, by scoring the text so far."""
    values = []
    prefixes = [""] * len(rows)
    for pieces in zip(*texts, strict=True):
        for i, piece in enumerate(pieces):
            prefixes[i] += piece
            values.append(score(prefixes[i], rows[i]["references"]))
    return values


def terminal(reward: Reward, batch: TextBatch) -> list[float]:
    """The values of whole texts."""
    return list(reward.score(batch))


def terminal_by(scorers: list[Callable[[str], float]], texts: list[str]) -> list[float]:
    """The values of whole texts, by the library."""
    return [score(text) for score, text in zip(scorers, texts, strict=True)]


def check_equal(metric: str, mine: list[float], theirs: list[float]) -> None:
    """Stop where values differ: a benchmark of something else would be worth nothing."""
    worst = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
    if worst > (0.0 if metric == "bleu" else 1e-9):
        raise SystemExit(f"{metric}: our values differ from the library's by {worst}")


def measure(args: Args, metric: str, writer: Writer, references: list[list[str]]) -> dict[str, Any]:
    """Dense and terminal scoring of one metric against `references`, a list of a row."""
    rows: list[dict[str, Any]] = [{"references": texts} for texts in references]
    score = rescorer(metric)
    kinds = ("ours", "library", "whole", "whole_library", "setup", "setup_library")
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(args.rounds + 1):
        reward, spent = ours(metric), {}
        spent["setup"], _ = timed(begun, reward, rows)
        spent["setup_library"], scorers = timed(prepared, metric, references)
        texts = [writer.response(row["references"][0]) for row in rows]
        spent["ours"], mine = timed(dense, reward, rows, texts)
        spent["library"], theirs = timed(rescored, score, rows, texts)
        check_equal(metric, mine, theirs)
        # The library has just seen these texts as the last prefixes: others, then.
        wholes = ["".join(writer.response(row["references"][0])) for row in rows]
        spent["whole"], mine = timed(terminal, reward, TextBatch.from_texts(wholes, rows))
        spent["whole_library"], theirs = timed(terminal_by, scorers, wholes)
        check_equal(metric, mine, theirs)
        if turn:  # the first one warms up
            for kind, seconds in spent.items():
                times[kind].append(seconds)
    tokens, middle = args.rows * args.tokens, statistics.median
    return {
        "metric": metric,
        "references": len(references[0]),
        "us_per_token": round(1e6 * middle(times["ours"]) / tokens, 2),
        "us_per_token_library": round(1e6 * middle(times["library"]) / tokens, 1),
        "dense_times": round(ratio(times["library"], times["ours"]), 1),
        "us_per_text": round(1e6 * middle(times["whole"]) / args.rows, 1),
        "us_per_text_library": round(1e6 * middle(times["whole_library"]) / args.rows, 1),
        "terminal_times": round(ratio(times["whole_library"], times["whole"]), 1),
        "setup_us_per_row": round(1e6 * middle(times["setup"]) / args.rows, 1),
        "setup_us_per_row_library": round(1e6 * middle(times["setup_library"]) / args.rows, 1),
    }


def ratio(theirs: list[float], mine: list[float]) -> float:
    """How many times faster: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(theirs, mine, strict=True))


def main(args: Args) -> None:
    """Print the table and the JSON line."""
    result: dict[str, Any] = {"benchmark": "bench_rewards", "rows": args.rows}
    result |= {"tokens": args.tokens, "reference_words": args.words, "rounds": args.rounds}
    packages = ("sacrebleu", "rouge-score", "nltk", "numpy")
    result |= described(packages if args.gsm8k is None else (*packages, "math-verify"))
    for key in ("processor", "cores", "system", "python", "versions", "command", "commit"):
        print(f"{key:<10} {result[key]}")
    writer = Writer(args)
    references = [writer.references() for _ in range(args.rows)]
    print(f"\nmicroseconds, median of {args.rounds}; set-up is that of a row's references")
    heads = ("us/token", "library", "faster", "target", "us/text", "library", "faster", "set-up")
    print(f"{'metric':<10} {'refs':>4} " + " ".join(f"{head:>9}" for head in heads))
    result["metrics"] = []
    for metric in METRICS:
        for count in args.references:
            row = measure(args, metric, writer, [texts[:count] for texts in references])
            row["dense_target"] = TARGETS.get((metric, count))
            row["terminal_target"] = TERMINAL_TARGET
            result["metrics"].append(row)
            target = f"{row['dense_target']:.0f}x" if row["dense_target"] else "-"
            print(
                f"{metric:<10} {count:>4} {row['us_per_token']:>9.2f}"
                f" {row['us_per_token_library']:>9.1f} {row['dense_times']:>8.1f}x {target:>9}"
                f" {row['us_per_text']:>9.1f} {row['us_per_text_library']:>9.1f}"
                f" {row['terminal_times']:>8.1f}x {row['setup_us_per_row']:>9.1f}",
                flush=True,
            )
    if args.gsm8k is not None:
        from numeric_answers import compare  # math-verify is an extra

        result["numeric"] = compare(args.gsm8k, args.rounds)
        print("\nnumeric answers against math-verify: microseconds, and verdicts that differ")
        for name, row in result["numeric"].items():
            print(
                f"{name:<18} {row['texts']:>6} texts {row['us_per_text']:>7.2f}"
                f" {row['us_per_text_library']:>8.1f} {row['times']:>7.1f}x"
                f" {row['verdicts_that_differ']:>4} differ"
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
