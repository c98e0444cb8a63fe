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
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from machine import described, peak_mib

from textgym.agents import GRPO, GRPOConfig
from textgym.learning import GuardedOptimizer
from textgym.policies import CausalLMPolicy, backbone, causal_lm, random_causal_lm, slot_cache
from textgym.policies.graph_decode import GraphDecode
from textgym.rollout import collect
from textgym.runs import Run
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

PROMPT = 16
MODELS: dict[str, dict[str, int]] = {
    "0.2M": {"hidden_size": 64, "num_layers": 2, "intermediate_size": 256},
    "7M": {"hidden_size": 256, "num_layers": 6, "intermediate_size": 1024},
    "30M": {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "intermediate_size": 1536},
    "100M": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": 2304},
    "0.4B": {  # the numbers of Qwen2.5-0.5B
        "hidden_size": 896,
        "num_layers": 24,
        "num_heads": 14,
        "num_kv_heads": 2,
        "intermediate_size": 4864,
    },
    "1B": {  # the numbers of Llama-3.2-1B
        "hidden_size": 2048,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "intermediate_size": 8192,
    },
}
"""Llamas by their number of parameters; the (tied) embeddings come on top."""
FULL: dict[str, tuple[Any, ...]] = {
    "rows": (1, 4, 16, 64, 256, 1024),
    "horizon": (16, 64, 256, 1024),
    "vocab_size": (512, 2048, 8192, 32_000, 151_936),
    "model": tuple(MODELS),
}


@dataclass(frozen=True)
class Point:
    """What one process measures."""

    rows: int = 16
    """Rows N, and episodes of an iteration."""
    horizon: int = 32
    """Tokens of every response."""
    vocab_size: int = 2048
    """Vocabulary size V."""
    model: str = "7M"
    """A key of `MODELS`."""


@dataclass(frozen=True)
class Args:
    """What to measure."""

    base: Point = Point()
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
    compute_dtype: str = "float32"
    """What forwards compute in; weights are float32."""
    forward_tokens: int = 16_384
    """Tokens in one forward of the update; more are several forwards."""
    rounds: int = 3
    """Iterations measured; tables show the median."""
    limit_s: int = 120
    """Seconds (of the wall) after which a point is given up."""
    memory_gib: float = 0.0
    """Memory a point may take on a CPU; 0: three quarters of what is free."""
    device: str = "cpu"
    """Where the model runs."""


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


# ------------------------------------------------------------------------------------ one point


