"""`collect`: exactly B episodes, whole, whatever the number of rows and the path."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textgym.episodes import Episodes
from textgym.mdp import Reply, Task
from textgym.rewards import as_reward, dense
from textgym.rollout import PromptQueue, collect
from textgym.streams import mix64, uniform53
from textgym.tokens import load_tokenizer, symbol_tokenizer
from textgym.vector import TextGenVectorEnv

A, B, C, EOS, BOS = range(5)
TOKENS = symbol_tokenizer(["a", "b", "c"])
ROWS = [{"prompt": p, "references": ["a b c", "c b a"]} for p in ("a", "b c", "c c c", "a b a b")]


class Scripted:
    """Draws each token from a hash of its key (stream, sample index, length); counts its calls."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.calls = 0

    def act(
        self,
        obs: Any,
        stream: Any,
        sample_index: Any = 0,
        *,
        rows: Any = None,
        action_mask: Any = None,
    ) -> SimpleNamespace:
        self.calls += 1
        length = obs["length"][:, 0]
        key = mix64(stream, sample_index, length)
        if action_mask is None:
            action_mask = np.ones((len(length), self.vocab_size), np.bool_)
        order = np.argsort(~action_mask, axis=1, kind="stable")  # the allowed ones first
        rank = (key % action_mask.sum(1).astype(np.uint64)).astype(np.int64)
        return SimpleNamespace(
            action=order[np.arange(len(length)), rank],
            logprob=-uniform53(key).astype(np.float32),
            value=uniform53(mix64(stream, length, 9)).astype(np.float32),
        )

    def generate(
        self,
        obs: Any,
        stream: Any,
        sample_index: Any,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        num_rows: int,
    ) -> SimpleNamespace:
        length = obs["length"].copy()
        made = []
        for _ in range(max_new_tokens):
            made.append(self.act({"length": length}, stream, sample_index))
            length += 1
        columns = {
            k: np.stack([getattr(m, k) for m in made], 1) for k in ("action", "logprob", "value")
        }
        return SimpleNamespace(tokens=columns.pop("action"), **columns)


class Recording(TextGenVectorEnv):
    """Counts the episodes that begin and end."""

    begun = ended = 0

    def reset(self, **arguments: Any) -> Any:
        mask = (arguments.get("options") or {}).get("reset_mask")
        self.begun += self.num_envs if mask is None else int(mask.sum())
        return super().reset(**arguments)

    def step(self, actions: Any) -> Any:
        result = super().step(actions)
        self.ended += int((result[2] | result[3]).sum())
        return result


class EvenOnly(Recording):
    """Allows b (1) at the first token only, and even ids always."""

    masks_actions = True

    def action_masks(self) -> Any:
        mask = np.tile(np.arange(self.task.vocab_size) % 2 == 0, (self.num_envs, 1))
        mask[:, B] = self.mdp.steps == 0
        return mask


def make_task(**arguments: Any) -> Task:
    given = {"prompts": ROWS, "tokenizer": TOKENS, "reward": "bleu", "max_new_tokens": 6}
    return Task(**{**given, **arguments})


def gather(
    task: Task,
    episodes: int,
    number: int,
    *,
    kind: Any = Recording,
    limit: int | None = None,
    **arguments: Any,
) -> tuple[Episodes, Any]:
    envs = kind(task, number, autoreset_mode="Disabled", max_episode_steps=limit)
    return collect(Scripted(task.vocab_size), envs, episodes, **arguments), envs  # type: ignore[arg-type]


def assert_equal(first: Episodes, second: Episodes) -> None:
    for field in dataclasses.fields(Episodes):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for name in a:
                np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        elif isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        elif field.name != "traceback":
            assert a == b, field.name


def only_b(text: str) -> float:
    """Fails for a text without words, and pays the share of `b`."""
    return text.split().count("b") / len(text.split())


def nod(row: Mapping[str, Any], ids: Sequence[int]) -> Reply | None:
    return Reply([C, C], end=len(ids) >= 5) if ids[-1] == B else None


# --- B episodes, whole, in the queue's order


