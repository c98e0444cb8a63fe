"""Credit assignment: the same total whoever is paid, and what the agents make of it."""

from typing import Any

import numpy as np
import pytest

from textgym.agents import PPO, REINFORCE, PPOConfig, REINFORCEConfig
from textgym.credit import assign_credit
from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.returns import episode_sums
from textgym.rewards import Rouge, dense, steps, terminal
from textgym.rollout import collect
from textgym.shaping import RewardScale, shape_rewards
from textgym.task import Task
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

SYMBOLS = ("a", "b", "c", ".")
ROWS = [{"prompt": p, "references": ["a b a b . c a . b c a"]} for p in ("a", "b", "c")]


def make_envs(reward: Any = None, **arguments: Any) -> TextGenVectorEnv:
    task = Task(
        prompts=ROWS,
        tokenizer=symbol_tokenizer(SYMBOLS),
        reward=Rouge() if reward is None else reward,
        max_new_tokens=9,
        **arguments,
    )
    return TextGenVectorEnv(task, 8, autoreset_mode="Disabled")


def make_policy() -> CausalLMPolicy:
    model = random_causal_lm(6, hidden_size=16, num_layers=1, num_heads=2, max_positions=16)
    return CausalLMPolicy(model, device="cpu")


def test_credit_by_hand() -> None:
    scores, offsets = [6.0, -2.0, 7.0], [0, 3, 4, 6]
    assert assign_credit(scores, offsets, "last").tolist() == [0, 0, 6, -2, 0, 7]
    assert assign_credit(scores, offsets, "even").tolist() == [2, 2, 2, -2, 3.5, 3.5]
    found = assign_credit(scores, offsets, "discounted", 0.5)
    np.testing.assert_allclose(found, [6 / 7, 12 / 7, 24 / 7, -2, 7 / 3, 14 / 3])
    for discount, same in ((1.0, "even"), (0.0, "last")):
        np.testing.assert_allclose(
            assign_credit(scores, offsets, "discounted", discount),
            assign_credit(scores, offsets, same),  # type: ignore[arg-type]
        )
    assert assign_credit([], [0], "even").tolist() == []
    assert assign_credit([0.0, 1.0], [0, 0, 1], "even").tolist() == [1.0]


def test_a_long_response_keeps_its_total() -> None:
    lengths = np.array([1, 10, 5000])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    for how in ("last", "even", "discounted"):
        for discount in (0.01, 0.5, 0.999):
            credit = assign_credit([3.0, -1.0, 1e6], offsets, how, discount)  # type: ignore[arg-type]
            np.testing.assert_allclose(episode_sums(credit, offsets), [3.0, -1.0, 1e6], rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [0, 2], "first"), "credit must be one of .*'discounted'.*, got 'first'"),
        (([1.0], [0, 2], "discounted", 1.5), r"credit_discount must lie in \[0, 1\], got 1.5"),
        (([1.0], [0, 0], "even"), "episode 0 has the score 1.0 and no action to pay it to"),
        (([1.0, 2.0], [0, 2], "even"), r"scores must have shape \[1\]"),
        (([np.nan], [0, 2], "even"), "finite"),
        (([1.0], 3, "even"), r"shape \[B \+ 1\]"),
    ],
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assign_credit(*arguments)


def test_every_choice_pays_the_same_total() -> None:
    """Last, even, discounted, dense by potential, per step: one score, five ways to pay it."""
    policy, score, rows = make_policy(), Rouge(), np.arange(24) % 3
    schedules = {
        "last": terminal(score),
        "dense": dense(score),
        "per step": steps(score, " .", sees="prefix", total="growth"),
    }
    found = {
        name: collect(policy, make_envs(schedule), 24, seed=1, prompt_rows=rows)
        for name, schedule in schedules.items()
    }
    last = found["last"]
    payments = {name: episodes.reward for name, episodes in found.items()}
    for how in ("even", "discounted"):
        payments[how] = assign_credit(last.scores, last.offsets, how)  # type: ignore[arg-type]
    assert last.scores.std() > 0.05
    for name, paid in payments.items():
        np.testing.assert_array_equal(found.get(name, last).ids, last.ids)
        np.testing.assert_allclose(episode_sums(paid, last.offsets), last.scores, atol=1e-12)
    distinct = {tuple(paid.round(9)) for paid in payments.values()}
    assert len(distinct) == 5


@pytest.mark.parametrize("how", ["even", "discounted"])
def test_scores_are_spread_before_the_price_of_kl(how: Any) -> None:
    episodes = collect(make_policy(), make_envs(), 12, seed=2)
    kl = np.random.default_rng(0).normal(size=episodes.num_tokens)
    scale = RewardScale()
    scale.mean, scale.std = 0.3, 0.5
    kwargs: dict[str, Any] = {"beta": 0.2, "scale": scale, "cut_penalty": 0.1}
    bare = shape_rewards(episodes, None, **kwargs)
    spread = shape_rewards(episodes, kl, **kwargs, credit=how, credit_discount=0.7)
    whole = assign_credit(episode_sums(bare, episodes.offsets), episodes.offsets, how, 0.7)
    np.testing.assert_allclose(spread, whole - 0.2 * kl, atol=1e-12)
    unspread = shape_rewards(episodes, kl, **kwargs)
    np.testing.assert_allclose(episode_sums(spread, episodes.offsets),
                               episode_sums(unspread, episodes.offsets), atol=1e-9)  # fmt: skip


@pytest.mark.parametrize(("agent", "config"), [(PPO, PPOConfig), (REINFORCE, REINFORCEConfig)])
def test_agents_learn_from_spread_credit(agent: Any, config: Any) -> None:
    made = agent(
        make_policy(), make_envs(), config(episodes=8, credit="discounted", credit_discount=0.5)
    )
    episodes = collect(made.policy, made.envs, 8)
    shaped, _ = made._shape(episodes)
    wanted = assign_credit(episodes.scores, episodes.offsets, "discounted", 0.5)
    np.testing.assert_allclose(shaped, wanted, atol=1e-12)
    assert np.count_nonzero(shaped) > len(episodes)
    result = made.learn(total_tokens=60, quiet=True)
    assert result is not None


@pytest.mark.parametrize(("agent", "config"), [(PPO, PPOConfig), (REINFORCE, REINFORCEConfig)])
def test_what_is_refused(agent: Any, config: Any) -> None:
    with pytest.raises(ValueError, match="credit must be one of"):
        config(credit="first")
    with pytest.raises(ValueError, match="credit_discount"):
        config(credit_discount=-0.1)
    envs = make_envs(dense(Rouge()))
    with pytest.raises(ValueError, match=r"paid token by token .*: use credit='last'"):
        agent(make_policy(), envs, config(credit="even"))
    agent(make_policy(), envs, config())
