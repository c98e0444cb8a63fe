"""The expected step of an agent is the exact gradient of what it is to maximise.

Every episode of a small dialogue is listed and weighted with its probability, so that a batch is
the expectation and nothing is left to chance: not the credit, not what the environment says between
two guesses, not the baseline, not the price of KL.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from textgym.agents import PPO, REINFORCE, PPOConfig, REINFORCEConfig
from textgym.envs.high_low import HighLowVectorEnv
from textgym.episodes import Episodes
from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.rollout import collect
from textgym.streams import mix64

GUESSES, SECRETS, IDS = 2, 3, 6
EPISODES = SECRETS * IDS**GUESSES
COMMON: dict[str, Any] = {"episodes": EPISODES, "kl_coef": 0.3, "vf_coef": 0.0}
CONFIGS = [
    REINFORCEConfig(**COMMON, baseline="none"),
    REINFORCEConfig(**COMMON, baseline="moving_average"),
    REINFORCEConfig(**COMMON, baseline="learned", microbatch=25),
    PPOConfig(
        **COMMON, epochs=1, minibatches=1, gae_lambda=1.0, whiten=False, normaliser="constant"
    ),
]


class Listing:
    """Plays every sequence of guesses: those of episode k are the digits of k."""

    def act(self, obs: Any, stream: Any, *args: Any, **kwargs: Any) -> SimpleNamespace:
        names = mix64(0, np.arange(EPISODES))
        k = np.array([int(np.flatnonzero(names == s)[0]) for s in stream])
        turn = (obs["length"] - obs["prompt_length"])[:, 0] // 2  # each guess has an answer
        nothing = np.zeros(len(k), np.float32)
        return SimpleNamespace(action=k // IDS**turn % IDS, logprob=nothing, value=nothing)


def all_episodes(policy: CausalLMPolicy, envs: HighLowVectorEnv) -> Episodes:
    """Every episode for every secret, as `policy` would have played it, weighted by how often."""
    secrets = np.repeat(np.arange(SECRETS), IDS**GUESSES)
    found = collect(Listing(), envs, EPISODES, prompt_rows=secrets)  # type: ignore[arg-type]
    with torch.no_grad():
        scored = policy.evaluate(found.batch(range(EPISODES)))
    assert scored.value is not None
    found.logprob, found.value = scored.logprob.numpy(), scored.value.numpy()
    alike = IDS ** (GUESSES - found.lengths)  # those that end early are listed several times
    found.weight = np.exp(found.per_episode(found.logprob)) / alike
    assert found.weight.sum() == pytest.approx(SECRETS)
    assert set(found.lengths.tolist()) == {1, 2}
    return found


def small_policy(seed: int) -> CausalLMPolicy:
    model = random_causal_lm(IDS, hidden_size=16, num_layers=1, num_heads=2, seed=seed)
    policy = CausalLMPolicy(model, device="cpu")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(3.0)  # far from uniform
        assert policy.value_head is not None
        policy.value_head.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return policy


@pytest.mark.parametrize("config", CONFIGS, ids=["none", "moving_average", "learned", "ppo"])
def test_the_expected_step_is_the_gradient_of_return_less_kl(config: Any) -> None:
    policy, reference = small_policy(0), small_policy(1).frozen_copy()
    envs = HighLowVectorEnv(num_envs=16, guesses=GUESSES, autoreset_mode="Disabled")
    kind: Any = PPO if isinstance(config, PPOConfig) else REINFORCE
    agent = kind(policy, envs, config, reference=reference)
    if isinstance(agent, REINFORCE):
        agent.baseline.update([0.7])  # any number
    episodes = all_episodes(policy, envs)

    batch = episodes.batch(range(EPISODES))
    logprob = policy.evaluate(batch).logprob
    with torch.no_grad():
        log_ratio = logprob - reference.evaluate(batch).logprob
    owner = torch.from_numpy(np.repeat(np.arange(EPISODES), episodes.lengths))
    sums = torch.zeros(2, EPISODES).index_add_(1, owner, torch.stack([logprob, log_ratio]))
    alike = torch.from_numpy(IDS ** (GUESSES - episodes.lengths))
    # The gradient of the KL is that with the log ratio held fixed: the rest of it sums to 0.
    value = torch.from_numpy(episodes.scores).float() - 0.3 * sums[1].detach()
    objective = (sums[0].exp() / alike * value).sum() / SECRETS
    trained = agent.optimizer.parameters
    expected = torch.autograd.grad(objective, trained, allow_unused=True)

    kept: list[torch.Tensor | None] = []

    def step(loss: float) -> float:
        kept.extend(None if p.grad is None else p.grad.clone() for p in trained)
        return 0.0

    agent.optimizer.step = step
    shaped, _ = agent._shape(episodes)
    agent._update(episodes, shaped, *([0] if kind is PPO else []))
    assert max(float(g.abs().max()) for g in expected if g is not None) > 0.01
    budget = 2 * GUESSES - 1
    for found, wanted in zip(kept, expected, strict=True):
        if wanted is None:  # the value head
            assert found is None or not found.any()
        else:
            assert found is not None
            torch.testing.assert_close(found, -wanted / budget, rtol=1e-3, atol=2e-6)
