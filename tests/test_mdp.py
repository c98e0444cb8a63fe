"""The token decision process: tasks, the transition function, ends, replies, state copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from hypothesis import given, settings
from hypothesis import strategies as st

from textgym.mdp import STOP_REASONS, Reply, Task, TokenMDP
from textgym.prompts import Prompts
from textgym.rewards import Reward, TextBatch, as_reward, dense, terminal
from textgym.streams import mix64
from textgym.tokens import Tokenizer, load_tokenizer, symbol_tokenizer

A, B, C, STOP, HALT, EOS, BOS = range(7)
TOKENS = symbol_tokenizer(["a", "b", "c", "xSTOPy", "halt"])  # eos 5, bos 6
PROMPTS = [{"prompt": "a"}, {"prompt": "b c"}, {"prompt": "c c c"}]


def length(text: str) -> float:
    return float(len(text))


class Spy(Reward):
    """Pays 1 and remembers the batches that it was asked about."""

    name = "spy"

    def __init__(self) -> None:
        self.batches: list[TextBatch] = []

    def score(self, batch: TextBatch) -> list[float]:
        self.batches.append(batch)
        return [1.0] * len(batch)


def make(rows: int = 1, max_episode_steps: int | None = None, **arguments: Any) -> TokenMDP:
    """A decision process over `TOKENS`, begun on prompt `row % 3` in each row."""
    reward = as_reward(length, high=99.0)
    given = {"prompts": PROMPTS, "tokenizer": TOKENS, "reward": reward, "max_new_tokens": 4}
    mdp = TokenMDP(Task(**{**given, **arguments}), rows, max_episode_steps)
    numbers = np.arange(rows)
    mdp.begin(numbers, prompt_row=numbers % len(mdp.task.prompts))
    return mdp


def play(mdp: TokenMDP, tokens: Sequence[int]) -> Any:
    """Step row 0 through `tokens`; returns the last outcome. All but the last must go on."""
    for t, token in enumerate(tokens):
        outcome = mdp.step([token])
        ended = bool(outcome.terminated[0] or outcome.truncated[0])
        assert ended == (t == len(tokens) - 1), f"token {t} of {tokens}"
    return outcome


# --- transitions


def test_an_action_is_appended_and_the_rest_stays_zero() -> None:
    mdp = make(rows=3)
    mdp.step([B, C, A])
    observation = mdp.observation()
    assert observation["input_ids"].tolist() == [
        [A, B, 0, 0, 0, 0, 0],
        [B, C, C, 0, 0, 0, 0],
        [C, C, C, A, 0, 0, 0],
    ]
    assert observation["length"].tolist() == [[2], [3], [4]]
    assert observation["prompt_length"].tolist() == [[1], [2], [3]]


def test_rows_that_are_not_live_do_not_move() -> None:
    mdp = make(rows=2)
    before = mdp.observation()
    outcome = mdp.step([B, 99], live=np.array([True, False]))
    assert mdp.length.tolist() == [2, 2]
    assert np.array_equal(mdp.ids[1], before["input_ids"][1])
    assert not outcome.terminated.any() and not outcome.truncated.any()


def test_begin_clears_what_a_longer_episode_left() -> None:
    mdp = make()
    play(mdp, [B, B, B, B])
    mdp.begin(np.array([0]), prompt_row=np.array([0]))
    assert mdp.ids.tolist() == [[A, 0, 0, 0, 0, 0, 0]]


# --- ends, one by one


def test_a_stop_id_terminates() -> None:
    outcome = play(make(), [A, B, EOS])
    assert (outcome.terminated[0], outcome.truncated[0]) == (True, False)
    assert (outcome.stop_reason[0], outcome.text[0]) == ("stop_id", "a b")
    assert outcome.reward[0] == length("a b")


def test_a_stop_id_at_once_is_an_empty_response() -> None:
    outcome = play(make(), [EOS])
    assert (outcome.stop_reason[0], outcome.text[0], outcome.reward[0]) == ("stop_id", "", 0.0)


def test_a_stop_id_is_not_in_the_text_even_where_it_has_one() -> None:
    spy = Spy()
    outcome = play(make(stop=C, reward=spy), [A, B, C])
    assert (outcome.stop_reason[0], outcome.text[0]) == ("stop_id", "a b")
    assert (spy.batches[0].texts, spy.batches[0].token_ids) == (["a b"], [[A, B, C]])
    mdp = make(stop=C)
    play(mdp, [A, B, C])
    assert mdp.response_text(0) == "a b"


def test_the_budget_terminates_or_truncates() -> None:
    outcome = play(make(budget="terminate"), [A, B, A, B])
    assert (outcome.terminated[0], outcome.truncated[0]) == (True, False)
    assert (outcome.stop_reason[0], outcome.text[0]) == ("length", "a b a b")
    assert outcome.reward[0] == length("a b a b")
    outcome = play(make(budget="truncate"), [A, B, A, B])
    assert (outcome.terminated[0], outcome.truncated[0]) == (False, True)
    assert (outcome.stop_reason[0], outcome.text[0]) == ("length", "a b a b")
    assert outcome.reward[0] == 0.0, "a time limit has no outcome"


@pytest.mark.parametrize(
    ("stop", "tokens", "text"),
    [
        ("halt", [A, B, HALT], "a b "),  # one token
        ("b c", [A, B, C], "a "),  # two tokens and the space between them
        ("a b c", [C, A, B, C], "c "),  # three tokens
        ("STOP", [A, STOP], "a x"),  # in the middle of a token's text
        (("y", "STOP"), [A, STOP], "a x"),  # the earliest of several
        ("b", [B], ""),
    ],
)
def test_a_stop_string_terminates(stop: Any, tokens: list[int], text: str) -> None:
    spy = Spy()
    outcome = play(make(stop=stop, reward=spy), tokens)
    assert (outcome.terminated[0], outcome.truncated[0]) == (True, False)
    assert (outcome.stop_reason[0], outcome.text[0]) == ("stop_string", text)
    (batch,) = spy.batches
    assert (batch.texts, batch.token_ids) == ([text], [tokens]), "ids are whole, text is cut"
    assert batch.stop_reasons == ["stop_string"]


def test_a_stop_string_in_the_prompt_or_across_it_does_not_count() -> None:
    mdp = make(stop="a b")  # the prompt is "a"
    assert not mdp.step([B]).terminated[0]


def test_a_stop_string_of_a_byte_level_tokenizer() -> None:
    tokenizer = load_tokenizer("embedded")
    ids = [i for i in tokenizer.encode("yes ☃ no") if i != tokenizer.bos_id]
    mdp = make(prompts=[{"prompt": "x"}], tokenizer=tokenizer, stop="☃", max_new_tokens=20)
    outcome = play(mdp, ids[: next(k for k in range(1, 20) if "☃" in tokenizer.decode(ids[:k]))])
    assert (outcome.stop_reason[0], outcome.text[0]) == ("stop_string", "yes ")


@pytest.mark.parametrize(
    ("arguments", "tokens", "reason"),
    [
        ({"stop": (C, "b c")}, [A, B, C], "stop_id"),  # stop id before stop string
        ({"stop": (EOS,), "max_new_tokens": 2}, [A, EOS], "stop_id"),  # stop id before length
        ({"stop": ("b c",), "max_new_tokens": 2}, [B, C], "stop_string"),  # string before length
        ({"stop": ("b",), "respond": lambda row, ids: Reply(end=True)}, [B], "stop_string"),
        (
            {"stop": (), "respond": lambda row, ids: Reply(end=True), "max_new_tokens": 1},
            [B],
            "env",
        ),
    ],
)
@pytest.mark.parametrize("budget", ["terminate", "truncate"])
def test_of_several_reasons_the_first_counts(
    arguments: dict[str, Any], tokens: list[int], reason: str, budget: str
) -> None:
    outcome = play(make(budget=budget, **arguments), tokens)
    assert outcome.stop_reason[0] == reason
    assert outcome.terminated[0] and not outcome.truncated[0], "only an empty budget truncates"
    assert reason in STOP_REASONS


def test_a_time_limit_truncates_without_an_outcome_and_an_end_comes_first() -> None:
    mdp = make(max_episode_steps=2)
    outcome = play(mdp, [A, B])
    assert (outcome.terminated[0], outcome.truncated[0]) == (False, True)
    assert (outcome.reward[0], outcome.stop_reason[0], outcome.text) == (0.0, None, {})
    with pytest.raises(ResetNeeded):
        mdp.step([A])
    outcome = play(make(max_episode_steps=2), [A, EOS])
    assert (outcome.terminated[0], outcome.truncated[0]) == (True, False)


def test_what_stops() -> None:
    assert (make().task.stop_ids, make().task.stop_strings) == ((EOS,), ())
    assert make(stop="x").task.stop_ids == (EOS,), "strings are added to the default ids"
    assert make(stop=(B, "x")).task.stop_ids == (B,), "ids replace them"
    assert make(stop=B).task.stop_ids == (B,)
    assert (make(stop=()).task.stop_ids, make(stop=()).task.stop_strings) == ((), ())
    assert play(make(stop=()), [EOS, EOS, EOS, EOS]).stop_reason == ["length"]


# --- the environment's own turns


def answer(row: Mapping[str, Any], ids: Sequence[int]) -> Reply | None:
    """Says `b b` after `a`, says `halt` and ends after `b`, is silent otherwise."""
    return {A: Reply([B, B]), B: Reply([HALT], end=True)}.get(ids[-1])


def test_a_reply_is_appended_and_marked_as_not_chosen() -> None:
    spy = Spy()
    mdp = make(respond=answer, reward=spy, max_new_tokens=9)
    outcome = mdp.step([A])
    assert mdp.response_ids(0) == [A, B, B] and not outcome.terminated[0]
    mdp.step([C])
    assert mdp.response_ids(0) == [A, B, B, C]
    outcome = mdp.step([B])
    assert outcome.terminated[0] and outcome.stop_reason[0] == "env"
    (batch,) = spy.batches
    assert batch.token_ids == [[A, B, B, C, B, HALT]]
    assert batch.texts == ["a b b c b halt"]
    assert batch.action_masks == [[True, False, False, True, True, False]]


def test_what_was_replied_in_an_earlier_episode_is_forgotten() -> None:
    spy = Spy()
    mdp = make(respond=answer, reward=spy, max_new_tokens=9)
    play(mdp, [A, B])
    mdp.begin(np.array([0]), prompt_row=np.array([0]))
    play(mdp, [C, C, C, C, EOS])
    assert spy.batches[1].action_masks == [[True] * 5]


def test_a_reply_counts_toward_the_budget_and_is_cut_at_it() -> None:
    mdp = make(respond=answer, max_new_tokens=2)
    outcome = mdp.step([A])
    assert outcome.terminated[0] and outcome.stop_reason[0] == "length"
    assert mdp.response_ids(0) == [A, B]
    assert mdp.length[0] == mdp.task.prompt_length[0] + 2


def test_a_reply_does_not_follow_a_stop() -> None:
    called: list[int] = []

    def respond(row: Mapping[str, Any], ids: Sequence[int]) -> None:
        called.append(ids[-1])

    play(make(respond=respond, stop=(EOS, "halt")), [A, HALT])
    play(make(respond=respond), [C, EOS])
    assert called == [A, C]


def test_a_stop_id_that_the_environment_says_does_not_stop() -> None:
    mdp = make(respond=lambda row, ids: Reply([EOS]), max_new_tokens=6)
    outcome = mdp.step([A])
    assert not outcome.terminated[0]
    assert mdp.response_text(0) == "a"
    assert play(mdp, [EOS]).stop_reason[0] == "stop_id"


def test_a_stop_string_that_the_environment_says_does_not_stop() -> None:
    spy = Spy()
    mdp = make(respond=answer, stop=("b b", "halt"), reward=spy, max_new_tokens=9)
    outcome = play(mdp, [A, C, A, C, HALT])
    assert outcome.stop_reason[0] == "stop_string"
    assert outcome.text[0] == spy.batches[0].texts[0] == "a b b c a b b c "
    assert mdp.response_text(0) == outcome.text[0]


def test_the_hook_sees_its_row_of_the_table() -> None:
    seen = []
    rows = [{"prompt": "a", "secret": 1}, {"prompt": "b", "secret": 2}]
    mdp = make(
        rows=2, prompts=rows, respond=lambda row, ids: seen.append((row["secret"], list(ids)))
    )
    mdp.step([B, C])
    assert seen == [(1, [B]), (2, [C])]


def test_a_reply_outside_the_vocabulary_is_an_error() -> None:
    for token in (-1, TOKENS.vocab_size):
        mdp = make(respond=lambda row, ids, token=token: Reply([token]))
        with pytest.raises(ValueError, match=rf"replied with \[{token}\], but ids are in \[0, 7\)"):
            mdp.step([A])


# --- rewards


def test_the_reward_is_asked_once_a_step_about_finished_rows_only() -> None:
    spy = Spy()
    mdp = make(rows=3, reward=spy)
    mdp.step([A, A, A])
    assert spy.batches == []
    outcome = mdp.step([EOS, A, EOS])
    assert [b.texts for b in spy.batches] == [["a", "a"]]
    assert outcome.reward.tolist() == [1.0, 0.0, 1.0]
    assert outcome.paid_rows.tolist() == [0, 2]
    batch = spy.batches[0]
    assert batch.prompts == ["a", "c c c"]
    assert batch.prompt_ids == [[A], [C, C, C]]
    assert batch.token_ids == [[A, EOS], [A, EOS]]
    assert [row["prompt"] for row in batch.rows] == ["a", "c c c"]


def test_a_dense_schedule_is_paid_every_step_and_sums_to_the_outcome() -> None:
    mdp = make(rows=2, reward=dense(as_reward(length, high=99.0)))
    with pytest.warns(UserWarning, match="no cursor"):
        rewards = [mdp.step([A, B]).reward]
    rewards += [mdp.step([C, EOS]).reward]
    live = np.array([True, False])
    rewards += [mdp.step([EOS, 0], live).reward]
    assert np.array(rewards).T.tolist() == [[1.0, 2.0, 0.0], [1.0, 0.0, 0.0]]
    assert mdp.paid.tolist() == [3.0, 1.0]


def test_prompts_reach_rewards_as_text_or_messages() -> None:
    spy = Spy()
    mdp = make(rows=2, prompts=[{"prompt": [B, C]}, {"prompt": "a b"}], reward=spy)
    mdp.step([EOS, EOS])
    assert spy.batches[0].prompts == ["b c", "a b"]


def test_after_a_reward_that_raises_the_row_needs_a_reset() -> None:
    def broken(text: str) -> float:
        raise RuntimeError("no service")

    from textgym.rewards import RewardError, as_schedule

    mdp = make(reward=as_schedule(broken, strict=True))
    with pytest.raises(RewardError, match="no service"):
        mdp.step([EOS])
    with pytest.raises(ResetNeeded):
        mdp.step([EOS])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=12))
def test_totals_are_finite_and_lengths_within_the_budget(actions: list[list[int]]) -> None:
    mdp = make(
        rows=3,
        reward=terminal(as_reward(length, high=99.0)) * 0.5,
        respond=answer,
        stop=(EOS, "c c"),
    )
    for chosen in actions:
        outcome = mdp.step(chosen, ~mdp.done)
        assert np.isfinite(outcome.reward).all()
        assert not (outcome.terminated & outcome.truncated).any()
        assert (mdp.length - mdp.prompt_length <= mdp.task.max_new_tokens).all()
        assert mdp.task.observation_space()["input_ids"].contains(mdp.ids[0])
        beyond = np.arange(mdp.task.max_length) >= mdp.length[:, None]
        assert not mdp.ids[beyond].any()
        if mdp.done.all():
            mdp.begin(np.arange(3))


# --- text is a view


def test_text_is_never_encoded_back(monkeypatch: pytest.MonkeyPatch) -> None:
    mdp = make(
        rows=3, reward=dense("bleu"), prompts=[{"prompt": p, "references": "a b"} for p in "abc"]
    )

    def refuse(*arguments: Any) -> None:
        raise AssertionError("text was encoded")

    for name in ("encode", "_encode_text", "_encode_messages"):
        monkeypatch.setattr(Tokenizer, name, refuse)
    mdp.begin(np.arange(3))
    for chosen in ([A, B, C], [B, B, B], [EOS, EOS, A], [0, 0, A]):
        mdp.step(chosen, ~mdp.done)
    assert mdp.done.all()


def test_ids_that_no_text_encodes_to_stay_as_they_are() -> None:
    tokenizer = load_tokenizer("embedded")
    whole = [i for i in tokenizer.encode(" the") if i != tokenizer.bos_id]
    letters = [i for c in " the" for i in tokenizer.encode(c) if i != tokenizer.bos_id]
    assert tokenizer.decode(letters) == tokenizer.decode(whole) and letters != whole
    spy = Spy()
    mdp = make(
        prompts=[{"prompt": "x"}], tokenizer=tokenizer, reward=spy, max_new_tokens=len(letters)
    )
    play(mdp, letters)
    assert spy.batches[0].token_ids == [letters]


# --- tasks


def test_the_longest_prompt_of_all_splits_sets_the_columns() -> None:
    rows = [{"prompt": " ".join("a" * n)} for n in (1, 2, 3, 4, 5, 6, 7, 8)]
    train, heldout = Prompts(rows).split(0.5)
    tasks = [make(prompts=part).task for part in (train, heldout, train[:1])]
    assert {t.max_prompt_tokens for t in tasks} == {8}
    assert {str(t.observation_space()) for t in tasks} == {str(tasks[0].observation_space())}


def test_long_prompts_are_an_error_or_cut_on_the_side_asked_for() -> None:
    rows = [{"prompt": "a"}, {"prompt": "a b c"}]
    with pytest.raises(ValueError, match=r"prompt 1 has 3 tokens, more than max_prompt_tokens=2; "):
        make(prompts=rows, max_prompt_tokens=2)
    left = make(prompts=rows, max_prompt_tokens=2, truncate_prompt="left").task
    right = make(prompts=rows, max_prompt_tokens=2, truncate_prompt="right").task
    assert (left.prompt_ids[1].tolist(), right.prompt_ids[1].tolist()) == ([B, C], [A, B])
    assert left.prompt_ids[0].tolist() == [A, 0]
    assert make(prompts=rows, max_prompt_tokens=9).task.max_length == 9 + 4


def test_a_long_prompt_of_another_split_is_named_as_such() -> None:
    train, heldout = Prompts([{"prompt": "a"}, {"prompt": "a b c"}]).split(1)
    short = train if len(train[0]["prompt"]) == 1 else heldout
    with pytest.raises(ValueError, match=r"prompt 0 of another split, .*, has 3 tokens"):
        make(prompts=short, max_prompt_tokens=2)


def test_an_empty_prompt_is_bos() -> None:
    task = make(prompts=[{"prompt": ""}, {"prompt": []}]).task
    assert task.prompt_ids.tolist() == [[BOS], [BOS]]
    assert task.prompt_text(1) == ""


def test_a_larger_vocabulary_than_the_tokenizer() -> None:
    mdp = make(vocab_size=10)
    outcome = play(mdp, [A, 9, EOS])
    assert outcome.text[0] == "a", "ids that are no token have no text"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [{"prompt": "a z"}]}, "row 0, column 'prompt': .*cannot encode 'a z'"),
        ({"prompts": [{"prompt": "\ud800"}]}, "row 0, column 'prompt': "),  # half a character
        ({"prompts": [{"prompt": "a"}, {"prompt": [7]}]}, "row 1, column 'prompt': token id 7"),
        ({"reward": "bleu"}, "references"),
        ({"budget": "stop"}, "budget must be 'terminate' or 'truncate', got 'stop'"),
        ({"truncate_prompt": "middle"}, "must be None, 'left' or 'right', got 'middle'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer, got 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be a positive integer, got 2.0"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be a positive integer"),
        ({"max_prompt_tokens": "4"}, "max_prompt_tokens must be a positive integer"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer"),
        ({"vocab_size": 2, "stop": ()}, "prompt 1 holds id 2, but vocab_size is 2"),
        ({"vocab_size": 5}, "stop id 5 is outside the vocabulary of 5 ids"),
        ({"stop": [7]}, "stop id 7 is outside the vocabulary of 7 ids"),
        ({"stop": -1}, "stop id -1 is outside"),
        ({"stop": ""}, "a stop string must not be empty"),
        ({"stop": [1.5]}, "stop holds ids .* got 1.5"),
        ({"stop": [True]}, "stop holds ids .* got True"),
    ],
)
def test_bad_tasks(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make(**arguments)


def test_a_tokenizer_without_stop_ids_needs_stop() -> None:
    bare = symbol_tokenizer(["a", "b", "c"], bos=None, eos=None)
    with pytest.raises(
        ValueError, match=r"no end-of-sequence id.*or stop=\(\) to end on the budget"
    ):
        make(tokenizer=bare)
    assert make(tokenizer=bare, stop=()).task.stop_ids == ()
    assert play(make(tokenizer=bare, stop="a b"), [A, B]).stop_reason == ["stop_string"]


def test_a_misspelt_column_is_suggested() -> None:
    with pytest.raises(ValueError, match=r"refrences.*references"):
        make(prompts=[{"prompt": "a", "references": "b"}], reward=lambda text, refrences: 1.0)


def test_prompts_are_encoded_once_a_table_and_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Prompts(PROMPTS)
    make(prompts=table)
    monkeypatch.setattr(Tokenizer, "encode", None)
    assert make(prompts=table).task.prompt_length.tolist() == [1, 2, 3]


def test_tasks_are_shared_by_deep_copies_and_pickle() -> None:
    task = make(reward="bleu", prompts=[{"prompt": "a", "references": "b"}]).task
    assert copy.deepcopy([task])[0] is task
    other = pickle.loads(pickle.dumps(task))
    assert other.max_length == task.max_length
    assert other.tokenizer is task.tokenizer


# --- bad actions


@pytest.mark.parametrize(
    ("actions", "error", "message"),
    [
        (
            [7, 0],
            ValueError,
            r"action 7 of row 0 is outside the vocabulary; expected an id in \[0, 7",
        ),
        ([0, -1], ValueError, "action -1 of row 1"),
        ([2**63, 0], ValueError, "of row 0 is outside"),
        ([0.0, 1.0], TypeError, "actions must be integers, got float64"),
        ([True, False], TypeError, "actions must be integers, got bool"),
        (["a", "b"], TypeError, "actions must be integers"),
        ([None, None], TypeError, "actions must be integers"),
        ([0], ValueError, r"expected 2 actions, got an array of shape \(1,\)"),
        ([[0, 0]], ValueError, r"expected 2 actions, got an array of shape \(1, 2\)"),
        (0, ValueError, r"expected 2 actions, got an array of shape \(\)"),
    ],
)
def test_bad_actions_change_nothing(actions: Any, error: type[Exception], message: str) -> None:
    mdp = make(rows=2)
    before = mdp.observation()
    with pytest.raises(error, match=message):
        mdp.step(np.array(actions, np.uint64) if actions == [2**63, 0] else actions)
    assert all(np.array_equal(v, before[k]) for k, v in mdp.observation().items())


def test_a_step_before_reset_or_after_the_end_is_an_error() -> None:
    fresh = TokenMDP(make().task, 2)
    with pytest.raises(
        ResetNeeded, match=r"rows \[0, 1\] have ended or were never reset; call reset"
    ):
        fresh.step([A, A])
    mdp = make(rows=2)
    mdp.step([EOS, A])
    with pytest.raises(ResetNeeded, match=r"rows \[0\] have ended"):
        mdp.step([A, A])


# --- streams and prompts


def test_streams_are_a_hash_of_row_seed_and_episode_number() -> None:
    mdp = make(rows=4)
    mdp.seed[:] = [5, 6, 7, 2**64 - 1]
    mdp.episode[:] = [0, 0, 3, 0]
    mdp.begin(np.arange(4))
    assert mdp.stream.tolist() == [int(mix64(s, e)) for s, e in [(5, 0), (6, 0), (7, 3), (-1, 0)]]
    assert mdp.episode.tolist() == [1, 1, 4, 1]
    streams = mdp.stream.copy()
    mdp.begin(np.array([1]))
    assert mdp.stream[1] == mix64(6, 1)
    assert np.array_equal(np.delete(mdp.stream, 1), np.delete(streams, 1))


def test_a_prompt_is_drawn_from_the_stream_alone() -> None:
    rows = [{"prompt": "a", "i": i} for i in range(50)]
    one, many = make(rows=1, prompts=rows), make(rows=64, prompts=rows)
    streams = np.arange(64, dtype=np.uint64)
    many.begin(np.arange(64), stream=streams)
    for i, stream in enumerate(streams):
        one.begin(np.array([0]), stream=stream[None])
        assert one.prompt_row[0] == many.prompt_row[i]
    assert len(set(many.prompt_row.tolist())) > 25, "streams draw different prompts"


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (3, ValueError, r"prompt_row must be in \[0, 3\), got \[3\]"),
        (-1, ValueError, "prompt_row must be in"),
        (0.0, TypeError, "prompt_row must be integers, got float64"),
    ],
)
def test_a_bad_prompt_row_changes_nothing(row: Any, error: type[Exception], message: str) -> None:
    mdp = make()
    before = (mdp.episode[0], mdp.stream[0], mdp.ids.copy())
    with pytest.raises(error, match=message):
        mdp.begin(np.array([0]), prompt_row=np.array([row]))
    assert (mdp.episode[0], mdp.stream[0]) == before[:2]
    assert np.array_equal(mdp.ids, before[2])


# --- state copies


def reference_rows() -> list[dict[str, Any]]:
    return [{"prompt": p, "references": ["a b c a", "c b a"]} for p in ("a", "b c", "c c c")]


@pytest.mark.parametrize("reward", ["bleu", dense("bleu"), dense("rougeL") + 0.5 * dense("bleu")])
def test_a_copied_episode_goes_on_exactly_in_any_row(reward: Any) -> None:
    def fresh() -> TokenMDP:
        return make(
            rows=3, prompts=reference_rows(), reward=reward, max_new_tokens=8, respond=answer
        )

    source, target = fresh(), fresh()
    source.seed[:] = [11, 12, 13]
    source.begin(np.arange(3))
    for chosen in ([A, C, A], [C, A, C]):
        source.step(chosen)
    state = source.get_state(1)
    rest = [[0, C, 0], [0, A, 0], [0, EOS, 0]]
    live = np.array([False, True, False])

    def finish(mdp: TokenMDP, row: int) -> list[Any]:
        seen = []
        for chosen in rest:
            if mdp.done[row]:
                break
            rolled = np.roll(chosen, row - 1)
            outcome = mdp.step(rolled, np.roll(live, row - 1))
            seen.append(
                (outcome.reward[row], outcome.terminated[row], outcome.stop_reason[row],
                 outcome.text.get(row), mdp.ids[row].tolist(), int(mdp.length[row]), mdp.paid[row])
            )  # fmt: skip
        mdp.begin(np.array([row]))
        return [*seen, int(mdp.stream[row]), int(mdp.prompt_row[row])]

    expected = finish(source, 1)
    # The copy is not touched by what its source did since; it can be used again, and in any row.
    for row in (2, 0, 2):
        target.set_state(row, state)
        assert finish(target, row) == expected


def test_a_state_of_a_finished_row_is_finished() -> None:
    source, target = make(), make()
    play(source, [A, EOS])
    target.set_state(0, source.get_state(0))
    with pytest.raises(ResetNeeded):
        target.step([A])


def test_a_state_of_another_task_is_refused() -> None:
    long = make(max_new_tokens=20)
    for _ in range(15):
        long.step([A])
    with pytest.raises(ValueError, match="the state has 16 tokens, this task at most 7"):
        make().set_state(0, long.get_state(0))
    wide = make(vocab_size=9)
    wide.step([8])
    with pytest.raises(ValueError, match=r"largest id 8.*is of another task"):
        make().set_state(0, wide.get_state(0))
    last = make(rows=3)
    with pytest.raises(ValueError, match="prompt row 2"):
        make(prompts=PROMPTS[:1], max_prompt_tokens=3).set_state(0, last.get_state(2))


@pytest.mark.parametrize("arguments", [{"rows": 0}, {"rows": -1}, {"max_episode_steps": 0}])
def test_bad_sizes(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a positive integer"):
        make(**arguments)
