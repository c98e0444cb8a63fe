"""Scores of a set of texts, with bootstrap intervals and paired comparisons.

A `Metric` holds one row of sufficient statistics a text and a function from their sum to a score,
so that a resample of the texts is one weighted sum: corpus BLEU over a thousand resamples costs no
more than a matrix product. Intervals are percentiles over resampled texts (Efron & Tibshirani
1993), comparisons are the paired bootstrap of Koehn 2004 ("Statistical significance tests for
machine translation evaluation"), over texts and over runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from textgym.rewards import Bleu, Reward, Rouge, TextBatch
from textgym.rewards.base import mean_of_sums
from textgym.rewards.diversity import distinct_n as distinct_n
from textgym.streams import generator, mix64, uniform53

FloatArray = NDArray[np.float64]

_CHUNK = 64  # resamples drawn at once, so that memory stays at 64 weights a text


@dataclass(frozen=True)
class Metric:
    """A score of n texts that is a function of sums over them."""

    name: str
    """What tables call it."""
    statistics: FloatArray
    """Sufficient statistics, float64 `[n, k]`."""
    score: Callable[[FloatArray], FloatArray]
    """From sums `[..., k]` to scores `[...]`."""

    @property
    def value(self) -> float:
        """The score of all n texts."""
        return float(self.score(self.statistics.sum(0)))

    def grouped(self, size: int) -> Metric:
        """The same score with groups of `size` texts (those of one prompt) resampled as one."""
        sums = self.statistics.reshape(-1, size, self.statistics.shape[1]).sum(1)
        return Metric(self.name, sums, self.score)


@dataclass(frozen=True)
class Interval:
    """A score with its bootstrap interval."""

    value: float
    """Score of all texts."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Comparison:
    """How much better system A is than system B."""

    difference: float
    """Score of A minus score of B, mean over runs."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end of its interval."""
    p_value: float
    """One-sided: share of resamples in which A is not better, (count + 1) / (resamples + 1)."""


def as_dict(result: Interval | Comparison) -> dict[str, float]:
    """The fields as JSON values."""
    return asdict(result)


def mean_metric(name: str, values: ArrayLike) -> Metric:
    """Mean of one number a text; NaN (no value, an unscored text) counts in neither sum nor number.

    Args:
        name: What tables call it.
        values: Numbers `[n]`.
    """
    numbers = np.asarray(values, np.float64).reshape(-1)
    there = ~np.isnan(numbers)
    return Metric(name, np.stack([np.where(there, numbers, 0.0), there], 1), mean_of_sums)


def reward_metric(reward: Reward, batch: TextBatch, name: str | None = None) -> Metric:
    """Score of a set of texts by a reward: by its own corpus form, else the mean of its values.

    Args:
        reward: What scores.
        batch: The texts, with the rows of their prompts.
        name: What tables call it; by default the name of the reward.
    """
    corpus = reward.corpus(batch)
    return Metric(reward.name if name is None else name, corpus.statistics, corpus.score)


def bleu_metric(
    texts: Sequence[str], references: Sequence[Sequence[str]], *, lowercase: bool = False
) -> Metric:
    """Corpus BLEU on a scale of 0 to 1, equal to sacrebleu's `corpus_score` over 100.

    Args:
        texts: n hypotheses.
        references: One or more references of each; their number may differ between texts.
        lowercase: Compare lower-cased, as the E2E challenge's published numbers do.

    Raises:
        ValueError: The numbers of texts and reference lists differ, or a list is empty.
    """
    reward = Bleu(lowercase=lowercase, effective_order=False)
    return reward_metric(reward, _batch(texts, references))


