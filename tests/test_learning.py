import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from textgym.episodes import FORWARD_LIMIT, FORWARD_TOKENS, Episodes
from textgym.learning import (
    SHARED,
    GuardedOptimizer,
    NonFiniteError,
    UnscoredError,
    check_scored,
    learning_rate,
    microbatches,
)
from textgym.metrics import Tally, finite_means, rollout_metrics, sample_records, spread
from textgym.shaping import RewardScale, learned_weights, shape_rewards
from textgym.tokens import symbol_tokenizer


def episodes(**changes: Any) -> Episodes:
    """Three episodes of 2, 1 and 3 action tokens after prompts of one token; the second failed."""
    lengths = [2, 1, 3]
    fields: dict[str, Any] = {
        "ids": np.array([3, 0, 1, 3, 2, 3, 0, 0, 4]),
        "starts": np.array([0, 3, 5, 9]),
        "prompt_length": np.array([1, 1, 1]),
        "column": np.array([1, 2, 1, 1, 2, 3]),
        "offsets": np.array([0, 2, 3, 6]),
        "logprob": np.full(6, -1.0, np.float32),
        "value": np.zeros(6, np.float32),
        "reward": np.array([0.25, 1.0, 0.0, 0.0, 0.0, 0.5]),
        "components": {
            "bleu": np.array([0.25, 1.0, np.nan, np.nan, np.nan, 0.5]),
            "rare": np.array([np.nan] * 5 + [4.0]),
        },
        "terminated": np.ones(3, bool),
        "truncated": np.zeros(3, bool),
        "bootstrap_value": np.zeros(3, np.float32),
        "stop_reason": ["length", "length", "stop_id"],
        "texts": ["a b", "c", "a a"],
        "prompts": ["d", "d", "d"],
        "prompt_row": np.zeros(3, np.int64),
        "stream": np.zeros(3, np.uint64),
        "sample_index": np.zeros(3, np.int64),
        "group": np.arange(3),
        "weight": np.array([1.0, 0.0, 1.0]),
        "status": [None, "error: ValueError: boom", None],
        "traceback": "Traceback: boom",
        "packed_masks": None,
        "vocab_size": 6,
    }
    assert sum(lengths) == 6
    return Episodes(**(fields | changes))


def test_shaped_rewards_by_hand() -> None:
    kl = np.array([1.0, 2.0, 0.0, -1.0, 0.0, 4.0])
    got = shape_rewards(episodes(), kl, beta=0.5)
    np.testing.assert_allclose(got, [-0.25, 0.0, 0.0, 0.5, 0.0, -1.5])
    scale = RewardScale()
    scale.mean, scale.std = 1.0, 2.0
    got = shape_rewards(episodes(), None, beta=0.5, scale=scale, cut_penalty=3.0)
    np.testing.assert_allclose(got, [0.125, (1 - 3 - 1) / 2, (0 - 3 - 1) / 2, 0, 0, -0.25])
    np.testing.assert_array_equal(episodes().reward, [0.25, 1.0, 0.0, 0.0, 0.0, 0.5])


def test_a_truncated_episode_has_no_outcome_to_centre() -> None:
    """Its value, which is learned from shaped rewards, is less the mean already."""
    scale = RewardScale()
    scale.mean, scale.std = 1.0, 2.0
    ended = np.array([True, True, False])
    batch = episodes(terminated=ended, truncated=~ended)
    got = shape_rewards(batch, None, beta=0.0, scale=scale)
    np.testing.assert_allclose(got, [0.125, 0.0, -0.5, 0.0, 0.0, 0.25])


def test_shaping_keeps_the_score_minus_the_price() -> None:
    """Summed over a response: (score - mean) / std - beta * log ratio of the response."""
    batch, kl = episodes(), np.random.default_rng(0).normal(size=6)
    scale = RewardScale()
    scale.fit(batch.scores, batch.weight)
    sums = batch.per_episode(shape_rewards(batch, kl, beta=0.3, scale=scale))
    expected = (batch.scores - scale.mean) / scale.std - 0.3 * batch.per_episode(kl)
    np.testing.assert_allclose(sums, expected)
    assert (scale.mean, scale.std) == (0.875, 0.375)  # of 1.25 and 0.5; the unscored one is out


def test_learned_weights() -> None:
    np.testing.assert_array_equal(learned_weights(episodes(), "keep"), [1, 0, 1])
    np.testing.assert_array_equal(learned_weights(episodes(), "mask"), [0, 0, 1])


def test_too_many_unscored() -> None:
    with pytest.raises(UnscoredError, match=r"1 of 3 .* boom \(1\)") as error:
        check_scored(episodes())
    assert "Traceback: boom" in str(error.value)
    check_scored(episodes(), limit=1 / 3)


