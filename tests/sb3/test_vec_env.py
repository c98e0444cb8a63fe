"""The adapter is what SB3 makes of single environments, and survives rewards that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

from textgym.learning import UnscoredError
from textgym.sb3 import SampleTextCallback, SB3VecEnv, TextMetricsCallback

PROMPTS = [{"prompt": "The ferry"}, {"prompt": "A bus"}]


@pytest.mark.parametrize("env", ["Echo", "StopEarly", "HighLow"])
def test_it_equals_single_environments(make_vec_env: Any, env: str) -> None:
    native = make_vec_env(3, env=env, seed=7)
    single = DummyVecEnv([lambda: gym.make(f"textgym/{env}-v0").unwrapped for _ in range(3)])
    single.seed(7)
    rng = np.random.default_rng(0)
    observed = native.reset(), single.reset()
    ends = 0
    for _ in range(60):
        for key in observed[0]:
            np.testing.assert_array_equal(observed[0][key], observed[1][key])
        action = rng.integers(0, native.action_space.n, 3)  # type: ignore[attr-defined]
        ours, theirs = native.step(action), single.step(action)
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-6)
        np.testing.assert_array_equal(ours[2], theirs[2])
        for mine, other in zip(ours[3], theirs[3], strict=True):
            for key in ("text", "stop_reason", "reward", "TimeLimit.truncated"):
                if key in mine:  # SB3 writes TimeLimit.truncated at every step
                    assert mine[key] == other[key]
            assert ("terminal_observation" in mine) == ("terminal_observation" in other)
            if "terminal_observation" in mine:
                ends += 1
                for key in ("input_ids", "length"):
                    np.testing.assert_array_equal(
                        mine["terminal_observation"][key], other["terminal_observation"][key]
                    )
        observed = ours[0], theirs[0]
    assert ends > 5


def test_any_other_autoreset_is_refused() -> None:
    envs = gym.make_vec("textgym/Echo-v0", 2, vectorization_mode="vector_entry_point")
    with pytest.raises(ValueError, match="autoreset_mode='SameStep', got 'NextStep'"):
        SB3VecEnv(envs)


def test_attributes_are_shared(make_vec_env: Any) -> None:
    env = make_vec_env(2)
    assert env.get_attr("task")[0].vocab_size == env.action_space.n
    assert env.has_attr("action_masks") and not env.has_attr("no_such_thing")
    assert np.stack(env.env_method("action_masks")).shape == (2, env.action_space.n)
    env.set_attr("copy", False)
    assert env.get_attr("copy", indices=[1]) == [False]
    with pytest.raises(ValueError, match="share their attributes"):
        env.set_attr("copy", True, indices=[0])


class Flaky:
    """A reward that raises for some share of the texts."""

    def __init__(self, share: float) -> None:
        self.share, self.calls = share, 0

    def __call__(self, text: str) -> float:
        self.calls += 1
        if (self.calls // 2) % 100 < 100 * self.share:  # each failure is tried twice
            raise RuntimeError("no such luck")
        return 1.0


def flaky_env(make_vec_env: Any, share: float) -> SB3VecEnv:
    from textgym.sb3 import make_sb3_vec_env

    return make_sb3_vec_env(
        "textgym:TextGen-v0",
        8,
        0,
        env_kwargs={"prompts": PROMPTS, "reward": Flaky(share), "max_new_tokens": 3},
    )


def test_an_unscored_episode_is_not_trained_on(
    make_algorithm: Any, collect_once: Any, make_vec_env: Any
) -> None:
    env = flaky_env(make_vec_env, 0.05)
    algorithm = make_algorithm(env=env, n_steps=60, policy_kwargs={"model": tiny(env)})
    buffer = collect_once(algorithm)
    assert 0 < buffer.unscored <= 0.2 * buffer.ended
    left_out = ~buffer.counted
    assert 0 < left_out.sum() <= 3 * buffer.unscored
    assert (buffer.rewards[left_out] == 0).all()
    seen = sum(len(batch.actions) for batch in buffer.get(20))
    assert seen == buffer.counted.sum()
    assert all(episode["r"] > 0 for episode in algorithm.ep_info_buffer)


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.filterwarnings("ignore:one forward for each")
def test_too_many_of_them_stop_training(
    make_algorithm: Any, make_vec_env: Any, stock: bool
) -> None:
    env = flaky_env(make_vec_env, 0.6)
    algorithm = make_algorithm(env=env, n_steps=30, stock=stock, policy_kwargs={"model": tiny(env)})
    with pytest.raises(UnscoredError, match=r"(?s)have no score, more than 20%.*no such luck"):
        algorithm.learn(1000, callback=TextMetricsCallback())


def test_metrics_and_samples_are_written(
    make_algorithm: Any, make_vec_env: Any, tmp_path: Path
) -> None:
    from stable_baselines3.common.logger import configure

    env = make_vec_env(4, env="StopEarly")
    algorithm = make_algorithm(env=env, n_steps=40)
    algorithm.set_logger(configure(str(tmp_path), ["json"]))
    path = tmp_path / "deep" / "samples.jsonl"
    algorithm.learn(480, callback=[TextMetricsCallback(), SampleTextCallback(path, every=2)])
    algorithm.logger.close()
    lines = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    last = lines[-1]
    assert last["time/tokens_per_s"] > 0
    assert last["rollout/unscored"] == 0
    assert last["rollout/stop_id"] + last.get("rollout/length", 0) == pytest.approx(1)
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert {sample["timesteps"] > 160 for sample in samples} == {False, True}
    for sample in samples:
        count = len(sample["tokens"])
        assert count == len(sample["token_rewards"]) == len(sample["token_values"])
        assert sample["score"] == pytest.approx(sum(sample["token_rewards"]))
        assert max(sample["token_logprobs"]) < 0


def tiny(env: Any) -> Any:
    from textgym.policies import random_causal_lm

    return random_causal_lm(
        int(env.action_space.n), hidden_size=16, num_layers=1, num_heads=2, max_positions=64
    )
