"""ExactMatch and LengthPenalty."""

import copy
import pickle

import pytest

from textgym.rewards import ExactMatch, LengthPenalty, RewardColumnError, TextBatch


def match(text, references, **options):
    batch = TextBatch.from_texts([text], [{"references": references}])
    return ExactMatch(**options).evaluate(batch, strict=True).values[0]


def test_exact_match():
    assert match("42", "42") == match(" 42\n", "42 ") == 1
    assert match("42", ["41", "42"]) == match("42", 42) == match("0.5", [0.5]) == 1
    assert match("42", "421") == match("", "42") == match("Yes", "yes") == 0
    assert match("Yes", "yEs", lowercase=True) == 1


@pytest.mark.parametrize("references", [None, [], {"a": 1}, [None]])
def test_exact_match_names_bad_references(references):
    batch = TextBatch.from_texts(["a", "a"], [{"references": references}, {"references": "a"}])
    scores = ExactMatch().evaluate(batch)
    assert "column 'references'" in scores.status[0]
    assert scores.status[1] is None and scores.values[1] == 1


def test_exact_match_checks_its_column():
    with pytest.raises(RewardColumnError, match="Did you mean 'answer'"):
        ExactMatch(column="anwser").check(["prompt", "answer"])
    ExactMatch(column="answer").check(["prompt", "answer"])


def test_length_penalty():
    lengths = [0, 10, 11, 15, 20, 50]
    n = len(lengths)
    batch = TextBatch(
        prompts=[""] * n,
        texts=[""] * n,
        token_ids=[[0] * length for length in lengths],
        prompt_ids=[[0]] * n,
        rows=[{}] * n,
        stop_reasons=[None] * n,
    )
    values = LengthPenalty(free=10, span=10).score(batch).tolist()
    assert values == pytest.approx([0, 0, -0.1, -0.5, -1, -1])
    assert str(values[0]) == "0.0"  # not -0.0
    assert LengthPenalty(0, 100).score(batch).tolist() == [0, -0.1, -0.11, -0.15, -0.2, -0.5]


@pytest.mark.parametrize("options", [{"free": -1}, {"span": 0}])
def test_length_penalty_refuses_bad_arguments(options):
    with pytest.raises(ValueError, match="free >= 0 and span >= 1"):
        LengthPenalty(**options)


@pytest.mark.parametrize("reward", [ExactMatch("answer", lowercase=True), LengthPenalty(3, 7)])
def test_copies_and_pickles(reward):
    assert copy.deepcopy(reward) is reward
    assert pickle.loads(pickle.dumps(reward)).__dict__ == reward.__dict__
