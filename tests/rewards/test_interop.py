"""Rewards of TRL and verifiers as ours, and ours as TRL's."""

import asyncio
import functools
import pickle
import types

import numpy as np
import pytest

from textgym.rewards import (
    Bleu,
    ExactMatch,
    InTag,
    LengthPenalty,
    Numeric,
    RewardColumnError,
    TextBatch,
    TextFailure,
    as_reward,
    terminal,
)
from textgym.rewards.interop import from_rubric, text_of
from textgym.rewards.service import Service

CHAT = [{"role": "user", "content": "2+2?"}]


def said(text):
    return [{"role": "assistant", "content": text}]


def batch_of(texts, prompt="2+2?", **columns):
    rows = [
        {"prompt": prompt, **{name: values[i] for name, values in columns.items()}}
        for i in range(len(texts))
    ]
    return TextBatch.from_texts(texts, rows)


# ---- ours as TRL's -------------------------------------------------------------------------------


def call_as_trl(function, prompts, completions, **columns):
    """Call a reward function with all that TRL's GRPOTrainer passes (1.16)."""
    return function(
        prompts=prompts,
        completions=completions,
        completion_ids=[[1, 2, 3]] * len(prompts),
        trainer_state=types.SimpleNamespace(global_step=3),
        log_extra=lambda column, values: None,
        log_metric=lambda name, value: None,
        **columns,
    )


def test_a_reward_is_a_trl_function():
    function = ExactMatch("answer").trl()
    assert function.__name__ == "exact_match"
    assert (Bleu() + 0.5 * ExactMatch()).named("mix").trl().__name__ == "mix"
    values = call_as_trl(function, ["p"] * 3, ["4", "5", " 4 "], answer=["4", "4", "4"])
    assert values == [1.0, 0.0, 1.0] and all(type(value) is float for value in values)
    chat = call_as_trl(function, [CHAT] * 2, [said("4"), said("5")], answer=["4", "4"])
    assert chat == [1.0, 0.0]
    assert function(["p"], ["4"], answer=["4"]) == [1.0]  # called by hand, with less


def test_columns_ids_and_prompts_reach_the_reward():
    seen = {}

    def look(prompt, completion, text, token_ids, weight, **columns):
        seen.update(locals())
        return 0.5

    values = call_as_trl(as_reward(look).trl(), [CHAT], [said("a")], weight=[3], other=["x"])
    assert values == [0.5]
    assert (seen["prompt"], seen["completion"], seen["text"]) == (CHAT, said("a"), "a")
    assert seen["token_ids"] == [1, 2, 3] and seen["weight"] == 3
    assert seen["columns"]["other"] == "x"
    assert not {"trainer_state", "log_extra", "log_metric"} & set(seen["columns"])


def test_a_missing_column_is_an_error_and_not_a_none():
    with pytest.raises(RewardColumnError, match=r"'answer'.*mean 'answers'"):
        call_as_trl(ExactMatch("answer").trl(), ["p"], ["4"], answers=["4"])
    with pytest.raises(ValueError, match="one per prompt"):
        ExactMatch("answer").trl()(["p"], ["4", "5"], answer=["4"])


def test_failures_become_none_and_faults_of_the_text_the_worst():
    outcomes = {
        "none": None,
        "nan": float("nan"),
        "down": OSError("down"),
        "bad": TextFailure("does not parse"),
        "fine": 0.25,
    }

    def scripted(texts):
        return [outcomes[text] for text in texts]

    function = as_reward(scripted, low=-1.0).trl()
    assert function(["p"] * 5, list(outcomes)) == [None, None, None, -1.0, 0.25]


def test_async_rewards_are_trl_functions_too():
    async def judge(text):
        await asyncio.sleep(0)
        return len(text)

    async def trainer():  # TRL may call from within its own loop
        return as_reward(judge).trl()(["p", "p"], ["a", "bb"])

    assert asyncio.run(trainer()) == [1.0, 2.0]