@pytest.mark.parametrize("path", ["step", "sequence"])
@pytest.mark.parametrize("number", [1, 3, 8, 64])
def test_exactly_b_episodes_are_begun_and_finished(number: int, path: Any) -> None:
    made, envs = gather(make_task(), 20, number, path=path)
    assert len(made) == envs.ended == 20
    # Where rows are fewer, whole responses are written to prompts that were read once before.
    assert envs.begun == (40 if path == "sequence" and number < 20 else 20)
    assert (made.terminated | made.truncated).all()
    assert all(reason is not None for reason in made.stop_reason)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"reward": dense("bleu") + 0.1 * as_reward("rougeL")},
        {"reward": only_b},
        {"stop": (EOS, "b c", "aa"), "budget": "truncate"},
    ],
)
def test_neither_rows_nor_path_change_anything(arguments: dict[str, Any]) -> None:
    task = make_task(**arguments)
    expected, _ = gather(task, 24, 8, seed=5, group_size=2)
    for number in (1, 3, 64):
        assert_equal(gather(task, 24, number, seed=5, group_size=2)[0], expected)
    for number in (1, 5, 64):
        assert_equal(gather(task, 24, number, seed=5, group_size=2, path="sequence")[0], expected)
    assert len(set(expected.lengths.tolist())) > 2, "episodes differ in length"


def test_two_half_batches_are_the_whole_batch() -> None:
    task = make_task()
    whole, _ = gather(task, 12, 4, seed=2)
    halves = [gather(task, 6, 4, seed=2, first_episode=first)[0] for first in (0, 6)]
    for name in ("texts", "stop_reason", "prompts"):
        assert getattr(whole, name) == [x for half in halves for x in getattr(half, name)]
    for name in (
        "ids",
        "column",
        "logprob",
        "value",
        "reward",
        "stream",
        "prompt_row",
        "terminated",
    ):
        joined = np.concatenate([getattr(half, name) for half in halves])
        np.testing.assert_array_equal(getattr(whole, name), joined)


def test_another_seed_gives_other_episodes() -> None:
    task = make_task()
    first, second = (gather(task, 12, 4, seed=s)[0] for s in (0, 1))
    assert not set(first.stream.tolist()) & set(second.stream.tolist())
    assert first.texts != second.texts


