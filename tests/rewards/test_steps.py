"""Process rewards: what a step is, what it is paid, and that its payments add up."""

import copy
import io
import math
import pickle
import random
import re
import time

import numpy as np
import pytest

from textgym.env import TextGenEnv
from textgym.mdp import TokenMDP
from textgym.metrics import sample_records
from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.rewards import (
    Bleu,
    LengthPenalty,
    RewardColumnError,
    RewardError,
    TextBatch,
    TextFailure,
    as_reward,
    as_schedule,
    dense,
    parse_reward,
    steps,
)
from textgym.rewards.process import FixedSeparator, PatternSeparator, Written
from textgym.rollout import collect
from textgym.task import Task
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

ROW = {"prompt": "solve", "answer": "7", "references": ["the cat sat on the mat"]}


def size(step):
    return float(len(step))


SIZE = as_reward(size, high=99.0)


def run(schedule, texts, end="terminated", row=ROW):
    """Pay an episode whose text grows through `texts`; gives the rewards and the last payment."""
    track, rewards = schedule.begin(row, row.get("prompt", "")), []
    for t, text in enumerate(texts):
        last = t == len(texts) - 1
        batch = TextBatch.from_texts([text], [row])
        ends = [np.array([last and end == kind]) for kind in ("terminated", "truncated")]
        payment = schedule.pay([track], batch, *ends)
        rewards.append(float(payment.reward[0]))
    return rewards, payment


def prefixes(text, rng=None):
    """The text as it grows: by a character, or by a random number of them."""
    ends = range(1, len(text) + 1)
    if rng is not None:
        ends = sorted({*rng.sample(ends, rng.randint(0, len(text))), len(text)})
    return [text[:n] for n in ends] or [""]


# --- what is paid, and when


def test_a_step_is_paid_on_the_token_that_completes_its_separator():
    texts = ["ab", "ab\n", "ab\n\n", "ab\n\nc", "ab\n\nc\n\ndef", "ab\n\nc\n\ndef"]
    assert run(steps(SIZE), texts)[0] == [0, 0, 2, 0, 1, 3]
    assert run(steps(SIZE), texts, "truncated")[0] == [0, 0, 2, 0, 1, 0]
    # Several steps in one token, the last one among them.
    assert run(steps(SIZE, ";"), ["a;bb;cc", "a;bb;cc;dd"])[0] == [3, 4]
    # Mean: 2, then (2 + 1) / 2, then (2 + 1 + 3) / 3.
    assert run(steps(SIZE, total="mean"), texts)[0] == pytest.approx([0, 0, 2, 0, -0.5, 0.5])
    growth = steps(LENGTH, sees="prefix", total="growth")
    assert run(growth, texts)[0] == [0, 0, 2, 0, 5 - 2, 10 - 5]
    assert run(growth, texts, "truncated")[0] == [0, 0, 2, 0, 3, 0]


LENGTH = as_reward(lambda text: float(len(text)), name="length", low=-9.0, high=99.0)


def test_white_space_is_no_step_and_costs_nothing():
    for text in ("\n\n\n\na\n\n \n\n\n\nbb\n\n", "a\n\nbb", "\n\na\n\n\n\n\n\nbb\n\n\n"):
        rewards, _ = run(steps(SIZE), prefixes(text))
        values = [r for r in rewards if r]
        assert len(values) == 2 and values[0] == 1 and values[1] in (2, 3), text


def test_what_the_scorer_sees():
    seen = []

    def score(prompt, text, step, prefix, step_number, answer):
        seen.append((prompt, text, step, prefix, step_number, answer))
        return 1.0

    text = "one;two;three"
    run(steps(score, ";"), prefixes(text))
    assert seen == [
        ("solve", "one", "one", "one", 1, "7"),
        ("solve", "two", "two", "one;two", 2, "7"),
        ("solve", "three", "three", "one;two;three", 3, "7"),
    ]
    seen.clear()
    run(steps(score, ";", sees="prefix"), prefixes(text))
    assert [s[1] for s in seen] == ["one", "one;two", "one;two;three"]


def test_steps_of_all_rows_are_scored_in_one_call():
    calls = []

    def score(texts, step_number, answer):
        calls.append((list(texts), list(step_number), list(answer)))
        return [float(len(text)) for text in texts]

    schedule = steps(score, ";")
    rows = [{**ROW, "answer": str(i)} for i in range(4)]
    tracks = [schedule.begin(row, "") for row in rows]
    batch = TextBatch.from_texts(["a;", "b", "cc", "d;ee;f"], rows)
    payment = schedule.pay(
        tracks, batch, np.array([False, False, True, False]), np.array([False, True, False, False])
    )
    assert calls == [(["a", "cc", "d", "ee"], [1, 1, 1, 2], ["0", "2", "3", "3"])]
    assert payment.reward.tolist() == [1, 0, 2, 3]
    assert np.isnan(payment.components["score"]).tolist() == [False, True, False, False]
    schedule.pay(tracks[:2], batch.take([0, 1]), np.zeros(2, bool), np.zeros(2, bool))
    assert len(calls) == 1, "nothing ended, nothing is asked"


