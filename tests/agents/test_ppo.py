import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from textgym.agents.ppo import PPO, PPOConfig, gae_advantage
from textgym.env import TextGenEnv
from textgym.learning import NonFiniteError, UnscoredError
from textgym.rewards import dense
from textgym.rollout import collect
from textgym.shaping import RewardScale, fit_scale
from textgym.vector_wrappers import AllowedTokens

FAST = PPOConfig(episodes=16, minibatches=2, epochs=2, lr=3e-3, kl_coef=0.01)


def parameters(policy: Any) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in policy.parameters()])


def test_it_learns_and_logs(make_envs: Any, make_policy: Any) -> None:
    agent = PPO(make_policy(), make_envs(), FAST, eval_envs=make_envs())
    result = agent.learn(4000, quiet=True)
    history = result.history
    assert history[0]["eval/reward_mean"] < 0.4
    assert history[-1]["rollout/reward_mean"] > 0.85
    assert history[-1]["eval/reward_mean"] > 0.85
    assert result.total_tokens >= 4000
    assert result.total_tokens == sum(16 * h["rollout/response_length"] for h in history[1:])
    expected = "kl/ref kl/ref_exact kl/beta loss/policy loss/value policy/entropy ppo/approx_kl \
        ppo/clip_fraction value/explained_variance optim/grad_norm optim/lr rollout/stop_id"
    assert set(expected.split()) <= set(history[1])
    assert {h["time/update"] for h in history[1:]} == set(range(1, result.updates + 1))


def test_the_first_ratio_is_one_and_the_first_kl_zero(make_envs: Any, make_policy: Any) -> None:
    for temperature in (0.7, 1.5):
        agent = PPO(make_policy(temperature=temperature), make_envs(), FAST)
        first, second = agent.learn(10**6, quiet=True, max_updates=2).history
        for line in (first, second):
            assert line["ppo/first_ratio_error"] < 1e-4
        assert first["kl/ref"] == pytest.approx(0, abs=1e-4)
        assert first["kl/ref_exact"] == pytest.approx(0, abs=1e-6)
        assert second["kl/ref_exact"] > 0


@pytest.mark.parametrize("normaliser", ["constant", "token", "sequence"])
def test_microbatches_change_nothing(make_envs: Any, make_policy: Any, normaliser: str) -> None:
    trained = []
    for microbatch in (None, 3, 1):
        policy = make_policy()
        config = dataclasses.replace(
            FAST, microbatch=microbatch, ent_coef=0.01, normaliser=normaliser, epochs=1
        )
        PPO(policy, make_envs(), config).learn(10**6, quiet=True, max_updates=1)
        trained.append(parameters(policy))
    for other in trained[1:]:
        torch.testing.assert_close(other, trained[0], rtol=0, atol=2e-5)


def test_the_number_of_rows_changes_nothing(make_envs: Any, make_policy: Any) -> None:
    lines = []
    for rows in (1, 5, 16):
        agent = PPO(make_policy(), make_envs(num_envs=rows), FAST)
        lines.append(agent.learn(10**6, quiet=True, max_updates=1).history[0])
    for line in lines[1:]:
        assert line["rollout/reward_mean"] == lines[0]["rollout/reward_mean"]
        assert line["loss/policy"] == pytest.approx(lines[0]["loss/policy"], abs=1e-5)


def test_unscored_episodes_teach_nothing(make_envs: Any, make_policy: Any) -> None:
    """Whatever an unscored episode would have said, the step is the same."""
    trained = []
    for seed in (1, 2):
        policy, envs = make_policy(), make_envs()
        agent = PPO(policy, envs, FAST)
        episodes = collect(policy, envs, 16, prompt_rows=np.arange(16) % 4)
        unscored = [2, 7]
        episodes.weight[unscored] = 0.0
        shaped = episodes.reward.copy()
        shaped[episodes.tokens(unscored)] = np.random.default_rng(seed).normal(
            size=len(episodes.tokens(unscored))
        )
        agent._update(episodes, shaped, 0)
        trained.append(parameters(policy))
    assert torch.equal(trained[0], trained[1])


def test_too_many_unscored_episodes_stop_the_run(make_envs: Any, make_policy: Any) -> None:
    def broken(text: str) -> float:
        raise ConnectionError("the judge is down")

    with pytest.raises(UnscoredError, match=r"16 of 16 episodes are unscored, more than 20%") as e:
        PPO(make_policy(), make_envs(reward=broken), FAST).learn(1000, quiet=True)
    assert "ConnectionError: the judge is down" in str(e.value)
    assert "Traceback" in str(e.value)


