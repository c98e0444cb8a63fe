"""Scores of whole sequences: against torch.distributions, in chunks, and blind to the padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from textgym.episodes import SequenceBatch
from textgym.policies import CausalLMPolicy, Evaluation, scoring

VOCAB = 61
M = 11


def use_blocks(tokens: int, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(scoring.BLOCK_BYTES, "cpu", tokens * 4 * VOCAB)
    patch.setattr(scoring, "BLOCK_TOKENS", 1)


def random_mask(batch: SequenceBatch, share: float = 0.3) -> torch.Tensor:
    mask = torch.rand(M, VOCAB, generator=torch.Generator().manual_seed(1)) < share
    mask[torch.arange(M), batch.ids[batch.row, batch.col]] = True
    return mask


def exact_logits(policy: CausalLMPolicy, batch: SequenceBatch) -> torch.Tensor:
    """Logits of each action token from the model's own forward over its prefix alone."""
    rows = []
    for row, col in zip(batch.row.tolist(), batch.col.tolist(), strict=True):
        with torch.no_grad():
            rows.append(policy.model(batch.ids[row : row + 1, :col]).logits[0, -1, :VOCAB])
    return torch.stack(rows).double() / policy.temperature


def loss_and_gradient(policy: CausalLMPolicy, batch: SequenceBatch) -> tuple[float, torch.Tensor]:
    policy.zero_grad()
    scored: Evaluation = policy.evaluate(batch)
    assert scored.value is not None and scored.entropy is not None
    weight = torch.linspace(-1, 1, len(batch.row))
    loss = (weight * (scored.logprob + scored.value.square() - 0.3 * scored.entropy)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradient)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_torch_distributions(
    make_model: Callable[..., Any],
    batch: SequenceBatch,
    family: str,
    temperature: float,
    masked: bool,
) -> None:
    model = make_model(family, vocab=VOCAB + 7)  # 7 surplus logits, which no score may see
    policy = CausalLMPolicy(model, vocab_size=VOCAB, device="cpu", temperature=temperature)
    logits = exact_logits(policy, batch)
    if masked:
        batch = replace(batch, action_mask=random_mask(batch))
        assert batch.action_mask is not None
        logits = logits.masked_fill(~batch.action_mask, float("-inf"))
    expected: Any = torch.distributions.Categorical(logits=logits)
    found = policy.evaluate(batch)
    action = batch.ids[batch.row, batch.col]
    assert found.logprob.dtype == torch.float32
    assert torch.allclose(found.logprob.double(), expected.log_prob(action), atol=2e-5)
    assert found.entropy is not None
    probs = expected.probs
    entropy = -torch.where(probs > 0, probs * probs.log(), 0.0).sum(-1)
    assert torch.allclose(found.entropy.double(), entropy, atol=2e-5)
    assert policy.evaluate(batch, entropy=False).entropy is None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [1, 4, M])