# --- totals


@pytest.mark.parametrize("total", ["sum", "mean", "growth"])
def test_payments_add_up_however_the_text_is_cut_into_tokens(total):
    rng = random.Random(1)
    reward = as_reward(lambda text: math.sin(len(text)), low=-1.0)
    schedule = steps(reward, sees="prefix" if total == "growth" else "step", total=total)
    for _ in range(200):
        words = [
            rng.choice(["a", "bb", "\n", "\n\n", " ", "ccc"]) for _ in range(rng.randint(1, 15))
        ]
        text = "".join(words)
        pieces = [part for part in split_offline(text) if part.strip()]
        values = [math.sin(len(part)) for part in pieces]
        if total == "growth":
            wanted = math.sin(len(text))
        elif not values:
            wanted = 0.0 if total == "sum" else -1.0
        else:
            wanted = sum(values) / (1 if total == "sum" else len(values))
        for texts in (prefixes(text), prefixes(text, rng), [text]):
            assert sum(run(schedule, texts)[0]) == pytest.approx(wanted, abs=1e-12)


def split_offline(text):
    return text.split("\n\n")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_pattern_parts_as_splitting_the_finished_text_does(compiled):
    pytest.importorskip("re2")
    rng = random.Random(2)
    pattern = r"\n\n+|;|Step \d:"
    schedule = steps(SIZE, pattern=re.compile(pattern) if compiled else pattern)
    for _ in range(200):
        words = [rng.choice(["a", "☃", "\n", "\n\n", ";", "Step 1:", "St"]) for _ in range(12)]
        text = "".join(words)
        # Line breaks that come late belong to no separator but to no step of their own either.
        wanted = [part.strip("\n") for part in re.split(pattern, text) if part.strip()]
        scored = []
        schedule = steps(
            as_reward(lambda step, into=scored: into.append(step.strip("\n")) or 1.0),
            pattern=re.compile(pattern) if compiled else pattern,
        )
        run(schedule, prefixes(text, rng))
        assert scored == wanted


def test_credit_by_steps_adds_up_to_the_score_of_the_whole_response():
    texts = prefixes("the cat\n\nsat on\n\nthe mat and more\n\n")
    batch = TextBatch.from_texts(texts[-1:], [ROW])
    score = Bleu().evaluate(batch).values[0]
    rewards, _ = run(steps(Bleu(), sees="prefix", total="growth"), texts)
    assert sum(rewards) == pytest.approx(score, abs=1e-12)
    assert sum(r != 0 for r in rewards) >= 3


def test_an_empty_response():
    for end, wanted in (("terminated", -9.0), ("truncated", 0.0)):
        assert run(steps(LENGTH, total="mean"), [" \n\n "], end)[0] == [wanted]
        assert run(steps(LENGTH), [" \n\n "], end)[0] == [0.0]
        rewards, payment = run(-1 * steps(LENGTH, total="mean"), [""], end)
        assert rewards == [-99.0 if end == "terminated" else 0.0]
        assert payment.status == [None], "writing nothing is no way to stay unscored"
    assert run(steps(LENGTH, sees="prefix", total="growth"), [""])[0] == [0.0]


def test_withdrawn_text_is_not_paid_twice():
    # The second separator turns out to be the beginning of a stop string, and is cut off.
    rewards, _ = run(steps(SIZE, ";"), ["aa", "aa;", "aa;b", "aa;b;", "aa;b"])
    assert rewards == [0, 2, 0, 1, 0]
    # A spoilt run of bytes: the text goes on from where it differs.
    rewards, _ = run(
        steps(SIZE, ";"), ["aa;", "aa\ufffd\ufffd", "aa\ufffd\ufffd;", "aa\ufffd\ufffd;c"]
    )
    assert rewards == [2, 0, 2, 1]


# --- sums, metrics, sub-goals, failures