def test_too_many_unscored_held_out_episodes_stop_the_run_too(
    make_envs: Any, make_policy: Any
) -> None:
    """Else the best checkpoint would be chosen by the few that have a score."""

    def flaky(text: str) -> float:
        if len(text) > 5:
            raise ConnectionError("the judge is down")
        return 0.5

    agent = PPO(make_policy(), make_envs(), FAST, eval_envs=make_envs(reward=flaky))
    with pytest.raises(UnscoredError, match="the judge is down"):
        agent.learn(1000, quiet=True)


def test_truncated_episodes_do_not_set_the_scale_of_rewards(
    make_envs: Any, make_policy: Any
) -> None:
    """They were paid nothing because they have no outcome, not because it is worth 0."""
    envs = make_envs(reward=lambda text: 50.0 + len(text), budget="truncate")
    episodes = collect(make_policy(), envs, 64, seed=3)
    assert 0 < episodes.truncated.sum() < 64
    scale = RewardScale()
    assert fit_scale(scale, make_policy(), envs, 64, 3) == episodes.num_tokens
    assert scale.mean == pytest.approx(episodes.scores[episodes.terminated].mean())
    assert scale.mean > 50


@pytest.mark.parametrize("ent_coef", [0.0, 0.01])
def test_the_entropy_has_a_gradient_only_where_it_is_learned_from(
    make_envs: Any, make_policy: Any, ent_coef: float
) -> None:
    policy, asked = make_policy(), []
    evaluate = policy.evaluate

    def watched(batch: Any, **options: bool) -> Any:
        asked.append(options)
        return evaluate(batch, **options)

    policy.evaluate = watched
    config = dataclasses.replace(FAST, ent_coef=ent_coef, minibatches=1)
    line = PPO(policy, make_envs(), config).learn(1, quiet=True).history[-1]
    learned = bool(ent_coef)
    assert asked == [
        {"entropy": True, "entropy_gradient": learned},
        {"entropy": learned, "entropy_gradient": learned},
    ]
    assert 1.5 < line["policy/entropy"] < math.log(6)


def test_non_finite_steps_are_skipped_and_five_stop_the_run(
    make_envs: Any, make_policy: Any
) -> None:
    policy = make_policy()
    before = parameters(policy)

    def poisoned(episodes: Any, rewards: Any, config: PPOConfig) -> Any:
        advantages, returns = gae_advantage(episodes, rewards, config)
        return advantages, returns * 1e30  # its square is infinite in float32

    agent = PPO(policy, make_envs(), FAST, advantage=poisoned)
    with pytest.raises(NonFiniteError, match="5 steps in a row"):
        agent.learn(10**6, quiet=True)
    assert agent.optimizer.skipped == 5
    assert torch.equal(parameters(policy), before)


def test_target_kl_ends_an_update_early(make_envs: Any, make_policy: Any) -> None:
    config = dataclasses.replace(FAST, epochs=50, lr=1e-2, target_kl=0.01)
    line = PPO(make_policy(), make_envs(), config).learn(1, quiet=True).history[-1]
    assert line["ppo/epochs"] < 50
    assert line["ppo/approx_kl"] < 0.015


def test_cut_responses_can_be_masked_or_fined(make_envs: Any, make_policy: Any) -> None:
    policy, envs = make_policy(), make_envs()
    episodes = collect(policy, envs, 16, prompt_rows=np.arange(16) % 4)
    cut = np.array([r == "length" for r in episodes.stop_reason])
    assert 0 < cut.sum() < 16
    agent = PPO(policy, envs, dataclasses.replace(FAST, kl_coef=0.0, cut_penalty=2.0))
    shaped, _ = agent._shape(episodes)
    difference = np.zeros(episodes.num_tokens)
    difference[episodes.offsets[1:][cut] - 1] = -2.0
    np.testing.assert_allclose(shaped - episodes.reward, difference)
    masked = PPO(policy, envs, dataclasses.replace(FAST, cut="mask"))
    before = parameters(policy)
    for b in np.flatnonzero(~cut):
        episodes.weight[b] = 0.0
    masked._update(episodes, shaped, 0)
    assert torch.equal(parameters(policy), before)  # nothing is left to learn from


