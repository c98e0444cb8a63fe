"""Corpus scores against the libraries and by hand; the bootstrap against theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textgym.evaluation import (
    Metric,
    bleu_metric,
    compare,
    distinct_n,
    hold_out_reference,
    interval,
    mean_metric,
    perplexity_metric,
    reward_metric,
    rouge_metric,
)
from textgym.rewards import Ter, TextBatch, TokenF1, as_reward

WORDS = st.sampled_from(["a", "b", "the cat", "sat", "on", "mat.", "Mat", ",", ""])
TEXT = st.lists(WORDS, max_size=9).map(" ".join)
CORPUS = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3)), min_size=1, max_size=6)


def sacrebleu_of(texts: list[str], references: list[list[str]], lowercase: bool = False) -> float:
    from sacrebleu.metrics.bleu import BLEU

    most = max(map(len, references))
    streams = [[r[k] if k < len(r) else None for r in references] for k in range(most)]
    return float(BLEU(lowercase=lowercase).corpus_score(texts, streams).score) / 100


@settings(max_examples=200, deadline=None)
@given(corpus=CORPUS, lowercase=st.booleans())
def test_corpus_bleu_is_sacrebleu(corpus: list[tuple[str, list[str]]], lowercase: bool) -> None:
    texts, references = [text for text, _ in corpus], [targets for _, targets in corpus]
    ours = bleu_metric(texts, references, lowercase=lowercase).value
    assert ours == pytest.approx(sacrebleu_of(texts, references, lowercase), abs=1e-12)


def test_corpus_bleu_of_a_resample_is_that_of_the_repeated_texts() -> None:
    texts = ["the cat sat on the mat", "a dog ran far away today", "the cat is on a mat"]
    references = [["the cat sat on a mat"], ["a dog ran far today", "dogs run"], ["the cat sat"]]
    metric = bleu_metric(texts, references)
    weights = np.array([[2, 0, 1], [0, 3, 0], [1, 1, 1]])
    for row, score in zip(weights, metric.score(weights @ metric.statistics), strict=True):
        again = [text for text, w in zip(texts, row, strict=True) for _ in range(w)]
        targets = [r for r, w in zip(references, row, strict=True) for _ in range(w)]
        assert score == pytest.approx(sacrebleu_of(again, targets), abs=1e-12)


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_the_mean_over_best_references(kind: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    texts = ["the cat sat on the mat", "", "dogs run fast"]
    references = [["a cat sat", "the cat on the mat"], ["x"], ["dogs run very fast"]]
    scorer = RougeScorer([kind])
    best = [
        max(scorer.score(target, text)[kind].fmeasure for target in targets)
        for text, targets in zip(texts, references, strict=True)
    ]
    assert rouge_metric(kind, texts, references).value == pytest.approx(np.mean(best), abs=1e-9)


def test_a_reward_is_a_metric() -> None:
    """By its corpus form, of which a resample is a weighted sum; by the mean where it has none."""
    texts, references = ["the cat sat", "", "dogs run"], ["a cat sat", "x", "dogs run fast"]
    batch = TextBatch.from_texts(texts, [{"references": r} for r in references])
    ter = reward_metric(Ter(), batch)
    assert ter.name == "ter" and ter.value == pytest.approx(1 - 3 / 7)
    twice = ter.score(np.array([2.0, 0.0, 1.0]) @ ter.statistics)
    assert twice == pytest.approx(1 - (2 * 1 + 1) / 9)
    f1 = reward_metric(TokenF1(), batch, "F1")
    assert f1.name == "F1" and f1.value == pytest.approx(np.mean([1, 0, 0.8]))
    assert interval(f1).low <= f1.value <= interval(f1).high


def test_a_reward_without_values_has_no_mean() -> None:
    batch = TextBatch.from_texts(["a", "b"])
    assert math.isnan(reward_metric(as_reward(lambda text: None), batch).value)


def test_bad_corpora_are_named() -> None:
    with pytest.raises(ValueError, match="got 1 lists for 2 texts"):
        bleu_metric(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="references for text 1, got 'b'"):
        bleu_metric(["a", "b"], [["a"], "b"])
    with pytest.raises(ValueError, match=r"references for text 0, got \[\]"):
        rouge_metric("rougeL", ["a"], [[]])


def test_distinct_n_by_hand() -> None:
    assert distinct_n(["a b a b", "a b"], 1) == pytest.approx(2 / 6)
    assert distinct_n(["a b a b", "a b"], 2) == pytest.approx(2 / 4)
    assert distinct_n(["a", ""], 2) == 0.0


def test_perplexity_by_hand() -> None:
    """Two tokens of probability 1/2 and one of 1/8: exp of the mean surprise is 2 ** (5/3)."""
    metric = perplexity_metric([2 * math.log(1 / 2), math.log(1 / 8)], [2, 1])
    assert metric.value == pytest.approx(2 ** (5 / 3))


def test_unscored_texts_have_no_weight() -> None:
    assert mean_metric("reward", [1.0, math.nan, 0.0, 1.0]).value == pytest.approx(2 / 3)
    assert math.isnan(mean_metric("reward", [math.nan]).value)


def test_interval_of_a_mean_is_the_normal_one() -> None:
    """For many texts the percentile interval is mean +- 1.96 standard errors."""
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    got = interval(mean_metric("x", values), samples=4000)
    error = 1.96 * values.std() / math.sqrt(len(values))
    assert got.value == pytest.approx(values.mean())
    assert got.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert got.high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_responses_to_one_prompt_are_resampled_together() -> None:
    """Doubling every text changes no score and, grouped, no interval; ungrouped it seems surer."""
    values = np.random.default_rng(2).normal(size=100)
    single, double = mean_metric("x", values), mean_metric("x", np.repeat(values, 2))
    assert interval(double.grouped(2)) == interval(single)
    assert double.value == pytest.approx(single.value)
    assert interval(double).high < interval(single).high


def test_interval_is_repeatable_and_takes_one_text() -> None:
    metric = mean_metric("x", [1.0, 2.0, 5.0])
    assert interval(metric, seed=3) == interval(metric, seed=3)
    assert interval(metric, seed=3) != interval(metric, seed=4)
    one = interval(mean_metric("x", [0.5]))
    assert (one.value, one.low, one.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="at least one"):
        interval(mean_metric("x", []))


def test_pairing_sees_a_difference_that_the_spread_hides() -> None:
    """Inputs differ by far more than the systems; paired, the small gain is certain."""
    rng = np.random.default_rng(1)
    base = rng.normal(0.0, 10.0, size=300)
    gain = rng.normal(0.1, 0.2, size=300)
    better, worse = mean_metric("x", base + gain), mean_metric("x", base)
    result = compare([better], [worse])
    assert result.difference == pytest.approx(gain.mean())
    assert 0 < result.low < result.difference < result.high < 0.2
    assert result.p_value < 0.002
    assert interval(better).low < worse.value, "unpaired, the intervals overlap"


def test_equal_systems_are_not_told_apart() -> None:
    metric = mean_metric("x", np.arange(10.0))
    result = compare([metric], [metric])
    assert (result.difference, result.low, result.high) == (0.0, 0.0, 0.0)
    assert result.p_value == 1.0


def test_runs_are_resampled_in_pairs() -> None:
    """All texts agree, so only the runs' own spread is left: gains of 0 and 1."""
    ones, zeros = mean_metric("x", np.ones(50)), mean_metric("x", np.zeros(50))
    result = compare([ones, zeros], [zeros, zeros])
    assert result.difference == 0.5
    assert (result.low, result.high) == (0.0, 1.0)
    assert 0.2 < result.p_value < 0.3, "both draws are the second run in a quarter of resamples"


def test_comparisons_need_equal_shapes() -> None:
    two, three = mean_metric("x", [0.0, 1.0]), mean_metric("x", [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="as many runs"):
        compare([two, two], [two])
    with pytest.raises(ValueError, match="over the same texts"):
        compare([two], [three])


def test_held_out_references() -> None:
    references = [["a", "b", "c"], ["only"], ["d", "e"]]
    kept, texts, rest = hold_out_reference(references, seed=1)
    assert kept == [0, 2]
    for i, text, others in zip(kept, texts, rest, strict=True):
        assert sorted([text, *others]) == sorted(references[i])
    assert hold_out_reference(references, seed=1) == (kept, texts, rest)
    choices = {tuple(hold_out_reference(references, seed=s)[1]) for s in range(40)}
    assert len(choices) == 6, "every reference has its turn"


def test_any_function_of_sums_is_a_metric() -> None:
    statistics = np.array([[1.0, 2.0], [3.0, 4.0]])
    metric = Metric("product", statistics, lambda sums: sums[..., 0] * sums[..., 1])
    assert metric.value == 24.0
