"""The joined decoding step gives what the model's own modules give, and knows when it may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from textgym.policies import CausalLMPolicy, joined_step
from textgym.policies.cache_support import make_slot_decoder
from textgym.policies.joined_step import JoinedStep
from textgym.policies.slot_cache import SlotDecoder

from .families import VOCAB, family_model


def decoder_of(model: Any) -> SlotDecoder:
    decoder = make_slot_decoder(model.base_model, VOCAB)
    assert isinstance(decoder, SlotDecoder), decoder
    return decoder


FAMILIES = {
    "llama": ("llama", {}),
    "llama, one head a group": ("llama", {"num_key_value_heads": 4}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 20}),
    "llama, stretched": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
    ),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {"sliding_window": None}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_are_those_of_the_full_forward(name: str) -> None:
    family, settings = FAMILIES[name]
    model = family_model(family, **settings)
    decoder = decoder_of(model)
    assert decoder.step is not None
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (5, 40))
    calls = [  # in step; out of step; some rows in another order; rows that are no range of slots
        (np.full(5, 7), np.arange(5)),
        *((np.full(5, 7 + k), np.arange(5)) for k in range(1, 4)),
        (np.array([20, 11, 33]), np.array([0, 1, 2])),
        *((np.array([21 + k, 12 + k, 34 + k]), np.array([0, 1, 2])) for k in range(3)),
        (np.array([12, 12]), np.array([4, 3])),
        (np.array([13, 24]), np.array([4, 0])),
    ]
    for length, rows in calls:
        found = decoder.hidden(ids[rows], length, rows)
        with torch.no_grad():
            full = model.base_model(input_ids=torch.from_numpy(ids[rows])).last_hidden_state
        full = full[torch.arange(len(rows)), torch.from_numpy(length - 1)]
        torch.testing.assert_close(found, full, rtol=1e-4, atol=1e-4)


def test_the_same_tokens_with_and_without_it(
    assert_same_responses: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model("llama")
    ids = np.random.default_rng(0).integers(0, VOCAB, (6, 5))
    length, stream = np.array([5, 5, 3, 4, 5, 2]), np.arange(6)
    responses = []
    for families in ({"LlamaModel"}, set[str]()):
        monkeypatch.setattr(joined_step, "FAMILIES", families)
        policy = CausalLMPolicy(model, device="cpu", value_head=False)
        obs = {"input_ids": ids, "length": length}
        responses.append(policy.generate(obs, stream, max_new_tokens=20, stop_ids=[7]))
        decoder = policy._slot_decoder()
        assert decoder is not None
        assert (decoder.step is None) == (not families)
    assert_same_responses(policy, ids, length, stream, *responses)


def test_a_copy_in_bfloat16_has_it_too() -> None:
    policy = CausalLMPolicy(family_model("llama"), device="cpu", compute_dtype="bfloat16")
    ids = np.random.default_rng(0).integers(0, VOCAB, (4, 9))
    exact = CausalLMPolicy(family_model("llama"), device="cpu")
    for length in (5, 6, 7, 8):
        obs = {"input_ids": ids, "length": np.full(4, length)}
        hidden = policy._hidden_last(ids, obs["length"], np.arange(4)).float()
        full = exact._hidden_last(ids, obs["length"], np.arange(4))
        assert float((hidden - full).norm() / full.norm()) < 0.05
    decoder = policy._slot_decoder()
    assert decoder is not None
    assert decoder.step is not None


def test_it_follows_the_weights() -> None:
    model = family_model("qwen2")
    policy = CausalLMPolicy(model, device="cpu")
    ids, rows = np.random.default_rng(0).integers(0, VOCAB, (3, 8)), np.arange(3)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    for _ in range(2):
        policy._hidden_last(ids, np.full(3, 6), rows)
        found = policy._hidden_last(ids, np.full(3, 7), rows)
        with torch.no_grad():
            full = model.base_model(input_ids=torch.from_numpy(ids[:, :7])).last_hidden_state
        torch.testing.assert_close(found, full[:, -1], rtol=1e-4, atol=1e-4)
        for parameter in policy.parameters():
            parameter.grad = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
        optimizer.step()


def test_hooks_and_patched_modules_are_not_passed_by() -> None:
    model = family_model("llama")
    policy = CausalLMPolicy(model, device="cpu")
    ids, rows = np.random.default_rng(0).integers(0, VOCAB, (3, 8)), np.arange(3)
    policy._hidden_last(ids, np.full(3, 5), rows)
    seen: list[int] = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    policy._hidden_last(ids, np.full(3, 6), rows)
    assert seen == [1]
    handle.remove()
    policy._hidden_last(ids, np.full(3, 7), rows)
    assert seen == [1]
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: torch.zeros_like(x)
    ablated = policy._hidden_last(ids, np.full(3, 8), rows)
    policy.invalidate_cache()
    del mlp.forward
    whole = policy._hidden_last(ids, np.full(3, 8), rows)
    assert float((ablated - whole).abs().max()) > 0.1


def test_global_hooks_see_every_module() -> None:
    policy = CausalLMPolicy(family_model("llama"), device="cpu")
    ids, rows = np.random.default_rng(0).integers(0, VOCAB, (3, 8)), np.arange(3)
    policy._hidden_last(ids, np.full(3, 5), rows)
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        seen: list[str] = []
        handle = register(lambda module, *_, to=seen: to.append(type(module).__name__))
        policy._hidden_last(ids, np.full(3, 6), rows)
        handle.remove()
        assert seen.count("LlamaMLP") == 2
        policy._hidden_last(ids, np.full(3, 5), rows)


@pytest.mark.parametrize("change", ["activation", "frequencies", "wrapper", "dtype"])
def test_it_looks_at_the_model_again(change: str) -> None:
    """Weights do not tell, so `invalidate_cache` must."""

    class Twice(nn.Module):
        """Another module in the place of one that was joined."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * self.inner(x)

    model = family_model("llama")
    policy = CausalLMPolicy(model, device="cpu", value_head=False)
    ids, rows = np.random.default_rng(0).integers(0, VOCAB, (3, 8)), np.arange(3)
    for length in (5, 6):
        before = policy._hidden_last(ids, np.full(3, length), rows)
    first = model.model.layers[0]
    if change == "activation":
        first.mlp.act_fn = nn.GELU()
    elif change == "frequencies":
        model.model.rotary_emb.inv_freq.mul_(0.1)
    elif change == "wrapper":
        first.mlp = Twice(first.mlp)
    else:
        model.bfloat16()
    policy.invalidate_cache()
    policy._hidden_last(ids, np.full(3, 5), rows)
    found = policy._hidden_last(ids, np.full(3, 6), rows).float()
    with torch.no_grad():
        full = model.model(input_ids=torch.from_numpy(ids[:, :6])).last_hidden_state[:, -1].float()
    assert float((found - full).norm() / full.norm()) < (0.05 if change == "dtype" else 1e-4)
    if change != "dtype":
        assert float((found - before).norm() / full.norm()) > 0.01


