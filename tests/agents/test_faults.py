"""Training bears a scorer that fails: what is unscored is left out, and no one gains by a crash.

Run it with `pytest -s -m slow tests/agents/test_faults.py` to see rewards and faults of five seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from textgym.agents import PPO, REINFORCE, PPOConfig, REINFORCEConfig
from textgym.checks import FaultyReward
from textgym.envs.bandit import right_arm
from textgym.envs.chain import RightPrefix
from textgym.learning import UnscoredError
from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.rewards import Reward, TextBatch, as_reward
from textgym.rewards.verifiers.base import as_item
from textgym.rollout import collect
from textgym.runs import Result
from textgym.sandbox.pool import WorkerPool
from textgym.task import Task
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

ARMS, TARGET, CRASH = 8, 5, 2
FAULTS = {
    "hang": 0.0005,
    "spin": 0.001,
    "kill": 0.01,
    "raise_": 0.05,
    "nan": 0.05,
    "wrong_type": 0.02,
    "wrong_length": 0.01,
}
FAULT_SEED = 2  # meets every kind within 3,000 texts
AGENTS = ["PPO", "REINFORCE"]


def bandit(reward: Any, arms: int = ARMS, num_envs: int = 64, length: int = 1) -> TextGenVectorEnv:
    task = Task(
        prompts=[{"prompt": "s0"}],
        tokenizer=symbol_tokenizer([f"s{i}" for i in range(arms)], bos=None, eos=None),
        reward=reward,
        max_new_tokens=length,
        stop=(),
    )
    return TextGenVectorEnv(task, num_envs, autoreset_mode="Disabled")


def pays_target(arms: int = ARMS) -> Reward:
    return as_reward(partial(right_arm, target=TARGET * arms // ARMS))


def make_policy(vocab_size: int, seed: int) -> CausalLMPolicy:
    model = random_causal_lm(
        vocab_size,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        max_positions=16,
        initializer_range=0.06,
        seed=seed,
    )
    return CausalLMPolicy(model, device="cpu", seed=seed)


def learn(
    agent: str, policy: CausalLMPolicy, envs: TextGenVectorEnv, tokens: int, lr: float = 3e-3
) -> Result:
    # As in test_diagnostics: small steps that end at 0, or a batch in which nearly every answer is
    # right is whitened into noise.
    common: dict[str, Any] = {"episodes": envs.num_envs, "lr_final": 0.0, "eval_every": 0}
    common |= {"seed": policy.seed, "lr": lr}
    if agent == "REINFORCE":
        config = REINFORCEConfig(whiten=True, ent_coef=0.05, **common)
        return REINFORCE(policy, envs, config).learn(tokens, quiet=True)
    common |= {"target_kl": 0.02, "max_grad_norm": 0.3, "vf_clip_coef": None, "ent_coef": 0.05}
    return PPO(policy, envs, PPOConfig(epochs=2, **common)).learn(tokens, quiet=True)


def unscored_shares(result: Result) -> dict[str, float]:
    """Mean over the updates of every share of episodes without a score, by reason."""
    names = {name for line in result.history for name in line if name.startswith("unscored/")}
    return {n: float(np.mean([line.get(n, 0.0) for line in result.history])) for n in sorted(names)}


def score(policy: CausalLMPolicy, envs: TextGenVectorEnv) -> float:
    return float(collect(policy, envs, 1024, seed=1_000_003).scores.mean())


def test_unscored_episodes_have_no_reward_and_no_weight() -> None:
    faulty = FaultyReward(as_reward(lambda text: 1.0), raise_=0.3, nan=0.1, kill=0.05, timeout=5.0)
    episodes = collect(make_policy(ARMS, 0), bandit(faulty), 128)
    unscored = np.array([status is not None for status in episodes.status])
    assert 0.1 < unscored.mean() < 0.4  # 0.45 squared
    assert (episodes.weight == ~unscored).all()
    assert (episodes.scores == ~unscored).all()  # 1 where it is scored, and 0 that counts nowhere
    reasons = Counter(status for status in episodes.status if status is not None)
    assert reasons["error: InjectedFault: raised"] > reasons["nan"] > 0
    assert reasons["error: InjectedFault: the worker's verdict is 'killed'"] > 0
    assert {"raise", "nan", "kill"} == set(faulty.met)
    assert faulty.met.total() > unscored.sum()  # those whose second try was good are counted too


@pytest.mark.parametrize("agent", AGENTS)
def test_a_run_with_faults_ends_like_one_without(agent: str) -> None:
    final = {}
    for name in ("without", "with"):
        reward = pays_target()
        faulty = FaultyReward(reward, seed=FAULT_SEED, timeout=0.6, **FAULTS)
        policy = make_policy(ARMS, seed=0)
        result = learn(agent, policy, bandit(faulty if name == "with" else reward), 64 * 50)
        final[name] = score(policy, bandit(reward))
        shares, total = unscored_shares(result), [u["rollout/unscored"] for u in result.history]
        if name == "with":
            assert set(faulty.met) == {*faulty.chances, "wrong length"}
            assert shares["unscored/InjectedFault"] > 0 and shares["unscored/nan"] > 0
            assert sum(shares.values()) == pytest.approx(np.mean(total))
        else:
            assert not shares and max(total) == 0 and not faulty.met
    assert final["without"] > 0.9
    assert final["with"] == pytest.approx(final["without"], abs=0.05)


def test_training_stops_where_too_much_fails() -> None:
    faulty = FaultyReward(pays_target(), raise_=0.8)
    with pytest.raises(UnscoredError, match="InjectedFault: raised"):
        learn("REINFORCE", make_policy(ARMS, 0), bandit(faulty), 64 * 5)


@pytest.mark.slow
@pytest.mark.parametrize("agent", AGENTS)
def test_five_seeds_with_faults_end_like_five_without(agent: str) -> None:
    # Chain-v0 with three tokens: of 64 responses one earns 1, the others nothing.
    reward = RightPrefix((1, 1, 3), whole=True)
    final: dict[str, list[float]] = {"without": [], "with": []}
    met: Counter[str] = Counter()
    shares: list[dict[str, float]] = []
    for seed in range(5):
        for name, scores in final.items():
            faulty = FaultyReward(reward, seed=seed, timeout=0.6, **FAULTS)
            policy = make_policy(4, seed)
            envs = bandit(faulty if name == "with" else reward, 4, num_envs=256, length=3)
            result = learn(agent, policy, envs, 40_000, lr=1e-3 if agent == "PPO" else 3e-3)
            scores.append(score(policy, bandit(reward, 4, length=3)))
            if name == "with":
                met += faulty.met
                shares.append(unscored_shares(result))
    unscored = np.mean([sum(share.values()) for share in shares])
    for name, scores in final.items():
        print(f"\n{agent} {name} faults: {np.mean(scores):.4f} +- {np.std(scores, ddof=1):.4f}")
    print(f"faults of five runs: {dict(met)}; unscored {unscored:.2%}")
    noise = np.hypot(*(np.std(scores, ddof=1) for scores in final.values())) / np.sqrt(5)
    assert min(final["without"]) > 0.9 and min(final["with"]) > 0.9
    assert abs(np.mean(final["with"]) - np.mean(final["without"])) <= 3 * noise + 0.01
    assert 0.01 < unscored < 0.05 and len(met) == len(FAULTS)


SCORER = """
import os, signal

