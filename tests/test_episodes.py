"""`Episodes`: ragged storage, sums, and batches of whole sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textgym.episodes import Episodes


def make(lengths: list[int], gap: int = 0, masks: bool = False) -> Episodes:
    """Episodes of given action counts: prompt of b + 1 tokens, `gap` replied tokens an action."""
    total = len(lengths)
    prompts = np.arange(total) + 1
    columns = [p + np.arange(n) * (gap + 1) for p, n in zip(prompts, lengths, strict=True)]
    sizes = [int(c[-1]) + 1 for c in columns]
    count = sum(lengths)
    plain: dict[str, Any] = {
        "components": {}, "stop_reason": ["length"] * total, "texts": [""] * total,
        "prompts": [""] * total, "status": [None] * total, "traceback": None, "vocab_size": 11,
    }  # fmt: skip
    return Episodes(
        ids=np.arange(sum(sizes)) % 11,
        starts=np.concatenate([[0], np.cumsum(sizes)]),
        prompt_length=prompts,
        column=np.concatenate(columns),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        logprob=np.zeros(count, np.float32),
        value=np.zeros(count, np.float32),
        reward=np.arange(count) + 0.5,
        terminated=np.ones(total, np.bool_),
        truncated=np.zeros(total, np.bool_),
        bootstrap_value=np.zeros(total, np.float32),
        prompt_row=np.zeros(total, np.int64),
        stream=np.zeros(total, np.uint64),
        sample_index=np.zeros(total, np.int64),
        group=np.arange(total),
        weight=np.arange(total) % 2.0,
        packed_masks=np.packbits(np.arange(count * 11).reshape(count, 11) % 3 == 0, axis=1)
        if masks
        else None,
        **plain,
    )


def test_a_worked_example() -> None:
    made = make([2, 1, 3])
    assert (len(made), made.num_tokens) == (3, 6)
    assert made.lengths.tolist() == [2, 1, 3]
    assert made.scores.tolist() == [2.0, 2.5, 13.5]
    assert made.sequence(1).tolist() == [3, 4, 5]
    assert made.token_weight.tolist() == [0, 0, 1, 0, 0, 0]
    assert made.tokens([2, 0]).tolist() == [3, 4, 5, 0, 1]
    assert made.tokens([]).tolist() == []
    batch = made.batch([2, 0])
    assert batch.ids.tolist() == [[6, 7, 8, 9, 10, 0], [0, 1, 2, 0, 0, 0]]
    assert batch.lengths.tolist() == [6, 3]
    assert batch.row.tolist() == [0, 0, 0, 1, 1]
    assert batch.col.tolist() == [3, 4, 5, 1, 2]
    assert batch.action_mask is None
    assert {batch.ids.dtype, batch.lengths.dtype, batch.row.dtype, batch.col.dtype} == {torch.int64}


lengths = st.lists(st.integers(1, 6), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(0, 2), st.randoms(use_true_random=False))
def test_batches_hold_the_tokens_of_their_episodes(
    counts: list[int], gap: int, random: Any
) -> None:
    made = make(counts, gap, masks=True)
    indices = random.sample(range(len(counts)), random.randint(1, len(counts)))
    batch, tokens = made.batch(indices), made.tokens(indices)
    owner = np.repeat(np.arange(len(counts)), made.lengths)[tokens]
    assert [indices[r] for r in batch.row.tolist()] == owner.tolist()
    expected = [made.sequence(b)[c] for b, c in zip(owner, made.column[tokens], strict=True)]
    assert batch.ids[batch.row, batch.col].tolist() == expected
    beyond = torch.arange(batch.ids.shape[1]) >= batch.lengths[:, None]
    assert not batch.ids[beyond].any()
    assert batch.action_mask is not None
    whole = np.arange(made.num_tokens * 11).reshape(-1, 11) % 3 == 0
    np.testing.assert_array_equal(batch.action_mask.numpy(), whole[tokens])


@settings(max_examples=60, deadline=None)
@given(lengths)
def test_sums_do_not_depend_on_the_other_episodes(counts: list[int]) -> None:
    made = make(counts)
    values = np.where(np.arange(made.num_tokens) % 4 == 3, np.nan, 0.1 * 1e6 ** (made.reward % 2))
    spans = [values[made.offsets[b] : made.offsets[b + 1]] for b in range(len(made))]
    alone = [sum((v for v in span if not np.isnan(v)), 0.0) for span in spans]
    assert made.per_episode(values).tolist() == alone, "bit for bit: no running total"


def test_an_empty_batch_is_empty() -> None:
    batch = make([2, 1]).batch([])
    assert batch.ids.shape[0] == 0 and batch.row.numel() == 0


def test_an_unknown_episode_is_an_error() -> None:
    with pytest.raises(IndexError):
        make([2, 1]).batch([2])
