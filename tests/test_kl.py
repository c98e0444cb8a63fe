import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from textgym.kl import (
    AdaptiveKL,
    FixedKL,
    KLController,
    categorical_kl,
    k1,
    k2,
    k3,
    kl_per_response,
)
from textgym.losses import policy_gradient_loss
from textgym.returns import discounted_returns

seeds = st.integers(0, 2**32 - 1)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_estimators_by_hand() -> None:
    pi, ref = t(0.5, 0.25).log(), t(0.25, 0.5).log()  # r = log 2, -log 2
    log2 = math.log(2)
    torch.testing.assert_close(k1(pi, ref), t(log2, -log2))
    torch.testing.assert_close(k2(pi, ref), t(log2**2 / 2, log2**2 / 2))
    torch.testing.assert_close(k3(pi, ref), t(0.5 - 1 + log2, 2 - 1 - log2))


@given(seeds, st.integers(2, 8))
def test_k1_and_k3_are_unbiased_and_k3_never_negative(seed: int, ids: int) -> None:
    pi, ref = normal(seed, 2, ids).log_softmax(-1)
    exact = kl_divergence(Categorical(logits=pi), Categorical(logits=ref))
    torch.testing.assert_close((pi.exp() * k1(pi, ref)).sum(), exact)
    torch.testing.assert_close((pi.exp() * k3(pi, ref)).sum(), exact)
    assert (k3(pi, ref) >= 0).all()
    assert (k2(pi, ref) >= 0).all()


@given(seeds, st.integers(2, 8))
def test_categorical_kl_equals_torch(seed: int, ids: int) -> None:
    logits, ref = normal(seed, 2, 3, ids)
    expected = kl_divergence(Categorical(logits=logits), Categorical(logits=ref))
    torch.testing.assert_close(categorical_kl(logits, ref), expected)
    torch.testing.assert_close(categorical_kl(logits, logits + 3.0), torch.zeros_like(expected))


def test_categorical_kl_under_a_mask() -> None:
    # Probabilities (1/2, 1/2) against (1/4, 3/4); the third id is masked in both.
    pi, ref = t(0.5, 0.5, 0.0).log(), t(0.25, 0.75, 0.0).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert categorical_kl(pi, ref).item() == pytest.approx(expected)
    assert categorical_kl(pi, t(0.0, 1.0, 0.0).log()).item() == math.inf


def test_kl_per_response_is_nats_per_response() -> None:
    # Sums 3 and 10; the third episode is unscored.
    assert kl_per_response(t(1, 2, 10, 99), [0, 2, 3, 4], [1, 1, 0]) == 6.5
    assert math.isnan(kl_per_response(t(1), [0, 1], [0]))


# A tabular policy over three ids, id 0 ending the response, at most three tokens: every response
# can be listed.
HORIZON, IDS = 3, 3
RESPONSES = [
    (*head, tail)
    for length in range(1, HORIZON + 1)
    for head in itertools.product(range(1, IDS), repeat=length - 1)
    for tail in (range(IDS) if length == HORIZON else [0])
]
PREFIXES = sorted({r[:i] for r in RESPONSES for i in range(len(r))})
OFFSETS = np.concatenate([[0], np.cumsum([len(r) for r in RESPONSES])])
STATES = torch.tensor([PREFIXES.index(r[:i]) for r in RESPONSES for i in range(len(r))])
ACTIONS = torch.tensor([a for r in RESPONSES for a in r])
EPISODE = torch.from_numpy(np.repeat(np.arange(len(RESPONSES)), np.diff(OFFSETS)))


class Tabular:
    """All responses of a small policy and reference, as a flat batch weighted by probability."""

    def __init__(self) -> None:
        self.theta = normal(1, len(PREFIXES), IDS).requires_grad_()
        self.ref_logits = normal(2, len(PREFIXES), IDS)
        self.logprob = self.theta.log_softmax(-1)[STATES, ACTIONS]
        self.ref_logprob = self.ref_logits.log_softmax(-1)[STATES, ACTIONS]
        sums = torch.zeros(len(RESPONSES), dtype=torch.float64)
        self.log_p = sums.index_add(0, EPISODE, self.logprob)
        self.log_q = sums.index_add(0, EPISODE, self.ref_logprob)
        self.kl = (self.log_p.exp() * (self.log_p - self.log_q)).sum()
        self.weights = self.log_p.exp().detach()[EPISODE]

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.theta, retain_graph=True)[0]

    def in_reward(self, penalty: Tensor, gamma: float) -> Tensor:
        """The expected gradient of the loss when `penalty` is subtracted from the reward."""
        returns = discounted_returns(-penalty.detach().numpy(), OFFSETS, gamma)
        loss = policy_gradient_loss(self.logprob, torch.from_numpy(returns), self.weights)
        return self.gradient(loss)