def test_steps_in_a_sum():
    schedule = (
        steps(SIZE, ";") + 0.5 * dense(LengthPenalty(4)) + 2 * LENGTH + 0 * steps(Bleu(), ";")
    )
    assert schedule.names == ("size", "length", "length_2", "bleu")
    assert schedule.every_step and schedule.gamma == 1.0
    texts = ["a", "a;", "a;bb"]
    rewards, payment = run(schedule, texts)
    alone = run(0.5 * dense(LengthPenalty(4)), texts)[0]
    assert rewards == pytest.approx([alone[0], alone[1] + 1, alone[2] + 2 + 8])
    assert payment.components["size"][0] == 2 and payment.components["length_2"][0] == 4
    schedule = steps(0.5 * SIZE + LENGTH, ";")
    assert schedule.names == ("size", "length")
    assert run(schedule, texts)[0] == [0, 1.5, 3]


def test_a_scorer_that_fails_leaves_the_episode_unscored():
    script = [1.0, OSError("down"), 2.0, OSError("down"), OSError("still down")]

    def score(text):
        item = script.pop(0)
        if isinstance(item, Exception):
            raise item
        return item

    rewards, payment = run(steps(score, ";"), ["a;", "a;b;", "a;b;c;", "a;b;c;d"])
    assert rewards == [1, 2, 0, 0]
    assert payment.status == ["error: OSError: still down"] and not script
    with pytest.raises(RewardError, match="OSError: down"):
        script.append(OSError("down"))
        run(as_schedule(steps(score, ";"), strict=True), ["a;"])
    rewards, payment = run(steps(lambda text: None, ";"), ["a;"])
    assert (rewards, payment.status) == ([0], ["none"])


def test_a_step_that_is_at_fault_gets_the_worst_value():
    def score(text):
        if text == "bad":
            raise TextFailure("timeout")
        return 1.0

    reward = as_reward(score, low=-2.0)
    rewards, payment = run(steps(reward, ";"), ["a;", "a;bad;", "a;bad;c"])
    assert (rewards, payment.status) == ([1, -2, 1], [None])
    assert run(-1 * steps(reward, ";"), ["bad;"])[0] == [-1]


def test_a_step_that_does_not_apply_is_left_out_of_the_mean():
    only_long = as_reward(lambda text: len(text) / 4 if len(text) > 1 else None, name="long")
    schedule = steps(only_long, ";", total="mean") + steps(LENGTH, ";")
    rewards, payment = run(schedule, ["aa;", "aa;b;", "aa;b;cccc"])
    assert (rewards, payment.status) == ([2.5, 1, 4.25], [None])


# --- contracts


def test_a_copied_track_is_exact_and_independent():
    schedule = steps(SIZE, ";", total="mean") + dense(Bleu())

    def step(track, text, last=False):
        batch = TextBatch.from_texts([text], [ROW])
        return schedule.pay([track], batch, np.array([last]), np.array([False])).reward[0]

    track = schedule.begin(ROW, "")
    for text in ("the", "the;", "the;c"):
        step(track, text)
    twin = track.copy()
    left = [step(track, "the;cat;"), step(track, "the;cat;sat", True)]
    assert [step(twin, "the;cat;"), step(twin, "the;cat;sat", True)] == left
    assert any(left)


def test_a_schedule_of_steps_is_shared_and_pickles():
    pytest.importorskip("re2")
    for schedule in (
        steps(Bleu()),
        steps(Bleu(), pattern=r"\n+"),
        steps(Bleu(), pattern=re.compile("x")),
    ):
        assert copy.deepcopy(schedule) is schedule
        texts = prefixes("the cat\n\nsat on x the mat")
        assert run(pickle.loads(pickle.dumps(schedule)), texts)[0] == run(schedule, texts)[0]


def test_columns_are_checked():
    schedule = steps(lambda step, step_number, answer: 1.0)
    schedule.check(["prompt", "answer"])
    with pytest.raises(RewardColumnError, match="'answer'"):
        schedule.check(["prompt"])
    with pytest.raises(ValueError, match=r"the prompt table has step, prefix already: rename it"):
        schedule.check(["prompt", "answer", "prefix", "step"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"separator": ""}, "must not be empty"),
        ({"sees": "all"}, "sees must be 'step' or 'prefix', got 'all'"),
        ({"total": "max"}, "total must be 'sum', 'mean' or 'growth', got 'max'"),
        ({"total": "growth"}, "say sees='prefix'"),
        ({"pattern": "(?=a)"}, r"RE2 cannot compile the pattern '\(\?=a\)': invalid perl"),
    ],
)
def test_bad_arguments(arguments, message):
    if "pattern" in arguments:
        pytest.importorskip("re2")
    with pytest.raises(ValueError, match=message):
        steps(SIZE, **arguments)


def test_a_string_needs_re2_and_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "re2", None)
    with pytest.raises(ImportError, match=r'pip install "textgym\[verify\]"'):
        steps(SIZE, pattern="a")
    assert run(steps(SIZE, pattern=re.compile("[;,]")), ["a;bb,c"])[0] == [4]


