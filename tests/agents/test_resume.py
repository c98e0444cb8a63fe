"""Runs that end before their time: killed, interrupted, resumed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from textgym.agents import (
    GRPO,
    PPO,
    REINFORCE,
    SFT,
    ExpertIteration,
    ExpertIterationConfig,
    GRPOConfig,
    PPOConfig,
    REINFORCEConfig,
    SFTConfig,
)
from textgym.checkpoint import CheckpointError
from textgym.logging import read_metrics
from textgym.rewards import Cider
from textgym.runs import Run

TOKENS = 400
AGENTS = {
    "ppo": (
        PPO,
        PPOConfig(
            episodes=8,
            minibatches=2,
            epochs=2,
            kl_coef=0.1,
            kl_target=0.5,
            kl_horizon=100,
            scale_episodes=8,
            lr=1e-2,
            lr_final=0.0,
            warmup_updates=3,
            ent_coef=0.01,
            target_kl=0.05,
            eval_every=3,
            checkpoint_every=2,
        ),
    ),
    "reinforce": (
        REINFORCE,
        REINFORCEConfig(episodes=8, lr=1e-2, eval_every=3, checkpoint_every=2, warmup_updates=4),
    ),
    "grpo": (
        GRPO,
        GRPOConfig(
            episodes=8,
            group_size=4,
            epochs=2,
            minibatches=2,
            kl_coef=0.1,
            kl_target=0.5,
            kl_horizon=100,
            lr=1e-2,
            eval_every=3,
            checkpoint_every=2,
        ),
    ),
    "grpo-resample": (
        GRPO,
        GRPOConfig(episodes=4, group_size=2, resample=2, lr=1e-2, eval_every=3, checkpoint_every=2),
    ),
    "expert-iteration": (
        ExpertIteration,
        ExpertIterationConfig(
            episodes=8,
            group_size=4,
            epochs=2,
            minibatches=2,
            kl_coef=0.1,
            kl_target=0.5,
            kl_horizon=100,
            lr=1e-2,
            eval_every=3,
            checkpoint_every=2,
        ),
    ),
    "sft": (SFT, SFTConfig(batch_size=4, lr=1e-2, eval_every=3, checkpoint_every=2)),
}


def agent(name: str, make_envs: Any, make_policy: Any, folder: Path, **kwargs: Any) -> Any:
    kind, config = AGENTS[name]
    policy = make_policy(**kwargs)
    return kind(policy, make_envs(), config, eval_envs=make_envs(), folder=folder)


def parameters(trained: Any) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trained.policy.parameters()])


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    clocks = ("time/tokens_per_s", "time/rollout_s", "time/train_s")
    return [{k: v for k, v in r.items() if k not in clocks} for r in read_metrics(folder)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", list(AGENTS))
def test_a_resumed_run_is_the_same_run_bit_for_bit(
    make_envs: Any, make_policy: Any, tmp_path: Path, name: str, family: str
) -> None:
    whole = agent(name, make_envs, make_policy, tmp_path / "whole", family=family)
    result = whole.learn(TOKENS, quiet=True)
    assert result.updates > 8
    for updates in (1, 4, 2, None):
        pieces = agent(name, make_envs, make_policy, tmp_path / "pieces", family=family)
        pieces.learn(TOKENS, quiet=True, resume=True, max_updates=updates)
    assert torch.equal(parameters(whole), parameters(pieces))
    assert lines(tmp_path / "whole") == lines(tmp_path / "pieces")


# peft asks transformers a deprecated question.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_a_lora_run_resumes_bit_for_bit(make_envs: Any, make_policy: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    whole = agent("ppo", make_envs, make_policy, tmp_path / "whole", lora=2)
    whole.learn(TOKENS, quiet=True)
    for updates in (3, None):
        pieces = agent("ppo", make_envs, make_policy, tmp_path / "pieces", lora=2)
        pieces.learn(TOKENS, quiet=True, resume=True, max_updates=updates)
    assert torch.equal(parameters(whole), parameters(pieces))
    assert lines(tmp_path / "whole") == lines(tmp_path / "pieces")
    other = agent("ppo", make_envs, make_policy, tmp_path / "pieces", lora=2, seed=9)
    with pytest.raises(ValueError, match="reference policy is not that of the run"):
        other.learn(TOKENS, quiet=True, resume=True)


def test_ctrl_c_saves_and_says_how_to_resume(
    make_envs: Any, make_policy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    whole = agent("ppo", make_envs, make_policy, tmp_path / "whole")
    whole.learn(TOKENS, quiet=True)
    pieces = agent("ppo", make_envs, make_policy, tmp_path / "pieces")
    shape, calls = pieces._shape, []

    def interrupted(episodes: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of the fifth update
        return shape(episodes)

    pieces._shape = interrupted
    result = pieces.learn(TOKENS)
    assert result.interrupted
    assert result.updates == 5
    assert result.checkpoint is not None
    assert result.checkpoint.name == "step-00000005"
    said = " ".join(capsys.readouterr().err.split())
    assert "interrupted: saved" in said
    assert "--resume" in said
    pieces = agent("ppo", make_envs, make_policy, tmp_path / "pieces")
    assert not pieces.learn(TOKENS, quiet=True, resume=True).interrupted
    assert torch.equal(parameters(whole), parameters(pieces))
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_between_two_updates_loses_none(
    make_envs: Any, make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes when the update is done and the decision not to save it was made."""
    fresh_start, done = Run._fresh_start, []

    def interrupted(run: Run) -> None:
        fresh_start(run)
        done.append(1)
        if len(done) == 6:  # before the first update, and after each
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "_fresh_start", interrupted)
    result = agent("reinforce", make_envs, make_policy, tmp_path).learn(TOKENS, quiet=True)
    assert result.interrupted
    assert result.updates == 5
    assert result.checkpoint is not None
    assert result.checkpoint.name == "step-00000005"


