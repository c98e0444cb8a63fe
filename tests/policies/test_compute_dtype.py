"""Forwards in bfloat16 beside float32 weights, and layers computed again in the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from textgym.episodes import SequenceBatch
from textgym.policies import CausalLMPolicy, backbone, cpu_attention, joined_step

VOCAB = 61


@pytest.fixture
def obs() -> dict[str, Any]:
    ids = np.random.default_rng(1).integers(0, VOCAB, (4, 12))
    return {"input_ids": ids, "length": np.array([5, 7, 5, 9])}


def gradient(policy: CausalLMPolicy, batch: SequenceBatch) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    scored = policy.evaluate(batch)
    assert scored.entropy is not None
    (scored.logprob.sum() + 0.1 * scored.entropy.sum()).backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def test_weights_stay_float32_and_results_are_those_of_bfloat16(
    make_model: Callable[..., Any], family: str, batch: SequenceBatch
) -> None:
    model = make_model(family)
    exact = CausalLMPolicy(copy.deepcopy(model), device="cpu")
    half = CausalLMPolicy(model, device="cpu", compute_dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    theirs, ours = exact.evaluate(batch).logprob, half.evaluate(batch).logprob
    assert ours.dtype == torch.float32
    gap = float((ours - theirs).detach().abs().max())
    assert 1e-4 < gap < 0.3  # it did compute in bfloat16, and the same thing
    want, got = gradient(exact, batch), gradient(half, batch)
    assert set(want) == set(got)
    for name in want:
        assert got[name].dtype == torch.float32
        assert float((got[name] - want[name]).norm() / want[name].norm()) < 0.1, name


def test_what_acts_is_a_bfloat16_copy_that_follows_the_weights(
    make_model: Callable[..., Any], family: str, obs: dict[str, Any]
) -> None:
    model = make_model(family)
    pure = CausalLMPolicy(copy.deepcopy(model).to(torch.bfloat16), device="cpu")
    policy = CausalLMPolicy(model, device="cpu", compute_dtype=torch.bfloat16)
    stream = np.arange(4)
    for turn in range(2):
        want, got = pure.act(obs, stream), policy.act(obs, stream)
        assert np.array_equal(got.action, want.action)
        assert np.array_equal(got.logprob, want.logprob)
        if turn == 0:  # an optimizer's step, and the same weights in the pure one
            before = got.logprob
            optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.5)
            for p in policy.model.parameters():
                p.grad = torch.ones_like(p) * 0.1
            optimizer.step()
            with torch.no_grad():
                for mine, theirs in zip(
                    pure.model.parameters(), policy.model.parameters(), strict=True
                ):
                    mine.copy_(theirs)
        else:
            assert not np.array_equal(before, got.logprob)


def test_steps_and_whole_responses_are_the_same_tokens(
    make_model: Callable[..., Any], obs: dict[str, Any]
) -> None:
    policy = CausalLMPolicy(make_model(), device="cpu", compute_dtype="bfloat16")
    stream = np.arange(4)
    made = policy.generate(obs, stream, max_new_tokens=5, stop_ids=())
    policy.invalidate_cache()  # prompts are read again: a cached one rounds otherwise
    ids, length = np.pad(obs["input_ids"], ((0, 0), (0, 8))), obs["length"].copy()
    for t in range(5):
        act = policy.act({"input_ids": ids, "length": length}, stream)
        assert np.array_equal(act.action, made.tokens[:, t])
        assert np.array_equal(act.logprob, made.logprob[:, t])
        ids[np.arange(4), length] = act.action
        length += 1


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_of_one_query_is_that_of_many(
    make_model: Callable[..., Any], groups: int
) -> None:
    """Ragged rows, with and without grouped queries, against the full forward in bfloat16."""
    model = make_model(num_heads=4, num_kv_heads=groups).to(torch.bfloat16)
    policy = CausalLMPolicy(model, device="cpu")
    rng = np.random.default_rng(0)
    ids, length = rng.integers(0, VOCAB, (6, 40)), rng.integers(1, 20, 6)
    for step in range(20):
        at = {"input_ids": ids, "length": length + step}
        cached = policy.logits(at)
        policy.invalidate_cache()
        whole = policy.logits(at)  # prefilled, by PyTorch's attention
        gap, size = (cached - whole).detach().norm(), whole.detach().norm()
        assert 0 < float(gap) < 0.03 * float(size) or step == 0
        policy.logits(at)
    assert not policy._no_cache  # type: ignore[has-type]


def test_products_attend_where_one_query_a_row_does(
    make_model: Callable[..., Any], obs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renamed field of transformers' configurations would leave them out without a word."""
    called: list[int] = []
    attend = cpu_attention._attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        called.append(args[1].shape[2])
        return attend(*args, **kwargs)

    monkeypatch.setitem(cpu_attention.ALL_ATTENTION_FUNCTIONS, cpu_attention.ATTENTION, counted)
    monkeypatch.setattr(joined_step, "FAMILIES", set())  # else it attends in the model's stead
    policy = CausalLMPolicy(make_model(), device="cpu")
    policy.act(obs, np.arange(4))
    called.clear()  # those of the trial
    before = policy.config._attn_implementation
    policy.generate(obs, np.arange(4), max_new_tokens=3, stop_ids=())
    assert called == [1] * 3 * 3  # layers, steps; the first from the cache
    assert policy.config._attn_implementation == before == "sdpa"


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    gaps = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return float((gaps / sum(float(g.square().sum()) for g in wanted.values())) ** 0.5)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_learning_in_bfloat16_attends_in_float32_on_a_cpu(
    make_model: Callable[..., Any],
    batch: SequenceBatch,
    groups: int,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With grouped queries and with a mask; log-probabilities and gradient are no less exact."""
    model = make_model(num_heads=4, num_kv_heads=groups)
    if window is not None:  # the same weights
        config = MistralConfig(**model.config.to_dict() | {"sliding_window": window})
        model, weights = MistralForCausalLM(config), model.state_dict()
        model.load_state_dict(weights)
        assert model.config._attn_implementation == "sdpa"
    exact = CausalLMPolicy(copy.deepcopy(model), device="cpu")
    theirs, want = exact.evaluate(batch).logprob.detach(), gradient(exact, batch)
    policy = CausalLMPolicy(model, device="cpu", compute_dtype="bfloat16")
    dtypes = record_attention(monkeypatch)
    gaps, errors = [], []
    for _ in range(2):
        gaps.append(float((policy.evaluate(batch).logprob.detach() - theirs).norm()))
        errors.append(distance(gradient(policy, batch), want))
        used, masked = zip(*dtypes, strict=True)
        assert used == ((torch.float32 if len(errors) == 1 else torch.bfloat16,) * 3,) * 6
        assert masked == (window is not None,) * 6
        dtypes.clear()
        monkeypatch.setattr(backbone, "cpu_attention", lambda *_, **__: nullcontext())
    assert 0 < gaps[0] < 1.5 * gaps[1]  # mostly less; what else is bfloat16 makes it vary
    assert 0 < errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("lora", [None, 2])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_layers_computed_again_attend_in_float32_too(
    make_model: Callable[..., Any],
    family: str,
    batch: SequenceBatch,
    lora: int | None,
    weights: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if lora:
        pytest.importorskip("peft")
    policy = CausalLMPolicy(
        make_model(family).to(weights),
        device="cpu",
        compute_dtype="bfloat16" if weights == torch.float32 else None,
        lora=lora,
        gradient_checkpointing=True,
    )
    dtypes = record_attention(monkeypatch)
    assert gradient(policy, batch)
    assert dtypes == [((torch.float32,) * 3, False)] * 2 * 3  # both times, in each layer
    assert policy.config._attn_implementation == "sdpa"


def record_attention(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the fused attention computes in, and whether it gets a mask, at each call."""
    calls: list[Any] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(*inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        cast = torch.is_autocast_enabled("cpu")  # to this dtype, before anything is computed
        used = tuple(torch.bfloat16 if cast else x.dtype for x in inputs)
        calls.append((used, options["attn_mask"] is not None))
        return attend(*inputs, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(cpu_attention, "FEW_SCORES", 0)  # else plain products do it
    return calls


def test_adapters_are_followed_and_a_reference_leaves_them_off(
    make_model: Callable[..., Any], obs: dict[str, Any], batch: SequenceBatch
) -> None:
    pytest.importorskip("peft")
    policy = CausalLMPolicy(make_model(), device="cpu", lora=2, compute_dtype="bfloat16")
    reference = policy.frozen_copy()
    stream = np.arange(4)
    before = policy.act(obs, stream)
    at_start = reference.act(obs, stream)
    assert np.array_equal(before.logprob, at_start.logprob)  # adapters start at zero
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    assert not np.array_equal(policy.act(obs, stream).logprob, before.logprob)
    assert np.array_equal(reference.act(obs, stream).logprob, at_start.logprob)
    assert float(policy.kl(reference, batch).max()) > 0.0


def test_a_reference_computes_in_the_same_dtype(
    make_model: Callable[..., Any], batch: SequenceBatch
) -> None:
    policy = CausalLMPolicy(make_model(), device="cpu", compute_dtype="bfloat16")
    reference = policy.frozen_copy()
    assert float(policy.kl(reference, batch).abs().max()) == 0.0
    assert torch.equal(policy.evaluate(batch).logprob, reference.evaluate(batch).logprob)


@pytest.mark.parametrize("compute", [None, "bfloat16"])
def test_layers_computed_again_give_the_same_gradient(
    make_model: Callable[..., Any], family: str, batch: SequenceBatch, compute: str | None
) -> None:
    model = make_model(family)
    plain = CausalLMPolicy(copy.deepcopy(model), device="cpu", compute_dtype=compute)
    again = CausalLMPolicy(model, device="cpu", compute_dtype=compute, gradient_checkpointing=True)
    kept: dict[str, int] = {}
    for name, policy in (("plain", plain), ("again", again)):

        def keep(tensor: torch.Tensor, name: str = name) -> torch.Tensor:
            kept[name] = kept.get(name, 0) + tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            policy.evaluate(batch)
    assert kept["again"] < kept["plain"] / 2
    want, got = gradient(plain, batch), gradient(again, batch)
    assert set(want) == set(got)
    for name in want:
        assert torch.equal(want[name], got[name]), name
    assert not any("forward" in vars(module) for module in again.model.modules())


def test_a_dtype_that_would_underflow_is_refused(make_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match='expected "bfloat16", "float32" or None'):
        CausalLMPolicy(make_model(), device="cpu", compute_dtype="float16")
    assert CausalLMPolicy(make_model(), compute_dtype="float32").compute_dtype is None
