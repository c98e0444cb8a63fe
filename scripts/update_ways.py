"""The ways to do one update that `bench_update.py` compares, on the same sequences.

`full` and `selective` are what others do, written here in a few lines; `ours` is what the agents
call; `packed` is what they could do instead of padding.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from textgym.episodes import Episodes, SequenceBatch
from textgym.learning import GuardedOptimizer, microbatches
from textgym.losses import clipped_surrogate_loss, token_weights
from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.policies.scoring import score_tokens

PROMPT, CLIP, LR = 16, 0.2, 1e-5


@dataclass(frozen=True)
class Problem:
    """What is updated, and on what."""

    sequences: int = 32
    """Sequences of an update."""
    response_tokens: int = 64
    """Longest response; prompts have 16 tokens."""
    hidden_size: int = 256
    """Width of the model; its feed-forward layers are four times as wide."""
    num_layers: int = 6
    """Layers of the model."""
    microbatch: int = 8
    """Sequences in one forward, where the variant says so."""
    packed_row: int = 256
    """Longest row of `packed rows`."""
    bf16: bool = True
    """Also compute in bfloat16."""
    device: str = "cpu"
    """Where the model runs."""


@dataclass(frozen=True)
class Variant:
    """One way to do an update."""

    name: str
    gradient: Callable[[Work], None]
    bf16: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of CausalLMPolicy; empty with `plain`."""
    plain: bool = False
    """The model as transformers makes it, and the optimizer as torch does."""


