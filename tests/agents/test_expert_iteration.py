"""Expert iteration against a choice worked by hand, and a slow SFT on what was chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from textgym.agents import ExpertIteration, ExpertIterationConfig
from textgym.episodes import Episodes
from textgym.learning import UnscoredError
from textgym.rollout import collect

SCORES = [0.2, 0.8, 0.8, 0.5, 0.4, 0.4, 0.4, 0.4, 0.9, 1.0, 0.1, 0.3]  # three groups of four


def scored(agent: ExpertIteration, scores: list[float]) -> Episodes:
    """Episodes that earn these scores, with responses that all differ."""
    size = agent.config.group_size
    episodes = collect(agent.policy, agent.envs, len(scores), group_size=size, seed=0)
    episodes.reward[:] = 0.0
    episodes.reward[episodes.offsets[1:] - 1] = scores
    episodes.ids[episodes.starts[1:] - 1] = np.arange(len(scores)) + 100  # of no vocabulary
    episodes.stop_reason = ["stop_id"] * len(scores)
    return episodes


def chosen(agent: ExpertIteration, episodes: Episodes) -> list[int]:
    kept, metrics = agent._choose(episodes, agent._shape(episodes)[0])
    assert metrics["expert/kept"] == kept.mean()
    if kept.any():
        assert metrics["expert/reward_mean"] == pytest.approx(episodes.scores[kept].mean())
    return np.flatnonzero(kept).tolist()


@pytest.fixture
def make_agent(make_envs: Any, make_policy: Any) -> Any:
    def make(**settings: Any) -> ExpertIteration:
        config = ExpertIterationConfig(**{"episodes": 12, "group_size": 4} | settings)
        return ExpertIteration(make_policy(seed=1), make_envs(), config)

    return make


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 9]),  # the earlier of two that are equal; the flat group has no best
        ({"best": 2}, [1, 2, 8, 9]),
        ({"flat": "keep"}, [1, 4, 9]),
        ({"best": 3, "threshold": 0.5}, [1, 2, 3, 8, 9]),
        ({"best": None, "threshold": 0.4}, [1, 2, 3, 8, 9]),
        ({"best": None, "threshold": 0.4, "flat": "keep"}, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"best": 1, "threshold": 0.9}, [9]),
        ({"threshold": 1.5}, []),
    ],
)
def test_the_choice_by_hand(make_agent: Any, settings: Any, expected: list[int]) -> None:
    agent = make_agent(**settings)
    assert chosen(agent, scored(agent, SCORES)) == expected


def test_the_choice_leaves_out_what_is_unscored_truncated_or_written_twice(make_agent: Any) -> None:
    agent = make_agent(best=2)
    episodes = scored(agent, SCORES)
    episodes.reward[episodes.offsets[2] - 1] = np.nan  # of the second response
    episodes.weight[1] = 0.0
    episodes.terminated[8] = False
    assert chosen(agent, episodes) == [2, 3, 9, 11]

    episodes = scored(agent, SCORES)
    prompt = episodes.sequence(4)[: episodes.prompt_length[4]]
    assert (episodes.sequence(5)[: len(prompt)] == prompt).all()  # one prompt a group
    copied = episodes.take([0, 1, 1, 3, 4, 5, 6, 7, 9, 9, 10, 9])
    assert copied.scores.tolist() == [0.2, 0.8, 0.8, 0.5, *SCORES[4:8], 1.0, 1.0, 0.1, 1.0]
    copied.stop_reason = ["stop_id"] * 12
    assert chosen(agent, copied) == [1, 3, 8, 10]


def test_cut_responses_are_fined_or_left_out(make_agent: Any) -> None:
    cut = ["length" if b in (1, 9) else "stop_id" for b in range(12)]
    for settings, expected in (
        ({}, [1, 9]),
        ({"cut": "mask"}, [2, 8]),
        ({"cut_penalty": 0.1}, [2, 8]),  # 1.0 - 0.1 is not above 0.9, which is earlier
    ):
        agent = make_agent(**settings)
        episodes = scored(agent, SCORES)
        episodes.stop_reason = cut
        assert chosen(agent, episodes) == expected


def test_the_price_of_kl_orders_and_does_not_judge(make_envs: Any, make_policy: Any) -> None:
    config = ExpertIterationConfig(episodes=12, group_size=4, kl_coef=1e6, threshold=0.5)
    agent = ExpertIteration(
        make_policy(seed=1), make_envs(), config, reference=make_policy(seed=2).frozen_copy()
    )
    episodes = scored(agent, SCORES)
    episodes.ids[episodes.starts[1:] - 1] = 0  # the price is of ids that there are
    shaped, metrics = agent._shape(episodes)
    price = episodes.per_episode(episodes.reward - shaped)
    assert metrics["kl/beta"] == 1e6 and np.abs(price).min() > 10.0
    kept, _ = agent._choose(episodes, shaped)
    # Nearest to the reference of those that earn 0.5; all of the second group earn less.
    nearest = [min(some, key=lambda b: price[b]) for some in ([1, 2, 3], [8, 9])]
    assert np.flatnonzero(kept).tolist() == nearest


@pytest.mark.parametrize("normaliser", ["token", "sequence", "constant"])
def test_the_gradient_is_that_of_sft_on_what_was_chosen(make_agent: Any, normaliser: Any) -> None:
    agent = make_agent(best=2, normaliser=normaliser, microbatch=3)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.mul_(3.0)
    episodes = collect(agent.policy, agent.envs, 12, group_size=4, seed=3)
    kept = np.zeros(12, np.bool_)
    kept[[0, 3, 4, 9, 10]] = True

    budget = agent.task.max_new_tokens
    lengths = [int(episodes.lengths[b]) for b in np.flatnonzero(kept)]
    assert len(set(lengths)) > 1
    loss: Any = 0.0
    for b in np.flatnonzero(kept):
        ids = torch.from_numpy(episodes.sequence(b))[None]
        logprobs = agent.policy.model(ids).logits[0, :-1].log_softmax(-1)
        first = int(episodes.prompt_length[b])
        for column in range(first, ids.shape[1]):
            share = {
                "token": 1 / sum(lengths),
                "sequence": 1 / (5 * (ids.shape[1] - first)),
                "constant": 1 / (5 * budget),
            }[normaliser]
            loss = loss - share * logprobs[column - 1, ids[0, column]]
    trained = agent.optimizer.parameters
    expected = torch.autograd.grad(loss, trained, allow_unused=True)

    found: list[Any] = []

    def step(total: Any) -> Any:
        found.append(total)
        found.extend(None if p.grad is None else p.grad.clone() for p in trained)
        return torch.zeros(())

    agent.policy.zero_grad()
    agent.optimizer.step = step
    metrics = agent._update(episodes, kept, 0)
    assert float(found[0]) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert metrics["loss/policy"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert max(float(g.abs().max()) for g in expected if g is not None) > 1e-2
    for ours, exact in zip(found[1:], expected, strict=True):
        if exact is None:
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6)


def test_microbatches_change_nothing_and_minibatches_share_the_batch(make_agent: Any) -> None:
    losses, steps = {}, {}
    for microbatch, minibatches in ((None, 1), (2, 1), (None, 3)):
        agent = make_agent(best=3, minibatches=minibatches, microbatch=microbatch, lr=1e-9)
        episodes = collect(agent.policy, agent.envs, 12, group_size=4, seed=3)
        metrics = agent._update(episodes, np.arange(12) % 4 > 0, 0)
        losses[microbatch, minibatches] = metrics["loss/policy"]
        steps[minibatches] = metrics["optim/steps"]
    assert steps == {1: 1, 3: 3}
    assert len({round(loss, 5) for loss in losses.values()}) == 1


def test_every_token_counts_and_an_update_without_a_response_takes_no_step(
    make_envs: Any, make_policy: Any
) -> None:
    config = ExpertIterationConfig(episodes=16, group_size=4, lr=1e-2, eval_every=0)
    agent = ExpertIteration(make_policy(), make_envs(reward=lambda text: 0.5), config)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    result = agent.learn(200, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))
    assert all(line["expert/kept"] == 0.0 for line in result.history)
    assert all(line["expert/flat_groups"] == 1.0 for line in result.history)
    lengths = sum(16 * line["rollout/response_length"] for line in result.history)
    assert result.total_tokens == pytest.approx(lengths)


def test_it_learns(make_envs: Any, make_policy: Any) -> None:
    config = ExpertIterationConfig(episodes=32, lr=2e-2, eval_every=0)
    agent = ExpertIteration(make_policy(), make_envs(num_envs=32), config)
    result = agent.learn(32 * 4 * 25, quiet=True)
    first, last = result.history[0], result.history[-1]
    assert first["rollout/reward_mean"] < 0.4 and last["rollout/reward_mean"] > 0.8
    assert first["expert/reward_mean"] > first["rollout/reward_mean"] + 0.1


def test_what_could_not_be_learned_from_is_refused(make_envs: Any, make_policy: Any) -> None:
    for settings in ({"best": None}, {"best": 8}):
        with pytest.raises(ValueError, match="something must be left out"):
            ExpertIterationConfig(**settings)
    with pytest.raises(ValueError, match="best must be at least 1, got 0"):
        ExpertIterationConfig(best=0)
    with pytest.raises(ValueError, match="a group of one is always flat"):
        ExpertIterationConfig(group_size=1, threshold=0.5)
    with pytest.raises(ValueError, match="gamma must be 1"):
        ExpertIterationConfig(gamma=0.9)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        ExpertIterationConfig(epochs=0)
    one = ExpertIterationConfig(group_size=1, threshold=0.5, flat="keep", episodes=8)
    ExpertIteration(make_policy(), make_envs(), one).learn(1, quiet=True)

    def fails(text: str) -> float:
        raise ZeroDivisionError("my bug")

    with pytest.raises(UnscoredError, match="my bug"):
        ExpertIteration(
            make_policy(), make_envs(reward=fails), dataclasses.replace(one, lr=1e-3)
        ).learn(1, quiet=True)
