"""RMS norms with a backward of their own: the numbers are those of the model's norms."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from textgym.policies import cpu_norm
from textgym.policies.cpu_norm import CpuRMSNorm, _Norm, use_fast_norms

from .families import family_model


def small_model(family: str) -> Any:
    return family_model(family, scale=1.0, hidden_size=16, head_dim=8)


def test_gradients_of_the_first_and_second_order() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True)
    by_hand = weight * x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(_Norm.apply(x, weight, 0.1), by_hand)
    assert torch.autograd.gradcheck(lambda *a: _Norm.apply(*a, 0.1), (x, weight))
    assert torch.autograd.gradgradcheck(lambda *a: _Norm.apply(*a, 0.1), (x, weight))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_model_computes_the_same_with_them(family: str) -> None:
    plain = small_model(family)
    fast = copy.deepcopy(plain)
    use_fast_norms(fast)
    norms = [m for m in fast.modules() if type(m).__name__.endswith("RMSNorm")]
    assert norms and all(type(m) is CpuRMSNorm for m in norms)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    ids = torch.arange(20).view(2, 10)
    results = []
    for model in (plain, fast):
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        results.append((logits.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[1][0], results[0][0])
    for found, expected in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():  # by the norms' own forward, bit for bit
        assert torch.equal(fast(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_they_survive_copies_and_pickles() -> None:
    model = small_model("llama")
    use_fast_norms(model)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        norm = twin.model.norm
        assert type(norm) is CpuRMSNorm and "eps" in repr(norm)
        torch.testing.assert_close(norm(x), model.model.norm(x))
    use_fast_norms(model)  # once more changes nothing
    assert model.model.norm.original is not CpuRMSNorm


def test_norms_of_another_formula_stay() -> None:
    model = small_model("gemma")
    use_fast_norms(model)
    assert not any(isinstance(m, CpuRMSNorm) for m in model.modules())

    class DoubleRMSNorm(nn.Module):
        """Looks like one, and gives twice as much."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * nn.functional.rms_norm(x, (4,), self.weight, self.variance_epsilon)

    double = nn.Sequential(DoubleRMSNorm())
    use_fast_norms(double)
    assert type(double[0]) is DoubleRMSNorm


def test_other_dtypes_are_left_to_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("llama").bfloat16()
    use_fast_norms(model)
    monkeypatch.setattr(cpu_norm, "_Norm", None)
    model(input_ids=torch.arange(6)[None]).logits.float().sum().backward()
