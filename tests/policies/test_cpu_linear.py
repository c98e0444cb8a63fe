"""oneDNN's products equal those of PyTorch, forward and backward, and change nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from textgym.policies import cpu_linear
from textgym.policies.cpu_linear import OneDNNLinear, use_onednn


@pytest.fixture(autouse=True)
def _small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "SMALLEST", 1)


def test_small_products_are_left_to_the_plain_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = pair(bias=False)
    monkeypatch.setattr(cpu_linear, "SMALLEST", 3 * 24 * 40 + 1)
    monkeypatch.setattr(cpu_linear, "product", None)  # not even asked
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(4))
    assert torch.equal(fast(x), plain(x))


def pair(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, nn.Linear]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Linear(24, 40, bias=bias, dtype=dtype)
    fast = nn.Sequential(copy.deepcopy(plain))
    use_onednn(fast)
    assert type(fast[0]) is OneDNNLinear
    return plain, fast[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 5, 24), (0, 24)])
def test_equals_the_plain_layer_with_its_gradient(bias: bool, shape: tuple[int, ...]) -> None:
    plain, fast = pair(bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for layer, given in zip((plain, fast), inputs, strict=True):
        out = layer(given)
        assert out.shape == (*shape[:-1], 40)
        (out * torch.linspace(-1, 1, 40)).sum().backward()
    torch.testing.assert_close(fast(x), plain(x))
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_frozen_weights_get_no_gradient_and_strided_inputs_are_read_right() -> None:
    plain, fast = pair(bias=True)
    fast.requires_grad_(False)
    x = torch.randn(24, 7, generator=torch.Generator().manual_seed(2)).t().requires_grad_()
    fast(x).sum().backward()
    torch.testing.assert_close(x.grad, plain.weight.sum(0).detach().expand(7, 24))
    assert fast.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_the_plain_layer(dtype: torch.dtype) -> None:
    plain, fast = pair(bias=True, dtype=dtype)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(fast(x), plain(x))


def test_a_model_keeps_its_parameters_its_state_and_its_loss(
    make_model: Callable[..., Any],
) -> None:
    model = make_model("llama", vocab=61)
    before = copy.deepcopy(model)
    use_onednn(model)
    assert list(model.state_dict()) == list(before.state_dict())
    ids = torch.arange(24).reshape(2, 12)
    losses = [m(ids, labels=ids).loss for m in (before, model)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    for (name, ours), theirs in zip(model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, before(ids).logits)


def test_what_is_expanded_is_written_out_first() -> None:
    layer = nn.Sequential(nn.Linear(64, 2048, bias=False))
    use_onednn(layer)
    x = torch.ones(1).expand(128, 64).detach().requires_grad_()
    with torch.profiler.profile() as profile:
        layer(x).sum().backward()  # its gradient has strides 0
    names = [event.name for event in profile.events()]
    assert names.count("aten::clone") >= 2
    torch.testing.assert_close(x.grad, layer[0].weight.sum(0).detach().expand(128, 64))


def test_subclasses_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(2, 2), nn.Linear(2, 2))
    use_onednn(model)
    assert [type(layer) for layer in model] == [Own, OneDNNLinear]


def test_gradients_have_gradients() -> None:
    """Hessian-vector products, as TRPO takes them, are those of PyTorch's own product."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for product in (cpu_linear._Product.apply, torch.nn.functional.linear):
        generator.manual_seed(0)
        rows = torch.randn(5, 7, generator=generator, requires_grad=True)
        weight = torch.randn(3, 7, generator=generator, requires_grad=True)
        out = product(rows, weight).tanh().pow(2).sum()
        first = torch.autograd.grad(out, (rows, weight), create_graph=True)
        along = sum((g * g.detach().cos()).sum() for g in first)
        found.append([*first, *torch.autograd.grad(along, (rows, weight))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