class Shares:
    """Self time of parts of a program, in whatever order they call one another."""

    def __init__(self, now: Callable[[], float]) -> None:
        """Start with nothing seen."""
        self.now = now
        self.seconds: dict[str, float] = {}
        self._inside: list[str] = []
        self._since = 0.0

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Count the calls of a function or method as a part."""
        setattr(owner, name, self.timed(getattr(owner, name), part))

    def timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """A function that counts as a part."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._pass()
            self._inside.append(part)
            try:
                return call(*args, **kwargs)
            finally:
                self._pass()
                self._inside.pop()

        return counted

    def _pass(self) -> None:
        """Give the time since the last look to the innermost part."""
        now = self.now()
        if self._inside:
            part = self._inside[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now

    def take(self, total: float) -> dict[str, float]:
        """Shares of `total` seconds, and forget."""
        shares = {part: round(spent / total, 3) for part, spent in self.seconds.items()}
        shares["rest"] = round(1.0 - sum(self.seconds.values()) / total, 3)
        self.seconds = {}
        return shares


class Trainer:
    """A GRPO agent and its environment, in the process of a point."""

    def __init__(self, point: Point, args: Args) -> None:
        """Build model, environment and agent."""
        self.point, self.device = point, args.device
        model: Any = random_causal_lm(
            point.vocab_size,
            max_positions=PROMPT + point.horizon,
            **{"num_heads": 4, **MODELS[point.model]},
        )
        self.parameters = sum(p.numel() for p in model.parameters())
        self.policy = CausalLMPolicy(
            model,
            device=args.device,
            value_head=False,
            compute_dtype=None if args.compute_dtype == "float32" else args.compute_dtype,
        )
        self.reward = self._reward
        ids = np.random.default_rng(0).integers(point.vocab_size, size=(256, PROMPT))
        self.envs = TextGenVectorEnv(
            num_envs=point.rows,
            autoreset_mode="Disabled",
            prompts=[{"prompt": row} for row in ids.tolist()],
            tokenizer=symbol_tokenizer([f"s{i}" for i in range(point.vocab_size - 1)], eos=None),
            reward=lambda completion_ids: self.reward(completion_ids),
            max_new_tokens=point.horizon,
            stop=(),
        )
        at_once = max(1, args.forward_tokens // (PROMPT + point.horizon))
        config = GRPOConfig(
            episodes=point.rows,
            group_size=min(8, point.rows),
            advantage="standard" if point.rows > 1 else "batch",
            microbatch=at_once if at_once < point.rows else None,
            path="sequence",
            lr=1e-5,
            eval_every=0,
            exact_kl_episodes=0,
        )
        self.agent = GRPO(self.policy, self.envs, config)
        self.sampled = self.now()
        self.halfway: Callable[[], None] = lambda: None
        done = Run.rollout_done

        def rollout_done(run: Run) -> None:
            done(run)
            self.sampled = self.now()
            self.halfway()

        Run.rollout_done = rollout_done  # type: ignore[method-assign]

    def _reward(self, completion_ids: list[list[int]]) -> list[float]:
        """Share of ids in the lower half of the vocabulary."""
        half = self.point.vocab_size // 2
        return [sum(i < half for i in ids) / len(ids) for ids in completion_ids]

    def now(self) -> float:
        """CPU seconds; wall seconds on an accelerator, once it is done."""
        if self.device == "cpu":
            return time.process_time()
        torch.accelerator.synchronize()
        return time.perf_counter()

    def iteration(self) -> tuple[float, float]:
        """Seconds of a rollout on the sequence path, and of the update that follows."""
        began = self.now()
        self.agent.learn(10**12, quiet=True, max_updates=1)
        return self.sampled - began, self.now() - self.sampled

    def step_path(self) -> float:
        """Seconds of a rollout on the step path."""
        self.policy.invalidate_cache()  # as after an update
        began = self.now()
        collect(self.policy, self.envs, self.point.rows, path="step")
        return self.now() - began

    def shares(self) -> dict[str, dict[str, float]]:
        """Where the time of a round goes; the timers change it a little."""
        timers, found = Shares(self.now), {}
        timers.wrap(slot_cache.SlotDecoder, "_forward", "model")
        timers.wrap(GraphDecode, "write", "model")
        timers.wrap(GraphDecode, "act", "model")
        timers.wrap(backbone.Backbone, "_acting_logits", "output layer")
        timers.wrap(causal_lm, "draw", "sampler")
        timers.wrap(self.envs, "step", "environment")
        timers.wrap(self.envs, "reset", "environment")
        timers.wrap(self, "reward", "reward")
        timers.wrap(backbone.Backbone, "_hidden_all", "forward")
        timers.wrap(causal_lm, "score_tokens", "scores")
        timers.wrap(torch.Tensor, "backward", "backward")
        timers.wrap(GuardedOptimizer, "step", "optimizer")
        began = self.now()

        def halfway() -> None:
            found["rollout"] = timers.take(self.sampled - began)

        self.halfway = halfway
        _, update = self.iteration()
        found["update"] = timers.take(update)
        found["step path"] = timers.take(self.step_path())
        return found


def child(pipe: Any, point: Point, memory: int, args: Args) -> None:
    """Measure a point and send what was found."""
    torch.set_num_threads(1)
    if args.device == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    try:
        pipe.send(measured(point, args))
    except (MemoryError, torch.OutOfMemoryError):
        pipe.send({"skipped": "did not fit into memory"})
    except RuntimeError as problem:
        if "allocate memory" not in str(problem):
            raise
        pipe.send({"skipped": f"did not fit into {memory / 2**30:.1f} GiB"})


def measured(point: Point, args: Args) -> dict[str, Any]:
    """Tokens per second of each kind, peak memory, and shares."""
    trainer = Trainer(point, args)
    built = peak_mib(args.device)
    times: dict[str, list[float]] = {"rollout": [], "update": [], "step path": []}
    for turn in range(args.rounds + 1):
        spent = dict(zip(times, (*trainer.iteration(), trainer.step_path()), strict=True))
        if turn:  # the first one warms up
            for kind, value in spent.items():
                times[kind].append(value)
    tokens = point.rows * point.horizon
    found: dict[str, Any] = {"parameters": trainer.parameters, "tokens": tokens}
    for kind, values in times.items():
        found[kind] = {
            "tokens_per_s": round(tokens / statistics.median(values), 1),
            "spread": [round(tokens / f(values), 1) for f in (max, min)],
        }
    both = [sum(pair) for pair in zip(times["rollout"], times["update"], strict=True)]
    found["iteration_tokens_per_s"] = round(tokens / statistics.median(both), 1)
    found |= {"peak_mib": round(peak_mib(args.device)), "built_mib": round(built)}
    return found | {"shares": trainer.shares()}


# ------------------------------------------------------------------------------------ all points


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
