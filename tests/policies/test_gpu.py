"""CUDA against the CPU: the same scores, and the same tokens but where a draw is on a boundary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from textgym import streams
from textgym.episodes import SequenceBatch
from textgym.policies import CausalLMPolicy
from textgym.sampling import gumbel_noise, mix64, uniform53

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
N = 8


def test_hash_and_uniforms_are_bit_equal() -> None:
    key = torch.from_numpy(streams.mix64(3, np.arange(1000)).view(np.int64))
    assert torch.equal(mix64(7, key.cuda()).cpu(), mix64(7, key))
    assert torch.equal(uniform53(key.cuda()).cpu(), uniform53(key))
    noise = gumbel_noise(key[:10].cuda(), 50).cpu()
    assert torch.allclose(noise, gumbel_noise(key[:10], 50), atol=1e-12)


def test_scores_and_tokens(
    make_model: Callable[..., Any], batch: SequenceBatch, family: str
) -> None:
    slow = CausalLMPolicy(make_model(family), device="cpu")
    fast = CausalLMPolicy(make_model(family), device="auto")
    assert fast.device.type == "cuda"
    for a, b in zip(slow.evaluate(batch), fast.evaluate(batch), strict=True):
        assert a is not None and b is not None
        assert torch.allclose(a, b.cpu(), atol=1e-3)
    assert fast.kl(fast.frozen_copy(), batch).abs().max() == 0
    rng = np.random.default_rng(0)
    obs = {"input_ids": rng.integers(0, 61, (N, 9)), "length": rng.integers(2, 10, N)}
    keys = streams.mix64(1, np.arange(N))
    one = slow.generate(obs, keys, max_new_tokens=20, stop_ids=(5, 17))
    two = fast.generate(obs, keys, max_new_tokens=20, stop_ids=(5, 17))
    width = min(one.tokens.shape[1], two.tokens.shape[1])
    same = (one.tokens[:, :width] == two.tokens[:, :width]).all(1) & (one.count == two.count)
    assert same.mean() >= 0.75  # a draw may fall on a boundary, rarely
    np.testing.assert_allclose(one.logprob[same, :width], two.logprob[same, :width], atol=1e-3)
    act = fast.act(obs, keys)
    np.testing.assert_allclose(act.logprob[same], two.logprob[same, 0], atol=1e-3)


def test_optimizers_of_the_gpu_invalidate_the_cache(
    make_model: Callable[..., Any], batch: SequenceBatch
) -> None:
    policy = CausalLMPolicy(make_model(), device="cuda")
    obs = {"input_ids": batch.ids.numpy(), "length": batch.lengths.numpy()}
    rows = np.arange(3)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        policy.act(obs, rows)
        optimizer.zero_grad()
        policy.evaluate(batch).logprob.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.inference_mode():
            cached = policy._hidden_last(obs["input_ids"], obs["length"], rows)
            full = policy._hidden_all(batch.ids.cuda())[rows, batch.lengths.cuda() - 1]
        assert torch.allclose(cached, full, atol=1e-3)