def test_streams_and_groups() -> None:
    made, _ = gather(make_task(), 12, 5, seed=7, group_size=3, first_episode=40)
    assert made.stream.tolist() == [int(mix64(7, 40 + b // 3)) for b in range(12)]
    assert made.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert made.sample_index.tolist() == [0, 1, 2] * 4
    for g in range(4):
        assert len(set(made.prompt_row[made.group == g].tolist())) == 1, "one prompt a group"
    assert len(set(made.texts)) > 4, "and different samples"


def test_prompts_can_be_given_a_group() -> None:
    made, _ = gather(make_task(), 6, 2, group_size=2, prompt_rows=np.array([3, 0, 3]))
    assert made.prompt_row.tolist() == [3, 3, 0, 0, 3, 3]
    assert made.prompts == ["a b a b"] * 2 + ["a"] * 2 + ["a b a b"] * 2
    assert made.prompt_length.tolist() == [4, 4, 1, 1, 4, 4]


def test_no_short_response_is_preferred() -> None:
    """The first finishers are short; the mean length must not see how many rows there are."""
    task = make_task(max_new_tokens=30)
    lengths = [gather(task, 60, number)[0].lengths.mean() for number in (1, 7, 60)]
    assert lengths[0] == lengths[1] == lengths[2]


def test_a_policy_is_asked_as_rarely_as_the_rows_allow() -> None:
    task = make_task()
    envs = Recording(task, 64, autoreset_mode="Disabled")
    policy = Scripted(task.vocab_size)
    made = collect(policy, envs, 20)  # type: ignore[arg-type]
    assert policy.calls == made.lengths.max()


# --- what is stored


def check_layout(made: Episodes) -> None:
    """Sequences, action columns and per-token arrays fit together."""
    total = made.num_tokens
    assert made.starts[0] == made.offsets[0] == 0
    assert (made.starts[-1], made.offsets[-1]) == (len(made.ids), total)
    for array in (made.logprob, made.value, made.reward, *made.components.values()):
        assert array.shape == (total,)
    for b in range(len(made)):
        columns = made.column[made.offsets[b] : made.offsets[b + 1]]
        assert (np.diff(columns) > 0).all()
        assert columns[0] == made.prompt_length[b]
        assert columns[-1] < len(made.sequence(b))
    np.testing.assert_array_equal(made.tokens(range(len(made))), np.arange(total))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 6), st.integers(0, 99), st.sampled_from(["step", "sequence"])
)
def test_layout(episodes: int, number: int, seed: int, path: Any) -> None:
    made, _ = gather(LAYOUT, episodes, number, seed=seed, path=path)
    check_layout(made)
    assert np.isfinite(made.scores).all()


LAYOUT = make_task()


def test_tokens_are_those_that_the_policy_drew() -> None:
    made, _ = gather(make_task(), 10, 3, seed=3)
    for b in range(10):
        sequence, columns = made.sequence(b), made.column[made.offsets[b] : made.offsets[b + 1]]
        key = mix64(made.stream[b], made.sample_index[b], columns)
        assert sequence[columns].tolist() == (key % np.uint64(5)).tolist()
        span = slice(made.offsets[b], made.offsets[b + 1])
        np.testing.assert_array_equal(made.logprob[span], -uniform53(key).astype(np.float32))
        assert len(sequence) == columns[-1] + 1
        cut = sequence[columns][:-1] if made.stop_reason[b] == "stop_id" else sequence[columns]
        assert made.texts[b] == TOKENS.decode(cut.tolist())


def test_the_reply_of_an_environment_is_in_the_sequence_and_no_action() -> None:
    made, _ = gather(make_task(respond=nod, max_new_tokens=9), 30, 4)
    check_layout(made)
    replied = 0
    for b in range(30):
        columns = made.column[made.offsets[b] : made.offsets[b + 1]]
        sequence = made.sequence(b)
        others = set(range(made.prompt_length[b], len(sequence))) - set(columns.tolist())
        replied += len(others)
        assert all(sequence[c] == C for c in others)
        assert (
            sequence[columns].tolist()
            == (mix64(made.stream[b], made.sample_index[b], columns) % np.uint64(5)).tolist()
        )
    assert replied > 10
    assert "env" in made.stop_reason
    with pytest.raises(ValueError, match="use path='step'"):
        gather(make_task(respond=nod), 4, 2, path="sequence")


def test_components_are_nan_where_they_do_not_apply() -> None:
    task = make_task(reward=dense("bleu") + 0.5 * as_reward("rougeL"))
    made, _ = gather(task, 12, 5)
    assert set(made.components) == {"bleu", "rougeL"}
    last = np.zeros(made.num_tokens, np.bool_)
    last[made.offsets[1:] - 1] = True
    assert np.array_equal(~np.isnan(made.components["rougeL"]), last), "paid at the end"
    assert not np.isnan(made.components["bleu"]).any(), "paid at every token"
    parts = made.per_episode(made.components["bleu"]) + 0.5 * made.per_episode(
        made.components["rougeL"]
    )
    np.testing.assert_allclose(parts, made.scores, atol=1e-12)


def test_dense_rewards_sum_to_the_terminal_score() -> None:
    terminal, _ = gather(make_task(reward="bleu"), 20, 6, seed=4)
    shaped, _ = gather(make_task(reward=dense("bleu")), 20, 6, seed=4)
    np.testing.assert_allclose(shaped.scores, terminal.scores, atol=1e-12)
    assert np.count_nonzero(shaped.reward) > np.count_nonzero(terminal.reward) > 0


def test_unscored_episodes_weigh_nothing() -> None:
    made, _ = gather(make_task(reward=only_b), 40, 6)
    empty = np.array([text == "" for text in made.texts])
    assert 0 < empty.sum() < 40
    assert (made.weight == np.where(empty, 0.0, 1.0)).all()
    assert [s is not None for s in made.status] == empty.tolist()
    assert all(s is None or s == "error: ZeroDivisionError: division by zero" for s in made.status)
    assert made.traceback is not None and "ZeroDivisionError" in made.traceback
    assert (made.scores[empty] == 0).all()
    assert (made.token_weight == np.repeat(made.weight, made.lengths)).all()


def test_cut_episodes_bootstrap_and_others_do_not() -> None:
    made, _ = gather(make_task(budget="truncate"), 30, 7)
    assert 0 < made.truncated.sum() < 30
    assert not (made.truncated & made.terminated).any()
    reasons = np.array(made.stop_reason)
    assert (reasons[made.truncated] == "length").all()
    assert (reasons[made.terminated] == "stop_id").all()
    final = np.diff(made.starts)  # the length of the final state
    expected = uniform53(mix64(made.stream, final, 9)).astype(np.float32)
    np.testing.assert_array_equal(made.bootstrap_value, np.where(made.truncated, expected, 0))
    assert (made.scores[made.truncated] == 0).all(), "a time limit has no outcome"


def test_a_time_limit_has_a_reason_and_a_text_of_its_own() -> None:
    made, _ = gather(make_task(), 30, 7, limit=2)
    late = np.array([reason == "time_limit" for reason in made.stop_reason])
    assert (late == made.truncated).all() and late.any() and not late.all()
    assert made.lengths.max() == 2
    for b in np.flatnonzero(late):
        assert made.texts[b] == TOKENS.decode(made.sequence(b)[made.prompt_length[b] :].tolist())
    assert (made.bootstrap_value[late] > 0).all()
    assert_equal(made, gather(make_task(), 30, 64, limit=2, path="sequence")[0])


def test_masks_are_packed_and_come_back() -> None:
    made, _ = gather(make_task(), 16, 5, kind=EvenOnly)
    assert made.packed_masks is not None
    assert made.packed_masks.shape == (made.num_tokens, 1)
    batch = made.batch([3, 0, 7])
    assert batch.action_mask is not None
    first = made.column == np.repeat(made.prompt_length, made.lengths)
    allowed = np.tile([True, False, True, False, True], (made.num_tokens, 1))
    allowed[:, B] = first
    np.testing.assert_array_equal(batch.action_mask.numpy(), allowed[made.tokens([3, 0, 7])])
    chosen = batch.ids[batch.row, batch.col]
    assert batch.action_mask[np.arange(len(chosen)), chosen].all()
    assert_equal(made, gather(make_task(), 16, 16, kind=EvenOnly)[0])
    with pytest.raises(ValueError, match="masks actions; use path='step'"):
        gather(make_task(), 4, 2, kind=EvenOnly, path="sequence")


def test_views_instead_of_copies_change_nothing() -> None:
    task = make_task(budget="truncate")
    envs = TextGenVectorEnv(task, 3, autoreset_mode="Disabled", copy=False)
    policy = Scripted(task.vocab_size)
    assert_equal(collect(policy, envs, 12), gather(task, 12, 5)[0])  # type: ignore[arg-type]


# --- what is refused


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_an_environment_that_resets_by_itself_is_refused(mode: str) -> None:
    envs = TextGenVectorEnv(make_task(), 2, autoreset_mode=mode)
    with pytest.raises(ValueError, match=f"autoreset_mode='Disabled', got '{mode}'"):
        collect(Scripted(5), envs, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"episodes": 0}, "positive multiple of group_size, got 0 and 1"),
        ({"episodes": 5, "group_size": 2}, "positive multiple of group_size, got 5 and 2"),
        ({"episodes": 4, "group_size": 0}, "positive multiple of group_size"),
        ({"episodes": 4, "prompt_rows": np.array([0])}, r"one row a group \(4\), got 1"),
        ({"episodes": 1, "prompt_rows": np.array([9])}, r"prompt_row must be in \[0, 4\)"),
        ({"episodes": 4, "path": "fast"}, "path must be 'step' or 'sequence', got 'fast'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gather(make_task(), number=2, **arguments)


# --- the queue of prompts


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 5), st.lists(st.integers(0, 25), max_size=6))
def test_every_prompt_once_an_epoch_however_it_is_taken(
    number: int, seed: int, counts: list[int]
) -> None:
    queue, whole = PromptQueue(number, seed), PromptQueue(number, seed)
    parts = [queue.take(count).tolist() for count in counts]
    taken = [row for part in parts for row in part]
    assert taken == whole.take(sum(counts)).tolist()
    for epoch in range(len(taken) // number):
        assert sorted(taken[epoch * number : (epoch + 1) * number]) == list(range(number))


def test_epochs_and_seeds_are_shuffled_differently_and_a_queue_resumes() -> None:
    queue = PromptQueue(30, seed=1)
    first, second = queue.take(30).tolist(), queue.take(30).tolist()
    assert first != second and first != PromptQueue(30, seed=2).take(30).tolist()
    queue.take(7)
    other = PromptQueue(30, seed=1)
    other.load_state_dict(queue.state_dict())
    assert other.take(40).tolist() == queue.take(40).tolist()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        PromptQueue(0, seed=0)


# --- with a real policy


def real(**arguments: Any) -> tuple[Task, Any]:
    from textgym.policies import CausalLMPolicy, random_causal_lm

    task = make_task(**arguments)
    model = random_causal_lm(task.vocab_size, hidden_size=32, num_layers=2, num_heads=4, seed=3)
    return task, CausalLMPolicy(model, device="cpu", seed=1)


def run(task: Task, policy: Any, episodes: int, number: int, **arguments: Any) -> Episodes:
    envs = TextGenVectorEnv(task, number, autoreset_mode="Disabled")
    return collect(policy, envs, episodes, **arguments)


def assert_alike(first: Episodes, second: Episodes) -> None:
    """The same tokens and rewards; log-probabilities and values to 1e-4."""
    for name in (
        "ids",
        "starts",
        "column",
        "offsets",
        "reward",
        "terminated",
        "truncated",
        "stream",
    ):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    assert (first.texts, first.stop_reason) == (second.texts, second.stop_reason)
    for name in ("logprob", "value", "bootstrap_value"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), atol=1e-4)


