"""The single environment: Gymnasium's face of one row, `TextGen-v0` and its arguments."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from textgym.env import TextGenEnv
from textgym.mdp import Reply, Task
from textgym.prompts import Prompts
from textgym.rewards import as_reward, dense
from textgym.streams import mix64
from textgym.tokens import symbol_tokenizer

A, B, C, EOS, BOS = range(5)
TOKENS = symbol_tokenizer(["a", "b", "c"])
ROWS = [{"prompt": p, "references": ["a b c"]} for p in ("a", "b c", "c c c")]


def words(text: str) -> float:
    return float(len(text.split()))


def make(**arguments: Any) -> TextGenEnv:
    """An environment over `TOKENS` that pays a word each, unless told otherwise."""
    render_mode = arguments.pop("render_mode", None)
    given = {"prompts": ROWS, "tokenizer": TOKENS, "reward": words, "max_new_tokens": 4}
    return TextGenEnv(Task(**{**given, **arguments}), render_mode=render_mode)


# --- one episode


def test_an_episode() -> None:
    env = make()
    observation, info = env.reset(seed=3, options={"prompt_row": 1})
    assert set(info) == {"prompt_row", "stream"}
    assert info["prompt_row"] == 1 and type(info["prompt_row"]) is int
    assert info["stream"] == mix64(3, 0) and type(info["stream"]) is np.uint64
    assert observation["input_ids"].tolist() == [B, C, 0, 0, 0, 0, 0]
    assert (observation["length"].tolist(), observation["prompt_length"].tolist()) == ([2], [2])
    observation, reward, terminated, truncated, info = env.step(A)
    assert (reward, terminated, truncated, info) == (0.0, False, False, {})
    observation, reward, terminated, truncated, info = env.step(np.int64(EOS))
    assert observation["input_ids"].tolist() == [B, C, A, EOS, 0, 0, 0]
    assert observation["length"].tolist() == [4]
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert [type(v) for v in (reward, terminated, truncated)] == [float, bool, bool]
    assert info == {"text": "a", "stop_reason": "stop_id", "reward": {"words": 1.0}}
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(A)


def test_observations_are_new_objects_every_call() -> None:
    env = make()
    seen = [env.reset(seed=0)[0], env.step(A)[0], env.step(B)[0]]
    for k in seen[0]:
        assert not any(np.shares_memory(x[k], y[k]) for x in seen for y in seen if x is not y)
    assert [o["length"][0] - seen[0]["length"][0] for o in seen] == [0, 1, 2]


@pytest.mark.parametrize("arguments", [
    {}, {"budget": "truncate"}, {"reward": dense("bleu")}, {"stop": ("a b",)},
    {"respond": lambda row, ids: Reply([B])}, {"max_prompt_tokens": 1, "truncate_prompt": "left"},
])  # fmt: skip
def test_gymnasium_finds_nothing_to_say(arguments: dict[str, Any]) -> None:
    check_env(make(**arguments), skip_render_check=True)  # which needs a spec: test_contracts.py


# --- seeds and options


def test_the_same_seed_gives_the_same_everything() -> None:
    def run(env: TextGenEnv) -> list[Any]:
        seen: list[Any] = [env.reset(seed=8)]
        for _ in range(3):
            for action in (A, B, EOS):
                seen.append(env.step(action))
            seen.append(env.reset())
        return seen

    env = make(reward=dense("bleu"))
    first = run(env)
    assert str(first) == str(run(env)) == str(run(make(reward=dense("bleu"))))
    streams = [step[1]["stream"] for step in first if len(step) == 2]
    assert streams == [mix64(8, episode) for episode in range(4)]


def test_without_a_seed_two_environments_differ() -> None:
    assert len({int(make().reset()[1]["stream"]) for _ in range(4)}) == 4


def test_any_seed_that_gymnasium_takes() -> None:
    for seed in (0, 2**31, 2**63, 2**64 - 1, 2**64 + 5):
        assert make().reset(seed=seed)[1]["stream"] == mix64(seed, 0)


def test_a_given_stream_is_the_identity_of_the_episode() -> None:
    rows = [{"prompt": "a", "i": i} for i in range(50)]
    streams = [0, 7, 2**64 - 1, np.uint64(2**63), -1]
    envs = [make(prompts=rows), make(prompts=rows)]
    infos = [
        [e.reset(seed=s, options={"stream": x})[1] for x in streams] for s, e in enumerate(envs)
    ]
    assert [i["stream"] for i in infos[0]] == [0, 7, 2**64 - 1, 2**63, 2**64 - 1]
    assert infos[0] == infos[1], "the prompt is drawn from the stream, not from the seed"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt_row": 3}, ValueError, r"prompt_row must be in \[0, 3\), got \[3\]"),
        ({"prompt_row": -1}, ValueError, "prompt_row must be in"),
        ({"prompt_row": 1.0}, TypeError, "prompt_row must be integers"),
        (
            {"prompt_row": [0, 1]},
            ValueError,
            r"'prompt_row'\] must be one integer, got shape \(2,\)",
        ),
        ({"stream": 0.5}, TypeError, "must hold 64-bit integers, got"),
        ({"stream": [1]}, ValueError, "must be one integer"),
        (
            {"prompt": "a"},
            ValueError,
            r"unknown reset option 'prompt'; the options are \['prompt_row'",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make().reset(seed=0, options=options)


# --- actions


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (5, ValueError, r"action 5 of row 0 is outside the vocabulary; expected an id in \[0, 5\)"),
        (-1, ValueError, "outside the vocabulary"),
        (1.0, TypeError, "actions must be integers, got float64"),
        (np.float32(1), TypeError, "actions must be integers, got float32"),
        (True, TypeError, "actions must be integers, got bool"),
        (None, TypeError, "actions must be integers"),
        ("a", TypeError, "actions must be integers"),
        (
            [1, 2],
            ValueError,
            r"expected one action, a single integer, got an array of shape \(2,\)",
        ),
        (np.array([1]), ValueError, r"got an array of shape \(1,\)"),
        (np.zeros((0,), np.int64), ValueError, r"got an array of shape \(0,\)"),
    ],
)
def test_bad_actions_change_nothing(action: Any, error: type[Exception], message: str) -> None:
    env = make()
    before, _ = env.reset(seed=0)
    with pytest.raises(error, match=message):
        env.step(action)
    after = env.step(A)[0]
    assert after["length"] == before["length"] + 1


def test_step_before_reset() -> None:
    with pytest.raises(ResetNeeded, match="never reset"):
        make().step(A)


# --- rendering


def test_ansi_shows_prompt_response_and_reward() -> None:
    env = make(render_mode="ansi", stop=("c",))
    env.reset(seed=0, options={"prompt_row": 1})
    assert env.render() == "b c\n> \n[reward 0.000]"
    env.step(A)
    assert env.render() == "b c\n> a\n[reward 0.000]"
    env.step(C)
    assert env.render() == "b c\n> a \n[reward 1.000 words=1.000 end: stop_string]"
    env.reset()
    assert "reward 0.000]" in str(env.render())


def test_human_prints_tokens_as_they_come_and_replies_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    env = make(render_mode="human", respond=lambda row, ids: Reply([C]) if ids[-1] == A else None)
    env.reset(seed=0, options={"prompt_row": 1})
    assert capsys.readouterr().out == "\nb c\n> "
    env.step(A)
    assert capsys.readouterr().out == "ac"
    env.step(EOS)
    assert capsys.readouterr().out == "<eos>\n[reward 2.000 words=2.000 end: stop_id]\n"
    assert env.render() is None


def test_chat_prompts_are_shown_as_a_conversation() -> None:
    from transformers import PreTrainedTokenizerFast

    hf = PreTrainedTokenizerFast(
        tokenizer_object=TOKENS.backend, eos_token="<eos>", bos_token="<bos>",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )  # fmt: skip
    rows = [{"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}]
    env = make(prompts=rows, tokenizer=hf, render_mode="ansi")
    assert env.reset(seed=0)[0]["input_ids"][:2].tolist() == [A, B]
    assert str(env.render()).startswith("system: a\nuser: b\n> ")


def test_render_modes_are_checked() -> None:
    assert make().render() is None
    with pytest.raises(ValueError, match=r"render_mode must be None or one of"):
        make(render_mode="rgb")


# --- state copies


def test_a_copied_state_continues_exactly_and_can_be_used_again() -> None:
    env = make(reward=dense("bleu"), render_mode="ansi")
    env.reset(seed=2)
    env.step(A)
    state, shown = env.get_state(), env.render()
    expected = [str(env.step(a)) for a in (B, C, EOS)]
    for other in (env, make(reward=dense("bleu"), render_mode="ansi")):
        observation = other.set_state(state)
        assert observation["length"] == observation["prompt_length"] + 1
        assert str(other.render()).splitlines()[:2] == str(shown).splitlines()[:2]
        assert [str(other.step(a)) for a in (B, C, EOS)] == expected
        assert other.reset()[1] == {"prompt_row": other.mdp.prompt_row[0], "stream": mix64(2, 1)}


# --- TextGen-v0


def test_without_arguments_it_is_data_to_text() -> None:
    one, other = gym.make("TextGen-v0"), gym.make("textgym/DataToText-v0")
    assert one.observation_space == other.observation_space
    assert one.reset(seed=1)[1] == other.reset(seed=1)[1]


def test_without_prompts_the_other_arguments_are_heeded() -> None:
    env: Any = gym.make("TextGen-v0", max_new_tokens=5, stop="e", reward=words, budget="truncate")
    task = env.unwrapped.task
    assert (task.max_new_tokens, task.stop_strings, task.budget) == (5, ("e",), "truncate")
    assert task.schedule.names == ("words",)


def test_own_prompts_need_references_or_a_reward() -> None:
    env: Any = gym.make("TextGen-v0", prompts=Prompts(ROWS), tokenizer=TOKENS)
    assert env.unwrapped.task.schedule.names == ("bleu",)
    assert env.unwrapped.task.max_new_tokens == 64
    with pytest.raises(ValueError, match=r"need a reward: pass reward=<any callable>"):
        gym.make("TextGen-v0", prompts=[{"prompt": "a"}], tokenizer=TOKENS)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": []}, ValueError, "no prompts"),
        ({"prompts": "absent.jsonl"}, FileNotFoundError, "no prompts file 'absent.jsonl'"),
        (
            {"max_prompt_tokens": 2},
            ValueError,
            "prompt 2 has 3 tokens, more than max_prompt_tokens=2",
        ),
        ({"rewards": words}, TypeError, "rewards"),
        ({"budget": "x"}, ValueError, "budget must be"),
        ({"render_mode": "x"}, ValueError, "render_mode"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*render_mode")  # Gymnasium's own words, before ours
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"prompts": ROWS, "reward": words, "tokenizer": TOKENS}
    with pytest.raises(error, match=message):
        gym.make("TextGen-v0", **{**given, **arguments})


def test_copying_a_spec_keeps_tables_rewards_and_tokenizers() -> None:
    table, reward = Prompts(ROWS), as_reward(words)
    env = gym.make("TextGen-v0", prompts=table, reward=reward, tokenizer=TOKENS, max_new_tokens=3)
    assert env.spec is not None
    for kwargs in (env.spec.kwargs, copy.deepcopy(env.spec).kwargs):
        assert kwargs["prompts"] is table
        assert kwargs["reward"] is reward
        assert kwargs["tokenizer"] is TOKENS
    other: Any = gym.make(env.spec)
    assert other.unwrapped.task is env.unwrapped.task  # type: ignore[attr-defined]


def test_equal_knobs_share_a_task_and_unequal_ones_do_not() -> None:
    def task(**knobs: Any) -> Task:
        made: Any = gym.make("TextGen-v0", **knobs)
        made_task: Task = made.unwrapped.task
        return made_task

    assert task(max_new_tokens=5) is task(max_new_tokens=5)
    assert task(max_new_tokens=5) is not task(max_new_tokens=6)
    rows = [{"prompt": "a"}]  # a list is not hashable, so it is read each time
    assert task(prompts=rows, reward=words) is not task(prompts=rows, reward=words)
    task(max_new_tokens=1)
    with pytest.raises(ValueError, match="positive integer, got True"):
        task(max_new_tokens=True)  # although True == 1


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def prompt() -> str:
        made: Any = gym.make("TextGen-v0", prompts=str(path), reward=words)
        return str(made.unwrapped.task.prompts[0]["prompt"])

    path.write_text(json.dumps({"prompt": "a"}))
    assert prompt() == "a"
    path.write_text(json.dumps({"prompt": "another"}))
    assert prompt() == "another"


def test_an_environment_can_be_pickled_in_the_middle_of_an_episode() -> None:
    env = make(reward=0.5 * as_reward("bleu") + as_reward(words))
    env.reset(seed=5)
    env.step(A)
    other = pickle.loads(pickle.dumps(env))
    for action in (B, C, EOS):
        assert str(other.step(action)) == str(env.step(action))
    assert str(other.reset()) == str(env.reset())
