"""Sampling: the torch twins are bit-equal to NumPy, and frequencies follow the distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from textgym import streams
from textgym.sampling import (
    BLOCK,
    FEW,
    Sampler,
    draw,
    gumbel_noise,
    inverse_cdf,
    keep_top_k,
    keep_top_p,
    mask_logits,
    mix64,
    uniform53,
)


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(streams.mix64(seed, np.arange(count)).view(np.int64))


def log_chi_square_tail(statistic: float, freedom: int) -> float:
    """Natural logarithm of P(chi-square > statistic), from torch's incomplete gamma function."""
    a, x = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(a, x).log())


class TestTwins:
    def test_mix64_is_bit_equal_to_numpy(self) -> None:
        rng = np.random.default_rng(0)
        high = rng.integers(0, 2**64, 500, dtype=np.uint64, endpoint=False)
        high[:3] = [0, 2**63, 2**64 - 1]
        low = rng.integers(-(2**63), 2**63, 500)
        expected = streams.mix64(17, high, low, np.arange(500), 2**64 - 1)
        parts = [torch.from_numpy(high.view(np.int64)), torch.from_numpy(low), torch.arange(500)]
        found = mix64(17, *parts, 2**64 - 1)
        assert (found.numpy().view(np.uint64) == expected).all()

    def test_mix64_broadcasts_and_takes_only_integers(self) -> None:
        rows, cols = np.arange(3)[:, None], np.arange(4)[None]
        found = mix64(torch.from_numpy(rows), torch.from_numpy(cols))
        assert (found.numpy().view(np.uint64) == streams.mix64(rows, cols)).all()
        assert int(mix64(1, 2)) == int(streams.mix64(1, 2).view(np.int64))

    def test_uniform53_is_bit_equal_to_numpy(self) -> None:
        key = keys(1000)
        expected = streams.uniform53(key.numpy().view(np.uint64))
        assert (uniform53(key).numpy() == expected).all()
        assert uniform53(torch.tensor([-1])).item() == 1 - 2.0**-53
        assert uniform53(torch.tensor([0])).item() == 0.0