@given(st.sets(st.integers(0, 2), min_size=1), st.one_of(st.none(), st.integers(1, 4)))
def test_microbatches_are_a_partition(chosen: set[int], size: int | None) -> None:
    parts = list(microbatches(np.array(sorted(chosen)), episodes(), size, FORWARD_LIMIT))
    assert sorted(np.concatenate(parts).tolist()) == sorted(chosen)
    assert all(0 < len(part) <= (size or 3) for part in parts)


@given(
    lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=7),
    size=st.one_of(st.none(), st.integers(1, 4)),
)
def test_no_split_of_the_sorted_sequences_is_cheaper(lengths: list[int], size: int | None) -> None:
    number = len(lengths)
    ragged = like(lengths, [0] * number, range(number))
    parts = list(microbatches(np.arange(number), ragged, size, FORWARD_LIMIT))
    assert sorted(np.concatenate(parts).tolist()) == list(range(number))

    def cost(split: list[list[int]]) -> int:
        return sum(FORWARD_TOKENS + len(part) * max(part) for part in split)

    falling = sorted(lengths, reverse=True)
    splits = []
    for cuts in itertools.product([False, True], repeat=number - 1):
        ends = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), number]
        split = [falling[a:b] for a, b in itertools.pairwise(ends)]
        fits = all(len(p) == 1 or len(p) * max(p) <= FORWARD_LIMIT for p in split)
        if fits and (size is None or max(map(len, split)) <= size):
            splits.append(cost(split))
    assert cost([[lengths[k] for k in part] for part in parts]) == min(splits)


def test_too_many_tokens_are_split_evenly() -> None:
    alike = like([80] * 64, [16] * 64, range(64))
    parts = list(microbatches(np.arange(64), alike, None, FORWARD_LIMIT))
    assert [len(part) for part in parts] == [32, 32]
    grouped = like([80] * 64, [16] * 64, np.arange(64) // 8)
    parts = list(microbatches(np.arange(64), grouped, None, FORWARD_LIMIT))
    assert [part.tolist() for part in parts] == [[*range(32)], [*range(32, 64)]]


@given(
    groups=st.lists(
        st.tuples(st.integers(1, 1500), st.lists(st.integers(1, 400), min_size=1, max_size=4)),
        min_size=1,
        max_size=3,
    ),
    size=st.one_of(st.none(), st.integers(1, 4)),
)
def test_no_split_of_the_groups_is_cheaper(
    groups: list[tuple[int, list[int]]], size: int | None
) -> None:
    rows = [(g, prompt, n) for g, (prompt, rests) in enumerate(groups) for n in rests]
    rows = [rows[k] for k in np.random.default_rng(len(rows)).permutation(len(rows))]
    number = len(rows)
    group, prompt, rest = np.array(rows).T
    parts = list(
        microbatches(np.arange(number), like(prompt + rest, prompt, group), size, FORWARD_LIMIT)
    )
    assert sorted(np.concatenate(parts).tolist()) == list(range(number))

    def tokens(part: Any, *, shared: bool) -> int:
        whole = len(part) * int((prompt + rest)[part].max())
        if not shared:
            return whole
        longest, after = int(prompt[part].max()), int(rest[part].max())
        split = len(set(group[part])) * longest + len(part) * after
        fits = len(part) * (longest + after) <= SHARED * FORWARD_LIMIT
        return split if fits and split + FORWARD_TOKENS < whole else whole

    def cost(split: list[Any], *, shared: bool) -> float:
        return sum(FORWARD_TOKENS + tokens(part, shared=shared) for part in split)

    last = {g: max(r[1] + r[2] for r in rows if r[0] == g) for g in set(group)}
    best = math.inf
    by_length = sorted(range(number), key=lambda k: -(prompt + rest)[k])
    by_group = sorted(range(number), key=lambda k: (-last[group[k]], group[k], -rest[k]))
    for order, shared in ((by_length, False), (by_group, True)):
        for cuts in itertools.product([False, True], repeat=number - 1):
            ends = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), number]
            split = [order[a:b] for a, b in itertools.pairwise(ends)]
            fits = all(len(p) == 1 or tokens(p, shared=shared) <= FORWARD_LIMIT for p in split)
            if fits and (size is None or max(map(len, split)) <= size):
                best = min(best, cost(split, shared=shared))
    assert min(cost(parts, shared=True), cost(parts, shared=False)) <= best


def test_long_prompts_keep_groups_together() -> None:
    order = np.random.default_rng(0).permutation(64)
    groups = np.arange(64) // 8
    parts = list(microbatches(order, like([640] * 64, [512] * 64, groups), None, FORWARD_LIMIT))
    assert [sorted(set(groups[part].tolist())) for part in parts] == [
        [0, 1], [2, 3], [4, 5], [6, 7]
    ]  # fmt: skip


