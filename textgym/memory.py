"""How much memory a run will need, found by running it without any.

A policy with fake weights (`textgym.weightless`) is let do once what a run does over and over: read
prompts and decode a token, score sequences by the reference, forward and backward of an update, an
optimizer step. It is the code that trains, so there is no formula for a family of models that could
fall behind: attention, oneDNN's layers, blocks of logits, checkpointing, autocast, adapters and the
optimizer are counted as they are, and the most that exists at once is what they add up to then.

    learning  = weights + reference + gradients + moments + acting copy + (kept + passing)
    sampling  = weights + reference + moments + acting copy + cache + max(prefill, decoding step)
    cache     = 2 x layers x rows N x heads x (columns L + 1) x head size x bytes of a number

Shapes: N rows, L columns, B episodes, T tokens, M action tokens, V vocabulary.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from textgym.episodes import SequenceBatch
from textgym.learning import GuardedOptimizer, microbatches
from textgym.returns import IntArray
from textgym.weightless import FAKE, LiveBytes, fake_weights

if TYPE_CHECKING:
    from textgym.policies import CausalLMPolicy


def episode_bytes(tokens: int, actions: int, components: int, vocab_size: int = 0) -> int:
    """Bytes of RAM of a rollout, while it is collected and learned from.

        8 tokens + (24 + 8 components + ceil(V / 8)) actions

    are those of `Episodes`. They exist twice while a rollout's steps are put in order, and then
    as numbers that an update is computed from.

    Args:
        tokens: Of all sequences, prompts included.
        actions: Of them, those that the policy chose.
        components: Parts of the reward.
        vocab_size: V, where tokens are forbidden; else 0.
    """
    return 2 * (8 * tokens + (24 + 8 * components + -(-vocab_size // 8)) * actions)


@dataclass(frozen=True)
class Workload:
    """What is done with a policy."""

    prompts: IntArray
    """Tokens of the prompts of a batch [B], groups one after another."""
    responses: IntArray
    """Tokens of the responses that are learned from [B]."""
    budget: int
    """Tokens of a response that is sampled, at most."""
    columns: int
    """L, the longest sequence that an observation holds."""
    rows: int
    """Rows N that decode at once."""
    group_size: int = 1
    """Responses to one prompt, which is read once."""
    learned: int | None = None
    """How many of the B sequences are learned from; None: all."""
    minibatches: int = 1
    """Gradient steps of a pass."""
    microbatch: int | None = None
    """Sequences in one forward; None: a minibatch."""
    entropy_gradient: bool = False
    """Whether the loss has an entropy bonus."""
    scored: bool = True
    """Whether the reference scores every rollout."""
    exact_kl: int = 0
    """Sequences of a rollout whose divergence from the reference is computed."""
    measured: int = 0
    """Sequences of a forward when the policy is measured before and after training."""
    masks: bool = False
    """Whether tokens are forbidden."""

    def widest(self, policy: CausalLMPolicy, count: int, step: int = 1) -> tuple[IntArray, int]:
        """The forward with the most padded tokens of those that `microbatches` makes of sequences.

        Args:
            policy: Forwards them.
            count: How many of the sequences.
            step: Take one in so many of them.

        Returns:
            The sequences of that forward, and how many forwards there are.
        """
        chosen = np.arange(min(count, len(self.prompts)))[::step]
        lengths = (self.prompts + self.responses)[chosen]
        like: Any = SimpleNamespace(
            starts=np.concatenate([[0], np.cumsum(lengths)]),
            prompt_length=self.prompts[chosen],
            group=chosen // self.group_size,
        )
        parts = list(
            microbatches(np.arange(len(lengths)), like, self.microbatch, policy.forward_tokens)
        )
        widest = max(parts, key=lambda part: len(part) * int(lengths[part].max()))
        return chosen[widest], len(parts)

    def sampled(self, count: int) -> Workload:
        """As many sequences, with responses as long as they may be."""
        prompts = np.resize(self.prompts, count)
        return replace(self, prompts=prompts, responses=np.full(count, self.budget))

    def batch(self, chosen: IntArray, policy: CausalLMPolicy) -> SequenceBatch:
        """Some of the sequences, for `evaluate`."""
        prompts, responses = self.prompts[chosen], self.responses[chosen]
        lengths = prompts + responses
        row = np.repeat(np.arange(len(chosen)), responses)
        first = np.cumsum(responses) - responses
        col = np.arange(len(row)) - first[row] + prompts[row]
        ids = np.zeros((len(chosen), int(lengths.max())), np.int64)
        ids[:, 0] = chosen // self.group_size  # prompts of a group are the same, others differ
        return SequenceBatch(
            ids=torch.from_numpy(ids),
            lengths=torch.from_numpy(lengths),
            row=torch.from_numpy(row),
            col=torch.from_numpy(col),
            action_mask=_mask(len(row), policy, "cpu") if self.masks else None,
        )


@dataclass
class Footprint:
    """Bytes on the policy's device."""

    parameters: int = 0
    """Weights, value head and adapters."""
    reference: int = 0
    """Weights of the reference that are not the policy's own."""
    gradients: int = 0
    """One number for each weight that is trained."""
    optimizer: int = 0
    """Adam's moments."""
    acting: int = 0
    """Copy of the weights in the dtype that the policy acts in."""
    cache: int = 0
    """Keys and values of all rows."""
    cache_shape: tuple[int, ...] = ()
    """Layers, 2, rows, heads, columns, head size."""
    prefill: int = 0
    """What reading the prompts takes beside the cache."""
    decode: int = 0
    """What decoding takes beside the cache: hidden states, logits, the sampler's sums, joined
    weights (see `policies.joined_step`)."""
    scoring: int = 0
    """What forwards without gradient take: log-probabilities of the reference, exact KL."""
    forward: tuple[int, int] = (0, 0)
    """Sequences and padded length of the largest forward of an update."""
    activations: int = 0
    """What it keeps in the layers for the backward pass: hidden states, attention, MLP."""
    probabilities: int = 0
    """What it keeps of the action tokens' distributions."""
    passing: int = 0
    """What comes on top of both for a moment, in the forward or in the backward pass."""
    peaks: dict[str, int] = field(default_factory=dict)
    """The most that exists at once while a run samples, learns, and is measured or saved."""
    ram: dict[str, int] = field(default_factory=dict)
    """The same with the holes that malloc leaves, for a policy on a CPU."""

    @property
    def weights(self) -> int:
        """What is there all the time, once the optimizer has made a step."""
        return self.parameters + self.reference + self.optimizer + self.acting