def test_k1_in_the_reward_at_gamma_one_is_the_exact_gradient() -> None:
    tab = Tabular()
    true = tab.gradient(tab.kl)
    penalty = k1(tab.logprob, tab.ref_logprob)
    torch.testing.assert_close(tab.in_reward(penalty, 1.0), true, rtol=0, atol=1e-12)
    assert (
        tab.in_reward(penalty, 0.0) - true
    ).abs().max() > 1e-2  # the price of later tokens is lost
    k3_penalty = k3(tab.logprob, tab.ref_logprob)
    assert (tab.in_reward(k3_penalty, 1.0) - true).abs().max() > 1e-2


def test_estimators_as_losses() -> None:
    """k1 teaches nothing, k2 the KL of visited states, k3 (GRPO) their forward KL."""
    tab = Tabular()
    state_weights = torch.zeros(len(PREFIXES), dtype=torch.float64).index_add(
        0, STATES, tab.weights
    )
    reverse = tab.gradient((state_weights * categorical_kl(tab.theta, tab.ref_logits)).sum())
    forward = tab.gradient((state_weights * categorical_kl(tab.ref_logits, tab.theta)).sum())

    def as_loss(per_token: Tensor) -> Tensor:
        return tab.gradient((tab.weights * per_token).sum())

    close = {"rtol": 0.0, "atol": 1e-12}
    args = (tab.logprob, tab.ref_logprob)
    torch.testing.assert_close(as_loss(k1(*args)), torch.zeros_like(tab.theta), **close)
    torch.testing.assert_close(as_loss(k2(*args)), reverse, **close)
    torch.testing.assert_close(as_loss(k3(*args)), forward, **close)
    assert (reverse - tab.gradient(tab.kl)).abs().max() > 1e-2


def test_sampled_and_exact_kl_per_response_agree_in_expectation() -> None:
    tab = Tabular()
    probability = tab.log_p.exp().detach().numpy()
    exact = categorical_kl(tab.theta, tab.ref_logits)[STATES].detach().numpy()
    sampled = k1(tab.logprob, tab.ref_logprob).detach().numpy()
    for per_token in (exact, sampled):
        assert kl_per_response(per_token, OFFSETS, probability) == pytest.approx(tab.kl.item())


def test_adaptive_kl_by_hand() -> None:
    controller = AdaptiveKL(0.1, target=2.0, horizon=100)
    controller.update(2.2, 50)  # e = 0.1
    assert controller.beta == pytest.approx(0.1 * 1.05)
    controller.update(100.0, 50)  # e = 0.2, clipped
    assert controller.beta == pytest.approx(0.1 * 1.05 * 1.1)
    controller.update(0.0, 50)  # e = -0.2, clipped
    assert controller.beta == pytest.approx(0.1 * 1.05 * 1.1 * 0.9)


@given(st.lists(st.floats(-1.0, 50.0), max_size=50))
def test_adaptive_kl_stays_positive_and_resumes_exactly(kls: list[float]) -> None:
    whole, first = AdaptiveKL(0.1, target=1.0, horizon=64), AdaptiveKL(0.1, target=1.0, horizon=64)
    for kl in kls:
        whole.update(kl, 64)
        assert whole.beta > 0
    half = len(kls) // 2
    for kl in kls[:half]:
        first.update(kl, 64)
    second = AdaptiveKL(9.0, target=1.0, horizon=64)
    second.load_state_dict(first.state_dict())
    for kl in kls[half:]:
        second.update(kl, 64)
    assert second.beta == whole.beta


def test_controllers_find_their_target() -> None:
    """In a world where KL = 1 / beta, the price settles where the KL is the target."""
    controller: KLController = AdaptiveKL(1.0, target=5.0, horizon=100)
    for _ in range(300):
        controller.update(1 / controller.beta, 10)
    assert 1 / controller.beta == pytest.approx(5.0, rel=0.02)
    fixed: KLController = FixedKL(0.3)
    fixed.update(99.0, 10)
    assert fixed.beta == 0.3
    fixed.load_state_dict({"beta": 0.4})
    assert fixed.state_dict() == {"beta": 0.4}


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        k1(t(1, 2), t(1))
    with pytest.raises(ValueError, match="one shape"):
        categorical_kl(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="at least 0"):
        FixedKL(-1.0)
    with pytest.raises(ValueError, match="beta of an adaptive"):
        AdaptiveKL(0.0, target=1.0)
    with pytest.raises(ValueError, match="must be finite"):
        AdaptiveKL(1.0, target=1.0).update(math.nan, 1)
    with pytest.raises(ValueError, match="too short for batches of 500"):
        AdaptiveKL(1.0, target=1.0, horizon=100).update(1.0, 500)
