"""GRPO, RLOO, REINFORCE and PPO on three environments: equal tokens, five seeds, one figure.

`python scripts/compare_agents.py --figure docs/agents.png` trains all of them in turns, one thread,
and draws the reward on held-out prompts (where prompts do not differ: on other draws) against the
action tokens that were sampled for training, discarded ones counted: the mean over the seeds with
its 95 % interval by Student's t. It prints what each earns at the end, and its tokens per
CPU-second. Runs that `--results` holds are not done again. The last line is JSON.

The embedded model is trained with the recipes of `textgym train`; RLOO, which has none, with the
numbers of REINFORCE's, which takes one step an update as well. Models of random weights are trained
with those of `tests/agents/test_diagnostics.py`, GRPO with PPO's and RLOO with REINFORCE's. Their
entropy bonus of 0.1 is in units of the spread of advantages; RLOO's advantages are in units of
reward, and its bonus is that times 0.05, the least that whitening divides by. An agent has the same
numbers wherever the model is of the same kind, and all start from the same weights. GRPO and RLOO,
which sample in groups, begin with the same draws, and so do REINFORCE and PPO: where all hangs on
the first success, the two of a pair share their luck.
"""

from __future__ import annotations

import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch: one thread, so CPU time is comparable

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import tyro
from learners import make_policy, vector
from machine import described
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from textgym.agents import GRPO, PPO, REINFORCE, GRPOConfig, PPOConfig, REINFORCEConfig
from textgym.commands.options import FOR_EMBEDDED
from textgym.rollout import collect

AGENTS: dict[str, tuple[Any, Any]] = {
    "GRPO": (GRPO, GRPOConfig),
    "RLOO": (GRPO, partial(GRPOConfig.variant, "rloo")),
    "REINFORCE": (REINFORCE, REINFORCEConfig),
    "PPO": (PPO, PPOConfig),
}
"""Class and config of each agent."""
LOOKS = {
    "GRPO": ("#0072B2", "-"),
    "RLOO": ("#E69F00", "--"),
    "REINFORCE": ("#009E73", "-."),
    "PPO": ("#000000", ":"),
}
"""Colours that the colour-blind tell apart (Okabe and Ito), and lines that differ as well."""

_REINFORCE = FOR_EMBEDDED["reinforce"]
EMBEDDED: dict[str, dict[str, Any]] = {
    "GRPO": FOR_EMBEDDED["grpo"],
    "RLOO": {name: _REINFORCE[name] for name in ("lr", "kl_coef", "path")},
    "REINFORCE": _REINFORCE,
    "PPO": FOR_EMBEDDED["ppo"],
}
"""What differs from the configs' defaults for the embedded model."""
_ALL = {"episodes": 256, "lr": 1e-3, "lr_final": 0.0}
_STEPS = _ALL | {"epochs": 2, "minibatches": 4, "max_grad_norm": 0.3}
_VALUES = {"gae_lambda": 0.9, "vf_coef": 0.5, "vf_clip_coef": None}
RANDOM: dict[str, dict[str, Any]] = {
    "GRPO": _STEPS,
    "RLOO": _ALL,
    "REINFORCE": _ALL | {"whiten": True},
    "PPO": _STEPS | _VALUES | {"target_kl": 0.02},
}
"""The same for models of random weights."""


@dataclass(frozen=True)
class Kind:
    """An environment, and how all train on it."""

    tokens: int
    """Action tokens of a run."""
    eval_every: int
    """Updates between held-out evaluations."""
    settings: dict[str, dict[str, Any]]
    """Of each agent."""
    held_out: str
    """Environment of the held-out prompts."""


TASKS = {
    "TextGen-v0": Kind(50_000, 3, EMBEDDED, "textgym/DataToText-v0"),
    "textgym/Chain-v0": Kind(80_000, 3, RANDOM, "textgym/Chain-v0"),
    "textgym/HighLow-v0": Kind(160_000, 12, RANDOM, "textgym/HighLow-v0"),
}
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Args:
    """What to compare."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """Environment ids."""
    agents: tuple[str, ...] = tuple(AGENTS)
    """Names of agents."""
    seeds: int = 5
    """Seeds of each, at most 10: 0, 1, ..."""
    entropy: float = 0.1
    """Entropy bonus where the model has random weights, in units of the advantages' spread."""
    share: float = 1.0
    """Share of the tokens to train on; less is for trying the script."""
    results: Path = Path("runs/compare_agents.jsonl")
    """One line for each run; a run that is there is not done again."""
    figure: Path = Path("runs/compare_agents.png")
    """Where the curves are drawn."""


def wanted(args: Args, task: str, agent: str, seed: int) -> dict[str, Any]:
    """Everything that tells one run from another."""
    kind = TASKS[task]
    run = {"task": task, "agent": agent, "seed": seed, "tokens": round(args.share * kind.tokens)}
    settings = kind.settings[agent]
    if kind.settings is RANDOM:
        floor = REINFORCEConfig.whiten_floor if agent == "RLOO" else 1.0
        settings = settings | {"ent_coef": round(args.entropy * floor, 6)}
    return run | {"eval_every": kind.eval_every, "settings": settings}


