"""Two processes take the same steps as one: same episodes, same global batch, same weights.

This file is also what the two processes run: `python test_parallel.py <rank> <folder>`. They talk
through gloo on this machine and find each other through a file.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from textgym import parallel
from textgym.agents import (
    GRPO,
    PPO,
    REINFORCE,
    SB3PPO,
    SFT,
    ExpertIteration,
    ExpertIterationConfig,
    GRPOConfig,
    PPOConfig,
    REINFORCEConfig,
    SFTConfig,
)
from textgym.cli import main
from textgym.learning import GuardedOptimizer
from textgym.logging import read_metrics
from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.rewards import as_reward
from textgym.rollout import collect
from textgym.shaping import OldLogprob
from textgym.task import Task
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

SYMBOLS = ("a", "b", "c", "d")
UPDATES = 5
TIMEOUT = 300  # seconds; far more than the two take, and what a hang costs
COMMON: dict[str, Any] = {"lr": 1e-2, "eval_every": 2, "eval_episodes": 5, "checkpoint_every": 2}
AGENTS: dict[str, tuple[Any, Any]] = {
    # 9 episodes, 4 or 5 of them a minibatch: all shares are uneven.
    "ppo": (
        PPO,
        PPOConfig(
            episodes=9,
            minibatches=2,
            epochs=2,
            microbatch=2,
            kl_coef=0.1,
            kl_target=0.5,
            kl_horizon=100,
            scale_episodes=7,
            ent_coef=0.01,
            target_kl=0.01,
            **COMMON,
        ),
    ),
    # Weights decay, but for those that have no gradient: the value head's.
    "grpo": (
        GRPO,
        GRPOConfig(
            episodes=12,
            group_size=2,
            epochs=2,
            minibatches=2,
            kl_coef=0.1,
            weight_decay=0.1,
            resample=1,
            path="sequence",
            **COMMON,
        ),
    ),
    "one-group": (GRPO, GRPOConfig.variant("gspo", episodes=3, group_size=3, **COMMON)),
    "reinforce": (
        REINFORCE,
        REINFORCEConfig(
            episodes=10, baseline="learned", whiten=True, microbatch=3, kl_coef=0.1, **COMMON
        ),
    ),
    # The second process samples nothing and learns from nothing.
    "one-episode": (REINFORCE, REINFORCEConfig(episodes=1, ent_coef=0.01, **COMMON)),
    "expert-iteration": (
        ExpertIteration,
        ExpertIterationConfig(episodes=12, group_size=4, **COMMON),
    ),
    "sft": (SFT, SFTConfig(batch_size=5, microbatch=2, patience=3, **COMMON)),
}


def share_of_a(text: str) -> float:
    if text.split().count("d") == 3:
        raise ConnectionError("this one is never scored")
    return text.split().count("a") / 4


def make_envs(reward: Any = share_of_a, mode: str = "Disabled") -> TextGenVectorEnv:
    prompts = [{"prompt": p, "references": [f"{p} a", "a a"]} for p in ("b", "c", "d", "b c")]
    task = Task(
        prompts=prompts, tokenizer=symbol_tokenizer(SYMBOLS), reward=reward, max_new_tokens=4
    )
    return TextGenVectorEnv(task, 4, autoreset_mode=mode)


def make_policy(seed: int = 0) -> CausalLMPolicy:
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 16}
    model = random_causal_lm(len(SYMBOLS) + 2, seed=seed, **sizes)  # type: ignore[arg-type]
    return CausalLMPolicy(model, device="cpu", seed=0)


def weights(policy: CausalLMPolicy) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in policy.parameters()])


def trained(name: str, folder: Path | None, updates: int = UPDATES) -> dict[str, Any]:
    kind, config = AGENTS[name]
    policy = make_policy()
    agent = kind(policy, make_envs(), config, eval_envs=make_envs(), folder=folder)
    result = agent.learn(10**6, quiet=True, resume=True, max_updates=updates)
    return {"weights": weights(policy), "history": result.history, "tokens": result.total_tokens}


# ------------------------------------------------------------------------- what two processes do


def interrupted(folder: Path) -> dict[str, Any]:
    """Process 1 gets a signal in the third update, and the run is resumed."""
    updates = []
    for _ in range(2):
        kind, config = AGENTS["ppo"]
        policy = make_policy()
        agent = kind(policy, make_envs(), config, eval_envs=make_envs(), folder=folder)
        shape, calls = agent._shape, []

        def signalled(episodes: Any, shape: Any = shape, calls: list[int] = calls) -> Any:
            calls.append(1)
            if parallel.world().rank == 1 and len(calls) == 3 and not updates:
                os.kill(os.getpid(), signal.SIGINT)
            return shape(episodes)

        agent._shape = signalled
        left = UPDATES - sum(updates)
        result = agent.learn(10**6, quiet=True, resume=True, max_updates=left)
        updates.append(result.updates - sum(updates))
        assert result.interrupted == (len(updates) == 1)
    return {"weights": weights(policy), "updates": updates}


def failure(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing failed"


def failing_in_one(rank: int) -> float:
    def fails(text: str) -> float:
        if parallel.world().rank == rank:
            raise ConnectionError("the judge is down")
        return 0.0

    return collect(make_policy(), make_envs(as_reward(fails, strict=True)), 8).scores.sum()


def learn(rank: int) -> Any:
    """Every process begins with weights of its own."""
    return REINFORCE(make_policy(seed=rank), make_envs()).learn(100, quiet=True)


def command(folder: Path) -> str:
    """What `textgym train` prints."""
    options = ["--env", "textgym/StopEarly-v0", "--device", "cpu", "--report-prompts", "16"]
    options += ["--episodes", "16", "--total-tokens", "300", "--folder", str(folder)]
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        assert main(["train", *options]) == 0
    return printed.getvalue()


def skipped_step(rank: int) -> tuple[torch.Tensor, int]:
    """The gradient is not finite in process 1."""
    policy = make_policy()
    optimizer = GuardedOptimizer(policy, lr=0.1, max_grad_norm=1.0)
    loss = weights_loss(policy) * (torch.nan if rank else 1.0)
    loss.backward()
    optimizer.step(loss.detach())
    return weights(policy), optimizer.skipped


def first_forwards(rank: int) -> torch.Tensor:
    """Log-probabilities of which each process has computed half."""
    policy = make_policy()
    policy.compute_dtype = torch.bfloat16
    episodes = collect(make_policy(), make_envs(), 4, seed=3)
    old = OldLogprob(policy, episodes, None, steps=1)
    mine = torch.arange(rank, episodes.num_tokens, 2)
    assert torch.equal(old.of(mine, -mine.float()), -mine.float())
    old.settle()
    return old.of(torch.arange(episodes.num_tokens), torch.zeros(episodes.num_tokens))


def weights_loss(policy: CausalLMPolicy) -> torch.Tensor:
    return torch.stack([p.square().sum() for p in policy.parameters()]).sum()


def child(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    here = parallel.start(init_method=f"file://{folder}/meet", timeout_minutes=4)
    assert here == parallel.World(rank, 2)
    done: dict[str, Any] = {name: trained(name, folder / name) for name in AGENTS}
    done["episodes"] = collect(make_policy(), make_envs(), 9, group_size=3, seed=3)
    done["interrupted"] = interrupted(folder / "interrupted")
    done["failures"] = [
        failure(lambda: failing_in_one(0)),
        failure(lambda: failing_in_one(1)),
        failure(lambda: learn(rank)),
        failure(lambda: SB3PPO(make_policy(), make_envs(mode="SameStep"))),
    ]
    done["skipped"] = skipped_step(rank)
    done["first forwards"] = first_forwards(rank)
    done["command"] = command(folder / "command")  # which parts from the other at its end
    assert parallel.world().size == 1
    parallel.start(init_method=f"file://{folder}/meet-again", timeout_minutes=4)
    torch.save(done, folder / f"{rank}.pt")
    if rank == 1:
        os._exit(7)  # as if killed, while the other waits for it
    parallel.gather("are you there?")


if __name__ == "__main__":
    child(int(sys.argv[1]), Path(sys.argv[2]))


# ------------------------------------------------------------------------- how that compares


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[list[Any]]:
    """What the two processes found, by rank."""
    command = [sys.executable, "-W", "error", __file__]
    running = [
        subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert running[1].returncode == 7, said[1]
    assert running[0].returncode == 1 and "is gone, or has not" in said[0], said[
        0
    ]  # it did not wait for ever
    yield [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """A line of metrics without what depends on the clock."""
    clocks = ("time/tokens_per_s", "time/rollout_s", "time/train_s")
    return {k: np.nan if v is None else v for k, v in line.items() if k not in clocks}


@pytest.mark.parametrize("name", list(AGENTS))
def test_two_processes_take_the_steps_of_one(two: list[Any], folder: Path, name: str) -> None:
    alone, (first, second) = trained(name, None), (rank[name] for rank in two)
    start = weights(make_policy())
    assert float((alone["weights"] - start).abs().max()) > 1e-2
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=0, atol=1e-5)
    assert torch.equal(first["weights"], second["weights"])
    assert first["tokens"] == second["tokens"] == alone["tokens"]
    assert len(first["history"]) == len(alone["history"]) > UPDATES
    for ours, theirs, wanted in zip(
        first["history"], second["history"], alone["history"], strict=True
    ):
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-12, nan_ok=True)
        assert numbers(ours) == pytest.approx(numbers(wanted), rel=1e-3, abs=1e-5, nan_ok=True)
    written = read_metrics(folder / name)
    assert [numbers(line) | {"step": 0} for line in written] == [
        pytest.approx(numbers(line) | {"step": 0}, nan_ok=True) for line in first["history"]
    ]
    assert [line["step"] for line in written] == list(range(UPDATES + 1))


def test_one_process_goes_on_with_the_run_of_two(
    two: list[Any], folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "grpo", tmp_path / "grpo")
    resumed, alone = trained("grpo", tmp_path / "grpo", 2), trained("grpo", None, UPDATES + 2)
    torch.testing.assert_close(resumed["weights"], alone["weights"], rtol=0, atol=1e-5)
    assert resumed["tokens"] == alone["tokens"]


def test_the_runs_met_what_is_rare(two: list[Any]) -> None:
    """Episodes without a score, flat groups that were sampled again, a KL that ended an update."""

    def met(name: str, metric: str) -> list[float]:
        return [line[metric] for line in two[0][name]["history"] if metric in line]

    assert max(met("reinforce", "rollout/unscored")) > 0
    assert max(met("grpo", "grpo/resampled")) > 0
    assert 0 < min(met("ppo", "optim/steps")) < max(met("ppo", "optim/steps"))


def test_episodes_are_those_of_one_process_in_its_order(two: list[Any]) -> None:
    alone = collect(make_policy(), make_envs(), 9, group_size=3, seed=3)
    for rank in range(2):
        found = two[rank]["episodes"]
        for name in ("ids", "starts", "column", "offsets", "reward", "group", "sample_index"):
            np.testing.assert_array_equal(getattr(found, name), getattr(alone, name), name)
        np.testing.assert_allclose(found.logprob, alone.logprob, atol=1e-5)
        assert (found.texts, found.status) == (alone.texts, alone.status)


def test_a_signal_to_one_process_ends_all_after_the_same_update(two: list[Any]) -> None:
    assert [rank["interrupted"]["updates"] for rank in two] == [[3, UPDATES - 3]] * 2
    for rank in two:
        assert torch.equal(rank["interrupted"]["weights"], two[0]["ppo"]["weights"])


def test_a_failure_of_one_process_is_that_of_all(two: list[Any]) -> None:
    for rank in range(2):
        failures = two[rank]["failures"]
        for failed in range(2):
            said = "the judge is down" in failures[failed]
            other = failures[failed].startswith(f"ProcessError: process {failed} of 2 failed: ")
            assert said and other == (failed != rank), failures[failed]
        assert "the processes start from different weights" in failures[2]
        assert "stable-baselines3 trains in one process" in failures[3]


def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_in_all(two: list[Any]) -> None:
    for rank in range(2):
        found, skipped = two[rank]["skipped"]
        assert torch.equal(found, weights(make_policy())) and skipped == 1


def test_each_process_learns_what_the_first_forwards_of_the_other_said(two: list[Any]) -> None:
    for found in two:
        old = found["first forwards"]
        assert len(old) > 8 and torch.equal(old, -torch.arange(len(old)).float())


def test_the_command_is_one_run_that_the_first_process_reports(
    two: list[Any], folder: Path, tmp_path: Path
) -> None:
    assert two[1]["command"] == ""
    assert "2 processes" in two[0]["command"] and "learning curve" in two[0]["command"]
    command(tmp_path / "alone")
    folders = (folder / "command", tmp_path / "alone")
    ours, wanted = ([numbers(line) for line in read_metrics(where)] for where in folders)
    assert ours == [pytest.approx(line, rel=1e-3, abs=1e-5, nan_ok=True) for line in wanted]
    reports = [json.loads((where / "report.json").read_text()) for where in folders]
    assert reports[0]["completions"] == reports[1]["completions"]


def test_alone_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert parallel.start() == parallel.World(0, 1)
    assert parallel.gather("x") == ["x"] and parallel.total(3.0) == 3.0
    assert parallel.share(5) == slice(0, 5)
    assert parallel.deal([1, 3, 2]).tolist() == [0, 1, 2]
    parallel.stop()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_a_partition(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [5, 1, 4, 4, 9]
    stretches, hands = [], []
    for rank in range(size):
        monkeypatch.setattr(parallel, "world", lambda rank=rank: parallel.World(rank, size))
        stretches.append(list(range(5))[parallel.share(5)])
        hands.append(parallel.deal(lengths).tolist())
    assert [i for stretch in stretches for i in stretch] == list(range(5))
    assert sorted(i for hand in hands for i in hand) == list(range(5))
    for shares in (stretches, hands):
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
