"""Small models whose attention matters, and batches of action tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from textgym import streams
from textgym.episodes import SequenceBatch
from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.sampling import gumbel_noise

VOCAB = 61


def sharp_model(
    family: str = "llama", *, vocab: int = VOCAB, attention: str = "sdpa", **knobs: Any
) -> Any:
    """A random model whose weights are large enough that a wrong cache shows in the logits."""
    settings: dict[str, Any] = {"hidden_size": 32, "num_layers": 3, "max_positions": 48}
    if family == "llama":
        settings["num_kv_heads"] = 2
    model: Any = random_causal_lm(vocab, family=family, **{**settings, **knobs})  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    model.set_attn_implementation(attention)
    return model


def fork_gap(
    policy: CausalLMPolicy, ids: np.ndarray, key: np.uint64, one: int, other: int
) -> float:
    """How close the draw after `ids` with that key is to giving the one token and not the other."""
    with torch.no_grad():
        hidden = policy._hidden_all(torch.from_numpy(ids[None]).to(policy.device))[:, -1]
        logits = policy._logits(hidden)[0].double().cpu()
    if policy.sampler.method == "inverse_cdf":
        bounds = logits.softmax(0).cumsum(0)[min(one, other) : max(one, other)]
        return float((bounds - float(streams.uniform53(key))).abs().min())
    if policy.sampler.method == "gumbel":
        logits = logits + gumbel_noise(torch.tensor([key.view(np.int64)]), len(logits))[0]
    return float((logits[one] - logits[other]).abs())


@pytest.fixture
def assert_same_draws() -> Callable[..., np.ndarray]:
    """Assert that two ways to draw agree, up to draws within 1e-5 of a boundary.

    `(policy, ids, length, keys, one, other)`: observations [n, L], [n], keys of the draws uint64
    [n], and two results of `act`. Gives the rows whose tokens are the same.
    """

    def check(
        policy: CausalLMPolicy, ids: Any, length: Any, keys: Any, one: Any, other: Any
    ) -> np.ndarray:
        same: np.ndarray = one.action == other.action
        for i in np.flatnonzero(~same):
            gap = fork_gap(policy, ids[i, : length[i]], keys[i], one.action[i], other.action[i])
            assert gap < 1e-5
        np.testing.assert_allclose(one.logprob[same], other.logprob[same], atol=1e-4)
        np.testing.assert_allclose(one.value, other.value, atol=1e-4)
        return same

    return check


@pytest.fixture
def assert_same_responses() -> Callable[..., None]:
    """Assert that two generations agree, up to a first fork within 1e-5 of a boundary.

    `(policy, ids, length, stream, one, other, atol=)`: prompts [n, L], [n], their streams, and two
    results of `generate`; the log-probabilities before a fork agree to `atol`.
    """

    def check(
        policy: CausalLMPolicy,
        ids: Any,
        length: Any,
        stream: Any,
        one: Any,
        other: Any,
        atol: float = 1e-4,
    ) -> None:
        for i in range(len(ids)):
            same = shared = min(one.count[i], other.count[i])
            forks = one.tokens[i, :shared] != other.tokens[i, :shared]
            if forks.any():
                same = int(forks.argmax())
                before = np.concatenate([ids[i, : length[i]], one.tokens[i, :same]])
                key = streams.mix64(policy.seed, stream[i], 0, length[i] + same)
                tokens = one.tokens[i, same], other.tokens[i, same]
                assert fork_gap(policy, before, key, *tokens) < 1e-5
            else:
                assert one.count[i] == other.count[i]
            np.testing.assert_allclose(one.logprob[i, :same], other.logprob[i, :same], atol=atol)
            np.testing.assert_allclose(one.value[i, :same], other.value[i, :same], atol=atol)

    return check


@pytest.fixture
def make_model() -> Callable[..., Any]:
    return sharp_model


@pytest.fixture(params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def policy(family: str) -> CausalLMPolicy:
    policy = CausalLMPolicy(sharp_model(family), device="cpu")
    with torch.no_grad():
        assert policy.value_head is not None
        policy.value_head.weight.normal_(generator=torch.Generator().manual_seed(3))
    return policy


@pytest.fixture
def batch() -> SequenceBatch:
    """Three ragged sequences with 11 action tokens, some of them apart."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (3, 14)))
    lengths = torch.tensor([14, 6, 9])
    row = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
    col = torch.tensor([1, 2, 12, 13, 4, 5, 3, 4, 6, 7, 8])
    return SequenceBatch(ids=ids, lengths=lengths, row=row, col=col)
