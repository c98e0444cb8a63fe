"""Prompts that are computed once: scores and gradients are those of whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from textgym.episodes import SequenceBatch
from textgym.policies import CausalLMPolicy, shared_prompts
from textgym.policies.shared_prompts import SharedPrompts, can_share

VOCAB = 61


@pytest.fixture(autouse=True)
def always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prompts, "FORWARD_TOKENS", 0)


def batch_of(prompts: list[int], responses: list[int], alike: list[int]) -> SequenceBatch:
    """Sequences of some lengths; those of one number in `alike` begin with the same prompt."""
    rng = np.random.default_rng(0)
    shared = {number: rng.integers(0, VOCAB, 40) for number in sorted(set(alike))}
    lengths = np.add(prompts, responses)
    ids = np.zeros((len(lengths), lengths.max()), np.int64)
    row, col = [], []
    for b, (prompt, response, number) in enumerate(zip(prompts, responses, alike, strict=True)):
        ids[b, :prompt] = shared[number][:prompt]
        ids[b, prompt : prompt + response] = rng.integers(0, VOCAB, response)
        row += [b] * response
        col += range(prompt, prompt + response)
    return SequenceBatch(
        ids=torch.from_numpy(ids),
        lengths=torch.from_numpy(lengths),
        row=torch.tensor(row),
        col=torch.tensor(col),
    )


GROUPS = batch_of([6] * 6, [4] * 6, [0, 0, 0, 1, 1, 1])
RAGGED = batch_of([6, 9, 6, 2, 9, 6], [4, 1, 7, 3, 5, 2], [0, 1, 0, 2, 1, 0])
REPLIES = SequenceBatch(  # tokens 8 and 9 of the first are the environment's
    ids=GROUPS.ids,
    lengths=GROUPS.lengths,
    row=torch.cat([torch.tensor([0, 0]), GROUPS.row[4:]]),
    col=torch.cat([torch.tensor([6, 7]), GROUPS.col[4:]]),
)


def scores(policy: CausalLMPolicy, batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, values, and the gradient of a sum in which every token counts."""
    policy.zero_grad()
    found = policy.evaluate(batch)
    assert found.value is not None
    weights = torch.linspace(0.5, 1.5, len(batch.row))
    (found.logprob * weights + found.value * weights).sum().backward()
    gradient = [p.grad.reshape(-1) for p in policy.parameters() if p.grad is not None]
    return found.logprob.detach(), found.value.detach(), torch.cat(gradient)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch", [GROUPS, RAGGED, REPLIES], ids=["groups", "ragged", "replies"])
