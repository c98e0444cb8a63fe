"""Tokens per second and peak memory of whole updates, against TRL: GRPO, with and without KL, PPO.

`python scripts/bench_e2e.py --trl-grpo-python <path> --trl-ppo-python <path>` trains the same
Llama of random weights on the same prompts with the same reward (share of ids in the lower half of
the vocabulary), lengths, batch and learning rate. Rates are of the whole update: rollout, reward,
update and logging. The clock is CPU time of one thread, on CUDA wall time. Every variant and round
has a process of its own, in turns; peak memory is that of the process (on CUDA, of the
accelerator's allocator). The last line is JSON.

TRL needs environments of its own, for instance:

    python -m venv trl116 && trl116/bin/pip install torch==2.13.0 trl==1.16.0
    python -m venv trl112 && trl112/bin/pip install torch==2.13.0 trl==1.12.0

1.12.0 is the last with PPO. Without them its rows say "not measured". How each is set up is said in
`against_trl/`. What is not alike in both:

- TRL's PPO trains a second model of the same size for the value; ours has a head on the policy.
- With KL, ours can measure the exact KL of 32 episodes an update, and does by default. TRL has
  nothing like it, so that it is off, except in the variant named after it.
- bf16 is mixed precision in both: weights are float32.
- The gradient of a batch of 64 is taken at once, or by 8 responses at a time (8 is the default of
  TRL's `per_device_train_batch_size`), which takes less memory; both are measured in both.
- Only ours saves a checkpoint before the first update and after the last; neither is measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from against_trl.workload import SIZES, Workload
from machine import described

CHILDREN = Path(__file__).parent / "against_trl"
Comparison = Literal["grpo", "grpo_kl", "ppo"]
Dtype = Literal["float32", "bfloat16"]
TITLES = {"grpo": "GRPO, no KL", "grpo_kl": "GRPO, KL in the loss", "ppo": "PPO, KL in the reward"}
SHORT = {"float32": "f32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Args:
    """What to measure."""

    trl_grpo_python: str = ""
    """Python of an environment with trl 1.16.0."""
    trl_ppo_python: str = ""
    """Python of an environment with trl 1.12.0."""
    comparisons: tuple[Comparison, ...] = ("grpo", "grpo_kl", "ppo")
    """Which tables."""
    sizes: tuple[str, ...] = ("0.16M", "6.8M", "14.5M")
    """Which models, by number of parameters; there is also 0.5B."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    """What to compute in."""
    path: Literal["step", "sequence"] = "sequence"
    """How ours samples."""
    step: bool = False
    """Also measure ours with path="step"."""
    rounds: int = 3
    """Processes of each variant, in turns; tables show the median and the range."""
    warmup: int = 1
    """Updates of a process before the clock counts, at least 1."""
    updates: int = 3
    """Updates of a process that are measured."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train."""
    prompt_tokens: int = 16
    """Length of every prompt."""
    response_tokens: int = 64
    """Length of every response; nothing ends it earlier."""
    microbatches: tuple[int, ...] = (64, 8)
    """Responses in one forward of the update, in both; 64 are a batch."""
    kl_coef_grpo: float = 0.04
    """Price of KL in the second table (`beta` of TRL)."""
    kl_coef_ppo: float = 0.05
    """Price of KL in PPO."""


@dataclass(frozen=True)
class Variant:
    """A line of a table."""

    kind: str
    """`TRL`, `ours`, or ours with a difference."""
    python: str
    """Empty: not measured."""
    script: str
    work: Workload

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.kind} {self.cell}"

    @property
    def cell(self) -> str:
        """What it has in common with the line that it is compared with."""
        return f"{SHORT[self.work.dtype]} by {self.work.microbatch}"


def variants(comparison: Comparison, size: str, args: Args) -> list[Variant]:
    """TRL and ours, in each dtype; then what of ours has no counterpart."""
    algorithm = "ppo" if comparison == "ppo" else "grpo"
    price = {"grpo": 0.0, "grpo_kl": args.kl_coef_grpo, "ppo": args.kl_coef_ppo}[comparison]
    trl_python = args.trl_ppo_python if algorithm == "ppo" else args.trl_grpo_python
    plain: dict[str, Any] = {"path": args.path, "exact_kl_episodes": 0}
    found = []

    def add(kind: str, dtype: Dtype, microbatch: int, options: dict[str, Any]) -> None:
        work = Workload(
            algorithm=algorithm,
            size=size,
            dtype=dtype,
            kl_coef=price,
            warmup=args.warmup,
            updates=args.updates,
            device=args.device,
            prompt_tokens=args.prompt_tokens,
            response_tokens=args.response_tokens,
            microbatch=microbatch,
            options=options,
        )
        trl = kind == "TRL"
        python = trl_python if trl else sys.executable
        script = f"trl_{algorithm}.py" if trl else "ours.py"
        found.append(Variant(kind, python, script, work))

    for microbatch in args.microbatches:
        for dtype in args.dtypes:
            add("TRL", dtype, microbatch, {})
        for dtype in args.dtypes:
            add("ours", dtype, microbatch, plain)
    for dtype in args.dtypes:
        if args.step:
            add("ours, step path,", dtype, args.microbatches[0], plain | {"path": "step"})
        if price:
            add("ours, exact KL,", dtype, args.microbatches[0], {"path": args.path})
    return found


