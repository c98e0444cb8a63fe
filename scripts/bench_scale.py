"""How GRPO scales: tokens per second, memory, and where the time goes, one axis at a time.

`python scripts/bench_scale.py` trains models of random weights from a base point outwards: more
rows, longer responses, larger vocabularies, larger models. Every point has a process of its own,
for its peak memory. One round of a point is a whole iteration of the agent (rollout on the sequence
path, then its update), then a rollout on the step path. Afterwards the round is done once more with
timers around its parts. `forward` and `model` are the network without its output layer, but for
rollouts on CUDA, where a step is one graph; `rest` is what no timer saw.

A point that does not fit into memory or takes too long is skipped and named. `--full` goes up to
1,024 rows, 1,024 tokens, 151,936 words and 1 B parameters; a CPU takes hours for that. The clock is
CPU time of one thread, on an accelerator it is wall time. The last line is JSON.
"""

from __future__ import annotations

import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch: one thread, so CPU time is comparable

import multiprocessing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro
from machine import described
from scale_point import MODELS, PROMPT, Point, Setting, child

FULL: dict[str, tuple[Any, ...]] = {
    "rows": (1, 4, 16, 64, 256, 1024),
    "horizon": (16, 64, 256, 1024),
    "vocab_size": (512, 2048, 8192, 32_000, 151_936),
    "model": tuple(MODELS),
}


@dataclass(frozen=True)
class Args(Setting):
    """What to measure."""

    base: Point = field(default_factory=Point)
    """Where the axes cross."""
    rows: tuple[int, ...] = (1, 16, 64, 256)
    """Numbers of rows."""
    horizons: tuple[int, ...] = (16, 64, 256)
    """Lengths of responses."""
    vocab_sizes: tuple[int, ...] = (512, 32_000, 151_936)
    """Vocabulary sizes."""
    models: tuple[str, ...] = ("0.2M", "30M")
    """Models."""
    full: bool = False
    """All four axes to their ends instead."""
    limit_s: int = 120
    """Seconds (of the wall) after which a point is given up."""
    memory_gib: float = 0.0
    """Memory a point may take on a CPU; 0: three quarters of what is free."""


def axes(args: Args) -> dict[str, list[Point]]:
    """The points of each axis, in order; the base is on all of them."""
    given = {
        "rows": args.rows,
        "horizon": args.horizons,
        "vocab_size": args.vocab_sizes,
        "model": args.models,
    }
    found = {}
    for name, values in (FULL if args.full else given).items():
        key = list(MODELS).index if name == "model" else int
        here = sorted({*values, getattr(args.base, name)}, key=key)
        found[name] = [replace(args.base, **{name: value}) for value in here]
    return found


def free_memory() -> int:
    """Bytes that could be used now."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(n.split()[1]) * 1024 for n in lines if n.startswith("MemAvailable"))


def run(point: Point, args: Args) -> dict[str, Any]:
    """A point in a process of its own, or why it was skipped."""
    memory = int(args.memory_gib * 2**30) or free_memory() * 3 // 4
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["textgym.agents", "transformers.models.llama.modeling_llama"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(there, point, memory, args))
    process.start()
    there.close()
    found: dict[str, Any] = {"skipped": f"took longer than {args.limit_s} s"}
    if here.poll(args.limit_s):
        try:
            found = here.recv()
        except EOFError:
            process.join()
            found = {"skipped": f"its process ended with {process.exitcode}"}
    else:
        process.kill()
    process.join()
    return asdict(point) | found


HEADS = ("rows", "horizon", "V", "model", "M param.", "rollout", "step path", "update", "both")


def show(row: dict[str, Any]) -> None:
    """Print a line, and below it the shares."""
    where = (row["rows"], row["horizon"], f"{row['vocab_size']:,}", row["model"])
    start = " ".join(f"{cell:>9}" for cell in where)
    if "skipped" in row:
        print(f"{start}  skipped: {row['skipped']}", flush=True)
        return
    rates = [row[kind]["tokens_per_s"] for kind in ("rollout", "step path", "update")]
    rates.append(row["iteration_tokens_per_s"])
    print(
        start,
        f"{row['parameters'] / 1e6:>9,.1f}",
        *(f"{rate:>9,.0f}" for rate in rates),
        f"{row['peak_mib']:>9,}",
    )
    for kind, shares in row["shares"].items():
        ordered = sorted(shares.items(), key=lambda item: (item[0] == "rest", -item[1]))
        print(f"{'':12}{kind}: " + ", ".join(f"{part} {share:.0%}" for part, share in ordered))
    print(end="", flush=True)


def main(args: Args) -> None:
    """Print the tables and the JSON line."""
    result: dict[str, Any] = {"benchmark": "bench_scale"}
    result |= described(("torch", "transformers", "gymnasium", "numpy"))
    for key in ("processor", "cores", "system", "python", "versions", "command", "commit"):
        print(f"{key:<10} {result[key]}")
    result |= {"device": args.device, "clock": "cpu" if args.device == "cpu" else "wall"}
    result |= {"compute_dtype": args.compute_dtype, "prompt_tokens": PROMPT, "points": []}
    print(
        f"\ntokens per second ({result['clock']} time), median of {args.rounds}; peak memory in "
        "MiB; shares of time"
    )
    known: dict[Point, dict[str, Any]] = {}
    for axis, points in axes(args).items():
        print(f"\n{axis}\n" + " ".join(f"{head:>9}" for head in (*HEADS, "MiB")))
        for point in points:
            if point not in known:
                known[point] = run(point, args)
                result["points"].append(known[point])
            show(known[point])
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