@pytest.mark.parametrize("budget", ["terminate", "truncate"])
def test_step_path_is_sequence_path_is_two_half_batches(budget: str) -> None:
    task, policy = real(reward=dense("bleu"), max_new_tokens=12, budget=budget)
    step = run(task, policy, 16, 8, seed=6, group_size=2)
    assert_alike(run(task, policy, 16, 8, seed=6, group_size=2, path="sequence"), step)
    assert_alike(run(task, policy, 16, 3, seed=6, group_size=2), step)
    assert len(set(step.texts)) > 8
    halves = [run(task, policy, 8, 4, seed=6, group_size=2, first_episode=g) for g in (0, 4)]
    np.testing.assert_array_equal(np.concatenate([h.ids for h in halves]), step.ids)
    np.testing.assert_array_equal(np.concatenate([h.reward for h in halves]), step.reward)


@pytest.mark.parametrize("path", ["step", "sequence"])
def test_refilled_rows_write_what_waiting_rows_write(path: Any) -> None:
    """Not only the distributions of lengths and rewards are the same: the episodes are."""
    task, policy = real(max_new_tokens=24)
    waiting = [  # each batch of 8 is begun when the last row of the one before has ended
        run(task, policy, 8, 8, seed=6, group_size=4, first_episode=first, path=path)
        for first in range(0, 12, 2)
    ]
    together = Episodes.join(waiting)
    assert together.lengths.min() < 6 and together.lengths.max() == 24  # it is ragged
    for number in (1, 5, 8, 48):
        refilled = run(task, policy, 48, number, seed=6, group_size=4, path=path)
        assert_alike(refilled, together)
        np.testing.assert_array_equal(refilled.group, together.group)


def test_scores_of_the_rollout_are_those_of_a_whole_forward() -> None:
    import torch

    for arguments in ({"max_new_tokens": 12}, {"max_new_tokens": 12, "respond": nod}):
        task, policy = real(**arguments)
        made = run(task, policy, 12, 5, seed=2)
        order = [5, 0, 11, 3]
        with torch.no_grad():
            scored = policy.evaluate(made.batch(order))
        tokens = made.tokens(order)
        np.testing.assert_allclose(scored.logprob.numpy(), made.logprob[tokens], atol=1e-4)
        np.testing.assert_allclose(scored.value.numpy(), made.value[tokens], atol=1e-4)


def test_a_real_vocabulary_through_the_embedded_tokenizer() -> None:
    tokenizer = load_tokenizer("embedded")
    prompts = [
        {"prompt": p, "references": "the ferry is free"} for p in ("name Heron =", "3 + 4 =")
    ]
    task, policy = real(prompts=prompts, tokenizer=tokenizer)
    assert_alike(run(task, policy, 6, 2), run(task, policy, 6, 6, path="sequence"))