def test_a_run_that_lost_patience_is_over_when_resumed(
    make_envs: Any, make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SFT, "nll", lambda self, examples: 1.0)  # it never gets better
    config = SFTConfig(batch_size=4, eval_every=1, patience=2)
    for updates in (2, 0):
        learner = SFT(make_policy(), make_envs(), config, eval_envs=make_envs(), folder=tmp_path)
        result = learner.learn(TOKENS, quiet=True, resume=True)
        assert result.updates == 2
        assert len([h for h in result.history if "loss/nll" in h]) == updates


def test_a_folder_with_a_run_is_not_overwritten(
    make_envs: Any, make_policy: Any, tmp_path: Path
) -> None:
    agent("reinforce", make_envs, make_policy, tmp_path).learn(1, quiet=True)
    with pytest.raises(CheckpointError, match="already holds a run"):
        agent("reinforce", make_envs, make_policy, tmp_path).learn(1, quiet=True)


def test_resuming_with_other_parts_is_refused(
    make_envs: Any, make_policy: Any, tmp_path: Path
) -> None:
    agent("ppo", make_envs, make_policy, tmp_path).learn(TOKENS, quiet=True, max_updates=2)
    with pytest.raises(ValueError, match="reference policy is not that of the run"):
        other = agent("ppo", make_envs, make_policy, tmp_path, seed=9)
        other.learn(TOKENS, quiet=True, resume=True)
    (tmp_path / "r").mkdir()
    agent("reinforce", make_envs, make_policy, tmp_path / "r").learn(1, quiet=True)
    with pytest.raises(ValueError, match="another agent or configuration"):
        agent("sft", make_envs, make_policy, tmp_path / "r").learn(1, quiet=True, resume=True)
    with pytest.raises(CheckpointError, match="do not fit this policy"):
        other = agent("reinforce", make_envs, make_policy, tmp_path / "r", family="gpt2")
        other.learn(1, quiet=True, resume=True)


def test_a_folder_that_cannot_be_written_fails_before_training(
    make_envs: Any, make_policy: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Cannot write in the output folder"):
        agent("ppo", make_envs, make_policy, tmp_path / "file").learn(TOKENS, quiet=True)


def test_a_checkpoint_is_a_model_that_plain_transformers_load(
    make_envs: Any, make_policy: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from textgym.tokens import load_tokenizer

    trained = agent("reinforce", make_envs, make_policy, tmp_path)
    result = trained.learn(TOKENS, quiet=True)
    model = AutoModelForCausalLM.from_pretrained(result.checkpoint / "policy")
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(ids).logits, trained.policy.model(ids).logits)
    tokenizer = load_tokenizer(result.checkpoint / "policy")
    assert tokenizer.decode([0, 1]) == "a b"
    assert tokenizer.stop_ids == (4,)
    assert result.best_checkpoint is not None
    samples = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "text", "tokens", "token_rewards", "token_shaped_rewards"} <= set(samples[0])
    assert len(samples[0]["tokens"]) == len(samples[0]["token_rewards"])


KILLED = """
import os, random, signal, sys, time
from pathlib import Path

import torch
torch.set_num_threads(1)
from textgym.checkpoint import latest_checkpoint
from textgym.agents import PPO, PPOConfig
from textgym.envs.bandit import BanditVectorEnv
from textgym.policies import CausalLMPolicy, random_causal_lm

folder, random = Path(sys.argv[1]), random.Random(0)
config = PPOConfig(episodes=8, minibatches=2, epochs=1, kl_coef=0.1, checkpoint_every=1, lr=1e-2)
small = dict(hidden_size=8, num_layers=1, num_heads=1, max_positions=8)

def learn(where):
    policy = CausalLMPolicy(random_causal_lm(64, **small), device="cpu")
    envs = BanditVectorEnv(num_envs=8, autoreset_mode="Disabled")
    agent = PPO(policy, envs, config, eval_envs=envs, folder=where)
    agent.learn(240, resume=True, quiet=True)
    return torch.cat([p.detach().reshape(-1) for p in policy.parameters()])

expected = learn(folder / "whole")
checkpoints = folder / "killed" / "checkpoints"
kills = 0
while kills < 10:
    before = latest_checkpoint(checkpoints)
    pid = os.fork()
    if not pid:
        learn(folder / "killed")
        os._exit(0)
    done = 0
    if kills % 3:  # let it come further first; else kill it at any moment, while loading say
        while not done and latest_checkpoint(checkpoints) == before:
            time.sleep(0.005)
            done, _ = os.waitpid(pid, os.WNOHANG)
    time.sleep(random.uniform(0.0, 0.1))
    if done or os.waitpid(pid, os.WNOHANG)[0]:
        break
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    kills += 1
assert torch.equal(learn(folder / "killed"), expected)
print(kills)
"""


def test_killed_again_and_again_a_run_ends_as_if_never_killed(tmp_path: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) >= 3, "hardly a kill came while the run was going"
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_configs_are_frozen() -> None:
    for _, config in AGENTS.values():
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.lr = 1.0  # type: ignore[union-attr,misc]


def test_a_run_keeps_what_its_reward_froze(
    make_envs: Any, make_policy: Any, tmp_path: Path
) -> None:
    envs = make_envs(reward=Cider())
    REINFORCE(make_policy(), envs, REINFORCEConfig(episodes=8), folder=tmp_path).learn(
        64, quiet=True
    )
    kept = Cider.load(tmp_path / "rewards" / "cider.json")
    assert kept.frequencies == Cider().fitted(list(envs.task.prompts)).frequencies
    assert kept.frequencies.documents == 4