class TestInverseCdf:
    @pytest.mark.parametrize("vocab", [1, 5, 1000, FEW, FEW + 1, 12 * BLOCK - 1, 12 * BLOCK])
    def test_equals_a_plain_cumulated_sum(self, vocab: int) -> None:
        generator = torch.Generator().manual_seed(vocab)
        probs = (4 * torch.randn(300, vocab, generator=generator)).softmax(-1)
        probs[::3, ::2] = 0.0 if vocab > 1 else 1.0
        u = uniform53(keys(300, vocab))
        found = inverse_cdf(probs, u)
        cumulated = np.cumsum(probs.numpy().astype(np.float64), 1)
        for i in range(300):
            target = u[i].item() * cumulated[i, -1]
            expected = min(int(np.searchsorted(cumulated[i], target, side="right")), vocab - 1)
            token = int(found[i])
            if token != expected:  # the sums are in another order: only on a boundary
                assert abs(cumulated[i, min(token, expected)] - target) < 1e-12
            assert probs[i, token] > 0

    @pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
    def test_never_returns_a_token_of_probability_zero(self, u: float) -> None:
        for vocab in (4, 12 * BLOCK, 12 * BLOCK + 7):
            for at in (0, 1, vocab // 2, vocab - 1):
                probs = torch.zeros(1, vocab)
                probs[0, at] = 0.3
                assert inverse_cdf(probs, torch.tensor([u], dtype=torch.float64)).item() == at

    @pytest.mark.parametrize("vocab", [5, 12 * BLOCK, 12 * BLOCK + 7])
    def test_nan_gives_some_token_and_a_logprob_that_tells(self, vocab: int) -> None:
        logits = torch.full((3, vocab), float("nan"))
        action, logprob = draw(logits, keys(3), Sampler())
        assert bool((action < vocab).all()) and bool(logprob.isnan().all())

    def test_draws_the_tail_that_float32_sums_lose(self) -> None:
        probs = torch.full((1, 4096), 1e-9)
        probs[0, 0] = 1.0
        u = torch.tensor([1 - 5e-8], dtype=torch.float64)
        assert inverse_cdf(probs, u).item() == pytest.approx(4095 - 50, abs=2)


class TestFrequencies:
    @pytest.mark.parametrize("method", ["inverse_cdf", "gumbel"])
    def test_chi_square(self, method: str) -> None:
        probs = torch.tensor(
            [0.4, 0.2, 0.15, 0.1, 0.08, 0.04, 0.02, 0.009, 0.001], dtype=torch.float64
        )
        draws = 40_000
        logits = (probs.log() + 3.0).float().expand(draws, -1)
        action, _ = draw(logits, keys(draws), Sampler(method))  # type: ignore[arg-type]
        seen = torch.bincount(action, minlength=9).double()
        statistic = float(((seen - draws * probs) ** 2 / (draws * probs)).sum())
        # One fixed set of keys: a right sampler has one chance in a million to fail once, for ever.
        assert log_chi_square_tail(statistic, 8) > np.log(1e-6)
        wrong = probs.roll(1)
        statistic = float(((seen - draws * wrong) ** 2 / (draws * wrong)).sum())
        assert log_chi_square_tail(statistic, 8) < np.log(1e-6)

    def test_gumbel_noise_is_finite_and_of_mean_gamma(self) -> None:
        noise = gumbel_noise(keys(100), 500)
        assert noise.dtype == torch.float64 and bool(noise.isfinite().all())
        assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
        assert noise.var().item() == pytest.approx(np.pi**2 / 6, abs=0.05)

    def test_greedy_takes_the_mode_whatever_the_key(self) -> None:
        logits = torch.tensor([[0.0, 2.0, 1.0]]).expand(20, -1)
        action, logprob = draw(logits, keys(20), Sampler("greedy"))
        assert (action == 1).all()
        assert torch.allclose(logprob, logits.log_softmax(-1)[:, 1])


class TestLogprob:
    @pytest.mark.parametrize("method", ["inverse_cdf", "gumbel", "greedy"])
    def test_equals_torch_distributions(self, method: str) -> None:
        generator = torch.Generator().manual_seed(1)
        logits = 3 * torch.randn(50, 200, generator=generator)
        mask = torch.rand(50, 200, generator=generator) < 0.3
        masked = mask_logits(logits, mask)
        action, logprob = draw(masked, keys(50), Sampler(method))  # type: ignore[arg-type]
        assert mask.gather(1, action[:, None]).all()
        reference: Any = torch.distributions.Categorical(logits=masked.double())
        assert torch.allclose(logprob.double(), reference.log_prob(action), atol=1e-5)

    def test_equals_torch_distributions_after_truncation(self) -> None:
        logits = 2 * torch.randn(50, 40, generator=torch.Generator().manual_seed(2))
        action, logprob = draw(logits, keys(50), Sampler(top_k=5, top_p=0.8))
        cut = keep_top_p(keep_top_k(logits, 5), 0.8)
        reference: Any = torch.distributions.Categorical(logits=cut)
        assert torch.allclose(logprob, reference.log_prob(action), atol=1e-5)


class TestCuts:
    def test_top_k_keeps_k_and_ties(self) -> None:
        logits = torch.tensor([[1.0, 4.0, 3.0, 3.0, 0.0]])
        assert keep_top_k(logits, 1).isfinite().tolist() == [[False, True, False, False, False]]
        assert keep_top_k(logits, 2).isfinite().tolist() == [[False, True, True, True, False]]
        assert keep_top_k(logits, 99).isfinite().all()

    @pytest.mark.parametrize(
        ("p", "kept"), [(0.05, 1), (0.5, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 4)]
    )
    def test_top_p_keeps_the_smallest_set_that_reaches_p(self, p: float, kept: int) -> None:
        logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]], dtype=torch.float64).log()
        order = [1, 3, 2, 0]
        finite = keep_top_p(logits, p).isfinite()[0]
        assert sorted(order[:kept]) == finite.nonzero()[:, 0].tolist()

    def test_masks(self) -> None:
        logits = torch.zeros(2, 3)
        mask = torch.tensor([[True, False, False], [True, True, True]])
        probs = mask_logits(logits, mask).softmax(-1)
        assert probs[0].tolist() == [1.0, 0.0, 0.0]
        assert mask_logits(logits, None) is logits
        with pytest.raises(ValueError, match="row 1 allows no token"):
            mask_logits(logits, torch.tensor([[True] * 3, [False] * 3]))
        with pytest.raises(ValueError, match=r"expected bool \[2, 3\]"):
            mask_logits(logits, torch.ones(2, 4, dtype=torch.bool))


class TestSampler:
    def test_is_exact_only_for_the_full_distribution(self) -> None:
        assert Sampler().is_exact and Sampler("gumbel", temperature=0.3).is_exact
        assert not Sampler("greedy").is_exact and not Sampler("greedy").truncates
        for cut in (Sampler(top_k=3), Sampler(top_p=0.9)):
            assert cut.truncates and not cut.is_exact

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"method": "beam"}, "sampler: expected one of"),
            ({"temperature": 0.0}, 'use sampler="greedy"'),
            ({"temperature": float("nan")}, "temperature"),
            ({"top_k": 0}, "top_k"),
            ({"top_p": 0.0}, "top_p"),
            ({"top_p": 1.5}, "top_p"),
        ],
    )
    def test_refuses_what_gives_no_distribution(
        self, settings: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            Sampler(**settings)  # type: ignore[arg-type]