def test_an_exploding_pattern_is_linear_and_an_empty_match_parts_nothing():
    pytest.importorskip("re2")
    assert not list(PatternSeparator(r"(a+)+$|(a|a)*b").find("a" * 5000 + "c", 0))
    for splitter in (PatternSeparator("x*"), PatternSeparator(re.compile("x*"))):
        assert list(splitter.find("aaa☃", 0)) == []
        assert list(splitter.find("aa☃xxax", 1)) == [(3, 5), (6, 7)]
        assert list(splitter.find("a\ud800xx", 0)) == [(2, 4)]
    assert list(FixedSeparator("ab").find("aabab", 0)) == [(1, 3), (3, 5)]
    state = Written()
    ended = state.advance("a☃xxb", PatternSeparator("x*"), over=True, whole=False)
    assert [step.text for step in ended] == ["a☃", "b"]


# --- in environments

TOKENS = symbol_tokenizer(["a", "b", "."])


def make_task(**arguments):
    reward = (
        steps(as_reward(lambda step: step.split().count("a") / 8, name="a"), ".") + 0.5 * LENGTH
    )
    given = {"prompts": [{"prompt": p} for p in ("a", "b", "a b")], "tokenizer": TOKENS}
    return Task(**{**given, "reward": reward, "max_new_tokens": 12, **arguments})


def test_many_steps_at_once_take_linear_time():
    pytest.importorskip("re2")

    def seconds(count):
        text, best = "\u2603\n" * count, math.inf
        for _ in range(3):
            began = time.perf_counter()
            assert len(list(PatternSeparator(r"\n").find(text, 0))) == count
            best = min(best, time.perf_counter() - began)
        return best

    assert seconds(16_000) < 20 * max(seconds(2_000), 1e-3)


@pytest.mark.parametrize("budget", ["terminate", "truncate"])
def test_single_vector_and_sequence_paths_pay_alike(budget):
    task = make_task(budget=budget)
    model = random_causal_lm(TOKENS.vocab_size, hidden_size=16, num_layers=1, num_heads=2)
    policy = CausalLMPolicy(model, device="cpu")
    envs = TextGenVectorEnv(task, 4, autoreset_mode="Disabled")
    rows = np.arange(12) % 3
    one = collect(policy, envs, 12, seed=3, prompt_rows=rows)
    two = collect(policy, envs, 12, seed=3, prompt_rows=rows, path="sequence")
    np.testing.assert_array_equal(one.ids, two.ids)
    np.testing.assert_array_equal(one.reward, two.reward)
    for name, values in one.components.items():
        np.testing.assert_array_equal(values, two.components[name])
    env = TextGenEnv(task)
    for b in range(12):
        env.reset(options={"prompt_row": int(rows[b])})
        own = slice(one.offsets[b], one.offsets[b + 1])
        ids = one.sequence(b)[one.prompt_length[b] :]
        rewards = [env.step(i)[1] for i in ids]
        assert rewards == one.reward[own].tolist()
    paid = ~np.isnan(one.components["a"])
    assert 12 < paid.sum() < one.num_tokens, "on the last token of each step only"
    record = next(iter(sample_records(one, TOKENS, [0])))
    assert record["components"]["a"] == pytest.approx(
        np.nansum(one.components["a"][: one.offsets[1]])
    )
    assert len(record["token_rewards"]) == len(record["tokens"])


def test_on_the_command_line_it_is_an_object_of_a_module(monkeypatch, tmp_path):
    (tmp_path / "my_steps.py").write_text(
        "from textgym.rewards import steps\nreward = steps(lambda step: len(step) / 9, ';')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    schedule = parse_reward("0.5*my_steps:reward + bleu")
    assert schedule.names == ("lambda", "bleu")
    assert run(0.5 * parse_reward("my_steps:reward"), ["abc;"])[0] == [pytest.approx(1 / 6)]


def test_play_shows_what_every_step_was_paid():
    from rich.console import Console

    from textgym.commands.play import Game, PlayArgs

    out = io.StringIO()
    game = Game(PlayArgs(env="textgym/Echo-v0"), Console(file=out, width=100))
    game.env.unwrapped.task = make_task()
    game.env.unwrapped.mdp = TokenMDP(game.env.unwrapped.task, 1)
    game.tokenizer = TOKENS
    game.start(prompt_row=0)
    for line in ("a .", "b b .", ":undo", "a a .", ""):
        game.turn(line)
    assert game.rewards[:5] == [0, 0.125, 0, 0, 0.25]
    shown = out.getvalue()
    assert "a: 0.3750" in shown and "length: 9.0000" in shown and "total reward 4.8750" in shown
