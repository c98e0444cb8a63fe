"""Agents whose policy samples in bfloat16: what they compare with, and what they say of it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from textgym.agents import GRPO, PPO, REINFORCE, GRPOConfig, PPOConfig, REINFORCEConfig
from textgym.policies import CausalLMPolicy

AGENTS = {
    "PPO": (PPO, PPOConfig),
    "GRPO": (GRPO, GRPOConfig),
    "REINFORCE": (REINFORCE, REINFORCEConfig),
}
SMALL = {"episodes": 16, "eval_every": 0, "checkpoint_every": 100, "exact_kl_episodes": 0}


def sharp(make_policy: Any, **kwargs: Any) -> Any:
    """A policy whose probabilities show how they were rounded."""
    policy = make_policy(**kwargs)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    return policy


@pytest.mark.parametrize("name", AGENTS)
def test_it_learns_and_says_how_far_sampler_and_learner_are_apart(
    name: str, make_envs: Any, make_policy: Any
) -> None:
    agent, config = AGENTS[name]
    more = {"group_size": 4} if name == "GRPO" else {}
    policy = sharp(make_policy, compute_dtype="bfloat16")
    learner = agent(policy, make_envs(), config(**SMALL, **more, lr=1e-3))
    history = learner.learn(total_tokens=300, quiet=True).history
    gaps = [line["sampler/gap"] for line in history]
    assert 1e-5 < min(gaps) and max(gaps) < 0.2
    assert all(1.0 < line["sampler/max_ratio"] < 1.5 for line in history)
    if name != "REINFORCE":  # against what sampled, the ratios would be off by as much as that
        assert all(line["ppo/first_ratio_error"] < 1e-4 for line in history)
    exact = agent(sharp(make_policy), make_envs(), config(**SMALL, **more, lr=1e-3))
    assert "sampler/gap" not in exact.learn(total_tokens=60, quiet=True).history[0]


def test_one_step_and_several_compare_with_the_same(make_envs: Any, make_policy: Any) -> None:
    """A single step takes its own first forward; several score the batch before."""
    start = sharp(make_policy, compute_dtype="bfloat16")
    weights = []
    for epochs in (1, 2):
        policy = copy.deepcopy(start)
        agent = GRPO(policy, make_envs(), GRPOConfig(**SMALL, group_size=4, epochs=epochs))
        if epochs == 2:  # the same single step by the other way
            step, done = agent.optimizer.step, []

            def once(loss: Any, step: Any = step, done: Any = done, agent: Any = agent) -> Any:
                done.append(loss)
                if len(done) == 1:
                    return step(loss)
                agent.optimizer.zero_grad()
                return torch.zeros(())

            agent.optimizer.step = once
        agent.learn(total_tokens=1, quiet=True)
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    moved = torch.cat([p.detach().flatten() for p in start.parameters()])
    assert not torch.equal(weights[0], moved)
    assert torch.allclose(weights[0], weights[1], atol=1e-6)


def test_importance_weights_are_those_of_sampler_and_learner(
    make_envs: Any, make_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shifting what was sampled with by log 2 halves the weight of every token, up to the cap."""
    monkeypatch.setattr(CausalLMPolicy, "is_mixed", True)

    def gradient(shift: float, cap: float | None) -> np.ndarray[Any, Any]:
        agent = GRPO(
            make_policy(), make_envs(), GRPOConfig(**SMALL, group_size=4, importance_cap=cap)
        )
        shift_logprob(agent, shift)
        kept: list[torch.Tensor] = []

        def keep(loss: Any) -> Any:
            gradients = (p.grad for p in agent.optimizer.parameters)
            kept.extend(g.flatten().clone() for g in gradients if g is not None)
            return torch.zeros(())

        agent.optimizer.step = keep  # type: ignore[method-assign]
        agent.learn(total_tokens=1, quiet=True)
        return torch.cat(kept).numpy()

    plain = gradient(0.0, None)
    assert np.abs(plain).max() > 0
    np.testing.assert_allclose(gradient(np.log(2), 3.0), plain / 2, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(gradient(-np.log(4), 3.0), plain * 3, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(gradient(np.log(2), None), plain, rtol=1e-3, atol=1e-7)


def shift_logprob(agent: GRPO, shift: float) -> None:
    """Say that tokens were sampled with other probabilities."""
    sample = agent._sample

    def shifted(run: Any) -> Any:
        sampled, episodes, metrics = sample(run)
        episodes.logprob = episodes.logprob + np.float32(shift)
        return sampled, episodes, metrics

    agent._sample = shifted  # type: ignore[method-assign]
