"""Thinking: the format, the answer in it, and the reward composed of both."""

import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgym.rewards import ExactMatch, LengthPenalty, TextBatch, TextFailure, as_reward, terminal
from textgym.rewards.verifiers import InTag, Numeric, TagFormat, think_answer

from .hostile import HOSTILE

RIGHT = "<think>2 + 2 = 4</think>\n<answer>4</answer>"
BROKEN = [
    "",
    "4",
    "<answer>4</answer>",
    "<think>so</think>",
    "<think>so</think> and <answer>4</answer>",
    "Well. <think>so</think><answer>4</answer>",
    "<think>so</think><answer>4</answer>!",
    "<answer>4</answer><think>so</think>",
    "<think>so<answer>4</answer></think>",
    "<think>so</think><answer>4",
    "<think></think><answer>4</answer>",
    "<think>so</think><answer> </answer>",
    "<think><think>so</think></think><answer>4</answer>",
    "<think>so</think><think>so</think><answer>4</answer>",
    "<think>so</think><answer>3</answer><answer>4</answer>",
    "<Think>so</Think><answer>4</answer>",
    "< think>so</think><answer>4</answer>",
]


def value(reward, text, answer=4):
    return reward.evaluate(TextBatch.from_texts([text], [{"answer": answer}])).values[0]


def test_the_format():
    assert value(TagFormat(), RIGHT) == 1.0
    assert value(TagFormat(), f" {RIGHT}\n") == 1.0
    assert value(TagFormat(), "<think>a < b </ think></think><answer>x\n</answer>") == 1.0
    for text in BROKEN:
        assert value(TagFormat(), text) == 0.0, text
    assert value(TagFormat(opened=True), RIGHT.removeprefix("<think>")) == 1.0
    assert value(TagFormat(opened=True), RIGHT) == 0.0
    assert value(TagFormat(("a", "b", "c")), "<a>1</a><b>2</b><c>3</c>") == 1.0
    for bad in ((), ("a", "a"), ("",), ("a b",), ("<a>",)):
        with pytest.raises(ValueError, match="tags must be different names"):
            TagFormat(bad)


TAGS = ["<think>", "</think>", "<answer>", "</answer>", "a", " ", "\n"]


@given(st.lists(st.sampled_from(TAGS), max_size=9))
def test_the_format_is_that_of_the_expression_of_the_paper(pieces):
    # The expression of open reproductions; one tag each, because `.*?` would let others pass.
    text = "".join(pieces)
    expression = r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*"
    match = re.fullmatch(expression, text, re.DOTALL)
    once = all(text.count(tag) == 1 for tag in TAGS[:4])
    expected = match is not None and once and bool(match[1].strip() and match[2].strip())
    assert value(TagFormat(), text) == float(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RIGHT, 1.0),
        ("<think>so</think><answer>5</answer>", 0.5),
        ("<answer>4</answer>", 0.5),
        ("<think>so</think><answer>3</answer><answer>4</answer>", 0.0),
        ("<think>the answer is 4</think>", 0.0),
        ("<think>so</think><answer>3 or 4</answer>", 0.5),
        ("4", 0.0),
    ],
)
def test_half_for_format_half_for_answer(text, expected):
    assert value(think_answer(), text) == expected
    payment = terminal(think_answer()).pay(
        [terminal(think_answer()).begin({"answer": 4}, "")],
        TextBatch.from_texts([text], [{"answer": 4}]),
        [True],
        [False],
    )
    assert payment.reward[0] == expected
    assert set(payment.components) == {"tags", "numeric"}  # both parts are logged


def test_weights_other_answers_and_opened_thoughts():
    reward = think_answer(ExactMatch("answer"), format_weight=0.1, answer_weight=0.9, opened=True)
    assert value(reward, "so</think><answer>cat</answer>", "cat") == 1.0
    assert value(reward, "so</think><answer>dog</answer>", "cat") == pytest.approx(0.1)
    assert (reward.low, reward.high, reward.name) == (0.0, 1.0, "think_answer")
    twin = pickle.loads(pickle.dumps(reward))
    assert value(twin, "so</think><answer>cat</answer>", "cat") == 1.0
    with pytest.raises(ValueError, match="needs the column 'answer'"):
        reward.check(["gold"])


def test_another_reward_in_a_tag():
    def judge(text):
        if text == "fault":
            raise TextFailure("fault")
        return None if text == "none" else len(text) / 10

    inside = InTag(as_reward(judge, low=-1.0), "answer")
    texts = ["<answer>abc</answer>", "abc", "<answer>fault</answer>", "<answer>none</answer>"]
    scores = inside.evaluate(TextBatch.from_texts(texts))
    assert scores.values.tolist()[:3] == [0.3, -1.0, -1.0]
    assert scores.status == [None, None, "text: fault", "none"]
    assert InTag(LengthPenalty()).low == -1.0
    assert value(InTag(Numeric()), "</answer>4<answer>") == 0.0
    with pytest.raises(ValueError, match="a tag must be a name"):
        InTag(Numeric(), "<answer>")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts(name):
    text = HOSTILE[name]
    assert value(TagFormat(), text) == 0.0
    assert value(think_answer(), text, 123454321) in (0.0, 0.5)
    assert value(think_answer(), f"<think>so</think><answer>{text}</answer>", 123454321) in (0, 0.5)