def test_scores_and_gradients_are_those_of_whole_sequences(
    make_model: Callable[..., Any],
    family: str,
    batch: SequenceBatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = CausalLMPolicy(make_model(family), device="cpu")
    with torch.no_grad():
        policy.value_head.weight.fill_(0.1)  # type: ignore[union-attr]
    assert SharedPrompts.of(batch) is not None
    used: list[int] = []
    hidden = SharedPrompts.hidden
    monkeypatch.setattr(SharedPrompts, "hidden", lambda *a: used.append(1) or hidden(*a))
    together = scores(policy, batch)
    assert used == [1, 1]  # the trial, and this
    monkeypatch.setattr(SharedPrompts, "of", lambda batch: None)
    for found, expected in zip(together, scores(policy, batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_fewer_tokens_are_forwarded() -> None:
    split = SharedPrompts.of(RAGGED)
    assert split is not None
    assert split.prompts.shape == (3, 9)
    assert split.rest.shape == (6, 6)  # the last token of seven is not forwarded
    assert split.begin.tolist() == [6, 9, 6, 2, 9, 6]
    for b, owner in enumerate(split.owner.tolist()):
        begin, length = int(split.begin[b]), int(RAGGED.lengths[b])
        assert torch.equal(split.prompts[owner, :begin], RAGGED.ids[b, :begin])
        assert torch.equal(split.rest[b, : length - begin - 1], RAGGED.ids[b, begin : length - 1])


@pytest.mark.parametrize(
    "batch",
    [
        batch_of([6] * 4, [4] * 4, [0, 1, 2, 3]),  # no prompt twice
        batch_of([6] * 4, [1] * 4, [0, 0, 1, 1]),  # nothing is forwarded after the prompts
        batch_of([1, 1, 30], [40, 40, 1], [0, 0, 1]),  # padding takes more than it saves
    ],
)
def test_where_it_does_not_pay_sequences_stay_whole(batch: SequenceBatch) -> None:
    assert SharedPrompts.of(batch) is None


def test_a_second_forward_is_worth_some_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = 6 * 9 - (2 * 6 + 6 * 3)
    monkeypatch.setattr(shared_prompts, "FORWARD_TOKENS", saved - 1)
    assert SharedPrompts.of(GROUPS) is not None
    monkeypatch.setattr(shared_prompts, "FORWARD_TOKENS", saved)
    assert SharedPrompts.of(GROUPS) is None


def test_layers_that_are_computed_again_read_whole_sequences(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = CausalLMPolicy(make_model(), device="cpu")
    again = CausalLMPolicy(make_model(), device="cpu", gradient_checkpointing=True)
    with monkeypatch.context() as patched:
        patched.setattr(SharedPrompts, "hidden", None)
        found = scores(again, GROUPS)
    for ours, theirs in zip(found, scores(plain, GROUPS), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # nothing is computed again
        torch.testing.assert_close(again.evaluate(GROUPS).logprob, found[0], rtol=1e-4, atol=1e-4)


def test_adapters_and_their_reference(make_model: Callable[..., Any]) -> None:
    pytest.importorskip("peft")
    policy = CausalLMPolicy(make_model(), device="cpu", lora=2)
    reference = policy.frozen_copy()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    with torch.no_grad():
        ours, theirs = policy.evaluate(GROUPS).logprob, reference.evaluate(GROUPS).logprob
    assert float((ours - theirs).abs().max()) > 0.1
    plain = CausalLMPolicy(make_model(), device="cpu")
    with torch.no_grad():
        expected = plain.evaluate(GROUPS).logprob
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    assert float(policy.kl(reference, GROUPS).min()) > 0.0


def test_in_bfloat16(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = CausalLMPolicy(make_model(), device="cpu", compute_dtype="bfloat16")
    exact = CausalLMPolicy(make_model(), device="cpu")
    wanted = scores(exact, RAGGED)
    together = scores(policy, RAGGED)
    monkeypatch.setattr(SharedPrompts, "of", lambda batch: None)
    whole = scores(policy, RAGGED)
    for found, plain, want in zip(together, whole, wanted, strict=True):
        assert float((found - want).norm()) <= 2.0 * float((plain - want).norm()) + 1e-6


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_responses_of_two_tokens_in_bfloat16(
    make_model: Callable[..., Any], weights: torch.dtype
) -> None:
    """After the prompts there is one token a row, with a mask that is added."""
    short = batch_of([6] * 6, [2] * 6, [0, 0, 0, 1, 1, 1])
    assert SharedPrompts.of(short) is not None
    model = make_model().to(weights)
    compute = "bfloat16" if weights == torch.float32 else None
    policy = CausalLMPolicy(model, device="cpu", compute_dtype=compute)
    exact = CausalLMPolicy(make_model(), device="cpu")
    gap = policy.evaluate(short).logprob - exact.evaluate(short).logprob
    assert float(gap.detach().abs().max()) < 0.3


def test_padding_has_no_positions_beyond_the_context(make_model: Callable[..., Any]) -> None:
    uneven = batch_of([30] * 20 + [10] * 40, [2] * 20 + [22] * 40, [0] * 20 + [1] * 40)
    policy = CausalLMPolicy(make_model("gpt2", max_positions=32), device="cpu")
    assert SharedPrompts.of(uneven) is not None
    assert bool(policy.evaluate(uneven).logprob.isfinite().all())


def test_models_are_asked(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_share(make_model().base_model, VOCAB)
    assert not can_share(make_model(attention="eager").base_model, VOCAB)
    monkeypatch.setattr(SharedPrompts, "_mask", lambda self, dtype: None)
    assert not can_share(make_model().base_model, VOCAB)  # padding is seen