def test_a_trl_function_can_be_sent_to_another_process():
    function = pickle.loads(pickle.dumps(ExactMatch("answer").trl()))
    assert function.__name__ == "exact_match"
    assert function(["p"], ["4"], answer=["4"]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        ([], ""),
        (said("one"), "one"),
        ([{"content": "no role"}], "no role"),
        ([*said("call"), {"role": "tool", "content": "42"}, *said("so 42")], "call\nso 42"),
        ([{"role": "assistant", "content": None, "tool_calls": []}, *said("x")], "x"),
        (said([{"type": "text", "text": "a"}, {"type": "image"}, {"text": "b"}]), "ab"),
    ],
)
def test_the_text_of_a_completion(completion, text):
    assert text_of(completion) == text


def test_what_is_no_completion_is_refused():
    with pytest.raises(TypeError, match="chat messages, got int"):
        text_of(3)


# ---- TRL's as ours: shapes of published functions ------------------------------------------------


def think_format(completions, **kwargs):  # of conversations only
    contents = [completion[0]["content"] for completion in completions]
    return [float("<think>" in c and "</think>" in c) for c in contents]


def accuracy(completions, solution, log_extra=None, **kwargs):  # None: does not apply
    values = [
        None if not gold else float(completion[0]["content"] == gold)
        for completion, gold in zip(completions, solution, strict=True)
    ]
    if log_extra is not None:
        log_extra("solution", solution)
    return values


class RepetitionPenalty:
    """A callable object with a `__name__`, over token ids."""

    __name__ = "repetition_penalty_reward"

    def __init__(self, most):
        self.most = most

    def __call__(self, completion_ids, **kwargs):
        return [
            self.most * (1 - len(set(ids)) / len(ids)) if ids else 0.0 for ids in completion_ids
        ]


async def remote(prompts, completions, completion_ids, answer, **kwargs):
    await asyncio.sleep(0)
    return [
        float(len(ids) > 0 and a in c)
        for c, ids, a in zip(completions, completion_ids, answer, strict=True)
    ]


def test_published_shapes_plug_in_unchanged():
    chat = batch_of(["<think>x</think>4", "4"], prompt=CHAT, solution=["", "4"])
    assert as_reward(think_format).evaluate(chat).values.tolist() == [1.0, 0.0]
    scores = as_reward(accuracy).evaluate(chat, optional=True)
    assert np.isnan(scores.values[0]) and scores.values[1] == 1.0 and scores.traceback is None
    both = terminal(as_reward(think_format) + 2.0 * as_reward(accuracy))
    tracks = [both.begin(row, CHAT) for row in chat.rows]
    ended = np.array([True, True])
    assert both.pay(tracks, chat, ended, ~ended).reward.tolist() == [1.0, 2.0]

    plain = batch_of(["is 4", "5"], answer=["4", "4"])
    plain.token_ids[:] = [[1, 1, 2, 2], [3]]
    penalty = as_reward(RepetitionPenalty(-1.0), low=-1.0, high=0.0)
    assert penalty.name == "repetition_penalty_reward"
    assert penalty.evaluate(plain).values.tolist() == [-0.5, 0.0]
    assert as_reward(remote).evaluate(plain).values.tolist() == [1.0, 0.0]
    # There and back again.
    again = as_reward(penalty.trl())
    assert again.evaluate(plain).values.tolist() == [-0.5, 0.0]


# ---- verifiers -----------------------------------------------------------------------------------


class Parser:
    def parse_answer(self, completion):
        return completion[-1]["content"].split()[-1]


class Rubric:
    """What `verifiers.Rubric` keeps (0.1): functions, weights, objects by name."""

    def __init__(self, funcs, weights=None, parser=None):
        self.funcs, self.weights = funcs, weights or [1.0] * len(funcs)
        self.parser = parser or Parser()
        self.class_objects = {"parser": self.parser}


def exact_answer(parser, completion, answer, **kwargs) -> float:
    return 1.0 if parser.parse_answer(completion) == answer else 0.0


async def brief(completion) -> float:
    await asyncio.sleep(0)
    return 1.0 if len(completion[-1]["content"]) < 5 else 0.5