def run(variant: Variant) -> dict[str, Any]:
    """One process of a variant."""
    environment = dict(os.environ)
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONWARNINGS": "ignore"}
    if variant.work.device == "cpu":
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [variant.python, str(CHILDREN / variant.script), variant.work.as_argument()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{variant.name} failed: {command}\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check_same(results: list[dict[str, Any]]) -> None:
    """Check that all trained the same model on the same number of tokens.

    Raises:
        SystemExit: If they did not.
    """
    seen = {(r["tokens"], r["parameters"], round(r["weights"], 3)) for r in results}
    if len(seen) > 1:
        raise SystemExit(f"variants differ in (tokens, parameters, sum of weights): {seen}")


def cell(variant: Variant, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The line of a variant, from its processes."""
    if not results:
        return {"variant": variant.name, "tokens_per_s": None}
    rates = [r["tokens"] * len(r["seconds"]) / sum(r["seconds"]) for r in results]
    rollout = statistics.median(s for r in results for s in r["rollout_seconds"])
    whole = statistics.median(s for r in results for s in r["seconds"])
    return {
        "variant": variant.name,
        "tokens_per_s": round(statistics.median(rates)),
        "spread": [round(min(rates)), round(max(rates))],
        "rollout_s": round(rollout, 3),
        "rest_s": round(whole - rollout, 3),
        "peak_mib": round(statistics.median(r["peak_mib"] for r in results)),
        "built_mib": round(statistics.median(r["built_mib"] for r in results)),
        "rewards": [round(r, 3) for r in results[0]["rewards"]],
        "versions": results[0]["versions"],
    }


def measure(comparison: Comparison, size: str, args: Args) -> dict[str, Any]:
    """Run all variants in turns; the order moves by one every round."""
    lines = variants(comparison, size, args)
    found: dict[str, list[dict[str, Any]]] = {line.name: [] for line in lines}
    for turn in range(args.rounds):
        first = turn % len(lines)
        for line in lines[first:] + lines[:first]:
            if line.python:
                found[line.name].append(run(line))
    check_same([result for results in found.values() for result in results])
    cells = {line.name: cell(line, found[line.name]) for line in lines}
    for line in lines:
        mine, theirs = cells[line.name], cells[f"TRL {line.cell}"]
        if theirs["tokens_per_s"] and mine is not theirs:
            mine["times_trl"] = round(mine["tokens_per_s"] / theirs["tokens_per_s"], 2)
            mine["memory_of_trl"] = round(mine["peak_mib"] / theirs["peak_mib"], 2)
    row: dict[str, Any] = {"comparison": comparison, "size": size, "cells": list(cells.values())}
    row["parameters"] = next(r["parameters"] for results in found.values() for r in results)
    best_trl, best_ours = (
        max(cells[line.name]["tokens_per_s"] or 0 for line in lines if (line.kind == "TRL") is trl)
        for trl in (True, False)
    )
    row["best_over_best"] = round(best_ours / best_trl, 2) if best_trl else None
    return row


def show(row: dict[str, Any]) -> None:
    """Print a table."""
    name, vocab_size = TITLES[row["comparison"]], SIZES[row["size"]]["vocab_size"]
    print(f"\n{name}: {row['parameters'] / 1e6:.2f} M parameters, V = {vocab_size:,}")
    heads = ("tokens/s", "range", "x TRL", "rollout s", "rest s", "MiB", "of TRL", "reward")
    print(f"{'':28}" + "".join(f"{h:>{15 if h == 'range' else 10}}" for h in heads))
    for c in row["cells"]:
        if c["tokens_per_s"] is None:
            print(f"{c['variant']:28}  not measured")
            continue
        low, high = c["spread"]
        times, memory = (c.get(k, "") for k in ("times_trl", "memory_of_trl"))
        print(
            f"{c['variant']:28}{c['tokens_per_s']:>10,}{f'{low:,}-{high:,}':>15}{times:>10}"
            f"{c['rollout_s']:>10}{c['rest_s']:>10}{c['peak_mib']:>10,}{memory:>10}"
            f"    {c['rewards'][0]:.3f}-{c['rewards'][-1]:.3f}"
        )
    best = row["best_over_best"]
    print(f"best of ours over best of TRL: {'not measured' if best is None else f'{best}x'}")
    sys.stdout.flush()


def main(args: Args) -> None:
    """Print the tables and the JSON line."""
    if args.warmup < 1:
        raise SystemExit("warmup must be at least 1: an update is measured from the one before")
    result: dict[str, Any] = {"benchmark": "bench_e2e"}
    result |= described(("torch", "transformers", "gymnasium", "numpy"))
    for key in ("processor", "cores", "system", "python", "versions", "command", "commit"):
        print(f"{key:<10} {result[key]}")
    clock = "CPU second, one thread" if args.device == "cpu" else "wall second"
    print(
        f"\ntokens per {clock}, whole updates of 64 responses of {args.response_tokens} tokens to "
        f"prompts of {args.prompt_tokens};\nmedian and range of {args.rounds} processes with "
        f"{args.updates} updates each"
    )
    result |= {"device": args.device, "clock": "cpu" if args.device == "cpu" else "wall"}
    result |= {"prompt_tokens": args.prompt_tokens, "response_tokens": args.response_tokens}
    result["rows"] = []
    for comparison in args.comparisons:
        for size in args.sizes:
            row = measure(comparison, size, args)
            result["rows"].append(row)
            show(row)
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
