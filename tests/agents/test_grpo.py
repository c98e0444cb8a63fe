"""GRPO and its variants against numbers worked by hand and a slow implementation of the papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from textgym.agents import GRPO, GRPOConfig
from textgym.agents.grpo import VARIANTS
from textgym.episodes import Episodes
from textgym.rollout import PromptQueue, collect
from textgym.streams import mix64

NAMES = list(VARIANTS)


def slow_loss(agent: GRPO, episodes: Episodes, kl: bool) -> torch.Tensor:
    """The objective of each paper, response by response and token by token."""
    cfg, policy = agent.config, agent.policy
    reference = agent.reference
    high = cfg.clip_coef if cfg.clip_coef_high is None else cfg.clip_coef_high
    scored = [b for b in range(len(episodes)) if episodes.weight[b] > 0]
    logps, olds, refs, rewards = {}, {}, {}, {}
    for b in range(len(episodes)):
        batch = episodes.batch([b])
        logps[b] = policy.evaluate(batch).logprob.double()
        olds[b] = torch.from_numpy(episodes.logprob[episodes.tokens([b])]).double()
        rewards[b] = episodes.reward[episodes.tokens([b])].copy()
        if reference is not None:
            with torch.no_grad():
                refs[b] = reference.evaluate(batch).logprob.double()
            if cfg.kl_in == "reward":
                rewards[b] -= cfg.kl_coef * (olds[b] - refs[b]).numpy()
    total = {b: rewards[b].sum() for b in rewards}
    everything = np.concatenate([rewards[b][::-1].cumsum()[::-1] for b in scored])
    tokens = sum(len(rewards[b]) for b in scored)
    loss = torch.zeros((), dtype=torch.float64)
    for b in scored:
        mates = [j for j in scored if episodes.group[j] == episodes.group[b]]
        got = np.array([total[j] for j in mates])
        length = len(rewards[b])
        if cfg.advantage == "batch":
            to_go = rewards[b][::-1].cumsum()[::-1]
            advantage = (to_go - everything.mean()) / (everything.std() + 1e-8)
        else:
            others = [total[j] for j in mates if j != b]
            base = {
                "standard": (total[b] - got.mean()) / (got.std(ddof=1) + 1e-4),
                "mean": total[b] - got.mean(),
                "leave_one_out": total[b] - np.mean(others),
            }[cfg.advantage]
            advantage = np.full(length, base)
        weight = {
            "sequence": 1 / (len(scored) * length),
            "token": 1 / tokens,
            "constant": 1 / (len(scored) * agent.task.max_new_tokens),
        }[cfg.normaliser]
        ratios = (logps[b] - olds[b]).exp()
        if cfg.ratio == "sequence":
            ratios = (logps[b] - olds[b]).mean().exp().expand(length)
        for t in range(length):
            rho, a = ratios[t], advantage[t]
            kept = rho.clamp(1 - cfg.clip_coef, 1 + high)
            loss = loss - weight * torch.minimum(rho * a, kept * a)
            if kl:
                log = refs[b][t] - logps[b][t]
                loss = loss + cfg.kl_coef * weight * (log.exp() - log - 1)
    return loss


@pytest.mark.parametrize("kl_in", [None, "reward", "loss"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_those_of_the_papers(
    name: Any, kl_in: Any, make_envs: Any, make_policy: Any
) -> None:
    changes: dict[str, Any] = {"episodes": 12, "epochs": 1, "minibatches": 1, "microbatch": 5}
    if name != "reinforce++":
        changes["group_size"] = 4
    if name == "gspo":  # whose own range would clip all that the noise below changes
        changes |= {"clip_coef": 0.05, "clip_coef_high": 0.1}
    if kl_in is not None:
        changes |= {"kl_in": kl_in, "kl_coef": 0.3}
    config = GRPOConfig.variant(name, **changes)
    policy = make_policy(seed=1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(3.0)
    reference = None if kl_in is None else make_policy(seed=2).frozen_copy()
    agent = GRPO(policy, make_envs(), config, reference=reference)
    episodes = collect(policy, agent.envs, 12, group_size=config.group_size, seed=3)
    episodes.weight[5] = 0.0
    episodes.reward[:] += np.random.default_rng(0).normal(size=episodes.num_tokens)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():  # some ratios are clipped, and some are not
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))

    trained = agent.optimizer.parameters
    wanted = slow_loss(agent, episodes, kl_in == "loss")
    gradient = torch.autograd.grad(wanted, trained, allow_unused=True)
    kept: list[Any] = []

    def step(loss: float) -> float:
        kept.append(loss)
        kept.extend(None if p.grad is None else p.grad.clone() for p in trained)
        return 0.0

    policy.zero_grad()
    agent.optimizer.step = step  # type: ignore[method-assign]
    shaped, priced, _ = agent._shape(episodes)
    metrics = agent._update(episodes, shaped, priced, 0)
    assert 0.0 < metrics["ppo/clip_fraction"] < 1.0
    assert kept[0] == pytest.approx(float(wanted.detach()), rel=1e-4, abs=1e-6)
    assert max(float(g.abs().max()) for g in gradient if g is not None) > 1e-3
    for found, exact in zip(kept[1:], gradient, strict=True):
        if exact is None:
            assert found is None or not found.any()
        else:
            torch.testing.assert_close(found, exact, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_learns(name: Any, make_envs: Any, make_policy: Any) -> None:
    config = GRPOConfig.variant(name, episodes=32, lr=2e-2, eval_every=0)
    result = GRPO(make_policy(), make_envs(num_envs=32), config).learn(32 * 4 * 25, quiet=True)
    first, last = result.history[0], result.history[-1]
    assert first["rollout/reward_mean"] < 0.4 and last["rollout/reward_mean"] > 0.8
    assert first["ppo/first_ratio_error"] < 1e-4


def only_some(prompt: str, text: str) -> float:
    """Two of the four prompts earn nothing, whatever is written."""
    return text.split().count("a") / 4 if prompt in ("d", "b c") else 0.0


def watched(agent: GRPO) -> tuple[list[Episodes], list[Episodes]]:
    """What an agent samples, and what it learns from, as it goes on."""
    sampled, learned = [], []
    collecting, updating = agent._collect, agent._update

    def collect_and_keep(*args: Any) -> Episodes:
        sampled.append(collecting(*args))
        return sampled[-1]

    def update_and_keep(episodes: Episodes, *args: Any) -> dict[str, float]:
        learned.append(episodes)
        return updating(episodes, *args)

    agent._collect = collect_and_keep  # type: ignore[method-assign]
    agent._update = update_and_keep  # type: ignore[method-assign]
    return sampled, learned


def test_flat_groups_are_replaced_until_none_is_left(make_envs: Any, make_policy: Any) -> None:
    config = GRPOConfig(episodes=24, group_size=6, resample=20, lr=1e-2, eval_every=0)
    agent = GRPO(make_policy(), make_envs(reward=only_some), config)
    sampled, learned = watched(agent)
    result = agent.learn(4 * 1000, quiet=True, max_updates=3)
    assert len(learned) == 3 < len(sampled)
    for batch in learned:
        scores = batch.scores.reshape(4, 6)
        assert (scores.max(axis=1) > scores.min(axis=1)).all()
        assert (batch.prompt_row.reshape(4, 6) == batch.prompt_row[::6, None]).all()
    everything = Episodes.join(sampled)
    # All of it is counted, and it is the queue's next prompts, each with draws of its own.
    assert result.total_tokens == everything.num_tokens
    queue = PromptQueue(4, int(mix64(config.seed, 1)))
    np.testing.assert_array_equal(everything.prompt_row[::6], queue.take(len(everything) // 6))
    assert len(np.unique(everything.stream)) == len(everything) // 6
    line, first = result.history[0], sampled[: len(sampled) - 1]
    while Episodes.join(first).num_tokens > line["time/total_tokens"]:
        first.pop()
    assert line["grpo/flat_groups"] == 0.0
    assert line["grpo/resampled"] == sum(map(len, first)) / 24 - 1 > 0
    assert line["rollout/reward_mean"] == pytest.approx(Episodes.join(first).scores.mean())
    assert learned[0].scores.mean() > 1.5 * line["rollout/reward_mean"]


def test_resampling_ends_and_what_is_flat_still_teaches_nothing(
    make_envs: Any, make_policy: Any
) -> None:
    config = GRPOConfig(episodes=8, group_size=4, resample=3, lr=1e-2, eval_every=0)
    agent = GRPO(make_policy(), make_envs(reward=lambda text: 0.5), config)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    sampled, learned = watched(agent)
    result = agent.learn(1, quiet=True)
    assert [len(part) for part in sampled] == [8, 8, 8, 8] and [len(x) for x in learned] == [8]
    assert result.total_tokens == sum(part.num_tokens for part in sampled)
    assert result.history[-1]["grpo/flat_groups"] == 1.0
    assert result.history[-1]["grpo/resampled"] == 3.0
    assert all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))


def test_only_scored_responses_that_ended_make_a_group_worth_its_place(
    make_envs: Any, make_policy: Any
) -> None:
    config = GRPOConfig(episodes=15, group_size=3, cut="mask", resample=1)
    agent = GRPO(make_policy(), make_envs(), config)
    episodes = collect(agent.policy, agent.envs, 15, group_size=3, seed=0)
    last = episodes.offsets[1:] - 1
    episodes.reward[:] = 0.0
    episodes.reward[last] = [0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 1, 1, 1]
    episodes.stop_reason = ["stop_id"] * 15
    episodes.weight[5] = 0.0
    episodes.terminated[8] = False
    episodes.stop_reason[11] = "length"
    assert agent._flat(episodes).tolist() == [False, True, True, True, True]


def test_where_no_group_is_flat_resampling_changes_nothing(
    make_envs: Any, make_policy: Any
) -> None:
    def all_differ(text: str, token_ids: list[int]) -> float:
        return sum(i * 7**k for k, i in enumerate(token_ids)) / 7**4

    runs = []
    for resample in (0, 3, 3):
        config = GRPOConfig(episodes=16, resample=resample, lr=1e-2, eval_every=0)
        agent = GRPO(make_policy(), make_envs(reward=all_differ), config)
        lines = agent.learn(400, quiet=True).history
        runs.append((lines, [p.detach() for p in agent.policy.parameters()]))
    assert all(line["grpo/flat_groups"] == 0.0 for line in runs[0][0][1:])
    for lines, parameters in runs[1:]:
        assert len(lines) == len(runs[0][0]) > 4
        assert all(torch.equal(a, b) for a, b in zip(parameters, runs[0][1], strict=True))


def test_what_cannot_be_compared_is_refused(make_envs: Any, make_policy: Any) -> None:
    with pytest.raises(ValueError, match="group_size of at least 2, got 1"):
        GRPOConfig(group_size=1)
    with pytest.raises(ValueError, match="needs resample=0, got 2"):
        GRPOConfig.variant("reinforce++", resample=2)
    with pytest.raises(ValueError, match="resample must be at least 0"):
        GRPOConfig(resample=-1)
    with pytest.raises(ValueError, match="gamma must be 1"):
        GRPOConfig(gamma=0.9)
    with pytest.raises(ValueError, match="clip_coef_high must be above 0"):
        GRPOConfig(clip_coef_high=0.0)
    with pytest.raises(ValueError, match="there are grpo, dr_grpo"):
        GRPOConfig.variant("gpro")  # type: ignore[arg-type]
