"""What SB3 users have around their algorithms works around ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common import results_plotter
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import VecCheckNan, VecMonitor


def test_check_env() -> None:
    check_env(gym.make("textgym/Echo-v0").unwrapped)


def test_evaluate_policy(make_algorithm: Any, make_vec_env: Any) -> None:
    algorithm = make_algorithm()
    returns, lengths = evaluate_policy(
        algorithm, make_vec_env(2, seed=5), n_eval_episodes=6, return_episode_rewards=True
    )
    assert len(returns) == 6 and set(lengths) == {4}
    mean, _ = evaluate_policy(algorithm, Monitor(gym.make("textgym/Echo-v0")), n_eval_episodes=3)
    assert 0 <= mean <= 1


def test_callbacks(make_algorithm: Any, make_vec_env: Any, tmp_path: Path) -> None:
    algorithm = make_algorithm()
    evaluate = EvalCallback(
        make_vec_env(2, seed=5),
        n_eval_episodes=4,
        eval_freq=10,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    keep = CheckpointCallback(save_freq=10, save_path=str(tmp_path / "kept"))
    algorithm.learn(120, callback=[evaluate, keep])
    assert np.load(tmp_path / "evaluations.npz")["results"].shape == (3, 4)
    assert len(list((tmp_path / "kept").glob("*.zip"))) == 3
    path = tmp_path / "kept" / "rl_model_40_steps.zip"
    again = type(algorithm).load(path, env=algorithm.env, device="cpu")
    assert again.num_timesteps == 40
    type(algorithm).load(tmp_path / "best_model.zip", device="cpu")


def test_vector_wrappers_and_results(
    make_algorithm: Any, make_vec_env: Any, tmp_path: Path
) -> None:
    checked = VecCheckNan(make_vec_env(), raise_exception=True)
    with pytest.warns(UserWarning, match="statistics will be"):  # VecMonitor's, on top of our own
        env = VecMonitor(checked, str(tmp_path / "log"))
    algorithm = make_algorithm(env=env).learn(80)
    env.close()
    results = load_results(str(tmp_path))
    assert list(results["l"].unique()) == [4]
    assert len(results) == 20 and len(algorithm.ep_info_buffer) == 20
    steps, returns = results_plotter.ts2xy(results, results_plotter.X_TIMESTEPS)
    assert steps[-1] == 80 and len(returns) == 20
    results_plotter.plot_results([str(tmp_path)], 80, results_plotter.X_TIMESTEPS, "Echo")
    import matplotlib.pyplot as plt

    plt.close("all")


def test_vec_check_nan_finds_what_a_reward_may_not_be() -> None:
    """Our environments let no NaN through: it is an unscored episode, so there is none to find."""
    from textgym.sb3 import make_sb3_vec_env

    env = VecCheckNan(
        make_sb3_vec_env(
            "textgym:TextGen-v0",
            2,
            0,
            env_kwargs={
                "prompts": [{"prompt": "The ferry"}],
                "reward": lambda text: float("nan"),
                "max_new_tokens": 1,
            },
        ),
        raise_exception=True,
    )
    env.reset()
    _, reward, done, infos = env.step(np.array([5, 6]))
    assert done.all() and (reward == 0).all()
    assert all("reward_status" in info and "episode" not in info for info in infos)


@pytest.mark.parametrize("name", ["PPO", "A2C"])
def test_the_same_seed_gives_the_same_weights(
    make_algorithm: Any, make_vec_env: Any, name: str
) -> None:
    import torch

    states = []
    for _ in range(2):
        algorithm = make_algorithm(name, env=make_vec_env(seed=3)).learn(120)
        states.append(algorithm.policy.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])