def test_kl_keeps_the_policy_near_its_reference(make_envs: Any, make_policy: Any) -> None:
    distances = []
    for coef in (0.0, 1.0):
        policy = make_policy()
        config = dataclasses.replace(FAST, kl_coef=coef)
        agent = PPO(policy, make_envs(), config, reference=policy.frozen_copy())
        distances.append(agent.learn(3000, quiet=True).history[-1]["kl/ref_exact"])
    assert distances[1] < 0.2 * distances[0]


def test_adaptive_kl_moves_its_price(make_envs: Any, make_policy: Any) -> None:
    config = dataclasses.replace(FAST, kl_coef=0.1, kl_target=1e-6, kl_horizon=100)
    history = PPO(make_policy(), make_envs(), config).learn(2000, quiet=True).history
    assert history[-1]["kl/beta"] > 0.1
    with pytest.raises(ValueError, match="too short for batches of 16"):
        PPO(make_policy(), make_envs(), dataclasses.replace(config, kl_horizon=3))


def test_rewards_are_scaled_on_samples_of_the_reference(make_envs: Any, make_policy: Any) -> None:
    config = dataclasses.replace(FAST, scale_episodes=64, kl_coef=0.0)
    agent = PPO(make_policy(), make_envs(reward=lambda text: 50 + 10 * share(text)), config)
    result = agent.learn(10**6, quiet=True, max_updates=1)
    assert agent.scale.mean == pytest.approx(50, abs=10)
    episodes = collect(agent.policy, agent.envs, 64)
    scores = episodes.per_episode(agent._shape(episodes)[0])
    assert abs(scores.mean()) < 1
    assert 0.3 < scores.std() < 3
    assert result.total_tokens > 64  # those samples count


def share(text: str) -> float:
    return text.split().count("a") / 4


def test_what_does_not_fit_is_refused(make_envs: Any, make_policy: Any) -> None:
    envs, policy = make_envs(), make_policy()
    with pytest.raises(ValueError, match="Disabled"):
        PPO(policy, type(envs)(envs.task, 2, autoreset_mode="SameStep"))
    with pytest.raises(ValueError, match=r"got 'none': gym\.make_vec"):
        PPO(policy, TextGenEnv(task=envs.task))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sampler cuts it"):
        PPO(make_policy(top_k=3), envs)
    with pytest.raises(ValueError, match="value_head=True"):
        PPO(make_policy(value_head=False), envs)
    with pytest.raises(ValueError, match=r"the model's tokenizer.*vocab_size=6"):
        PPO(make_policy(vocab_size=5), envs)
    with pytest.raises(ValueError, match="context holds 16"):
        PPO(policy, make_envs(max_new_tokens=16))
    with pytest.raises(ValueError, match=r"gamma 0\.9, the agent 1\.0"):
        PPO(policy, make_envs(reward=dense(share, gamma=0.9)))
    with pytest.raises(ValueError, match="temperature"):
        PPO(policy, envs, reference=make_policy(temperature=2.0))
    with pytest.raises(ValueError, match="minibatches must be at least 1"):
        PPOConfig(minibatches=0)
    with pytest.raises(ValueError, match=r"multiple of group_size \(3\), got 64"):
        PPOConfig(group_size=3)
    with pytest.raises(ValueError, match=r"gae_lambda must lie in \[0, 1\], got 1.5"):
        PPOConfig(gae_lambda=1.5)
    for name in ("max_grad_norm", "clip_coef", "vf_clip_coef", "target_kl"):
        with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
            PPOConfig(**{name: 0.0})
    frozen = make_policy()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="every one is frozen"):
        PPO(frozen, envs)


def test_every_metric_is_finite_or_documented_nan(make_envs: Any, make_policy: Any) -> None:
    history = PPO(make_policy(), make_envs(), FAST).learn(500, quiet=True).history
    for line in history:
        odd = {name for name, value in line.items() if not math.isfinite(value)}
        assert odd <= {"value/explained_variance"}


def test_a_way_to_sample_that_the_environment_forbids_is_refused_at_once(
    make_envs: Any, make_policy: Any
) -> None:
    masked: Any = AllowedTokens(make_envs(), [0, 1])
    PPO(make_policy(), masked, FAST)
    with pytest.raises(ValueError, match="masks actions; use path='step'"):
        PPO(make_policy(), masked, dataclasses.replace(FAST, path="sequence"))
