"""What standard PPO of stable-baselines3 costs with a language model: three ways, in turns.

`python scripts/bench_sb3.py` lets one model of random weights collect and train on the same
environment: `naive` scores every prefix with a full forward and keeps them in SB3's own buffer,
`cached` decodes through the slot cache into that buffer, `ours` stores whole sequences
(`SequenceRolloutBuffer`). The clock is CPU time of one thread. Peak memory is that of one process
for each way, beside what it was before the first update. `--large` measures the memory of ours
alone at N = 64, T = 128, V = 50,257. The last line is JSON.
"""

from __future__ import annotations

import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch: one thread, so CPU time is comparable

import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import tyro
from machine import described, peak_mib
from stable_baselines3 import PPO

from textgym.policies import random_causal_lm
from textgym.sb3 import CausalLMActorCriticPolicy, SB3VecEnv, SequenceRolloutBuffer
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

KINDS = ("naive", "cached", "ours")


@dataclass(frozen=True)
class Args:
    """What to measure."""

    vocab_sizes: tuple[int, ...] = (4096, 32_000)
    """Vocabulary sizes V."""
    num_envs: int = 16
    """Rows N."""
    n_steps: int = 64
    """Steps T of a rollout, and the longest response."""
    rounds: int = 3
    """Measurements of each kind, taken in turns; tables show the median."""
    large: bool = False
    """Only the peak memory of ours, at N = 64, T = 128, V = 50,257."""
    only: Literal["", "naive", "cached", "ours"] = ""
    """Run one kind once and print its peak memory (what the script calls itself with)."""


class NaivePolicy(CausalLMActorCriticPolicy):
    """A full forward over every prefix, also in collecting."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Draw tokens as if there were no cache."""
        self.lm._no_cache = True
        return super().forward(*args, **kwargs)


def make(kind: str, vocab_size: int, args: Args) -> Any:
    """PPO on prompts of 16 to 32 random ids; nothing but the budget ends a response."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(vocab_size, size=rng.integers(16, 33)).tolist() for _ in range(256)]
    envs = TextGenVectorEnv(
        num_envs=args.num_envs,
        autoreset_mode="SameStep",
        prompts=[{"prompt": row} for row in prompts],
        tokenizer=symbol_tokenizer([f"s{i}" for i in range(vocab_size - 1)], eos=None),
        reward=lambda text: 1.0,
        max_new_tokens=args.n_steps,
        stop=(),
    )
    model = random_causal_lm(
        vocab_size,
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=688,
        max_positions=32 + args.n_steps,
    )
    return PPO(
        NaivePolicy if kind == "naive" else CausalLMActorCriticPolicy,
        SB3VecEnv(envs),
        n_steps=args.n_steps,
        batch_size=256,
        n_epochs=1,
        gamma=1.0,
        learning_rate=1e-4,
        ent_coef=0.0,
        rollout_buffer_class=SequenceRolloutBuffer if kind == "ours" else None,
        policy_kwargs={"model": model},
        device="cpu",
        seed=0,
    )


def update(algorithm: Any, callback: Any) -> tuple[float, float]:
    """CPU seconds of one rollout and of training on it."""
    began = time.process_time()
    algorithm.collect_rollouts(algorithm.env, callback, algorithm.rollout_buffer, algorithm.n_steps)
    between = time.process_time()
    algorithm.train()
    return between - began, time.process_time() - between


def peak(kind: str, vocab_size: int, args: Args) -> tuple[float, float]:
    """Peak memory in MiB of a process of its own: after building, and after an update."""
    command = [sys.executable, __file__, "--only", kind, "--vocab-sizes", str(vocab_size)]
    command += ["--num-envs", str(args.num_envs), "--n-steps", str(args.n_steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    built, most = json.loads(done.stdout.splitlines()[-1])
    return built, most


def run_once(kind: str, args: Args) -> None:
    """Build, update once, and print peak memory."""
    algorithm = make(kind, args.vocab_sizes[0], args)
    built = peak_mib()
    _, callback = algorithm._setup_learn(10**9, None)
    update(algorithm, callback)
    print(json.dumps([round(built), round(peak_mib())]))


def measure(vocab_size: int, args: Args) -> dict[str, Any]:
    """Tokens per second and peak memory of every kind, and what ours wins."""
    algorithms = {kind: make(kind, vocab_size, args) for kind in KINDS}
    callbacks = {kind: a._setup_learn(10**9, None)[1] for kind, a in algorithms.items()}
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for turn in range(args.rounds + 1):
        for kind in KINDS:
            spent = update(algorithms[kind], callbacks[kind])
            if turn:  # the first one warms up
                times[kind].append(spent)
    tokens = args.num_envs * args.n_steps
    row: dict[str, Any] = {"vocab_size": vocab_size}
    for kind in KINDS:
        collect, train = (statistics.median(t[i] for t in times[kind]) for i in (0, 1))
        built, most = peak(kind, vocab_size, args)
        row[kind] = {
            "collect": round(tokens / collect),
            "train": round(tokens / train),
            "peak_mib": most,
            "built_mib": built,
        }
    row["collect_over_naive"] = round(row["ours"]["collect"] / row["naive"]["collect"], 1)
    row["train_over_naive"] = round(row["ours"]["train"] / row["naive"]["train"], 1)
    row["peak_of_naive"] = round(row["ours"]["peak_mib"] / row["naive"]["peak_mib"], 2)
    return row


def main(args: Args) -> None:
    """Print the table and the JSON line."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "one forward for each")  # that is what is measured
    if args.only:
        return run_once(args.only, args)
    result: dict[str, Any] = {"benchmark": "bench_sb3"}
    result |= described(("torch", "transformers", "stable-baselines3", "numpy"))
    for key in ("processor", "cores", "system", "python", "versions", "command", "commit"):
        print(f"{key:<10} {result[key]}")
    if args.large:
        built, most = peak("ours", 50_257, Args(num_envs=64, n_steps=128))
        result |= {"num_envs": 64, "n_steps": 128, "vocab_size": 50_257}
        result |= {"built_mib": built, "peak_mib": most}
    else:
        result |= {"num_envs": args.num_envs, "n_steps": args.n_steps, "rows": []}
        print(f"\ntokens per CPU second, median of {args.rounds}; peak memory in MiB")
        print(f"{'V':>7} {'kind':>7} {'collect':>9} {'train':>9} {'peak':>7} {'built':>7}")
        for vocab_size in args.vocab_sizes:
            row = measure(vocab_size, args)
            result["rows"].append(row)
            for kind in KINDS:
                print(f"{vocab_size:>7,} {kind:>7}", end="")
                print("".join(f"{row[kind][k]:>9,}" for k in ("collect", "train")), end="")
                print("".join(f"{row[kind][k]:>8,}" for k in ("peak_mib", "built_mib")))
            print(
                f"ours over naive: collect {row['collect_over_naive']}x, train "
                f"{row['train_over_naive']}x, peak memory {row['peak_of_naive']}x",
                flush=True,
            )
    print(json.dumps(result))
    return None


if __name__ == "__main__":
    main(tyro.cli(Args))