def like(lengths: Any, prompts: Any, groups: Any) -> Any:
    """What `microbatches` reads of episodes."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return SimpleNamespace(
        starts=starts, prompt_length=np.array(prompts), group=np.array(list(groups))
    )


def test_learning_rate_by_hand() -> None:
    options = {"warmup_updates": 3, "final": 0.2}
    assert learning_rate(1.0, 0, 0.0, **options) == 0.25
    assert learning_rate(1.0, 3, 0.0, **options) == 1.0
    assert learning_rate(2.0, 9, 0.5, **options) == pytest.approx(2 * 0.6)
    assert learning_rate(1.0, 9, 1.5, **options) == pytest.approx(0.2)
    assert learning_rate(1.0, 0, 0.7, warmup_updates=0, final=1.0) == 1.0


def test_steps_that_are_not_finite_are_skipped() -> None:
    module = torch.nn.Linear(2, 1)
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = GuardedOptimizer(module, lr=0.1, max_grad_norm=1.0, limit=3)

    def step(scale: float) -> float:
        loss = scale * module(torch.ones(1, 2)).sum()
        loss.backward()
        return optimizer.step(float(loss.detach()))

    assert math.isnan(step(math.inf))
    assert math.isnan(step(math.nan))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert step(1.0) == pytest.approx(math.sqrt(3))  # of (1, 1, 1), before clipping
    assert (optimizer.skipped, optimizer.in_a_row) == (2, 0)
    step(math.nan)
    step(math.nan)
    state = optimizer.state_dict()
    again = GuardedOptimizer(module, lr=0.1, max_grad_norm=1.0, limit=3)
    again.load_state_dict(state)
    assert (again.skipped, again.in_a_row) == (4, 2)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        step(math.nan)
    assert all(p.grad is None for p in module.parameters())


def test_clipping_bounds_the_gradient() -> None:
    module = torch.nn.Linear(2, 1, bias=False)
    optimizer = GuardedOptimizer(module, lr=0.0, max_grad_norm=0.5)
    (100 * module(torch.ones(1, 2)).sum()).backward()
    seen = []
    optimizer.adam.register_step_pre_hook(lambda *_: seen.append(float(module.weight.grad.norm())))
    assert optimizer.step(1.0) == pytest.approx(100 * math.sqrt(2))
    assert seen == [pytest.approx(0.5)]


def test_a_tally_puts_sums_means_and_maxima_together_step_by_step() -> None:
    tally = Tally()
    for k in range(2):
        tally.next_step()
        for weight, number in ((1.0, 1.0), (3.0, 2.0)):
            tally.sum(loss=torch.tensor(number + k))
            tally.mean(weight, kl=torch.tensor(number + k))
            tally.peak(worst=torch.tensor(number - k))
    tally.mean(norm=torch.tensor(math.nan))
    found = {name: values.tolist() for name, values in tally.result().items()}
    assert math.isnan(found["norm"][0]) and math.isnan(found.pop("norm")[1])
    assert found == {"loss": [3.0, 5.0], "kl": [1.75, 2.75], "worst": [2.0, 1.0]}
    assert tally.result(-1)["kl"].tolist() == [2.75]
    assert Tally().result() == {}


def test_means_of_finite_numbers() -> None:
    values = {"loss": np.array([1.0, math.nan, 2.0]), "norm": np.array([math.inf])}
    assert finite_means(values) == {"loss": 1.5}


def test_rollout_metrics_by_hand() -> None:
    metrics = rollout_metrics(episodes())
    assert metrics["rollout/reward_mean"] == pytest.approx(0.875)
    assert metrics["rollout/reward_std"] == pytest.approx(0.375)
    assert metrics["rollout/response_length"] == 2.5  # of 2 and 3; the unscored one is out
    assert metrics["rollout/unscored"] == pytest.approx(1 / 3)
    assert metrics["rollout/length"] == metrics["rollout/stop_id"] == 0.5
    assert metrics["reward/bleu"] == pytest.approx(0.875)  # of 1.25 and 0.5
    assert metrics["reward/rare"] == 4.0  # the one episode that it applies to


def test_sample_records() -> None:
    (record,) = sample_records(episodes(), symbol_tokenizer("a b c d".split()), [0])
    assert record["tokens"] == ["a", "b"]
    assert record["token_rewards"].tolist() == [0.25, 1.0]
    assert record["components"] == {"bleu": 1.25, "rare": 0.0}
    assert (record["score"], record["text"]) == (1.25, "a b")
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(2, 4) == [0, 1]
