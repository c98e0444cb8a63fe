"""The PPO of stable-baselines3 against textgym's own: same tasks, tokens, hyperparameters, seeds.

`python scripts/compare_sb3.py` trains both on every diagnostic and on `TextGen-v0`, five seeds
each, in turns, one thread, and prints what each earns afterwards on fresh draws (held-out prompts
where there are any), and its tokens per CPU-second. Both sample through the step path. What is left
is how SB3 differs: rollouts of a fixed number of steps, advantages whitened by minibatch, the form
of the value clip. The last line is JSON.
"""

from __future__ import annotations

import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch: one thread, so CPU time is comparable

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import tyro
from learners import make_policy, vector
from machine import described

from textgym.agents import PPO, SB3PPO, PPOConfig, SB3PPOConfig
from textgym.rollout import collect

DIAGNOSTIC = {"epochs": 2, "lr": 1e-3, "lr_final": 0.0, "target_kl": 0.02, "max_grad_norm": 0.3}
DIAGNOSTIC |= {"gae_lambda": 0.9, "vf_coef": 0.5, "vf_clip_coef": None, "ent_coef": 0.1}
TEXT = {"epochs": 2, "minibatches": 2, "lr": 3e-4, "lr_final": 0.0, "kl_coef": 0.02}
TEXT |= {"gae_lambda": 1.0, "vf_coef": 1.0}


@dataclass(frozen=True)
class Kind:
    """A task, and how both train on it."""

    tokens: int
    """Action tokens of a run."""
    episodes: int
    """Episodes of an update of ours."""
    rows: int
    """Rows of SB3's environment."""
    n_steps: int
    """Steps of SB3's rollouts."""
    config: dict[str, Any]
    """What both configs have in common, in the terms of ours."""
    minibatches: int = 4
    """SB3's: of about as many tokens as ours, so that both take as many steps."""


TASKS = {
    "textgym/Bandit-v0": Kind(40_000, 256, 256, 1, DIAGNOSTIC),
    "textgym/Echo-v0": Kind(400_000, 256, 256, 4, DIAGNOSTIC),
    "textgym/StopEarly-v0": Kind(40_000, 256, 256, 4, DIAGNOSTIC),
    "textgym/Chain-v0": Kind(160_000, 256, 256, 5, DIAGNOSTIC),
    "textgym/HighLow-v0": Kind(160_000, 256, 256, 3, DIAGNOSTIC),
    "TextGen-v0": Kind(100_000, 64, 8, 125, TEXT, minibatches=2),
}


@dataclass(frozen=True)
class Args:
    """What to compare."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """Environment ids."""
    seeds: int = 5
    """Seeds of each: 0, 1, ..."""
    out: Path = Path("runs/compare_sb3.jsonl")
    """One line for each run; a run that is there is not done again."""


def train(task: str, agent: str, seed: int) -> dict[str, Any]:
    """One run: what it earns afterwards, tokens per CPU-second, and CPU seconds."""
    kind = TASKS[task]
    config = dict(kind.config, seed=seed, eval_every=0)
    learner: Any
    if agent == "ppo":
        envs = vector(task, kind.episodes)
        policy = make_policy(envs, seed, embedded=task == "TextGen-v0")
        learner = PPO(policy, envs, PPOConfig(episodes=kind.episodes, **config))
    else:
        if "vf_coef" in config:
            config["vf_coef"] /= 2  # SB3's value loss has no half
        envs = vector(task, kind.rows, "SameStep")
        policy = make_policy(envs, seed, embedded=task == "TextGen-v0")
        config |= {"n_steps": kind.n_steps, "minibatches": kind.minibatches}
        learner = SB3PPO(policy, envs, SB3PPOConfig(**config))
    began = time.process_time()
    result = learner.learn(kind.tokens, quiet=True)
    if result.interrupted:
        raise SystemExit("interrupted: that run is not counted")
    tokens = result.total_tokens
    seconds = time.process_time() - began
    held_out = vector("textgym/DataToText-v0" if task == "TextGen-v0" else task, 256, split="test")
    fresh = collect(policy, held_out, 1024, seed=1_000_003)
    score = float(fresh.scores.mean())
    found = {"task": task, "agent": agent, "seed": seed, "score": round(score, 4)}
    return found | {"tokens_per_s": round(tokens / seconds), "seconds": round(seconds, 1)}


def table(runs: list[dict[str, Any]], tasks: tuple[str, ...]) -> dict[str, Any]:
    """Print mean and standard deviation over the seeds, and the ratio of speeds."""
    print("\n| task | seeds | PPO | SB3-PPO | tokens per CPU-second, SB3-PPO over PPO |")
    print("|---|---|---|---|---|")
    result: dict[str, Any] = {}
    for task in tasks:
        cells, found = [], {}
        for agent in ("ppo", "sb3-ppo"):
            mine = [run for run in runs if (run["task"], run["agent"]) == (task, agent)]
            scores = [run["score"] for run in mine]
            spread = stdev(scores) if len(scores) > 1 else 0.0
            speed = mean(run["tokens_per_s"] for run in mine)
            found[agent] = {"mean": mean(scores), "std": spread, "tokens_per_s": speed}
            cells.append(f"{mean(scores):.3f} ± {spread:.3f}")
        ratio = found["sb3-ppo"]["tokens_per_s"] / found["ppo"]["tokens_per_s"]
        print(f"| {task} | {len(mine)} | {cells[0]} | {cells[1]} | {ratio:.2f} |")
        result[task] = found | {"ratio": round(ratio, 2)}
    return result


def main(args: Args) -> None:
    """Train what is missing, and print the table."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = args.out.read_text(encoding="utf-8") if args.out.exists() else ""
    runs = [json.loads(line) for line in text.splitlines()]
    done = {(run["task"], run["agent"], run["seed"]) for run in runs}
    for task in args.tasks:
        for seed in range(args.seeds):
            for agent in ("ppo", "sb3-ppo"):
                if (task, agent, seed) in done:
                    continue
                runs.append(train(task, agent, seed))
                print(json.dumps(runs[-1]), flush=True)
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
    result = {
        "machine": described(("torch", "stable-baselines3")),
        "tasks": table(runs, args.tasks),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
