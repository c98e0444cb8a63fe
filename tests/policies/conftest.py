"""Small models whose attention matters, and batches of action tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from textgym.episodes import SequenceBatch
from textgym.policies import CausalLMPolicy, random_causal_lm

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
