"""What one update costs on the same sequences: written plainly, as TRL's helpers do it, and ours.

`python scripts/bench_update.py` lets one model of random weights take clipped steps on the same
tokens, forward, backward and optimizer, in turns. `full` has logits of all positions and
cross-entropy, as one writes it with transformers. `selective` has logits of the responses only,
and the logsumexp row by row, as TRL's `selective_log_softmax` (TRL 1.16 itself computes its output
layer in tiles; `bench_e2e.py` measures it whole). `same layers` is `selective` with the linear
layers of the policy, which a CPU multiplies by oneDNN. `ours` is what the agents call. The second
table is of ragged lengths: padded, in forwards of similar lengths, and packed without padding.

Every variant has a process of its own, for its peak memory, and all must find the same norm of the
gradient. The clock is CPU time of one thread, on an accelerator it is wall time and memory that of
its allocator. The last line is JSON.
"""

from __future__ import annotations

import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch: one thread, so CPU time is comparable

import math
import multiprocessing
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import tyro
from machine import described, peak_mib
from update_ways import Problem, Work, variants


@dataclass(frozen=True)
class Args(Problem):
    """What to measure."""

    vocab_sizes: tuple[int, ...] = (2048, 32_000)
    """Vocabulary sizes V."""
    rounds: int = 3
    """Updates measured of each variant, in turns; tables show the median."""
    ragged: bool = True
    """Also measure responses of random lengths, uniform from 1."""


def clock(device: str) -> float:
    """CPU seconds; wall seconds on an accelerator, once it is done."""
    if device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def child(pipe: Any, index: int, vocab_size: int, ragged: bool, args: Args) -> None:
    """Do an update whenever asked: tokens, norm of the first gradient, seconds, memory."""
    torch.set_num_threads(1)
    variant = variants(ragged, args)[index]
    work = Work(variant, vocab_size, ragged, args)
    built = peak_mib(args.device)
    variant.gradient(work)
    pipe.send((work.episodes.num_tokens, work.step(), built))  # and warm
    while pipe.recv():
        began = clock(args.device)
        variant.gradient(work)
        between = clock(args.device)
        work.step()
        pipe.send((between - began, clock(args.device) - between))
    pipe.send(peak_mib(args.device))


def measure(vocab_size: int, ragged: bool, args: Args) -> dict[str, Any]:
    """A table: tokens per second and peak memory of every variant."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["textgym.policies", "transformers.models.llama.modeling_llama"])
    lines = variants(ragged, args)
    pipes, processes = [], []
    for index in range(len(lines)):
        here, there = context.Pipe()
        process = context.Process(target=child, args=(there, index, vocab_size, ragged, args))
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    first = [pipe.recv() for pipe in pipes]
    times: list[list[tuple[float, float]]] = [[] for _ in lines]
    for _ in range(args.rounds):
        for spent, pipe in zip(times, pipes, strict=True):
            pipe.send(True)
            spent.append(pipe.recv())
    cells = []
    for line, (tokens, norm, built), spent, pipe in zip(lines, first, times, pipes, strict=True):
        pipe.send(False)
        tolerance = 5e-2 if line.bf16 else 1e-3
        if not math.isclose(norm, first[0][1], rel_tol=tolerance):
            raise SystemExit(f"{line.name}: gradient norm {norm}, {lines[0].name}: {first[0][1]}")
        rates = [tokens / (backward + step) for backward, step in spent]
        cells.append(
            {
                "variant": line.name,
                "tokens_per_s": round(statistics.median(rates)),
                "spread": [round(min(rates)), round(max(rates))],
                "step_share": round(statistics.median(s / (b + s) for b, s in spent), 3),
                "peak_mib": round(pipe.recv()),
                "built_mib": round(built),
                "gradient_norm": round(norm, 5),
            }
        )
    for process in processes:
        process.join()
    lengths = "uniform" if ragged else "equal"
    return {"vocab_size": vocab_size, "lengths": lengths, "tokens": first[0][0], "cells": cells}


def show(row: dict[str, Any]) -> None:
    """Print a table."""
    print(
        f"\nV = {row['vocab_size']:,}, {row['lengths']} lengths, {row['tokens']:,} tokens learned"
    )
    print(f"{'':20}{'tokens/s':>10}{'range':>15}{'x first':>9}{'step':>7}{'MiB':>8}{'built':>8}")
    for c in row["cells"]:
        low, high = c["spread"]
        times = c["tokens_per_s"] / row["cells"][0]["tokens_per_s"]
        print(
            f"{c['variant']:20}{c['tokens_per_s']:>10,}{f'{low:,}-{high:,}':>15}{times:>9.2f}"
            f"{c['step_share']:>7.1%}{c['peak_mib']:>8,}{c['built_mib']:>8,}",
            flush=True,
        )


def main(args: Args) -> None:
    """Print the tables and the JSON line."""
    result: dict[str, Any] = {"benchmark": "bench_update"}
    result |= described(("torch", "transformers", "numpy"))
    for key in ("processor", "cores", "system", "python", "versions", "command", "commit"):
        print(f"{key:<10} {result[key]}")
    clock_name = "cpu" if args.device == "cpu" else "wall"
    print(f"\naction tokens per second ({clock_name} time), median of {args.rounds}; peak memory")
    result |= {"clock": clock_name, "rows": [], **asdict(args)}
    for vocab_size in args.vocab_sizes:
        for ragged in (False, True) if args.ragged else (False,):
            row = measure(vocab_size, ragged, args)
            result["rows"].append(row)
            show(row)
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
