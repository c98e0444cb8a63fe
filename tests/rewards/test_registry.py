"""Rewards by name, and the expressions of the command line."""

import sys

import pytest

import textgym.rewards
from textgym.rewards import (
    REWARDS,
    Bleu,
    Reward,
    Schedule,
    TextBatch,
    as_reward,
    as_schedule,
    make_reward,
    parse_reward,
)

BATCH = TextBatch.from_texts(["the cat", "a dog sat"], [{"references": ["the cat sat"]}] * 2)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "from textgym.rewards import Reward, dense, Bleu\n"
        "def short(text):\n    return 1.0 / (1 + len(text))\n"
        "class Judge(Reward):\n"
        "    name = 'judge'\n"
        "    def score(self, batch):\n        return [0.5] * len(batch)\n"
        "class Space:\n    judge = Judge()\n"
        "spread = dense(Bleu())\n"
        "number = 3\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_rewards"
    sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize("name", REWARDS)
def test_every_name_makes_a_reward_of_that_name(name):
    reward = make_reward(name)
    assert isinstance(reward, Reward) and reward.name == name
    # On texts of its own, because rewards read different columns.
    examples = reward.examples()
    batch = BATCH
    if examples:
        batch = TextBatch.from_texts([e.text for e in examples], [e.row for e in examples])
    status = reward.fitted(batch.rows).evaluate(batch, strict=True).status
    assert status == [None] * len(batch)


def test_what_is_registered_is_exported():
    kinds = {type(make_reward(name)).__name__ for name in REWARDS} - {"ThinkAnswer"}
    assert kinds | {"think_answer", "Pattern", "TagFormat", "HTTPJudge"} <= set(
        textgym.rewards.__all__
    )
    assert all(hasattr(textgym.rewards, name) for name in textgym.rewards.__all__)


@pytest.mark.parametrize(
    ("expression", "terms"),
    [
        ("bleu", [(1.0, "bleu")]),
        (" 0.5*bleu + 0.5 * rougeL ", [(0.5, "bleu"), (0.5, "rougeL")]),
        ("-bleu-2e-1*rouge1", [(-1.0, "bleu"), (-0.2, "rouge1")]),
        ("bleu*exact_match+0*length", [(1.0, "bleu*exact_match"), (0.0, "length")]),
        ("rouge2*.5*2.", [(1.0, "rouge2")]),
        ("+bleu", [(1.0, "bleu")]),
        ("my_rewards:short - my_rewards:Judge", [(1.0, "short"), (-1.0, "judge")]),
        ("3*my_rewards:Space.judge", [(3.0, "judge")]),
    ],
)
def test_expressions(expression, terms, module):
    reward = parse_reward(expression)
    assert [(weight, part.name) for weight, part in reward.parts()] == terms


def test_an_expression_with_a_schedule_is_a_schedule(module):
    schedule = parse_reward("my_rewards:spread + 0.5*rougeL")
    assert isinstance(schedule, Schedule)
    assert schedule.names == ("bleu", "rougeL") and schedule.every_step
    with pytest.raises(TypeError, match="inside"):
        parse_reward("my_rewards:spread*rougeL")


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("", "the reward is empty"),
        ("blue", r"no reward named 'blue'. Did you mean 'bleu'\?"),
        ("xyz", "names are: bleu, rouge1"),
        ("bleu rougeL", "cannot read .* at 'rougeL'"),
        ("bleu+", "at its end"),
        ("bleu**2", r"at '\*'"),
        ("bleu+*2", r"at '\*'"),
        ("--bleu", "at '-'"),
        ("(bleu)", r"at '\(bleu\)'"),
        ("bleu;exit()", "at ';"),
        ("0.5", "multiplies no reward"),
        ("bleu+2", "multiplies no reward"),
        ("not_a_module:f", "no module 'not_a_module'"),
        ("my_rewards.sub:f", "no module 'my_rewards.sub'"),
        ("my_rewards:shrt", r"no 'shrt'. Did you mean 'short'\?"),
    ],
)
def test_bad_expressions_say_what_is_wrong(expression, says, module):
    with pytest.raises(ValueError, match=says):
        parse_reward(expression)


def test_an_object_that_is_no_reward(module):
    with pytest.raises(TypeError, match="got int"):
        parse_reward("my_rewards:number")


def test_a_module_that_fails_to_import_shows_its_own_error(module):
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        parse_reward("broken_rewards:f")


def test_a_parsed_reward_scores_like_the_written_one():
    written = 0.5 * Bleu() * make_reward("rougeL") - make_reward("exact_match")
    parsed = parse_reward("0.5*bleu*rougeL - exact_match")
    assert parsed.evaluate(BATCH).values.tolist() == written.evaluate(BATCH).values.tolist()


def test_expressions_are_rewards_wherever_rewards_are_taken() -> None:
    both = as_schedule("0.5*bleu + 0.5*rougeL")
    assert both.names == ("bleu", "rougeL") and both.high == 1.0
    assert as_reward("textgym.rewards:ExactMatch").name == "exact_match"