def test_blocks_change_neither_loss_nor_gradient(
    policy: CausalLMPolicy,
    batch: SequenceBatch,
    masked: bool,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if masked:
        batch = replace(batch, action_mask=random_mask(batch))
    whole = loss_and_gradient(policy, batch)
    assert whole[1].isfinite().all() and whole[1].abs().max() > 0
    policy.logit_chunk = 3
    use_blocks(block, monkeypatch)
    parts = loss_and_gradient(policy, batch)
    assert parts[0] == pytest.approx(whole[0], abs=1e-5)
    assert torch.allclose(parts[1], whole[1], atol=1e-4)


def test_no_more_probabilities_are_kept_than_asked_for(
    policy: CausalLMPolicy, batch: SequenceBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_blocks(2, monkeypatch)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 2 and tensor.shape[1] == VOCAB and tensor.shape[0] <= M:
            kept.append(len(tensor))
        return tensor

    for limit in (1, 3, M, None):
        policy.logit_chunk = limit
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            policy.evaluate(batch)
        assert sum(kept) == (M if limit is None else limit)
        assert max(kept) <= 2


def test_an_entropy_costs_neither_memory_nor_a_softmax(
    policy: CausalLMPolicy, batch: SequenceBatch
) -> None:
    """One [M, V] tensor is kept for the backward pass, none where tokens are computed again."""
    batch = replace(batch, action_mask=random_mask(batch))

    def run(chunk: int, **options: bool) -> tuple[Evaluation, torch.Tensor, int, int]:
        policy.logit_chunk, saved = chunk, 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            wide = tensor.ndim == 2 and tensor.shape[1] == VOCAB and len(tensor) <= M
            saved += tensor.numel() if wide and tensor.is_floating_point() else 0
            return tensor

        policy.zero_grad()
        with Softmaxes() as softmaxes:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                scored = policy.evaluate(batch, **options)
            scored.logprob.sum().backward()  # type: ignore[no-untyped-call]
        assert policy.value_head is not None
        gradient = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        return scored, torch.cat(gradient), saved, softmaxes.count

    for chunk in (M, 3):
        without, gradient, *costs = run(chunk, entropy=False)
        logged, same, *costs_logged = run(chunk, entropy_gradient=False)
        learned, _, *costs_learned = run(chunk)
        assert logged.entropy is not None and learned.entropy is not None
        assert not logged.entropy.requires_grad and learned.entropy.requires_grad
        assert torch.equal(logged.entropy, learned.entropy)
        assert torch.equal(logged.logprob, without.logprob)
        assert torch.equal(same, gradient)
        assert costs == costs_logged == costs_learned
        assert costs == ([M * VOCAB, 1] if chunk == M else [chunk * VOCAB, 3])


class Softmaxes(TorchDispatchMode):
    """Counts softmaxes over the vocabulary."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._softmax.default and args[0].shape[-1] == VOCAB
        return func(*args, **(kwargs or {}))


def test_padding_changes_neither_loss_nor_gradient(
    policy: CausalLMPolicy, batch: SequenceBatch
) -> None:
    expected = loss_and_gradient(policy, batch)
    padding = torch.arange(14) >= batch.lengths[:, None]
    for fill in (
        torch.randint(0, VOCAB, (3, 14)),
        torch.full((3, 14), -100),
        torch.full((3, 14), 10**6),
    ):
        filled = replace(batch, ids=torch.where(padding, fill, batch.ids))
        found = loss_and_gradient(policy, filled)
        assert found[0] == expected[0] and torch.equal(found[1], expected[1])
    wider = torch.cat([batch.ids, torch.full((3, 60), 7)], 1)  # beyond the context even
    found = loss_and_gradient(policy, replace(batch, ids=wider))
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])


def test_the_order_of_rows_and_the_split_do_not_matter(
    policy: CausalLMPolicy, batch: SequenceBatch
) -> None:
    expected = policy.evaluate(batch)
    order = torch.tensor([2, 0, 1])
    where = torch.argsort(order)
    turned = replace(
        batch, ids=batch.ids[order], lengths=batch.lengths[order], row=where[batch.row]
    )
    assert torch.allclose(policy.evaluate(turned).logprob, expected.logprob, atol=1e-5)
    for i in range(3):
        mine = batch.row == i
        alone = SequenceBatch(
            ids=batch.ids[i : i + 1],
            lengths=batch.lengths[i : i + 1],
            row=batch.row[mine] * 0,
            col=batch.col[mine],
        )
        assert torch.allclose(policy.evaluate(alone).logprob, expected.logprob[mine], atol=1e-5)


def test_a_batch_without_action_tokens(policy: CausalLMPolicy, batch: SequenceBatch) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    scored = policy.evaluate(replace(batch, row=none, col=none))
    assert scored.logprob.shape == (0,) and scored.entropy is not None
    assert scored.entropy.shape == (0,)


class TestKl:
    @pytest.mark.parametrize("masked", [False, True])
    def test_equals_torch_kl_div(
        self,
        make_model: Callable[..., Any],
        batch: SequenceBatch,
        family: str,
        masked: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        policy = CausalLMPolicy(make_model(family), device="cpu", temperature=1.4)
        other = CausalLMPolicy(
            make_model(family, seed=1, vocab=VOCAB + 3), vocab_size=VOCAB, device="cpu"
        )
        ours = exact_logits(policy, batch)
        theirs = exact_logits(other, batch) / 1.4  # the reference gets the policy's temperature
        if masked:
            batch = replace(batch, action_mask=random_mask(batch))
            assert batch.action_mask is not None
            ours = ours.masked_fill(~batch.action_mask, -1e30)
            theirs = theirs.masked_fill(~batch.action_mask, -1e30)
        expected = torch.nn.functional.kl_div(
            theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        for block in (4, 2048):
            use_blocks(block, monkeypatch)
            found = policy.kl(other, batch)
            assert not found.requires_grad and found.dtype == torch.float32
            assert torch.allclose(found.double(), expected, atol=1e-4, rtol=1e-4)
        assert found.min() > 0

    def test_is_zero_for_equal_weights(self, policy: CausalLMPolicy, batch: SequenceBatch) -> None:
        assert policy.kl(policy.frozen_copy(), batch).abs().max() == 0
        masked = replace(batch, action_mask=random_mask(batch))
        assert policy.kl(policy.frozen_copy(), masked).abs().max() == 0

    def test_vocabularies_must_agree(
        self, make_model: Callable[..., Any], batch: SequenceBatch, policy: CausalLMPolicy
    ) -> None:
        other = CausalLMPolicy(make_model(), vocab_size=50, device="cpu")
        with pytest.raises(ValueError, match="expected a vocabulary of 61, got 50"):
            policy.kl(other, batch)


class TestErrors:
    def test_truncated_samplers_are_not_scored(
        self, make_model: Callable[..., Any], batch: SequenceBatch
    ) -> None:
        for cut in ({"top_k": 5}, {"top_p": 0.9}):
            policy = CausalLMPolicy(make_model(), device="cpu", **cut)
            assert not policy.is_exact
            with pytest.raises(ValueError, match="leave top_k and top_p to play and evaluation"):
                policy.evaluate(batch)
            assert policy.frozen_copy().is_exact

    def test_places_that_were_never_drawn(
        self, policy: CausalLMPolicy, batch: SequenceBatch
    ) -> None:
        for row, col in ((0, 0), (1, 6)):
            wrong = replace(batch, row=torch.tensor([row]), col=torch.tensor([col]))
            with pytest.raises(ValueError, match=r"must lie at columns 1\.\.length - 1"):
                policy.evaluate(wrong)

    def test_forbidden_actions(self, policy: CausalLMPolicy, batch: SequenceBatch) -> None:
        mask = torch.ones(M, VOCAB, dtype=torch.bool)
        mask[4, batch.ids[batch.row[4], batch.col[4]]] = False
        with pytest.raises(ValueError, match=r"action token 4 .* is forbidden"):
            policy.evaluate(replace(batch, action_mask=mask))
        with pytest.raises(ValueError, match=r"expected bool \[11, 61\]"):
            policy.evaluate(replace(batch, action_mask=mask[1:]))


def test_a_policy_is_a_reference_that_a_reward_can_ask(make_model: Callable[..., Any]) -> None:
    from textgym.rewards import ReferenceLogProb, TextBatch

    policy = CausalLMPolicy(make_model("llama", vocab=VOCAB), device="cpu", temperature=0.8)
    prompts, responses = [[3, 4, 5], [6]], [[7, 8], [9, 10, 11, 12]]
    batch = TextBatch(["", ""], ["", ""], responses, prompts, [{}, {}], [None, None])
    wanted = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            scores = (policy.model(ids).logits[0, :, :VOCAB].double() / 0.8).log_softmax(-1)
        cols = range(len(prompt), ids.shape[1])
        wanted.append(sum(float(scores[c - 1, ids[0, c]]) for c in cols))
    assert ReferenceLogProb(policy).score(batch) == pytest.approx(wanted, abs=1e-4)