class Work:
    """The sequences, the model and the optimizer of one process."""

    def __init__(self, variant: Variant, vocab_size: int, ragged: bool, args: Problem) -> None:
        """Make what is the same in every process, and what is the variant's."""
        self.args, self.device = args, torch.device(args.device)
        model: Any = random_causal_lm(
            vocab_size,
            hidden_size=args.hidden_size,
            num_layers=args.num_layers,
            num_heads=4,
            intermediate_size=4 * args.hidden_size,
            max_positions=PROMPT + args.response_tokens,
        )
        self.dtype = torch.bfloat16 if variant.bf16 else None
        self.policy: Any = None
        if not variant.plain:
            self.policy = CausalLMPolicy(
                model,
                value_head=False,
                device=args.device,
                compute_dtype=self.dtype,
                **variant.options,
            )
        self.model = model.to(self.device)
        self.episodes = made_up(vocab_size, ragged, args)
        self.everything = np.arange(args.sequences)
        rng = np.random.default_rng(1)
        offsets = self.episodes.offsets
        advantage = np.repeat(rng.standard_normal(args.sequences), np.diff(offsets))
        weights = token_weights(offsets, np.ones(args.sequences), "sequence")
        self.advantage, self.weight = (
            torch.as_tensor(x, dtype=torch.float32, device=self.device)
            for x in (advantage, weights)
        )
        self.whole = on(self.episodes.batch(self.everything), self.device)
        self.old = self._old()
        if variant.plain:
            self.adam = torch.optim.AdamW(self.model.parameters(), lr=LR, eps=1e-5, fused=True)
        else:
            self.guarded = GuardedOptimizer(self.policy, lr=LR, max_grad_norm=1.0)

    @torch.no_grad()
    def _old(self) -> Tensor:
        """Log-probabilities before the first step, a sequence at a time: little memory."""
        found = []
        for b in self.everything:
            one = on(self.episodes.batch([b]), self.device)
            logits = self.model(input_ids=one.ids, use_cache=False).logits[0, one.col - 1]
            found.append(-F.cross_entropy(logits, one.ids[0, one.col], reduction="none"))
        return torch.cat(found)

    def autocast(self) -> AbstractContextManager[Any]:
        """What plain forwards run in."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()

    def backward(self, logprob: Tensor, tokens: Any = slice(None)) -> None:
        """The loss that all share, of some of the tokens, and its gradient."""
        old, advantage, weight = (x[tokens] for x in (self.old, self.advantage, self.weight))
        clipped_surrogate_loss(logprob, old, advantage, weight, clip_coef=CLIP).loss.backward()

    def step(self) -> float:
        """Clip the gradient and step; the norm before clipping."""
        if self.policy is not None:
            return float(self.guarded.step(0.0))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adam.step()
        self.adam.zero_grad()
        return float(norm)


def on(batch: SequenceBatch, device: torch.device) -> SequenceBatch:
    """A batch on a device."""
    fields = {k: v if v is None else v.to(device) for k, v in vars(batch).items()}
    return SequenceBatch(**fields)


def made_up(vocab_size: int, ragged: bool, args: Problem) -> Episodes:
    """Episodes of random ids, with what an update reads of them."""
    rng, count = np.random.default_rng(0), args.sequences
    lengths = np.full(count, args.response_tokens)
    if ragged:
        lengths = rng.integers(1, args.response_tokens + 1, size=count)
    starts, offsets = (np.concatenate([[0], np.cumsum(n)]) for n in (lengths + PROMPT, lengths))
    total, nothing = int(offsets[-1]), np.zeros(count)
    return Episodes(
        ids=rng.integers(vocab_size, size=int(starts[-1])),
        starts=starts,
        prompt_length=np.full(count, PROMPT),
        column=np.concatenate([PROMPT + np.arange(n) for n in lengths]),
        offsets=offsets,
        logprob=np.zeros(total, np.float32),
        value=np.zeros(total, np.float32),
        reward=np.zeros(total),
        components={},
        terminated=np.ones(count, np.bool_),
        truncated=np.zeros(count, np.bool_),
        bootstrap_value=nothing.astype(np.float32),
        stop_reason=["length"] * count,
        texts=[""] * count,
        prompts=[""] * count,
        prompt_row=np.arange(count),
        stream=np.arange(count).astype(np.uint64),
        sample_index=np.zeros(count, np.int64),
        group=np.arange(count),
        weight=np.ones(count),
        status=[None] * count,
        traceback=None,
        packed_masks=None,
        vocab_size=vocab_size,
    )


# ------------------------------------------------------------------------------------ the ways


def inside(batch: SequenceBatch) -> Tensor:
    """The attention mask of padded sequences, int64 [B, T]."""
    columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    return (columns < batch.lengths[:, None]).long()


def full(work: Work) -> None:
    """Logits [B, T, V] and cross-entropy; padding is scored and left out afterwards."""
    batch = work.whole
    with work.autocast():
        logits = work.model(input_ids=batch.ids, attention_mask=inside(batch)).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none"
        )
    work.backward(-loss.view(len(batch.ids), -1)[batch.row, batch.col - 1])


def selective(work: Work) -> None:
    """Logits of the responses, gathered, less the logsumexp row by row; entropy is logged."""
    batch, keep = work.whole, work.whole.ids.shape[1] - PROMPT
    with work.autocast():
        logits = work.model(
            input_ids=batch.ids, attention_mask=inside(batch), logits_to_keep=keep + 1
        ).logits[:, :-1]
    logits = logits.float()
    chosen = logits.gather(-1, batch.ids[:, PROMPT:, None])[..., 0]
    logprob = chosen - torch.stack([row.logsumexp(-1) for row in logits])
    with torch.no_grad():
        for some in logits.flatten(0, 1).split(128):
            log_p = some.log_softmax(-1)
            (log_p.exp() * log_p).sum(-1)
    work.backward(logprob[batch.row, batch.col - PROMPT])


def forwards(work: Work, size: int | None) -> None:
    """What the agents do: forwards of similar lengths, of at most `size` sequences."""
    for part in microbatches(work.everything, work.episodes, size, work.policy.forward_tokens):
        tokens = torch.from_numpy(work.episodes.tokens(part)).to(work.device)
        scored = work.policy.evaluate(work.episodes.batch(part), entropy_gradient=False)
        work.backward(scored.logprob, tokens)


def ours(work: Work) -> None:
    """As many forwards as the library finds best."""
    forwards(work, None)


def microbatched(work: Work) -> None:
    """Few sequences a forward."""
    forwards(work, work.args.microbatch)


def one_forward(work: Work) -> None:
    """All sequences in one forward, padded to the longest."""
    batch = work.episodes.batch(work.everything)
    work.backward(work.policy.evaluate(batch, entropy_gradient=False).logprob)


def packed(work: Work, width: int) -> None:
    """Sequences one after another in rows of at most `width`, each attending to itself only."""
    episodes, device = work.episodes, work.device
    lengths = np.diff(episodes.starts)
    rows: list[list[int]] = []
    room: list[int] = []
    for b in np.argsort(-lengths, kind="stable").tolist():  # the first row with room for it
        fits = [r for r, free in enumerate(room) if free >= lengths[b]]
        if not fits:
            rows.append([])
            room.append(width)
            fits = [len(rows) - 1]
        rows[fits[0]].append(b)
        room[fits[0]] -= int(lengths[b])
    longest = width - min(room)
    ids, position, owner = np.zeros((3, len(rows), longest), np.int64)
    owner -= 1
    where, order = [], []
    for r, members in enumerate(rows):
        begin = 0
        for b in members:
            span = slice(begin, begin + int(lengths[b]))
            ids[r, span], position[r, span] = episodes.sequence(b), np.arange(lengths[b])
            owner[r, span] = b
            where.append(r * longest + begin + episodes.column[episodes.tokens([b])])
            order.append(b)
            begin = span.stop
    of, at = torch.from_numpy(owner).to(device), torch.arange(longest, device=device)
    mask = (of[:, :, None] == of[:, None, :]) & (at[:, None] >= at)
    tokens = torch.from_numpy(ids).to(device)
    with work.autocast():
        hidden = work.policy.model.base_model(
            input_ids=tokens,
            attention_mask=mask[:, None],
            position_ids=torch.from_numpy(position).to(device),
            use_cache=False,
        ).last_hidden_state
    columns = torch.from_numpy(np.concatenate(where)).to(device)
    logprob, _ = score_tokens(
        hidden.flatten(0, 1)[columns - 1],
        work.policy._all_logits,
        tokens.flatten()[columns],
        vocab_size=work.policy.vocab_size,
        entropy_gradient=False,
    )
    work.backward(logprob, torch.from_numpy(episodes.tokens(order)).to(device))


def packed_whole(work: Work) -> None:
    """All sequences in one row."""
    packed(work, int(work.episodes.starts[-1]))


def packed_rows(work: Work) -> None:
    """Sequences packed into rows of a few times the longest."""
    packed(work, work.args.packed_row)


def variants(ragged: bool, args: Problem) -> list[Variant]:
    """The lines of a table."""
    if ragged:
        return [
            Variant("selective", selective, plain=True),
            Variant("ours, padded", one_forward),
            Variant("ours", ours),
            Variant("packed, one row", packed_whole),
            Variant("packed rows", packed_rows),
        ]
    lines = [
        Variant("full", full, plain=True),
        Variant("selective", selective, plain=True),
        Variant("same layers", selective),
        Variant("ours", ours),
        Variant("ours, microbatches", microbatched),
        Variant("ours, checkpointing", ours, options={"gradient_checkpointing": True}),
    ]
    if args.bf16:
        lines += [
            Variant("full, bf16", full, True, plain=True),
            Variant("selective, bf16", selective, True, plain=True),
            Variant("ours, bf16", ours, True),
        ]
    return lines
