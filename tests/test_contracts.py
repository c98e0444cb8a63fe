"""What holds for every registered environment, because it is registered."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit

from textgym.mdp import STOP_REASONS
from textgym.registry import ENVIRONMENTS
from textgym.tokens import Tokenizer

IDS = [entry.id for entry in ENVIRONMENTS]
NETWORKS = {"textgym/Continuation-v0": 1e-5}  # rewards that run a network depend on the batch
every_id = pytest.mark.parametrize("env_id", IDS)


def tokens(env: Any, seed: int) -> np.random.Generator:
    """A generator of actions of its own."""
    return np.random.default_rng([seed, env.unwrapped.task.vocab_size])


def likely(task: Any, rng: np.random.Generator, size: int) -> Any:
    """Random actions, a fifth of which are stop ids, so that episodes end in many ways."""
    actions = rng.integers(task.vocab_size, size=size)
    stops = np.array(task.stop_ids, np.int64)
    if len(stops):
        actions = np.where(rng.random(size) < 0.2, rng.choice(stops, size), actions)
    return actions


def assert_same(got: Any, expected: Any, where: str, tolerance: float = 0.0) -> None:
    """Equal at any depth in type, dtype and value; floats within the tolerance."""
    assert type(got) is type(expected), where
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key in expected:
            assert_same(got[key], expected[key], f"{where}.{key}", tolerance)
    elif isinstance(expected, np.ndarray) and expected.dtype == object:
        assert got.dtype == object and got.shape == expected.shape, where
        for i, (g, e) in enumerate(zip(got, expected, strict=True)):
            assert_same(g, e, f"{where}[{i}]", tolerance)
    elif isinstance(expected, np.ndarray):
        assert got.dtype == expected.dtype and got.shape == expected.shape, where
        exact = expected.dtype.kind != "f" or not tolerance
        close = np.array_equal(got, expected) if exact else np.allclose(got, expected, 0, tolerance)
        assert close, f"{where}: {got} is not {expected}"
    elif isinstance(expected, float):
        assert abs(got - expected) <= tolerance, where
    else:
        assert got == expected, where


# --- the checkers of Gymnasium and stable-baselines3


@every_id
def test_gymnasium_check(env_id: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(env_id).unwrapped)


@every_id
def test_stable_baselines3_check(env_id: str) -> None:
    from stable_baselines3.common.env_checker import check_env as check

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(gym.make(env_id).unwrapped)


# --- one environment


@every_id
def test_episodes_end_within_the_budget_and_totals_are_finite(env_id: str) -> None:
    env = gym.make(env_id)
    task = env.unwrapped.task  # type: ignore[attr-defined]
    rng = tokens(env, 0)
    for seed in range(8):
        observation, _ = env.reset(seed=seed)
        total, steps, ended = 0.0, 0, False
        while not ended:
            assert env.observation_space.contains(observation)
            action = likely(task, rng, 1)[0] if seed % 2 else env.action_space.sample()
            observation, reward, terminated, truncated, info = env.step(action)
            total, steps, ended = total + float(reward), steps + 1, terminated or truncated
            assert not (terminated and truncated)
            assert steps <= task.max_new_tokens
        assert np.isfinite(total)
        assert task.schedule.low - 1e-9 <= total <= task.schedule.high + 1e-9
        assert info["stop_reason"] in STOP_REASONS
        assert isinstance(info["text"], str)
        assert not {"reward_status", "reward_traceback"} & set(info), info
        assert set(info["reward"]) <= set(task.schedule.names)


@every_id
def test_one_seed_one_episode(env_id: str) -> None:
    first, second = gym.make(env_id), gym.make(env_id)
    for seed in (0, 1):
        rng = tokens(first, seed)
        assert_same(first.reset(seed=seed)[0], second.reset(seed=seed)[0], "reset")
        for step in range(40):
            action = likely(first.unwrapped.task, rng, 1)[0]  # type: ignore[attr-defined]
            got, expected = first.step(action), second.step(action)
            for name, g, e in zip(
                ("obs", "reward", "end", "cut", "info"), got, expected, strict=True
            ):
                assert_same(g, e, f"{step} {name}")
            if got[2] or got[3]:
                (g, g_info), (e, e_info) = first.reset(), second.reset()
                assert_same(g, e, "obs")
                assert_same(g_info, e_info, "info")


@every_id
def test_text_is_never_encoded_back(env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = gym.make(env_id)
    env.reset(seed=0)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("text was encoded")

    for name in ("encode", "_encode_text", "_encode_messages"):
        monkeypatch.setattr(Tokenizer, name, refuse)
    rng, episodes = tokens(env, 3), 0
    while episodes < 4:
        step = env.step(likely(env.unwrapped.task, rng, 1)[0])  # type: ignore[attr-defined]
        if step[2] or step[3]:
            episodes += 1
            env.reset()


@every_id
def test_a_copied_state_goes_on_exactly(env_id: str) -> None:
    env: Any = gym.make(env_id).unwrapped
    env.reset(seed=4)
    rng = tokens(env, 4)
    bold = [int(a) for a in rng.integers(env.task.vocab_size, size=env.task.max_new_tokens)]
    ended = False
    for action in bold[: len(bold) // 2]:
        ended = ended or any(env.step(action)[2:4])
    state = env.get_state()
    rest: list[str] = []
    for _ in range(2):
        env.set_state(state)
        seen = []
        for action in bold[len(bold) // 2 :]:
            if ended or env.mdp.done[0]:
                break
            seen.append(str(env.step(action)))
        seen.append(str(env.reset()))
        assert rest in ([], seen)
        rest = seen


@every_id
def test_it_can_be_rendered(env_id: str) -> None:
    env = gym.make(env_id, render_mode="ansi")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert "[reward " in str(env.render())


# --- specs, pickles, wrappers


@every_id
def test_spec_and_environment_can_be_pickled(env_id: str) -> None:
    env = gym.make(env_id)
    assert env.spec is not None
    assert pickle.loads(pickle.dumps(gym.spec(env_id))) == gym.spec(env_id)
    again = gym.make(pickle.loads(pickle.dumps(env.spec)))
    other = pickle.loads(pickle.dumps(gym.make(env_id)))
    expected = env.reset(seed=6)
    for copy in (again, other):
        got = copy.reset(seed=6)
        assert_same(got[0], expected[0], "obs")
        assert_same(got[1], expected[1], "info")
        assert copy.observation_space == env.observation_space
    assert gym.envs.registration.EnvSpec.from_json(env.spec.to_json()).id == env_id


@every_id
def test_gymnasium_wrappers(env_id: str) -> None:
    env = RecordEpisodeStatistics(TimeLimit(gym.make(env_id), 1))
    env.reset(seed=0)
    _, reward, _, truncated, info = env.step(env.action_space.sample())
    assert truncated, "TimeLimit says so, whatever else ended the episode"
    assert info["episode"]["l"] == 1
    assert info["episode"]["r"] == pytest.approx(float(reward))
    limited: Any = gym.make(env_id, max_episode_steps=1)
    assert limited.spec.max_episode_steps == 1


def test_an_environment_is_made_without_an_import() -> None:
    code = (
        "import gymnasium, sys; assert 'textgym' not in sys.modules;"
        "env = gymnasium.make('textgym:TextGen-v0'); env.reset(seed=0); print(env.spec.id);"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=os.path.expanduser("~"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["TextGen-v0", "[]"]


# --- the native vector environment


def make_vec(env_id: str, number: int, **arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return gym.make_vec(env_id, num_envs=number, **arguments)


@every_id
def test_make_vec_makes_the_native_environment(env_id: str) -> None:
    env = make_vec(env_id, 2)
    single = gym.make(env_id)
    assert isinstance(env, VectorEnv) and not isinstance(env, SyncVectorEnv)
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert env.single_observation_space == single.observation_space
    assert env.single_action_space == single.action_space
    assert env.spec.id == env_id
    assert env.unwrapped.task is single.unwrapped.task, "built once in a process"  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(env)).reset(seed=1)[0].keys() == env.reset(seed=1)[0].keys()


@every_id
@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("limit", [None, 3])
def test_native_rows_equal_single_environments(
    env_id: str, mode: AutoresetMode, limit: int | None
) -> None:
    number = 3
    native = make_vec(env_id, number, autoreset_mode=mode.value, max_episode_steps=limit)
    sync = SyncVectorEnv(
        [lambda: gym.make(env_id, max_episode_steps=limit)] * number, autoreset_mode=mode
    )
    rng = tokens(native, 9)
    tolerance = NETWORKS.get(env_id, 0.0)
    names = ("obs", "reward", "terminated", "truncated", "info")
    for name, g, e in zip(("obs", "info"), native.reset(seed=9), sync.reset(seed=9), strict=True):
        assert_same(g, e, name, tolerance)
    for _ in range(min(80, 2 * native.unwrapped.task.max_new_tokens + 10)):
        actions = likely(native.unwrapped.task, rng, number)
        got, expected = native.step(actions), list(sync.step(actions))
        expected[3] &= ~expected[2]  # TimeLimit sets both flags, the native environment one
        for name, g, e in zip(names, got, expected, strict=True):
            assert_same(g, e, name, tolerance)
        ended = got[2] | got[3]
        if mode is AutoresetMode.DISABLED and ended.any():
            fresh = native.reset(options={"reset_mask": ended})
            for name, g, e in zip(
                ("obs", "info"), fresh, sync.reset(options={"reset_mask": ended}), strict=True
            ):
                assert_same(g, e, name, tolerance)


@every_id
def test_a_row_does_not_depend_on_the_number_of_rows(env_id: str) -> None:
    few, many = make_vec(env_id, 2), make_vec(env_id, 5)
    few.reset(seed=3), many.reset(seed=3)
    rng = tokens(few, 1)
    for _ in range(20):
        actions = likely(few.unwrapped.task, rng, 5)
        a, b = few.step(actions[:2]), many.step(actions)
        for k in ("input_ids", "length", "prompt_length"):
            assert np.array_equal(a[0][k], b[0][k][:2])
        for k in (1, 2, 3):
            assert_same(a[k], b[k][:2], str(k), NETWORKS.get(env_id, 0.0))
