"""InversePerplexity against perplexities by hand."""

import math
import pickle

import numpy as np
import pytest

from textgym.rewards import InversePerplexity, ReferenceLogProb, TextBatch


class Even:
    """Probability 1/2 for even ids, 1/8 for odd ones."""

    def logprob(self, ids, lengths):
        return np.where(np.asarray(ids) % 2, math.log(1 / 8), math.log(1 / 2))


def batch_of(responses, masks=None):
    n = len(responses)
    return TextBatch(
        prompts=[""] * n,
        texts=[""] * n,
        token_ids=responses,
        prompt_ids=[[1, 1]] * n,
        rows=[{}] * n,
        stop_reasons=["stop_id"] * n,
        action_masks=masks,
    )


def test_by_hand():
    reward = InversePerplexity(Even())
    assert (reward.name, reward.low, reward.high) == ("inverse_perplexity", 0, 1)
    values = reward.score(batch_of([[2, 4], [2, 3], [3], [2] * 50]))
    assert values == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 2])


def test_parity_with_the_sum_of_log_probabilities():
    rng = np.random.default_rng(0)
    responses = [rng.integers(0, 9, rng.integers(1, 12)).tolist() for _ in range(40)]
    batch = batch_of(responses)
    sums = ReferenceLogProb(Even()).score(batch)
    expected = [math.exp(s / len(r)) for s, r in zip(sums, responses, strict=True)]
    assert InversePerplexity(Even()).score(batch) == pytest.approx(expected, rel=1e-12)


def test_only_the_tokens_of_the_policy_count():
    reward = InversePerplexity(Even())
    assert reward.score(batch_of([[2, 3]], [[True, False]])) == [pytest.approx(0.5)]
    scores = reward.evaluate(batch_of([[2, 3], []], [[False, False], []]), optional=True)
    assert scores.status == ["none", "none"]


def test_the_corpus_takes_all_tokens_together():
    """Two tokens of 1/2, one of 1/8: the perplexity is 2 ** (5/3)."""
    corpus = InversePerplexity(Even()).corpus(batch_of([[2, 2], [3]]))
    assert 1 / corpus.score(corpus.statistics.sum(0)) == pytest.approx(2 ** (5 / 3))


def test_pickles_by_recipe():
    reward = pickle.loads(pickle.dumps(InversePerplexity("a-name", temperature=2.0)))
    assert (reward.source, reward.temperature, reward.high) == ("a-name", 2.0, 1.0)