def test_a_trial_that_raises_leaves_the_model_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_step, "attend", None)
    assert decoder_of(family_model("llama")).step is None


def test_what_it_is_not_made_for_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert JoinedStep.fits(family_model("llama").base_model)
    assert not JoinedStep.fits(family_model("qwen3").base_model)  # norms of queries and keys
    assert not JoinedStep.fits(family_model("gemma").base_model)
    assert not JoinedStep.fits(family_model("llama", hidden_act="gelu").base_model)
    swapped = family_model("llama").base_model

    class Doubled(nn.Linear):
        """A linear layer that does more."""

    swapped.layers[1].mlp.up_proj.__class__ = Doubled
    assert not JoinedStep.fits(swapped)
    monkeypatch.setattr(joined_step, "LARGEST", 1000)
    assert not JoinedStep.fits(family_model("llama").base_model)


@pytest.mark.parametrize("lora", [2, {"r": 2, "target_modules": ["embed_tokens"]}])
def test_adapters_are_left_to_the_model(lora: Any) -> None:
    """Those of the embedding start at zero, which shows in no trial."""
    pytest.importorskip("peft")
    policy = CausalLMPolicy(family_model("llama"), device="cpu", lora=lora)
    decoder = policy._slot_decoder()
    assert decoder is not None
    assert decoder.step is None


def test_a_model_that_does_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 1.5 * forward(self, x))
    assert decoder_of(family_model("llama")).step is None


@pytest.mark.parametrize("width", [48, 224, 896])
def test_norms_of_bfloat16_are_of_the_right_size(width: int) -> None:
    """A root that bfloat16 rounds would scale every row by the same wrong factor."""
    rows = torch.randn(64, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    floor = torch.full((1, 1), 1e-3)
    exact = rows.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    found = joined_step._normed(rows, floor)
    assert found.dtype == torch.bfloat16
    assert float((found.double() * exact).sum() / exact.square().sum()) == pytest.approx(
        1, abs=3e-4
    )