def score(arm, crash):
    if arm == {crash}:
        os.kill(os.getpid(), getattr(signal, crash))
    return {pays}
"""


class InWorker(Reward):
    """An arm's payment, computed in a worker, which one arm crashes."""

    low, high = -1.0, 0.0

    def __init__(self, pool: WorkerPool, crash: str) -> None:
        self.name, self.pool, self.crash = "in_worker", pool, crash

    def score(self, batch: TextBatch) -> list[Any]:
        asked = [(ids[0], self.crash) for ids in batch.token_ids]
        return [as_item(verdict) for verdict in self.pool.map(asked)]


@pytest.fixture
def pool(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    """Of a scorer by which one arm earns 0 and the others -1: a 0 for a crash would be a gain."""
    pays = f"0.0 if arm == {TARGET} else -1.0"
    (tmp_path / "crashing_scorer.py").write_text(SCORER.format(crash=CRASH, pays=pays))
    monkeypatch.syspath_prepend(tmp_path)
    with WorkerPool("crashing_scorer:score", workers=1) as pool:
        yield pool


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("crash", ["SIGSEGV", "SIGKILL"])
def test_a_policy_gains_nothing_by_crashing_its_scorer(
    agent: str, crash: str, pool: WorkerPool
) -> None:
    envs = bandit(InWorker(pool, crash), arms=16)
    policy = make_policy(16, seed=1)

    def share(arm: int) -> float:
        found = collect(policy, bandit(lambda text: 0.0, arms=16), 1024, seed=7)
        return float(np.mean([text == f"s{arm}" for text in found.texts]))

    first = collect(policy, envs, 256)
    crashed = np.array([text == f"s{CRASH}" for text in first.texts])
    assert crashed.any()
    assert (first.scores[crashed] == -1.0).all() and first.weight.all()  # the text's fault
    before = share(CRASH)
    learn(agent, policy, envs, 64 * 60)
    print(
        f"{agent} {crash}: crash {before:.3f} to {share(CRASH):.3f}, best arm {share(TARGET):.3f}"
    )
    assert share(CRASH) < before < share(TARGET)
