"""Attention by plain products beside PyTorch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from textgym.episodes import SequenceBatch
from textgym.policies import CausalLMPolicy, cpu_attention

ROWS, HEADS, LENGTH, SIZE = 3, 4, 7, 8


class Layer(nn.Module):
    is_causal = True
    num_key_value_groups = 1


class Open(Layer):
    is_causal = False


def inputs(columns: int = LENGTH, heads: int = HEADS) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(ROWS, LENGTH, HEADS, SIZE, generator=g).transpose(1, 2)
    held = torch.randn(2, ROWS, heads, columns, SIZE, generator=g)
    return [x.clone().requires_grad_() for x in (query, *held)]


def unseen(columns: int, rows: int = 1) -> Tensor:
    """Added to the scores: all earlier columns are seen, and as many before the first query."""
    later = torch.ones(rows, 1, LENGTH, columns).triu(columns - LENGTH + 1).bool()
    return torch.zeros(later.shape).masked_fill(later, float("-inf"))


def with_gradients(attend: Any, *arguments: Any, **options: Any) -> list[Tensor]:
    out, _ = attend(*arguments, **options)
    weight = torch.arange(out.numel(), dtype=torch.float32).view(out.shape).cos()
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), arguments[1:4])]


@pytest.mark.parametrize("columns", [LENGTH, LENGTH + 5])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_products_attend_as_the_fused_one_does(columns: int, scaling: float | None) -> None:
    mask = None if columns == LENGTH else unseen(columns)
    given = (Layer(), *inputs(columns), mask)
    found = with_gradients(cpu_attention._attention, *given, scaling=scaling)
    wanted = with_gradients(sdpa_attention_forward, *given, scaling=scaling)
    assert found[0].shape == (ROWS, LENGTH, HEADS, SIZE)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
    out, _ = cpu_attention._attention(*given, scaling=scaling)
    assert out.is_contiguous()  # JetMoe takes a view of it


@pytest.mark.parametrize(
    ("case", "fused"),
    [
        ("few", False),
        ("many", True),
        ("grouped", True),
        ("boolean", True),
        ("a mask a row", True),
        ("dropout", True),
        ("not causal", True),
        ("not causal, asked for", True),
        ("float64", True),
    ],
)
def test_all_else_is_left_to_pytorch(
    case: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[bool] = []
    attend = nn.functional.scaled_dot_product_attention

    def noted(*arguments: Any, **options: Any) -> Tensor:
        called.append(True)
        return attend(*arguments, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
    if case == "many":
        monkeypatch.setattr(cpu_attention, "FEW_SCORES", ROWS * HEADS * LENGTH**2 - 1)
    module: nn.Module = Open() if case == "not causal" else Layer()
    heads = 2 if case == "grouped" else HEADS
    if case == "grouped":
        module.num_key_value_groups = 2  # type: ignore[assignment]
    tensors = inputs(heads=heads)
    if case == "float64":
        tensors = [x.double() for x in tensors]
    masks = {"boolean": unseen(LENGTH) == 0, "a mask a row": unseen(LENGTH, ROWS)}
    options: dict[str, Any] = {"dropout": 0.1} if case == "dropout" else {}
    if case == "not causal, asked for":
        options["is_causal"] = False
    cpu_attention._attention(module, *tensors, masks.get(case), **options)
    assert bool(called) == fused


@pytest.mark.parametrize("compute_dtype", [None, "bfloat16"])
def test_a_model_that_compares_the_name_is_left_alone(compute_dtype: str | None) -> None:
    """By another name Falcon adds its boolean mask to the scores, and sees what comes later."""
    config = FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FalconForCausalLM(config)
    policy = CausalLMPolicy(model, device="cpu", compute_dtype=compute_dtype)
    ids = torch.arange(12)[None]
    other = ids.clone()
    other[0, 8:] = 50  # after the token that is scored
    place = torch.tensor([12]), torch.tensor([0]), torch.tensor([3])
    found = [policy.evaluate(SequenceBatch(x, *place)).logprob for x in (ids, other)]
    assert torch.equal(*found)
    whole = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    wanted = whole.float().log_softmax(-1)[0, 2, ids[0, 3]]
    assert float((found[0] - wanted).detach()) == pytest.approx(
        0, abs=1e-5 if compute_dtype is None else 0.02
    )