def rouge_metric(kind: str, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Metric:
    """Mean of the ROUGE F-measure against each text's best reference.

    Args:
        kind: `"rouge1"`, `"rouge2"` or `"rougeL"`.
        texts: n hypotheses.
        references: One or more references of each.

    Raises:
        ValueError: The kind is unknown, the numbers of texts and reference lists differ, or a list
            is empty.
    """
    return reward_metric(Rouge(kind), _batch(texts, references))


def perplexity_metric(logprobs: ArrayLike, tokens: ArrayLike, name: str = "perplexity") -> Metric:
    """Perplexity of all tokens together, exp(-sum of log-probabilities / number of tokens).

    Args:
        logprobs: Sum of log pi_ref over each response, nats, `[n]`.
        tokens: Number of scored tokens of each response, `[n]`.
        name: What tables call it.
    """
    statistics = np.stack([np.asarray(logprobs, np.float64), np.asarray(tokens, np.float64)], 1)
    return Metric(name, statistics, lambda sums: np.exp(-mean_of_sums(sums)))


def interval(
    metric: Metric, *, samples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval over the texts.

    Args:
        metric: What is measured.
        samples: Number of resamples.
        level: Probability that the interval covers.
        seed: Seed of the resamples; equal seeds and numbers of texts give equal resamples.
    """
    scores = _resampled([metric], samples, seed)[0]
    low, high = _ends(scores, level)
    return Interval(metric.value, low, high)


def compare(
    ours: Sequence[Metric],
    theirs: Sequence[Metric],
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Paired bootstrap of the difference between two systems over the same inputs.

    Each resample draws the inputs once for all runs of both systems, and draws runs in pairs: run r
    of one system belongs to run r of the other (the same seed).

    Args:
        ours: System A, one metric a run, all over the same n inputs in the same order.
        theirs: System B, as many runs.
        samples: Number of resamples.
        level: Probability that the interval covers.
        seed: Seed of the resamples.

    Raises:
        ValueError: The numbers of runs, or of inputs, differ.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(
            f"expected as many runs of both systems, got {len(ours)} and {len(theirs)}; "
            "repeat a run that stands for several"
        )
    scores = _resampled([*ours, *theirs], samples, seed)
    runs = len(ours)
    gains = scores[:runs] - scores[runs:]
    draw = generator(seed, 1).integers(runs, size=(samples, runs))
    gains = np.take_along_axis(gains.T, draw, 1).mean(1)
    low, high = _ends(gains, level)
    difference = float(np.mean([a.value - b.value for a, b in zip(ours, theirs, strict=True)]))
    return Comparison(difference, low, high, (int((gains <= 0).sum()) + 1) / (samples + 1))


def hold_out_reference(
    references: Sequence[Sequence[str]], *, seed: int = 0
) -> tuple[list[int], list[str], list[list[str]]]:
    """Take one reference of each input as its text, to see what people score against each other.

    What is left is one reference fewer than a model is scored against: a modest ceiling.

    Args:
        references: Reference lists of n inputs; those with a single reference are left out.
        seed: Seed of the choice.

    Returns:
        Indices of the inputs that are left, the held-out references, and the lists without them.
    """
    kept = [i for i, targets in enumerate(references) if len(targets) > 1]
    chosen = [int(u * len(references[i])) for i, u in zip(kept, _draws(kept, seed), strict=True)]
    texts = [references[i][j] for i, j in zip(kept, chosen, strict=True)]
    rest = [
        [*references[i][:j], *references[i][j + 1 :]] for i, j in zip(kept, chosen, strict=True)
    ]
    return kept, texts, rest


def _draws(kept: list[int], seed: int) -> FloatArray:
    return uniform53(mix64(seed, np.asarray(kept, np.int64)))


def _resampled(metrics: Sequence[Metric], samples: int, seed: int) -> FloatArray:
    """Scores `[metrics, samples]` of resamples that draw the same texts for every metric."""
    sizes = {len(metric.statistics) for metric in metrics}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"expected metrics over the same texts, at least one, got {sorted(sizes)}")
    n = sizes.pop()
    draws = generator(seed, 0)
    scores = np.empty((len(metrics), samples))
    for start in range(0, samples, _CHUNK):
        size = min(_CHUNK, samples - start)
        weights = draws.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        for i, metric in enumerate(metrics):
            scores[i, start : start + size] = metric.score(weights @ metric.statistics)
    return scores


def _ends(scores: FloatArray, level: float) -> tuple[float, float]:
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(scores, [tail, 100 - tail])
    return float(low), float(high)


def _batch(texts: Sequence[str], references: Sequence[Sequence[str]]) -> TextBatch:
    if len(texts) != len(references):
        raise ValueError(
            "expected a list of references a text, "
            f"got {len(references)} lists for {len(texts)} texts"
        )
    for i, targets in enumerate(references):
        if isinstance(targets, str) or not len(targets):
            raise ValueError(
                f"expected a list of one or more references for text {i}, got {targets!r}"
            )
    return TextBatch.from_texts(texts, [{"references": list(targets)} for targets in references])
