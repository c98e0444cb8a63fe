import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical

from textgym.losses import (
    Normaliser,
    clipped_surrogate_loss,
    clipped_value_loss,
    entropy_from_logits,
    entropy_loss,
    policy_gradient_loss,
    token_weights,
    truncated_importance,
    value_loss,
)

NORMALISERS: tuple[Normaliser, ...] = ("constant", "token", "sequence")


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_token_weights_by_hand() -> None:
    # Lengths 1 and 3, budget 4; the last episode is unscored and counts nowhere.
    offsets, u = [0, 1, 4, 6], [1, 1, 0]
    expected = {
        "constant": [1 / 8] * 4 + [0, 0],
        "token": [1 / 4] * 4 + [0, 0],
        "sequence": [1 / 2] + [1 / 6] * 3 + [0, 0],
    }
    for normaliser in NORMALISERS:
        np.testing.assert_allclose(token_weights(offsets, u, normaliser, 4), expected[normaliser])
        np.testing.assert_array_equal(token_weights(offsets, [0, 0, 0], normaliser, 4), [0] * 6)


def test_token_weights_refuse_what_they_cannot_weigh() -> None:
    with pytest.raises(ValueError, match="needs max_new_tokens"):
        token_weights([0, 1], [1], "constant")
    with pytest.raises(ValueError, match="one of"):
        token_weights([0, 1], [1], "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cut 1 episodes"):
        token_weights([0, 1], [1, 1], "token")
    with pytest.raises(ValueError, match="at least 0"):
        token_weights([0, 1], [-1], "token")


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=8),
    st.sampled_from(NORMALISERS),
    st.integers(0, 2**32 - 1),
)
def test_microbatches_add_up_exactly(lengths: list[int], normaliser: Normaliser, seed: int) -> None:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    m = int(offsets[-1])
    weights = torch.from_numpy(token_weights(offsets, rng.random(len(lengths)), normaliser, 5))
    logprob, old, advantages = torch.from_numpy(rng.normal(size=(3, m)))

    def loss(index: Tensor) -> Tensor:
        return clipped_surrogate_loss(
            logprob[index], old[index], advantages[index], weights[index], clip_coef=0.2
        ).loss

    cut = int(offsets[len(lengths) // 2])
    everything = torch.arange(m)
    parts = loss(everything[:cut]) + loss(everything[cut:])
    torch.testing.assert_close(parts, loss(everything), rtol=1e-12, atol=1e-12)


def test_weights_sum_to_one_where_they_are_means() -> None:
    offsets, u = [0, 3, 4, 9], [1.0, 0.5, 2.0]
    assert token_weights(offsets, u, "token").sum() == pytest.approx(1)
    assert token_weights(offsets, u, "sequence").sum() == pytest.approx(1)
    assert token_weights(offsets, u, "constant", 5).sum() <= 1


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


def tabular() -> tuple[Tensor, list[Tensor], Tensor]:
    """Parameters, token log-probabilities of every response, an arbitrary return for each."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(len(PREFIXES), IDS, generator=generator, dtype=torch.float64)
    theta.requires_grad_()
    table = theta.log_softmax(-1)
    logprobs = [
        torch.stack([table[PREFIXES.index(r[:i]), r[i]] for i in range(len(r))]) for r in RESPONSES
    ]
    returns = torch.randn(len(RESPONSES), generator=generator, dtype=torch.float64)
    return theta, logprobs, returns


def expected_gradient(normaliser: Normaliser, batch: int) -> tuple[Tensor, Tensor]:
    """The exact expectation of the loss gradient over batches, and the policy gradient."""
    theta, logprobs, returns = tabular()
    probability = torch.stack([lp.sum() for lp in logprobs]).exp()
    assert probability.sum().item() == pytest.approx(1)
    (true,) = torch.autograd.grad((probability * returns).sum(), theta, retain_graph=True)
    total = torch.zeros((), dtype=torch.float64)
    for chosen in itertools.product(range(len(RESPONSES)), repeat=batch):
        offsets = np.concatenate([[0], np.cumsum([len(RESPONSES[i]) for i in chosen])])
        weights = torch.from_numpy(token_weights(offsets, np.ones(batch), normaliser, HORIZON))
        advantages = torch.cat([returns[i].expand(len(RESPONSES[i])) for i in chosen])
        loss = policy_gradient_loss(torch.cat([logprobs[i] for i in chosen]), advantages, weights)
        total = total + probability[list(chosen)].prod().detach() * loss
    (gradient,) = torch.autograd.grad(total, theta)
    return gradient, true


def test_constant_is_proportional_to_the_policy_gradient() -> None:
    for batch in (1, 2):
        gradient, true = expected_gradient("constant", batch)
        torch.testing.assert_close(gradient, -true / HORIZON, rtol=0, atol=1e-12)


def test_token_and_sequence_are_not_and_token_nearly_is_for_large_batches() -> None:
    def cosine(normaliser: Normaliser, batch: int) -> float:
        gradient, true = expected_gradient(normaliser, batch)
        return float(torch.cosine_similarity(-gradient.flatten(), true.flatten(), 0))

    one, two, three = (cosine("token", batch) for batch in (1, 2, 3))
    assert one < two < three < 1 - 1e-6
    assert cosine("sequence", 1) == pytest.approx(one)
    assert cosine("sequence", 3) == pytest.approx(one)  # no batch is large enough


def test_policy_gradient_loss_by_hand() -> None:
    logprob = t(-1.0, -2.0).requires_grad_()
    loss = policy_gradient_loss(logprob, t(2.0, -1.0), t(0.5, 0.25))
    assert loss.item() == -(0.5 * 2 * -1 + 0.25 * -1 * -2)
    loss.backward()
    torch.testing.assert_close(logprob.grad, t(-1.0, 0.25))


def test_clipped_surrogate_by_hand() -> None:
    # Ratios 2, 2, 1/2, 1/2 with clip 0.2. A > 0: min(2, 1.2) and min(.5, .8); A < 0: min(-2, -1.2),
    # min(-.5, -.8).
    ratios, advantages = t(2, 2, 0.5, 0.5), t(1, -1, 1, -1)
    out = clipped_surrogate_loss(
        ratios.log(), torch.zeros(4), advantages, t(1, 1, 1, 1), clip_coef=0.2
    )
    assert out.loss.item() == pytest.approx(-(1.2 - 2 + 0.5 - 0.8))
    assert out.clip_fraction.item() == 1.0
    k3 = [2 - 1 - math.log(2), 0.5 - 1 + math.log(2)]
    assert out.approx_kl.item() == pytest.approx(sum(k3) / 2)


def test_clipped_surrogate_ignores_tokens_without_weight() -> None:
    out = clipped_surrogate_loss(t(0, 5), t(0, 0), t(1, 1), t(1, 0), clip_coef=0.2)
    assert (out.approx_kl.item(), out.clip_fraction.item(), out.tokens.item()) == (0, 0, 1)
    none = clipped_surrogate_loss(t(5), t(0), t(1), t(0), clip_coef=0.2)
    assert (none.loss.item(), none.approx_kl.item(), none.tokens.item()) == (0, 0, 0)


def test_first_surrogate_gradient_is_the_policy_gradient() -> None:
    rng = np.random.default_rng(0)
    values, advantages, weights = torch.from_numpy(rng.normal(size=(3, 20)))
    a, b = values.clone().requires_grad_(), values.clone().requires_grad_()
    out = clipped_surrogate_loss(a, values, advantages, weights.abs(), clip_coef=0.2)
    out.loss.backward()
    policy_gradient_loss(b, advantages, weights.abs()).backward()
    torch.testing.assert_close(a.grad, b.grad)
    assert (out.approx_kl.item(), out.clip_fraction.item()) == (0, 0)


@given(st.integers(1, 30), st.integers(0, 2**32 - 1), st.floats(0.01, 0.9))
def test_clipped_surrogate_equals_a_plain_loop(m: int, seed: int, clip: float) -> None:
    rng = np.random.default_rng(seed)
    logprob, old, advantages = rng.normal(size=(3, m))
    weights = rng.random(m)
    loss = 0.0
    for new_lp, old_lp, a, w in zip(logprob, old, advantages, weights, strict=True):
        ratio = math.exp(new_lp - old_lp)
        loss -= w * (min(ratio, 1 + clip) * a if a >= 0 else max(ratio, 1 - clip) * a)
    out = clipped_surrogate_loss(
        *(torch.from_numpy(x) for x in (logprob, old, advantages, weights)), clip_coef=clip
    )
    assert out.loss.item() == pytest.approx(loss, rel=1e-9, abs=1e-12)


def test_truncated_importance_by_hand() -> None:
    learner, sampler = (
        torch.log(torch.tensor([0.5, 0.2, 0.6])),
        torch.log(torch.tensor([0.25, 0.4, 0.1])),
    )
    found = truncated_importance(learner.requires_grad_(), sampler, 2.5)
    assert found.tolist() == pytest.approx([2.0, 0.5, 2.5]) and not found.requires_grad
    assert truncated_importance(learner, sampler, None).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="cap must be above 0"):
        truncated_importance(learner, sampler, 0.0)


def test_value_losses_by_hand() -> None:
    value, old, returns, weights = t(3.0, 1.0), t(0.0, 1.0), t(2.0, 2.0), t(0.5, 0.5)
    assert value_loss(value, returns, weights).item() == 0.5 * (0.5 * 1 + 0.5 * 1)
    # The first value moved by 3 where 0.5 is allowed: its error is the worse of 1 and (0.5 - 2)**2.
    clipped = clipped_value_loss(value, old, returns, weights, clip_coef=0.5)
    assert clipped.item() == pytest.approx(0.5 * (0.5 * 2.25 + 0.5 * 1))


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 2.0))
def test_clipped_value_loss_is_at_least_the_plain_one(seed: int, clip: float) -> None:
    rng = np.random.default_rng(seed)
    value, old, returns = torch.from_numpy(rng.normal(size=(3, 10)))
    weights = torch.from_numpy(rng.random(10))
    plain = value_loss(value, returns, weights)
    assert clipped_value_loss(value, old, returns, weights, clip_coef=clip) >= plain
    wide = clipped_value_loss(value, old, returns, weights, clip_coef=100.0)
    torch.testing.assert_close(wide, plain)
    mse = torch.nn.functional.mse_loss(value, returns, reduction="none")
    torch.testing.assert_close(plain, (mse * weights).sum() / 2)


def test_entropy_by_hand_and_against_torch() -> None:
    assert entropy_from_logits(torch.zeros(4, dtype=torch.float64)).item() == pytest.approx(
        math.log(4)
    )
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(entropy_from_logits(logits), Categorical(logits=logits).entropy())
    assert entropy_loss(t(1.0, 3.0), t(0.5, 0.25)).item() == -1.25


def test_entropy_of_masked_logits_has_a_finite_gradient() -> None:
    logits = t(0.0, 0.0, -math.inf).requires_grad_()
    entropy = entropy_from_logits(logits)
    assert entropy.item() == pytest.approx(math.log(2))
    entropy.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_losses_refuse_shapes_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"one shape \[M\]"):
        policy_gradient_loss(t(1, 2), t(1, 2)[:, None], t(1, 2))
    with pytest.raises(ValueError, match=r"one shape \[M\]"):
        value_loss(t(1, 2), t(1), t(1, 2))
    with pytest.raises(ValueError, match="clip_coef must be above 0"):
        clipped_surrogate_loss(t(1), t(1), t(1), t(1), clip_coef=0.0)
