"""Agents learn the diagnostics: one configuration each, a model of random weights, three seeds.

Run it with `pytest -s -m slow tests/agents/test_diagnostics.py` to see tokens and seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from textgym.agents import (
    PPO,
    REINFORCE,
    SB3PPO,
    ExpertIteration,
    ExpertIterationConfig,
    PPOConfig,
    REINFORCEConfig,
    SB3PPOConfig,
)
from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.rollout import collect
from textgym.runs import Result
from textgym.vector import TextGenVectorEnv

pytestmark = pytest.mark.slow

# What matters, found by trial (docs/experiments.md): weights large enough for attention to begin
# with; enough of an entropy bonus that no position is settled before attention is; small steps that
# end at 0, because a batch in which nearly every answer is right is whitened into noise.
EPISODES = 256
INITIALIZER_RANGE = 0.06
PPO_CONFIG = PPOConfig(
    episodes=EPISODES,
    epochs=2,
    lr=1e-3,
    lr_final=0.0,
    target_kl=0.02,
    max_grad_norm=0.3,
    gae_lambda=0.9,
    vf_coef=0.5,
    vf_clip_coef=None,
    ent_coef=0.1,
    eval_every=0,
)
REINFORCE_CONFIG = REINFORCEConfig(
    episodes=EPISODES, lr=1e-3, lr_final=0.0, whiten=True, ent_coef=0.1, eval_every=0
)
EXPERT_CONFIG = ExpertIterationConfig(
    episodes=EPISODES, epochs=2, lr=2e-3, lr_final=0.0, eval_every=0
)
SB3_PPO_CONFIG = SB3PPOConfig(
    epochs=2,
    lr=1e-3,
    lr_final=0.0,
    target_kl=0.02,
    max_grad_norm=0.3,
    gae_lambda=0.9,
    vf_coef=0.25,  # of a loss without the half
    vf_clip_coef=None,
    ent_coef=0.1,
    eval_every=0,
)
SB3_STEPS = {"Bandit": 1, "Echo": 4, "StopEarly": 4, "Chain": 5, "HighLow": 3}  # of a rollout
BUDGETS = {  # action tokens of a run
    "Bandit": 40_000,
    "Echo": 400_000,
    "StopEarly": 40_000,
    "Chain": 160_000,
    "HighLow": 160_000,
}
OPTIMUM = 1.0  # of all of them
SHARE = 0.95  # of the optimum counts as learned
WINDOW = 4  # updates of which the mean is taken: 1,024 episodes
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Learned:
    """What became of one run."""

    policy: CausalLMPolicy
    tokens: int
    """Action tokens until `WINDOW` updates had 95 % of the optimum on average; all where never."""
    reached: bool
    seconds: float
    """Of the processor, for the whole budget."""


def make_envs(name: str, **knobs: Any) -> TextGenVectorEnv:
    envs = gym.make_vec(
        f"textgym/{name}-v0",
        num_envs=EPISODES,
        vectorization_mode="vector_entry_point",
        autoreset_mode="Disabled",
        **knobs,
    )
    assert isinstance(envs, TextGenVectorEnv)
    return envs


def make_policy(envs: TextGenVectorEnv, seed: int) -> CausalLMPolicy:
    model = random_causal_lm(
        envs.task.vocab_size,
        hidden_size=64,
        num_layers=1,
        num_heads=4,
        max_positions=64,
        initializer_range=INITIALIZER_RANGE,
        seed=seed,
    )
    return CausalLMPolicy(model, device="cpu", seed=seed)


def learn_ppo(
    policy: CausalLMPolicy,
    envs: TextGenVectorEnv,
    seed: int,
    budget: int,
    gae_lambda: float = PPO_CONFIG.gae_lambda,
) -> Result:
    config = replace(PPO_CONFIG, seed=seed, gae_lambda=gae_lambda)
    return PPO(policy, envs, config).learn(budget, quiet=True)


def learn_reinforce(
    policy: CausalLMPolicy, envs: TextGenVectorEnv, seed: int, budget: int
) -> Result:
    return REINFORCE(policy, envs, replace(REINFORCE_CONFIG, seed=seed)).learn(budget, quiet=True)


def learn_sb3_ppo(policy: CausalLMPolicy, envs: TextGenVectorEnv, seed: int, budget: int) -> Result:
    steps = next(n for name, n in SB3_STEPS.items() if type(envs).__name__.startswith(name))
    same_step = type(envs)(envs.task, EPISODES, autoreset_mode="SameStep")
    config = replace(SB3_PPO_CONFIG, seed=seed, n_steps=steps)
    return SB3PPO(policy, same_step, config).learn(budget, quiet=True)


def learn_expert(policy: CausalLMPolicy, envs: TextGenVectorEnv, seed: int, budget: int) -> Result:
    return ExpertIteration(policy, envs, replace(EXPERT_CONFIG, seed=seed)).learn(
        budget, quiet=True
    )


LEARNERS: dict[str, Callable[[CausalLMPolicy, TextGenVectorEnv, int, int], Result]] = {
    "PPO": learn_ppo,
    "REINFORCE": learn_reinforce,
    "ExpertIteration": learn_expert,
    "SB3PPO": learn_sb3_ppo,
}
# The best of several guesses at a number that is not shown was lucky: see agents/expert_iteration.
UNFIT = {("ExpertIteration", "HighLow")}


def train(
    learn: Callable[[CausalLMPolicy, TextGenVectorEnv, int, int], Result],
    envs: TextGenVectorEnv,
    seed: int,
    budget: int,
) -> Learned:
    policy = make_policy(envs, seed)
    began = time.process_time()
    result = learn(policy, envs, seed, budget)
    seconds = time.process_time() - began
    rewards = np.array([line["rollout/reward_mean"] for line in result.history])
    means = np.convolve(rewards, np.full(WINDOW, 1 / WINDOW), mode="valid")
    good = np.flatnonzero(means >= SHARE * OPTIMUM)
    if not len(good):
        return Learned(policy, result.total_tokens, False, seconds)
    tokens = int(result.history[good[0] + WINDOW - 1]["time/total_tokens"])
    return Learned(policy, tokens, True, seconds)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("agent", "name"), [pair for pair in product(LEARNERS, BUDGETS) if pair not in UNFIT]
)
def test_an_agent_learns_a_diagnostic(agent: str, name: str, seed: int) -> None:
    run = train(LEARNERS[agent], make_envs(name), seed, BUDGETS[name])
    # Other draws than those of training and, where the prompt matters, prompts that were held out.
    fresh = collect(run.policy, make_envs(name, split="test"), 1024, seed=1_000_003)
    reached = f"{run.tokens:,} tokens" if run.reached else "never"
    score = fresh.scores.mean()
    print(
        f"\n{name} {agent} seed {seed}: 95 % at {reached} of {BUDGETS[name]:,}, "
        f"{run.seconds:.1f} s in all; at the end {score:.3f}"
    )
    assert score >= SHARE * OPTIMUM


def test_a_dense_schedule_halves_the_tokens_of_chain() -> None:
    # At lambda 1 potentials cancel, and there is nothing to gain; the shorter the sight of the
    # advantages, the more a potential helps. At 0.9 it does not: see docs/experiments.md.
    learn, budget = partial(learn_ppo, gae_lambda=0.2), 100_000
    total = {"dense": 0, "terminal": 0}
    for seed in range(5):
        for schedule in total:
            run = train(learn, make_envs("Chain", schedule=schedule), seed, budget)
            # A run that does not get there counts with its budget: it needs at least that.
            total[schedule] += run.tokens
            reached = f"{run.tokens:,} tokens" if run.reached else "never"
            print(f"\nChain PPO lambda 0.2 {schedule} seed {seed}: 95 % at {reached} of {budget:,}")
            assert run.reached or schedule == "terminal"
    assert 2 * total["dense"] <= total["terminal"]