def predict(
    policy: CausalLMPolicy,
    reference: CausalLMPolicy | None,
    optimizer: GuardedOptimizer,
    work: Workload,
) -> Footprint:
    """Predict what a run takes once the optimizer has its state, which is after the first step.

    Args:
        policy: Made by `without_storage`.
        reference: Its frozen copy, if there is one.
        optimizer: Of its weights.
        work: What the run does.
    """
    with LiveBytes(policy.device.type) as live, fake_weights():
        trial = _Trial(live, policy, reference, optimizer, work)
        phases = {"sampling": live.most(trial.sample)}
        if reference is not None and work.measured:
            phases["measuring"] = live.most(trial.measure)
        # A captured step keeps its memory and the cache.
        graphs = policy.device.type == "cuda" and bool(policy.cuda_graphs)
        if not graphs:
            policy.invalidate_cache()
        gc.collect()
        phases["learning"] = live.most(trial.learn)
        policy.invalidate_cache()
    found = trial.found
    found.peaks = {n: most.tensors + graphs * found.decode for n, most in phases.items()}
    found.ram = {n: most.ram for n, most in phases.items()}
    if found.gradients < found.parameters // 2:  # adapters are merged into a copy of the weights
        found.peaks["saving"] = found.ram["saving"] = found.weights + found.parameters
    return found


