"""Agents whose policy samples in bfloat16: what they compare with, and what they say of it."""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch

from textgym.agents import GRPO, PPO, REINFORCE, GRPOConfig, PPOConfig, REINFORCEConfig
from textgym.policies import CausalLMPolicy
from textgym.shaping import OldLogprob, score_actions

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


@pytest.mark.parametrize("name", ["PPO", "GRPO"])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_ratios_are_to_what_a_forward_before_the_update_says(
    name: str,
    minibatches: int,
    make_envs: Any,
    make_policy: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a pass is one step, the first pass says it; its forwards are cut at random."""
    agent, config = AGENTS[name]
    policy = sharp(make_policy, compute_dtype="bfloat16")
    gaps, passes = [], []

    class Compared(OldLogprob):
        def __init__(self, policy: Any, episodes: Any, size: int | None, *, steps: int) -> None:
            self.wanted = score_actions(policy, episodes, size)
            self.sampled = episodes.logprob
            self.forwards: list[int] = []
            evaluate = policy.evaluate

            def counted(batch: Any, **options: Any) -> Any:
                self.forwards.append(len(batch.ids))
                return evaluate(batch, **options)

            with monkeypatch.context() as patch:
                patch.setattr(policy, "evaluate", counted)
                super().__init__(policy, episodes, size, steps=steps)

        def settle(self) -> None:
            super().settle()
            gaps.append(np.abs(self._logprob.numpy() - self.wanted).max())
            gaps.append(np.abs(self._logprob.numpy() - self.sampled).max())
            passes.append(sum(self.forwards))

    monkeypatch.setattr(sys.modules[agent.__module__], "OldLogprob", Compared)
    sizes = {"epochs": 3, "minibatches": minibatches, "microbatch": 5}
    more = {"group_size": 4} if name == "GRPO" else {}
    learner = agent(policy, make_envs(), config(**SMALL, **sizes, **more, lr=1e-2))
    history = learner.learn(total_tokens=100, quiet=True).history
    assert len(gaps) == 2 * 2 * len(history)
    assert max(gaps[::2]) < 1e-6  # of what a forward before the update says
    assert min(gaps[1::2]) > 1e-4  # of what was sampled with
    assert set(passes) == {0 if minibatches == 1 else 16}
    assert all(line["ppo/clip_fraction"] > 0 for line in history)  # later passes do compare with it


def test_one_step_compares_with_itself(make_envs: Any, make_policy: Any) -> None:
    """What it compares with is no part of the graph: the gradient is not zero."""
    start = sharp(make_policy, compute_dtype="bfloat16")
    policy = copy.deepcopy(start)
    agent = GRPO(policy, make_envs(), GRPOConfig(**SMALL, group_size=4))
    history = agent.learn(total_tokens=1, quiet=True).history
    assert history[0]["ppo/first_ratio_error"] == 0.0
    assert history[0]["optim/grad_norm"] > 0.0


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
