"""Diagnostics: optimum and random return, exactly, through the environments themselves."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from textgym.env import TextGenEnv
from textgym.envs import bandit, chain, echo, high_low, stop_early
from textgym.registry import ENVIRONMENTS

CHAIN = [1, 1, 3, 3, 1]


def random_return_by_enumeration(env: TextGenEnv, prompt_row: int) -> float:
    """Expected return of a uniform random policy: the whole tree is walked, by copies of state."""

    def value() -> float:
        state, total = env.get_state(), 0.0
        for action in range(env.task.vocab_size):
            env.set_state(state)
            _, reward, terminated, truncated, _ = env.step(action)
            total += reward + (0.0 if terminated or truncated else value())
        return total / env.task.vocab_size

    env.reset(seed=0, options={"prompt_row": prompt_row})
    return value()


def play(env: TextGenEnv, prompt_row: int, act: Callable[[list[int]], int]) -> tuple[float, str]:
    """Return and stop reason of one episode; `act` sees the ids so far."""
    observation, _ = env.reset(seed=0, options={"prompt_row": prompt_row})
    total, done, info = 0.0, False, dict[str, Any]()
    while not done:
        ids = observation["input_ids"][: int(observation["length"][0])].tolist()
        observation, reward, terminated, truncated, info = env.step(act(ids))
        total += reward
        done = terminated or truncated
    return total, info["stop_reason"]


def binary_search(ids: list[int]) -> int:
    """Guess in the middle of what the answers leave; token i is the number i + 1."""
    low, high = 0, 6
    for guess, answer in zip(ids[1::2], ids[2::2], strict=False):
        low, high = (guess + 1, high) if answer == 7 else (low, guess - 1)
    return (low + high) // 2


@pytest.mark.parametrize(
    ("env", "exact"),
    [
        (bandit.BanditEnv(), bandit.random_return()),
        (bandit.BanditEnv(arms=5, target=4), bandit.random_return(5)),
        (echo.EchoEnv(symbols=4, size=3), echo.random_return(4)),
        (stop_early.StopEarlyEnv(symbols=3, horizon=4), stop_early.random_return(3, 4)),
        (chain.ChainEnv(), chain.random_return()),
        (chain.ChainEnv(schedule="dense"), chain.random_return()),
    ],
    ids=str,
)
def test_random_return_by_enumeration(env: TextGenEnv, exact: float) -> None:
    assert random_return_by_enumeration(env, 0) == pytest.approx(exact)


def test_random_return_of_high_low_by_enumeration() -> None:
    env = high_low.HighLowEnv()
    returns = [random_return_by_enumeration(env, row) for row in range(7)]
    assert np.mean(returns) == pytest.approx(high_low.random_return())


@pytest.mark.parametrize(
    ("module", "vector_env"),
    [(echo, echo.EchoVectorEnv), (stop_early, stop_early.StopEarlyVectorEnv)],
    ids=["echo", "stop_early"],
)
def test_random_return_by_simulation(module: Any, vector_env: Any) -> None:
    """The defaults whose tree is too large: 4,096 episodes, within four standard errors."""
    envs = vector_env(num_envs=4096, autoreset_mode="Disabled")
    rng = np.random.default_rng(0)
    envs.reset(seed=0)
    returns, done = np.zeros(4096), np.zeros(4096, bool)
    while not done.all():
        actions = rng.integers(envs.task.vocab_size, size=4096)
        _, reward, terminated, truncated, _ = envs.step(actions)
        returns += reward
        done |= terminated | truncated
    error = returns.std() / 64
    assert abs(returns.mean() - module.random_return()) < 4 * error


@pytest.mark.parametrize(
    ("env", "act", "reason"),
    [
        (bandit.BanditEnv(), lambda ids: 37, "length"),
        (echo.EchoEnv(), lambda ids: ids[-4], "length"),
        (echo.EchoEnv(split="test"), lambda ids: ids[-4], "length"),
        (stop_early.StopEarlyEnv(), lambda ids: 7, "stop_id"),
        (chain.ChainEnv(), lambda ids: CHAIN[len(ids) - 1], "length"),
        (chain.ChainEnv(schedule="dense"), lambda ids: CHAIN[len(ids) - 1], "length"),
        (high_low.HighLowEnv(), binary_search, "env"),
    ],
)
def test_the_optimum_is_reached(env: TextGenEnv, act: Any, reason: str) -> None:
    for row in range(min(7, len(env.task.prompts))):
        total, ended = play(env, row, act)
        assert total == pytest.approx(1.0)
        assert ended == reason


def test_every_wrong_token_costs() -> None:
    assert play(bandit.BanditEnv(), 0, lambda ids: 36)[0] == 0
    assert play(echo.EchoEnv(), 0, lambda ids: ids[min(len(ids) - 4, 2)])[0] <= 0.75
    assert play(stop_early.StopEarlyEnv(), 0, lambda ids: 7 if len(ids) == 3 else 0)[0] == 1 / 3
    assert play(stop_early.StopEarlyEnv(), 0, lambda ids: 0) == (0, "length")
    for place in range(5):
        wrong = [*CHAIN]
        wrong[place] ^= 1
        for schedule in ("dense", "terminal"):
            env = chain.ChainEnv(schedule=schedule)
            assert play(env, 0, lambda ids, w=wrong: w[len(ids) - 1])[0] == pytest.approx(0)  # type: ignore[misc]
    assert play(high_low.HighLowEnv(), 6, lambda ids: 0) == (0, "env")


def test_a_dense_chain_pays_each_right_token() -> None:
    env = chain.ChainEnv(schedule="dense")
    env.reset(seed=0)
    rewards = [env.step(token)[1] for token in CHAIN]
    assert rewards == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.2])
    env.reset(seed=0)
    rewards = [env.step(token)[1] for token in [*CHAIN[:3], 0, CHAIN[4]]]
    assert rewards == pytest.approx([0.2, 0.2, 0.2, 0, -0.6])


def test_high_low_answers_and_ends() -> None:
    env = high_low.HighLowEnv()
    env.reset(seed=0, options={"prompt_row": 4})  # the secret is 5
    observation, reward, terminated, _, _ = env.step(1)
    assert observation["input_ids"].tolist() == [9, 1, 7, 0, 0, 0]  # go 2 higher
    assert (int(observation["length"][0]), reward, terminated) == (3, 0, False)
    observation, *_ = env.step(8)  # no number
    assert observation["input_ids"].tolist() == [9, 1, 7, 8, 9, 0]
    _, reward, terminated, _, info = env.step(4)
    assert (reward, terminated, info["stop_reason"]) == (1, True, "env")
    assert info["text"] == "2 higher lower go 5"


def test_the_secret_is_not_observed() -> None:
    env = high_low.HighLowEnv()
    first = [env.reset(seed=0, options={"prompt_row": row})[0] for row in range(7)]
    assert all(np.array_equal(o["input_ids"], first[0]["input_ids"]) for o in first)
    assert [row["secret"] for row in env.task.prompts] == [1, 2, 3, 4, 5, 6, 7]


def test_a_random_policy_has_at_most_half_and_the_documents_say_how_much() -> None:
    modules = {m.__name__.split(".")[-1]: m for m in (bandit, echo, stop_early, chain, high_low)}
    listed = {e.module: e for e in ENVIRONMENTS if e.optimum != "unknown"}
    assert set(listed) == set(modules)
    for name, module in modules.items():
        expected: float = module.random_return()
        assert expected <= module.OPTIMUM / 2
        assert float(listed[name].optimum) == module.OPTIMUM
        assert float(listed[name].random) == pytest.approx(expected, rel=0.01)
        text = getattr(module, f"{listed[name].name}Env").__doc__
        printed = re.search(r"random\s+policy\s+\*\*(?:[^=*]*= )?([\d.]+)\*\*", text)
        assert printed, f"{name}: the docstring does not print the random return"
        assert float(printed[1]) == pytest.approx(expected, rel=0.01)
        assert "Optimum **1**" in text


@pytest.mark.parametrize(
    ("make", "knobs"),
    [
        (bandit.BanditEnv, {"arms": 1}),
        (bandit.BanditEnv, {"target": 64}),
        (echo.EchoEnv, {"symbols": 27}),
        (echo.EchoEnv, {"size": 2}),
        (stop_early.StopEarlyEnv, {"horizon": 0}),
        (chain.ChainEnv, {"symbols": 1}),
        (chain.ChainEnv, {"schedule": "sparse"}),
        (high_low.HighLowEnv, {"guesses": 7}),
        (high_low.HighLowEnv, {"split": "x"}),
    ],
)
def test_knobs_out_of_range_are_refused(make: Any, knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|must be"):
        make(**knobs)
