"""The price of KL, against what it should come to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

from textgym.policies import random_causal_lm
from textgym.sb3 import (
    CausalLMActorCriticPolicy,
    ReferenceKL,
    SB3VecEnv,
    SequenceRolloutBuffer,
)
from textgym.task import Task
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv
from textgym.vector_wrappers import AllowedTokens


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[[Any], Callable[[], dict[str, float]]]]:
    """Gives, for an algorithm, what it logged last."""
    logger = configure(str(tmp_path), ["json"])

    def set_up(algorithm: Any) -> Callable[[], dict[str, float]]:
        algorithm.set_logger(logger)
        return lambda: json.loads((tmp_path / "progress.json").read_text().splitlines()[-1])

    yield set_up
    logger.close()


def bandit(num_envs: int) -> SB3VecEnv:
    """One token of two; the first earns 1."""
    task = Task(
        prompts=[{"prompt": "a"}],
        tokenizer=symbol_tokenizer(("a", "b"), bos=None, eos=None),
        reward=lambda text: float(text == "a"),
        max_new_tokens=1,
        stop=(),
    )
    return SB3VecEnv(TextGenVectorEnv(task, num_envs, autoreset_mode="SameStep"))


@pytest.mark.parametrize("beta", [0.25, 0.5, 2.0])
def test_the_optimum_is_the_tilted_reference(beta: float, watch: Any) -> None:
    """Max E[r] - beta KL(pi, ref) is reached by pi(a) ~ ref(a) exp(r(a) / beta)."""
    env = bandit(256)
    env.seed(0)
    model = random_causal_lm(2, hidden_size=8, num_layers=1, num_heads=2, max_positions=4)
    algorithm = A2C(
        CausalLMActorCriticPolicy,
        env,
        n_steps=1,
        gamma=1.0,
        learning_rate=lambda left: 0.03 * left,
        use_rms_prop=False,
        normalize_advantage=False,
        rollout_buffer_class=SequenceRolloutBuffer,
        policy_kwargs={"model": model},
        seed=0,
        device="cpu",
    )

    def first() -> float:
        obs = {k: torch.as_tensor(v[:1]) for k, v in env.reset().items()}
        with torch.no_grad():
            return float(algorithm.policy.get_distribution(obs).distribution.probs[0, 0])

    reference = first()
    last = watch(algorithm)
    algorithm.learn(256 * 150, callback=ReferenceKL(beta), log_interval=1)
    wanted = reference * np.exp(1 / beta)
    wanted /= wanted + 1 - reference
    assert abs(wanted - reference) > 0.05
    assert first() == pytest.approx(wanted, abs=0.03)
    exact = wanted * np.log(wanted / reference)
    exact += (1 - wanted) * np.log((1 - wanted) / (1 - reference))
    logged = last()
    assert logged["kl/beta"] == beta
    assert logged["kl/ref_exact"] == pytest.approx(exact, rel=0.15, abs=0.01)
    assert logged["kl/ref"] == pytest.approx(exact, rel=0.5, abs=0.1)


class KeepRewards(BaseCallback):
    """Copies the rewards before anything has changed them."""

    def __init__(self) -> None:
        super().__init__()
        self.rewards: list[Any] = []

    def _on_rollout_start(self) -> None:
        buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        buffer.before_returns.append(lambda b: self.rewards.append(b.rewards.copy()))

    def _on_step(self) -> bool:
        return True


def test_nothing_stays_of_a_callback_whose_training_failed(
    make_algorithm: Any, collect_once: Any
) -> None:
    algorithm = make_algorithm()
    train, algorithm.train = algorithm.train, lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        algorithm.learn(40, callback=ReferenceKL(5.0, reference=random_causal_lm(18, seed=9)))
    algorithm.train = train
    first = KeepRewards()
    buffer = collect_once(algorithm, [first])
    np.testing.assert_array_equal(buffer.rewards, first.rewards[0])


def test_rewards_fall_by_the_price_of_each_token(make_algorithm: Any, collect_once: Any) -> None:
    algorithm = make_algorithm()
    price = ReferenceKL(0.3, reference=random_causal_lm(18, seed=9))
    first = KeepRewards()
    buffer = collect_once(algorithm, [first, price])
    before = first.rewards
    numbers = np.arange(len(buffer.store.finished))
    batch, where = buffer.sequences(numbers)
    with torch.no_grad():
        ref = price.reference.evaluate(batch, entropy=False).logprob.numpy()  # type: ignore[union-attr]
    expected = before[0][where] - 0.3 * (buffer.log_probs[where] - ref)
    np.testing.assert_allclose(buffer.rewards[where], expected, atol=1e-6)
    assert np.abs(expected - before[0][where]).max() > 1e-3


def test_kl_is_0_at_first_and_the_price_adapts(make_algorithm: Any, watch: Any) -> None:
    algorithm = make_algorithm(n_steps=40, policy_kwargs={"temperature": 0.5})
    price = ReferenceKL(0.1, target=50.0, horizon=100)
    last = watch(algorithm)
    algorithm.learn(160, callback=price)
    assert last()["kl/ref_exact"] == pytest.approx(0.0, abs=1e-4)
    assert price.controller.beta < 0.1  # far below the target


def test_the_reference_is_masked_as_the_policy_is(make_algorithm: Any, collect_once: Any) -> None:
    envs = gym.make_vec(
        "textgym/Echo-v0", 4, vectorization_mode="vector_entry_point", autoreset_mode="SameStep"
    )
    env = SB3VecEnv(AllowedTokens(envs, [3, 5, 6]))
    env.seed(0)
    algorithm = make_algorithm("MaskablePPO", env=env)
    first = KeepRewards()
    buffer = collect_once(algorithm, [first, ReferenceKL(1.0)])
    np.testing.assert_allclose(buffer.rewards, first.rewards[0], atol=1e-4)  # the KL is 0 as yet


def test_it_needs_whole_sequences(make_algorithm: Any) -> None:
    with pytest.raises(TypeError, match="rollout_buffer_class="):
        make_algorithm(stock=True).learn(40, callback=ReferenceKL(0.1))