class _Trial:
    """Does once what a run does, and writes down what it takes."""

    def __init__(
        self,
        live: LiveBytes,
        policy: CausalLMPolicy,
        reference: CausalLMPolicy | None,
        optimizer: GuardedOptimizer,
        work: Workload,
    ) -> None:
        self.live, self.policy, self.reference = live, policy, reference
        self.optimizer, self.work, self.found = optimizer, work, Footprint()
        self.found.parameters = live.take_in(policy)
        if reference is not None:
            self.found.reference = live.take_in(reference)
        before = live.now
        for parameter in optimizer.parameters:
            parameter.grad = torch.empty_like(parameter)
        self.found.gradients = live.now - before
        optimizer.step(0.0)
        self.found.optimizer = live.now - before
        live.settle()

    @torch.inference_mode()
    def sample(self) -> None:
        """Read the prompts of all rows; then the last of the decoding steps."""
        live, policy, work, found = self.live, self.policy, self.work, self.found
        before = live.now
        decoder = policy._slot_decoder()
        gc.collect()
        found.acting = 0 if policy.compute_dtype is None else live.now - before
        rows = np.arange(work.rows)
        length = np.resize(work.prompts, work.rows)
        last = length + work.budget - 1
        ids = np.zeros((work.rows, work.columns), np.int64)
        ids[:, 0] = rows // work.group_size
        token = torch.zeros(work.rows, dtype=torch.int64, device=policy.device)
        mask = _mask(work.rows, policy, policy.device) if work.masks else None

        def draw(hidden: Tensor) -> None:
            policy._draw(hidden, token, mask)

        with policy._forward_mode():
            before = live.now
            if decoder is None:  # a full forward for every token
                most = live.most(lambda: draw(policy._hidden_last(ids, last, rows))).tensors
            else:
                prefill = live.most(lambda: draw(policy._hidden_last(ids, length, rows))).tensors
                layers = decoder.store.slot_layers
                keys = layers[0].keys
                assert keys is not None
                found.cache_shape = (len(layers), 2, *keys.shape)
                found.cache = 2 * len(layers) * keys.nbytes
                found.prefill = prefill - live.now
                before = live.now
                decoder.held[rows] = last
                most = live.most(lambda: draw(decoder.append(token, rows))).tensors
            found.decode = most - before

    def measure(self) -> None:
        """What `train` asks about samples before and after training."""
        work = self.work.sampled(self.work.measured)
        self._compare(np.arange(len(work.prompts)), work, exact=True)

    def _score(self) -> None:
        """What is asked of the reference about a rollout."""
        work, policy = self.work, self.policy
        self._compare(work.widest(policy, len(work.prompts))[0], work, exact=False)
        if work.exact_kl:
            self._compare(work.widest(policy, work.exact_kl)[0], work, exact=True)

    @torch.no_grad()
    def _compare(self, chosen: IntArray, work: Workload, *, exact: bool) -> None:
        assert self.reference is not None
        batch = work.batch(chosen, self.policy)
        self.reference.evaluate(batch, entropy=False)
        if exact:
            self.policy.kl(self.reference, batch)

    def learn(self) -> None:
        """Scores of the reference; forward and backward of the largest part, and a step."""
        live, policy, work, found = self.live, self.policy, self.work, self.found
        if self.reference is not None and work.scored:
            before = live.now
            found.scoring = live.most(self._score).tensors - before
        count = len(work.prompts) if work.learned is None else work.learned
        chosen, forwards = work.widest(policy, count, work.minibatches)
        batch = work.batch(chosen, policy)
        found.forward = (batch.ids.shape[0], batch.ids.shape[1])
        before = live.now
        with policy._forward_mode():
            hidden = policy._decisions(batch, share=True)
        found.activations = live.now - before
        del hidden

        def forward_backward() -> None:
            scored = policy.evaluate(batch, entropy_gradient=work.entropy_gradient)
            loss = scored.logprob.sum()
            if scored.value is not None:
                loss = loss + scored.value.sum()
            if work.entropy_gradient and scored.entropy is not None:
                loss = loss + scored.entropy.sum()
            found.probabilities = live.now - before - found.activations
            loss.backward()  # type: ignore[no-untyped-call]

        for _ in range(min(2, forwards)):  # from the second on there are gradients
            before = live.now
            found.passing = live.most(forward_backward).tensors - before
        found.passing -= found.activations + found.probabilities
        self.optimizer.step(0.0)


def _mask(rows: int, policy: CausalLMPolicy, device: torch.device | str) -> Tensor:
    with FAKE:
        return torch.ones(rows, policy.vocab_size, dtype=torch.bool, device=device)
