"""`Episodes`: ragged storage, sums, and batches of whole sequences."""

from __future__ import annotations

import dataclasses
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


def equal(a: Episodes, b: Episodes) -> bool:
    """Whether two collections hold the same, fields of every kind."""

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, dict):
            return list(x) == list(y) and all(same(x[k], y[k]) for k in x)
        if isinstance(x, np.ndarray):
            return x.dtype == y.dtype and np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
        return bool(x == y)

    return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Episodes))


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=9),
    cut=st.integers(0, 9),
    gap=st.integers(0, 2),
    masks=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_taking_apart_and_joining_gives_it_back(
    lengths: list[int], cut: int, gap: int, masks: bool
) -> None:
    whole = make(lengths, gap, masks)
    whole.components = {"a": np.arange(sum(lengths)) * 1.0}
    everything = np.arange(len(lengths))
    assert equal(whole.take(everything), whole)
    parts = [whole.take(everything[:cut]), whole.take(everything[cut:])]
    parts[1].group = parts[1].group - parts[1].group.min(initial=99)  # of its own, from 0
    assert equal(Episodes.join(parts), whole)
    back = whole.take(everything[::-1])
    assert [back.sequence(k).tolist() for k in everything] == [
        whole.sequence(int(k)).tolist() for k in everything[::-1]
    ]
    assert np.array_equal(back.scores, whole.scores[::-1])


def test_joining_fills_the_parts_of_a_reward_that_one_lacks() -> None:
    one, other = make([1, 1]), make([2])
    one.components, other.components = {"a": np.ones(2)}, {"b": np.ones(2)}
    joined = Episodes.join([one, other])
    assert np.array_equal(joined.components["a"], [1, 1, np.nan, np.nan], equal_nan=True)
    assert np.array_equal(joined.components["b"], [np.nan, np.nan, 1, 1], equal_nan=True)
    assert joined.group.tolist() == [0, 1, 2]


def test_what_does_not_fit_is_not_joined() -> None:
    with pytest.raises(ValueError, match="at least one part"):
        Episodes.join([])
    with pytest.raises(ValueError, match="all with action masks or all without"):
        Episodes.join([make([1]), make([1], masks=True)])
