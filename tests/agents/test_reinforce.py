import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from textgym.agents.reinforce import REINFORCE, REINFORCEConfig
from textgym.losses import token_weights
from textgym.rollout import collect

FAST = REINFORCEConfig(episodes=32, lr=1e-2)


def parameters(policy: Any) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in policy.parameters()])


@pytest.mark.parametrize("baseline", ["none", "moving_average", "learned", "group"])
def test_it_learns(make_envs: Any, make_policy: Any, baseline: Any) -> None:
    config = dataclasses.replace(FAST, baseline=baseline, group_size=4)
    agent = REINFORCE(make_policy(), make_envs(), config)
    history = agent.learn(6000, quiet=True).history
    assert history[0]["rollout/reward_mean"] < 0.4
    assert history[-1]["rollout/reward_mean"] > 0.8
    assert ("value/explained_variance" in history[-1]) == (baseline == "learned")
    assert ("baseline/value" in history[-1]) == (baseline == "moving_average")


def test_the_step_follows_the_policy_gradient(make_envs: Any, make_policy: Any) -> None:
    """The gradient that the agent leaves is that of the mean over episodes of sum A log pi."""
    policy, envs = make_policy(), make_envs()
    agent = REINFORCE(policy, envs, dataclasses.replace(FAST, baseline="none"))
    episodes = collect(policy, envs, 8, prompt_rows=np.arange(8) % 4)
    kept: list[torch.Tensor] = []

    def step(loss: float) -> float:
        kept.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained)
        return 0.0

    trained = agent.optimizer.parameters
    agent.optimizer.step = step  # type: ignore[method-assign]
    agent._update(episodes, episodes.reward)
    agent.optimizer.zero_grad()
    total = torch.zeros(())
    for b in range(8):
        logprob = policy.evaluate(episodes.batch([b]), entropy=False).logprob
        to_go = episodes.reward[episodes.offsets[b] : episodes.offsets[b + 1]][::-1].cumsum()[::-1]
        total = total - (torch.from_numpy(to_go.copy()).float() * logprob).sum() / (8 * 4)
    expected = torch.autograd.grad(total, trained, allow_unused=True)
    for found, wanted in zip(kept, expected, strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found) if wanted is None else wanted)


def test_microbatches_change_nothing(make_envs: Any, make_policy: Any) -> None:
    trained = []
    for microbatch in (None, 5):
        policy = make_policy()
        config = dataclasses.replace(FAST, microbatch=microbatch, baseline="learned", ent_coef=0.1)
        REINFORCE(policy, make_envs(), config).learn(10**6, quiet=True, max_updates=1)
        trained.append(parameters(policy))
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=2e-5)


def test_the_advantage_can_be_replaced(make_envs: Any, make_policy: Any) -> None:
    """A group baseline, written by a user."""

    def group_mean(episodes: Any, returns: Any, values: Any) -> Any:
        scores = episodes.scores.reshape(-1, 4)
        return np.repeat((scores - scores.mean(1, keepdims=True)).reshape(-1), episodes.lengths)

    config = dataclasses.replace(FAST, group_size=4)
    agent = REINFORCE(make_policy(), make_envs(), config, advantage=group_mean)
    history = agent.learn(6000, quiet=True).history
    assert history[-1]["rollout/reward_mean"] > 0.8
    assert "baseline/value" not in history[-1]


def test_a_group_baseline_needs_groups() -> None:
    with pytest.raises(ValueError, match="needs a group_size of at least 2, got 1"):
        REINFORCEConfig(baseline="group")


def test_a_learned_baseline_needs_a_value_head(make_envs: Any, make_policy: Any) -> None:
    policy = make_policy(value_head=False)
    REINFORCE(policy, make_envs(), FAST).learn(1, quiet=True)
    with pytest.raises(ValueError, match="value_head=True"):
        REINFORCE(policy, make_envs(), dataclasses.replace(FAST, baseline="learned"))


def test_the_default_normaliser_is_the_unbiased_one() -> None:
    assert REINFORCEConfig().normaliser == "constant"
    np.testing.assert_allclose(token_weights([0, 1, 4], [1, 1], "constant", 4), 1 / 8)