def train(run: dict[str, Any]) -> dict[str, Any]:
    """Do one run.

    Returns:
        `run` with its curve (action tokens, held-out reward), the reward at the end, and the CPU
        seconds that training took, without evaluations.
    """
    task, seed = run["task"], run["seed"]
    make, make_config = AGENTS[run["agent"]]
    every = {"eval_every": run["eval_every"], "eval_episodes": 256}
    config = make_config(seed=seed, **every, **run["settings"])
    envs = vector(task, config.episodes)
    held_out = vector(TASKS[task].held_out, 256, split="test")
    policy = make_policy(envs, seed, embedded=TASKS[task].settings is EMBEDDED)
    learner = make(policy, envs, config, eval_envs=held_out)
    wall, cpu = time.perf_counter(), time.process_time()
    result = learner.learn(run["tokens"], quiet=True)
    if result.interrupted:
        raise SystemExit("interrupted: that run is not counted")
    # Updates are timed by the clock on the wall, without evaluations: of that, the share that this
    # process had of its core.
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    updates = [line for line in result.history if "time/train_s" in line]
    seconds = share * sum(line["time/rollout_s"] + line["time/train_s"] for line in updates)
    points = [line for line in result.history if "eval/reward_mean" in line]
    curve = [(line["time/total_tokens"], round(line["eval/reward_mean"], 5)) for line in points]
    fresh = collect(policy, held_out, 1024, seed=1_000_003, path=config.path)
    return run | {
        "curve": curve,
        "score": round(float(fresh.scores.mean()), 5),
        "sampled": result.total_tokens,
        "seconds": round(seconds, 2),
    }


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of a mean, by Student's t; 0 for a single value."""
    n = len(values)
    return STUDENT[n - 2] * stdev(values) / n**0.5 if n > 1 else 0.0


def band(runs: Sequence[dict[str, Any]]) -> tuple[Any, Any, Any]:
    """Tokens [101], the mean reward over runs there, and half of its interval."""
    curves = [np.array(run["curve"], float) for run in runs]
    tokens = np.linspace(0.0, runs[0]["tokens"], 101)  # which all of them passed
    rewards = np.array([np.interp(tokens, curve[:, 0], curve[:, 1]) for curve in curves])
    widths = np.array([half_width(column.tolist()) for column in rewards.T])
    return tokens, rewards.mean(axis=0), widths


def draw(groups: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Draw one panel for each environment."""
    figure = Figure(figsize=(4 * len(groups), 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axis, (task, agents) in zip(axes, groups.items(), strict=True):
        for agent, runs in agents.items():
            tokens, centre, widths = band(runs)
            colour, style = LOOKS[agent]
            low, high = centre - widths, centre + widths
            axis.fill_between(tokens / 1000, low, high, color=colour, alpha=0.2, lw=0)
            axis.plot(tokens / 1000, centre, style, color=colour, lw=1.8, label=agent)
        bottom, top = axis.get_ylim()
        axis.set_ylim(max(bottom, -0.04), min(top, 1.04))  # no reward lies outside of 0 and 1
        axis.set_title(task)
        axis.set_xlabel("thousand action tokens")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean reward, held out")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def table(groups: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Print the means over the seeds, with half of their 95 % intervals."""
    print(
        "\n| environment | agent | seeds | at the end | mean of the curve | tokens per CPU-second |"
    )
    print("|---|---|---|---|---|---|")
    result: dict[str, Any] = {}
    for task, agents in groups.items():
        for agent, runs in agents.items():
            columns = {
                "end": [run["score"] for run in runs],
                "curve": [float(band([run])[1].mean()) for run in runs],
            }
            speed = mean(run["sampled"] / run["seconds"] for run in runs)
            found = {name: [mean(x), half_width(x)] for name, x in columns.items()}
            cells = " | ".join(f"{centre:.3f} ± {width:.3f}" for centre, width in found.values())
            print(f"| {task} | {agent} | {len(runs)} | {cells} | {speed:,.0f} |")
            rounded = {name: [round(number, 4) for number in x] for name, x in found.items()}
            result.setdefault(task, {})[agent] = rounded | {"tokens_per_s": round(speed)}
    return result


def main(args: Args) -> None:
    """Train what is missing, draw the curves, and print the table."""
    if not 1 <= args.seeds <= len(STUDENT) + 1:
        raise SystemExit(f"--seeds must be between 1 and {len(STUDENT) + 1}, got {args.seeds}")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    text = args.results.read_text(encoding="utf-8") if args.results.exists() else ""
    done = [json.loads(line) for line in text.splitlines()]
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {
        task: {agent: [] for agent in args.agents} for task in args.tasks
    }
    for task in args.tasks:
        for seed in range(args.seeds):
            for agent in args.agents:
                run = wanted(args, task, agent, seed)
                found = next((line for line in done if run.items() <= line.items()), None)
                if found is None:
                    found = train(run)
                    shown = ("task", "agent", "seed", "score", "sampled", "seconds")
                    print(json.dumps({name: found[name] for name in shown}), flush=True)
                    with args.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found) + "\n")
                groups[task][agent].append(found)
    draw(groups, args.figure)
    print(f"curves: {args.figure}")
    result = {"machine": described(("matplotlib", "numpy", "torch")), "tasks": table(groups)}
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
