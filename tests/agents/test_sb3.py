"""The recipes for stable-baselines3: they learn, they log and resume like textgym's own agents."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sb3_contrib")

from textgym.agents import (
    SB3A2C,
    SB3PPO,
    SB3TRPO,
    SB3A2CConfig,
    SB3MaskablePPO,
    SB3MaskablePPOConfig,
    SB3PPOConfig,
    SB3TRPOConfig,
)
from textgym.checkpoint import CheckpointError, OtherRunError
from textgym.learning import NonFiniteError, UnscoredError
from textgym.logging import GLOSSARY, read_metrics
from textgym.mdp import TokenMDP
from textgym.rollout import collect
from textgym.sb3.state import replayed, saved_row
from textgym.shaping import exact_kl
from textgym.vector import TextGenVectorEnv
from textgym.vector_wrappers import AllowedTokens
from textgym.wrappers import reference_tokens

TOKENS = 500
COMMON: dict[str, Any] = {
    "n_steps": 7,  # of episodes of at most 4: some go on in the next rollout
    "kl_coef": 0.1,
    "kl_target": 0.5,
    "kl_horizon": 100,
    "lr_final": 0.0,
    "warmup_updates": 3,
    "eval_every": 3,
    "checkpoint_every": 2,
}
PPO = {"epochs": 2, "minibatches": 2, "lr": 1e-2, "ent_coef": 0.01}
AGENTS: dict[str, tuple[Any, Any]] = {
    "ppo": (SB3PPO, SB3PPOConfig(**COMMON, **PPO)),
    "maskable-ppo": (SB3MaskablePPO, SB3MaskablePPOConfig(**COMMON, **PPO)),
    "a2c": (SB3A2C, SB3A2CConfig(**COMMON, lr=1e-2)),
    "trpo": (SB3TRPO, SB3TRPOConfig(**COMMON, lr=1e-2, cg_steps=3, sub_sampling=2)),
}


@pytest.fixture
def make_agent(make_envs: Any, make_policy: Any) -> Any:
    def make(name: str, folder: Path | None = None, config: Any = None, **knobs: Any) -> Any:
        kind, usual = AGENTS[name]
        settings = {k: knobs.pop(k) for k in ("seed", "lora", "family") if k in knobs}
        held_out = make_envs(**knobs)
        envs: Any = TextGenVectorEnv(
            held_out.task, knobs.get("num_envs", 8), autoreset_mode="SameStep"
        )
        if name == "maskable-ppo":
            envs = AllowedTokens(envs, reference_tokens(held_out.task))
        policy = make_policy(**settings)
        return kind(policy, envs, config or usual, eval_envs=held_out, folder=folder)

    return make


def parameters(agent: Any) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in agent.policy.parameters()])


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    clocks = ("time/tokens_per_s", "time/rollout_s", "time/train_s")
    return [{k: v for k, v in r.items() if k not in clocks} for r in read_metrics(folder)]


@pytest.mark.parametrize("name", list(AGENTS))
def test_a_resumed_run_is_the_same_run_bit_for_bit(
    make_agent: Any, tmp_path: Path, name: str
) -> None:
    whole = make_agent(name, tmp_path / "whole")
    before = parameters(whole)
    result = whole.learn(TOKENS, quiet=True)
    assert result.updates == 9 and result.total_tokens == 504  # 8 rows of 7 steps
    assert result.best_checkpoint is not None
    assert not torch.equal(before, parameters(whole))
    for updates in (1, 4, 2, None):
        pieces = make_agent(name, tmp_path / "pieces")
        pieces.learn(TOKENS, quiet=True, resume=True, max_updates=updates)
    assert torch.equal(parameters(whole), parameters(pieces))
    assert lines(tmp_path / "whole") == lines(tmp_path / "pieces")
    samples = [(tmp_path / run / "samples.jsonl").read_text() for run in ("whole", "pieces")]
    assert samples[0] == samples[1]


def test_a_run_whose_rewards_are_paid_on_every_token_resumes_bit_for_bit(
    make_agent: Any, tmp_path: Path
) -> None:
    from textgym.rewards import dense

    def share_of_a(text: str) -> float:
        return text.split().count("a") / 4

    with pytest.warns(UserWarning, match="whole text again"):
        knobs = {"reward": dense(share_of_a, gamma=1.0)}
        whole = make_agent("ppo", tmp_path / "whole", **knobs)
        whole.learn(TOKENS, quiet=True)
        for updates in (3, None):
            pieces = make_agent("ppo", tmp_path / "pieces", **knobs)
            pieces.learn(TOKENS, quiet=True, resume=True, max_updates=updates)
    assert torch.equal(parameters(whole), parameters(pieces))
    assert lines(tmp_path / "whole") == lines(tmp_path / "pieces")


def test_replayed_episodes_are_the_episodes() -> None:
    """Also those in which the environment takes turns, whose tokens are not actions."""
    import gymnasium as gym

    envs: Any = gym.make_vec(
        "textgym/HighLow-v0", 6, "vector_entry_point", autoreset_mode="SameStep"
    ).unwrapped
    envs.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(8):
        envs.step(rng.integers(envs.task.vocab_size, size=6))
    states = [envs.get_state(i) for i in range(6)]
    assert any(state.steps and state.replied.any() for state in states)
    saved = json.loads(json.dumps([saved_row(state) for state in states]))
    again = replayed(TokenMDP(envs.task, 6), saved)
    for state, found in zip(states, again, strict=True):
        for field in dataclasses.fields(state):
            a, b = getattr(state, field.name), getattr(found, field.name)
            if field.name != "track":
                assert np.array_equal(a, b), field.name


@pytest.mark.parametrize("name", list(AGENTS))
def test_what_is_logged(make_agent: Any, tmp_path: Path, name: str) -> None:
    agent = make_agent(name, tmp_path)
    result = agent.learn(TOKENS, quiet=True)
    last = result.history[-1]
    assert set(last) - {"reward/share_of_a", "eval/reward/share_of_a"} <= set(GLOSSARY)
    expected = {"rollout/reward_mean", "rollout/response_length", "kl/ref", "kl/ref_exact"}
    expected |= {"kl/beta", "loss/policy", "loss/value", "value/explained_variance", "optim/lr"}
    expected |= {"eval/reward_mean", "time/tokens_per_s", "reward/share_of_a"}
    assert expected <= set(last)
    assert last["optim/lr"] < 1e-2 and result.history[1]["optim/lr"] == pytest.approx(1e-2 / 4)
    assert last["rollout/stop_id"] + last["rollout/length"] == pytest.approx(1.0)
    assert last["rollout/reward_mean"] == pytest.approx(last["reward/share_of_a"])
    assert (tmp_path / "metrics.jsonl").is_file()
    samples = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    one = samples[-1]
    assert one["score"] == pytest.approx(sum(one["token_rewards"]))
    assert len(one["tokens"]) == len(one["token_values"]) == len(one["token_logprobs"])
    assert one["prompt"] in ("b", "c", "d", "b c")


def test_the_means_are_those_of_the_episodes_that_ended(make_agent: Any) -> None:
    """Also where an episode began in an earlier rollout."""
    agent = make_agent("ppo")
    step, ended = agent.training.envs.step_wait, []

    def watched() -> Any:
        found = step()
        ended.extend(info["episode"] for info, done in zip(found[3], found[2], strict=True) if done)
        return found

    agent.training.envs.step_wait = watched
    result = agent.learn(TOKENS, quiet=True, max_updates=1)
    count = len(ended)
    assert result.history[-1]["rollout/response_length"] == np.mean([e["l"] for e in ended])
    callbacks = agent.training.callbacks
    agent.algorithm.learn(56, callbacks, log_interval=None, reset_num_timesteps=False)
    recorded = agent.training.metrics.model.logger.name_to_value
    assert recorded["rollout/response_length"] == np.mean([e["l"] for e in ended[count:]])
    assert recorded["rollout/reward_mean"] == pytest.approx(
        np.mean([e["r"] for e in ended[count:]])
    )


def test_tokens_that_no_number_of_minibatches_divides(make_agent: Any) -> None:
    config = SB3PPOConfig(n_steps=7, minibatches=3, eval_every=0)
    result = make_agent("ppo", config=config).learn(56, quiet=True)  # a warning would be an error
    assert result.total_tokens == 56


def test_runs_of_other_seeds_share_no_episodes(make_agent: Any) -> None:
    streams = []
    for seed in (0, 1):
        agent = make_agent("ppo", config=SB3PPOConfig(seed=seed, eval_every=0))
        agent.learn(56, quiet=True)
        streams.append(set(agent.training.envs.envs.mdp.seed.tolist()))
    assert len(streams[0]) == 8 and not streams[0] & streams[1]


def test_learning_moves_the_reward(make_agent: Any) -> None:
    config = SB3PPOConfig(n_steps=16, lr=1e-2, ent_coef=0.01, eval_every=0)
    result = make_agent("ppo", config=config).learn(6_000, quiet=True)
    means = [line["rollout/reward_mean"] for line in result.history if "loss/policy" in line]
    assert np.mean(means[-3:]) > np.mean(means[:3]) + 0.3


def test_masks_of_the_environment_hold_in_training_and_after(make_agent: Any) -> None:
    agent = make_agent("maskable-ppo", prompts=[{"prompt": "b", "references": ["a a", "a c"]}])
    envs = agent.training.envs.envs
    agent.learn(300, quiet=True)
    allowed = np.flatnonzero(envs.allowed)
    assert len(allowed) == 3  # a, c and the stop id
    found = collect(agent.policy, AllowedTokens(agent.training.eval_envs, allowed), 32, seed=0)
    written = np.concatenate(
        [
            found.sequence(b)[found.column[found.offsets[b] : found.offsets[b + 1]]]
            for b in range(32)
        ]
    )
    assert set(written) <= set(allowed)
    store = agent.algorithm.rollout_buffer.store
    assert {int(i) for ids in store.finished.values() for i in ids[1:]} <= set(allowed)


# peft asks transformers a deprecated question.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_a_lora_run_resumes_bit_for_bit(make_agent: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    whole = make_agent("ppo", tmp_path / "whole", lora=2)
    whole.learn(TOKENS, quiet=True)
    for updates in (3, None):
        pieces = make_agent("ppo", tmp_path / "pieces", lora=2)
        pieces.learn(TOKENS, quiet=True, resume=True, max_updates=updates)
    assert torch.equal(parameters(whole), parameters(pieces))
    assert lines(tmp_path / "whole") == lines(tmp_path / "pieces")


def test_ctrl_c_finishes_the_update_and_saves(make_agent: Any, tmp_path: Path) -> None:
    whole = make_agent("ppo", tmp_path / "whole")
    whole.learn(TOKENS, quiet=True)
    agent = make_agent("ppo", tmp_path / "pieces")
    train, calls = agent.algorithm.train, []

    def interrupted() -> None:
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        train()

    agent.algorithm.train = interrupted
    result = agent.learn(TOKENS, quiet=True)
    assert result.interrupted and result.updates == 5
    with pytest.raises(CheckpointError, match="already holds a run"):
        make_agent("ppo", tmp_path / "pieces").learn(TOKENS, quiet=True)
    agent = make_agent("ppo", tmp_path / "pieces")
    agent.learn(TOKENS, quiet=True, resume=True)
    assert torch.equal(parameters(whole), parameters(agent))


def test_nothing_that_is_not_finite_is_saved(make_agent: Any, tmp_path: Path) -> None:
    agent = make_agent("ppo", tmp_path)
    train = agent.algorithm.train

    def broken() -> None:
        train()
        if agent.algorithm.num_timesteps > 150:
            next(iter(agent.policy.parameters())).data[0, 0] = float("nan")

    agent.algorithm.train = broken
    with pytest.raises(NonFiniteError, match="Too high a learning rate"):
        agent.learn(TOKENS, quiet=True)
    again = make_agent("ppo", tmp_path)
    again.learn(TOKENS, quiet=True, resume=True)
    assert torch.isfinite(parameters(again)).all()


def test_a_reward_that_fails_stops_the_run(make_agent: Any, tmp_path: Path) -> None:
    def fails(text: str) -> float:
        raise ZeroDivisionError("my bug")

    with pytest.raises(UnscoredError, match="my bug"):
        make_agent("ppo", reward=fails).learn(TOKENS, quiet=True)


@pytest.mark.parametrize("name", list(AGENTS))
def test_the_algorithm_is_saved_and_loaded_as_any_of_sb3(
    make_agent: Any, tmp_path: Path, name: str
) -> None:
    agent = make_agent(name)
    agent.learn(120, quiet=True)
    agent.algorithm.save(tmp_path / "saved.zip")
    weights = sum(p.numel() for p in agent.policy.parameters()) * 4
    assert (tmp_path / "saved.zip").stat().st_size < 3 * weights + 100_000  # Adam keeps two more
    loaded = type(agent.algorithm).load(tmp_path / "saved.zip", device="cpu")
    for a, b in zip(agent.policy.parameters(), loaded.policy.lm.parameters(), strict=True):
        assert torch.equal(a, b)
    loaded.set_env(agent.training.envs)
    loaded.learn(56, reset_num_timesteps=False)


def test_parts_that_do_not_fit_are_refused(make_envs: Any, make_policy: Any) -> None:
    with pytest.raises(ValueError, match="autoreset_mode='SameStep'"):
        SB3PPO(make_policy(), make_envs())
    envs = TextGenVectorEnv(make_envs().task, 8, autoreset_mode="SameStep")
    with pytest.raises(ValueError, match="value_head=True"):
        SB3PPO(make_policy(value_head=False), envs)
    with pytest.raises(ValueError, match="n_steps must be at least 1, got 0"):
        SB3PPOConfig(n_steps=0)
    with pytest.raises(ValueError, match="horizon 1 is too short"):
        SB3PPO(make_policy(), envs, SB3PPOConfig(kl_coef=0.1, kl_target=1.0, kl_horizon=1))
    with pytest.raises(ValueError, match="gae_lambda"):
        SB3TRPOConfig(gae_lambda=1.5)
    for name in ("warmup_updates", "lr_final", "vf_coef", "samples", "exact_kl_episodes"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0"):
            SB3A2CConfig(**{name: -1})
    with pytest.raises(ValueError, match="lr must be above 0"):
        SB3A2CConfig(lr=0.0)


@pytest.mark.parametrize("rows", [4, 16])
def test_a_run_keeps_its_rows(make_agent: Any, tmp_path: Path, rows: int) -> None:
    make_agent("ppo", tmp_path).learn(120, quiet=True, max_updates=1)
    other = make_agent("ppo", tmp_path, num_envs=rows)
    with pytest.raises(OtherRunError, match=f"8 rows and this environment {rows}"):
        other.learn(TOKENS, quiet=True, resume=True)


def test_a_run_keeps_its_budget(make_agent: Any, tmp_path: Path) -> None:
    agent = make_agent("ppo", tmp_path)
    agent.learn(120, quiet=True, max_updates=1)
    assert agent.training.envs.envs.mdp.steps.max() > 1
    other = make_agent("ppo", tmp_path, max_new_tokens=1)
    with pytest.raises(OtherRunError, match="the stops and the budget that it had"):
        other.learn(TOKENS, quiet=True, resume=True)


@pytest.mark.parametrize("name", list(AGENTS))
def test_rollouts_too_small_to_learn_from_are_refused(make_agent: Any, name: str) -> None:
    config = dataclasses.replace(AGENTS[name][1], n_steps=1)
    with pytest.raises(ValueError, match="1 rows and 1 steps is too small"):
        make_agent(name, config=config, num_envs=1)


@pytest.mark.parametrize("name", ["ppo", "maskable-ppo"])
def test_small_minibatches_stay_finite(make_agent: Any, name: str) -> None:
    """A minibatch of one token has no standard deviation."""
    config = dataclasses.replace(AGENTS[name][1], n_steps=3, minibatches=1, checkpoint_every=100)
    agent = make_agent(name, config=config, num_envs=1)
    agent.learn(60, quiet=True)
    assert torch.isfinite(parameters(agent)).all()


def test_masks_that_an_algorithm_would_not_heed_are_refused(
    make_envs: Any, make_policy: Any
) -> None:
    envs: Any = TextGenVectorEnv(make_envs().task, 8, autoreset_mode="SameStep")
    for agent in (SB3PPO, SB3A2C, SB3TRPO):
        with pytest.raises(ValueError, match="sb3-maskable-ppo"):
            agent(make_policy(), AllowedTokens(envs, [0, 1]))


# peft asks transformers a deprecated question.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_an_algorithm_with_adapters_is_saved_and_loaded(make_agent: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    agent = make_agent("ppo", lora=2)
    agent.learn(120, quiet=True)
    agent.algorithm.save(tmp_path / "saved.zip")
    loaded = type(agent.algorithm).load(tmp_path / "saved.zip", device="cpu")
    obs = agent.training.envs.reset()
    actions = [a.predict(obs, deterministic=True)[0] for a in (agent.algorithm, loaded)]
    np.testing.assert_array_equal(*actions)


@pytest.mark.parametrize("n_steps", [1, 3, 6, 8])
def test_kl_is_per_response_whatever_a_rollout_cuts(make_agent: Any, n_steps: int) -> None:
    """Responses of 4 tokens of a policy that stands still; rollouts that fit them or do not."""
    config = SB3PPOConfig(
        n_steps=n_steps, minibatches=1, lr=1e-12, eval_every=0, kl_coef=0.1, exact_kl_episodes=99
    )
    kwargs: dict[str, Any] = {"stop": (), "num_envs": 32}
    agent = make_agent("ppo", config=config, **kwargs)
    with torch.no_grad():
        agent.policy.model.get_input_embeddings().weight.mul_(3.0)
    history = agent.learn(32 * 24, quiet=True).history
    told = [line for line in history if "kl/ref" in line]
    assert len(told) == len([line for line in history if "rollout/response_length" in line])
    assert {line["rollout/response_length"] for line in told} == {4.0}
    episodes = collect(agent.policy, agent.training.eval_envs, 256, seed=0)
    expected = exact_kl(agent.policy, agent.training.reference, episodes, 256, None)
    means = [np.mean([line[name] for line in told]) for name in ("kl/ref", "kl/ref_exact")]
    assert means[0] == pytest.approx(expected, rel=0.35)
    assert means[1] == pytest.approx(expected, rel=0.15)


def test_a_second_try_from_the_start_is_the_same_run(make_agent: Any, tmp_path: Path) -> None:
    whole = make_agent("ppo")
    whole.learn(TOKENS, quiet=True)
    agent = make_agent("ppo", tmp_path)
    train = agent.algorithm.train
    agent.algorithm.train = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        agent.learn(TOKENS, quiet=True)
    agent.algorithm.train = train
    agent.learn(TOKENS, quiet=True, resume=True)
    assert torch.equal(parameters(whole), parameters(agent))


def test_a_dense_reward_that_fails_early_shows_its_traceback(make_agent: Any) -> None:
    from textgym.rewards import dense

    def fails(text: str) -> float:
        raise ZeroDivisionError("my early bug")

    agent = make_agent("ppo", reward=dense(fails, gamma=1.0))
    with (
        pytest.warns(UserWarning, match="whole text again"),
        pytest.raises(UnscoredError, match="my early bug"),
    ):
        agent.learn(TOKENS, quiet=True)


def test_the_same_seed_gives_the_same_run_and_leaves_the_process_alone(make_agent: Any) -> None:
    state = torch.get_rng_state()
    first, second = make_agent("ppo"), make_agent("ppo")
    torch.rand(3)
    numbers = np.random.get_state()[1].copy()
    first.learn(200, quiet=True)
    torch.rand(5)
    second.learn(200, quiet=True)
    assert torch.equal(parameters(first), parameters(second))
    assert np.array_equal(numbers, np.random.get_state()[1])
    torch.set_rng_state(state)


@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_advantages_of_nearly_equal_scores_stay_small(make_agent: Any, name: str) -> None:
    """Scores differ by 4e-4 of their range at most: a learner has nothing to make much of."""
    spreads = {}
    for floor in (0.05, 0.0):
        config = dataclasses.replace(
            AGENTS[name][1], kl_coef=0.0, kl_target=None, whiten_floor=floor
        )
        agent = make_agent(name, config=config, reward=lambda text: 1e-4 * text.count("a"))
        agent.learn(1, quiet=True)
        assert agent.algorithm.normalize_advantage is False  # SB3's own, which has no floor
        spreads[floor] = agent.algorithm.rollout_buffer.advantages.std()
    assert 0 < spreads[0.05] < 0.01
    assert spreads[0.0] == pytest.approx(1.0, abs=1e-3)