def looks_at_all(prompt, completion, answer, state, task, info):
    assert prompt == CHAT and completion == said(state["completion"][0]["content"])
    assert state["answer"] == answer and task == "default"
    return float(info["scale"])


def test_a_rubric_is_a_weighted_sum():
    rubric = Rubric([exact_answer, brief, looks_at_all], [1.0, 0.5, 0.0])
    batch = batch_of(
        ["it is 4", "4", "5"], answer=["4"] * 3, info=[{"scale": s} for s in (1, 2, 3)]
    )
    reward = from_rubric(rubric)
    reward.check(["prompt", "answer", "info"])
    assert reward.evaluate(batch, strict=True).values.tolist() == [1.25, 1.5, 0.5]
    weights = {part.name: weight for weight, part in reward.parts()}
    assert weights == {"exact_answer": 1.0, "brief": 0.5, "looks_at_all": 0.0}
    schedule = terminal(reward)
    tracks = [schedule.begin(row, "") for row in batch.rows]
    payment = schedule.pay(tracks, batch, np.full(3, True), np.full(3, False))
    assert payment.components["looks_at_all"].tolist() == [1, 2, 3]  # a metric


def test_one_function_and_groups_and_older_names():
    batch = batch_of(["4"], answer=["4"])
    rubric = types.SimpleNamespace(reward_funcs=[brief], reward_weights=[2.0], parser=Parser())
    assert from_rubric(rubric).evaluate(batch).values.tolist() == [2.0]
    group = types.SimpleNamespace(rubrics=[Rubric([brief]), Rubric([exact_answer], [0.25])])
    assert from_rubric(group).evaluate(batch).values.tolist() == [1.25]
    assert from_rubric(brief).name == "brief"
    partial = functools.partial(brief)
    assert from_rubric(partial).evaluate(batch).values.tolist() == [1.0]
    how = Service(retries=2)
    assert from_rubric(brief, service=how).service is how


def test_functions_of_bare_completions():
    def ends_well(prompt, completion):
        return float(prompt == "2+2?" and completion.endswith("4"))

    batch = batch_of(["it is 4"])
    assert from_rubric(ends_well, chat=False).evaluate(batch).values.tolist() == [1.0]
    # With as_reward, a function is given text for text and messages for messages.
    assert as_reward(ends_well).evaluate(batch).values.tolist() == [1.0]
    chat = batch_of(["it is 4"], prompt=CHAT, answer=["4"])
    plain = as_reward(functools.partial(exact_answer, Parser()))
    assert plain.evaluate(chat).values.tolist() == [1.0]


def test_a_rubric_that_cannot_be_a_reward_says_why():
    def compares(completions, answers):
        return [0.0] * len(completions)

    with pytest.raises(TypeError, match="'compares' compares all responses"):
        from_rubric(Rubric([compares]))
    with pytest.raises(TypeError, match="expected a rubric or a function, got int"):
        from_rubric(3)
    with pytest.raises(TypeError, match="without"):
        from_rubric(Rubric([]))
    with pytest.raises(RewardColumnError, match="'exact_answer' needs the column 'answer'"):
        from_rubric(Rubric([exact_answer])).check(["prompt", "solution"])


def test_an_exception_in_a_rubric_is_a_failure_and_not_a_zero():
    def broken(completion, state):
        return state["trajectory"][0]

    scores = from_rubric(broken).evaluate(batch_of(["4"]))
    assert np.isnan(scores.values[0]) and "KeyError: 'trajectory'" in scores.status[0]


def test_trl_is_told_what_is_missing() -> None:
    short = LengthPenalty(2, 2).trl()
    assert short(["a"], ["x y z"], completion_ids=[[1, 2, 3]]) == [-0.5]
    for reward in (LengthPenalty(2, 2), Bleu() + LengthPenalty(2, 2), InTag(LengthPenalty(2, 2))):
        with pytest.raises(ValueError, match="pass completion_ids"):
            reward.trl()(["a"], ["x y z"], references=["x"])
    with pytest.raises(ValueError, match="expected 2 values a column, one per prompt, got"):
        Numeric().trl()(["a", "b"], ["42", "7"], answer=["42"])
