"""Decoded tokens per second over what the machine's memory and arithmetic allow.

`python scripts/bench_roofline.py` lets a model of random weights write, and measures on the same
machine, in turns, how fast memory is read and matrices are multiplied. A decoding step of n rows
reads every weight of its linear layers and what the cache holds of keys and values, and writes one
column of them; it multiplies each weight n times. So it takes at least

    bound = max(bytes / bandwidth, operations / throughput)

with the bandwidth of reading as many bytes over and over (small models stay in a cache) and the
throughput of large square matrices. Logits, norms and samplers are left out: the bound is of the
arithmetic that cannot be avoided. `products` are the tokens per second that the linear layers alone
would allow, at their own shapes, each by the fastest kernel found. Tokens are written by
`generate` (whole responses) and by `act` (one at a time, as beside an environment).

The clock is CPU time of one thread, on an accelerator it is wall time. The last line is JSON.
"""

from __future__ import annotations

import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch: one thread, so CPU time is comparable

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from machine import described
from torch import Tensor, nn

from textgym.policies import CausalLMPolicy, random_causal_lm

SIZES: dict[str, dict[str, int]] = {
    "0.16M": {"vocab_size": 512, "hidden_size": 64, "num_layers": 2, "intermediate_size": 256},
    "6.8M": {"vocab_size": 2048, "hidden_size": 256, "num_layers": 6, "intermediate_size": 1024},
    "14.5M": {"vocab_size": 32_000, "hidden_size": 256, "num_layers": 6, "intermediate_size": 1024},
    "0.5B": {  # the numbers of Qwen2.5-0.5B
        "vocab_size": 151_936,
        "hidden_size": 896,
        "num_layers": 24,
        "num_heads": 14,
        "num_kv_heads": 2,
        "intermediate_size": 4864,
    },
}
"""Llamas with tied embeddings, by their number of parameters."""


@dataclass(frozen=True)
class Args:
    """What to measure."""

    device: str = "cpu"
    """Where the model runs."""
    size: Literal["auto", "0.16M", "6.8M", "14.5M", "0.5B"] = "auto"
    """Which model; auto: 14.5M on a CPU, else 0.5B."""
    rows: tuple[int, ...] = (1, 16, 64, 256)
    """Numbers of rows n."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Of the weights."""
    prompt_tokens: int = 32
    """Tokens that are held when the clock starts."""
    new_tokens: int = 32
    """Decoding steps that are measured."""
    rounds: int = 3
    """Measurements of each kind, in turns; tables show the median."""
    square: int = 0
    """Rows of the large matrices; 0: 1,024 on a CPU, else 8,192."""


# ------------------------------------------------------------------------------------ the step


@dataclass(frozen=True)
class Step:
    """What one decoding step of n rows has to move and to compute, counted from the model."""

    weight_bytes: int
    """Weights of all linear layers, the output layer among them; each is read once."""
    cache_bytes: int
    """Keys and values read, and those of one column written."""
    operations: int
    """Multiplications and additions of the linear layers and of attention."""

    @classmethod
    def of(cls, policy: CausalLMPolicy, rows: int, held: float) -> Step:
        """Count the step of a policy in which each row attends to `held` columns."""
        layers, config = linear_layers(policy), policy.config
        weights = sum(layer.weight.numel() for layer in layers)
        size = layers[0].weight.element_size()
        head = config.head_dim
        column = 2 * config.num_hidden_layers * config.num_key_value_heads * head * size
        attention = 4 * config.num_hidden_layers * config.num_attention_heads * head * held
        return cls(
            weight_bytes=weights * size,
            cache_bytes=round(rows * column * (held + 1)),
            operations=round(rows * (2 * weights + attention)),
        )

    @property
    def bytes(self) -> int:
        """All that is moved."""
        return self.weight_bytes + self.cache_bytes


def linear_layers(policy: CausalLMPolicy) -> list[nn.Linear]:
    """The layers that a step goes through, the output layer among them."""
    return [m for m in policy.model.modules() if isinstance(m, nn.Linear)]


# ------------------------------------------------------------------------------------ the machine


def seconds(run: Callable[[], Any], device: str, least: float = 0.02) -> float:
    """Seconds of a run, repeated until they can be measured."""
    times = 1
    while True:
        began = clock(device)
        for _ in range(times):
            run()
        spent = clock(device) - began
        if spent >= least:
            return spent / times
        times *= 4


def clock(device: str) -> float:
    """CPU seconds; wall seconds on an accelerator, once it is done."""
    if device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def readers(size: int, device: str) -> dict[str, Callable[[], Any]]:
    """Plain operations that read (or read and write) `size` bytes."""
    width = 1024
    data = torch.ones(max(1, size // (4 * width)), width, device=device)
    half, vector = data[: max(1, len(data) // 2)], data[0].clone()
    target = torch.empty_like(half)
    return {
        "sum": lambda: data.sum(),
        "matrix times vector": lambda: data @ vector,
        "copy": lambda: target.copy_(half),
    }


def bandwidth(size: int, device: str) -> float:
    """Bytes per second of the fastest plain operation that moves `size` bytes again and again."""
    return size / min(seconds(run, device) for run in readers(size, device).values())


def multipliers(x: Tensor, weight: Tensor) -> list[Callable[[], Any]]:
    """Kernels for X W^T: that of torch, and on a CPU oneDNN's."""
    found: list[Callable[[], Any]] = [lambda: F.linear(x, weight)]
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if x.device.type == "cpu" and onednn is not None:
        found.append(lambda: onednn(x, weight, None, "none", [], ""))
    return found


def throughput(square: int, dtype: torch.dtype, device: str) -> float:
    """Operations per second of a product of large square matrices."""
    x, weight = torch.randn(2, square, square, dtype=dtype, device=device)
    best = min(seconds(run, device) for run in multipliers(x, weight))
    return 2 * square**3 / best


def products(policy: CausalLMPolicy, rows: int, device: str) -> float:
    """Seconds of all linear layers of a step, one after another, each by its fastest kernel.

    Layers of one shape are timed together, so that each has its weights read from where they are.
    """
    shapes: dict[tuple[int, int], list[Tensor]] = {}
    for layer in linear_layers(policy):
        shapes.setdefault(tuple(layer.weight.shape), []).append(layer.weight)
    total = 0.0
    for (_, fan_in), weights in shapes.items():
        x = torch.randn(rows, fan_in, dtype=weights[0].dtype, device=device)
        kinds = zip(*(multipliers(x, weight) for weight in weights), strict=True)
        total += min(seconds(together(kind, device), device) for kind in kinds)
    return total


def together(runs: Sequence[Callable[[], Any]], device: str) -> Callable[[], Any]:
    """One after another; on CUDA as one graph, or starting them would be what is measured."""

    def all_of_them() -> None:
        for run in runs:
            run()

    if not device.startswith("cuda"):
        return all_of_them
    all_of_them()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    return graph.replay


# ------------------------------------------------------------------------------------ decoding


def writers(policy: CausalLMPolicy, rows: int, args: Args) -> dict[str, Callable[[int], None]]:
    """By name, how some tokens are written after prompts of random ids."""
    rng = np.random.default_rng(0)
    columns = args.prompt_tokens + args.new_tokens + 1
    ids = rng.integers(policy.vocab_size, size=(rows, columns))
    stream = np.arange(rows).astype(np.uint64)

    def generate(count: int) -> None:
        length = np.full((rows, 1), args.prompt_tokens)
        obs = {"input_ids": ids, "length": length}
        made = policy.generate(obs, stream, max_new_tokens=count, stop_ids=())
        assert made.tokens.shape == (rows, count)

    def act(count: int) -> None:
        obs = {"input_ids": ids.copy(), "length": np.full((rows, 1), args.prompt_tokens)}
        for _ in range(count):
            action = policy.act(obs, stream).action
            obs["input_ids"][np.arange(rows), obs["length"][:, 0]] = action
            obs["length"] += 1

    return {"generate": generate, "act": act}


def step_seconds(
    write: Callable[[int], None], policy: CausalLMPolicy, steps: int, device: str
) -> float:
    """Seconds of a decoding step: what `steps` tokens more than one take."""
    spent = []
    for count in (1, steps + 1):
        policy.invalidate_cache()  # prompts are prefilled each time
        began = clock(device)
        write(count)
        spent.append(clock(device) - began)
    return (spent[1] - spent[0]) / steps


def measure(
    policy: CausalLMPolicy, dtype: torch.dtype, rows: int, square: int, args: Args
) -> dict[str, Any]:
    """Measure one line of the table."""
    step = Step.of(policy, rows, held=args.prompt_tokens + 1 + args.new_tokens / 2)
    kinds: dict[str, Callable[[], float]] = {
        "bandwidth": lambda: bandwidth(step.bytes, args.device),
        "throughput": lambda: throughput(square, dtype, args.device),
        "products": lambda: products(policy, rows, args.device),
    }
    for name, write in writers(policy, rows, args).items():
        kinds[name] = lambda w=write: step_seconds(w, policy, args.new_tokens, args.device)
    found: dict[str, list[float]] = {name: [] for name in kinds}
    with torch.inference_mode():
        for turn in range(args.rounds + 1):
            for name, run in kinds.items():
                value = run()
                if turn:  # the first one warms up
                    found[name].append(value)
    middle = {name: statistics.median(values) for name, values in found.items()}
    memory = step.bytes / middle["bandwidth"]
    arithmetic = step.operations / middle["throughput"]
    bound = max(memory, arithmetic)
    row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "rows": rows} | asdict(step)
    row["gb_per_s"] = round(middle["bandwidth"] / 1e9, 1)
    row["gflop_per_s"] = round(middle["throughput"] / 1e9, 1)
    row["bound"] = round(rows / bound, 1)
    row["bound_by"] = "memory" if memory >= arithmetic else "arithmetic"
    row["products"] = round(rows / middle["products"], 1)
    for name in ("generate", "act"):
        row[name] = round(rows / middle[name], 1)
        row[f"{name}_spread"] = [round(rows / f(found[name]), 1) for f in (max, min)]
        row[f"{name}_of_bound"] = round(bound / middle[name], 3)
        row[f"{name}_of_products"] = round(middle["products"] / middle[name], 3)
    return row


def main(args: Args) -> None:
    """Print the table and the JSON line."""
    torch.set_num_threads(1)
    on_cpu = args.device == "cpu"
    size = args.size if args.size != "auto" else ("14.5M" if on_cpu else "0.5B")
    square = args.square or (1024 if on_cpu else 8192)
    result: dict[str, Any] = {"benchmark": "bench_roofline"}
    result |= described(("torch", "transformers", "numpy"))
    for key in ("processor", "cores", "system", "python", "versions", "command", "commit"):
        print(f"{key:<10} {result[key]}")
    device = "cpu" if on_cpu else torch.cuda.get_device_name(args.device)
    result |= {"device": device, "clock": "cpu" if on_cpu else "wall", "size": size}
    result |= {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens, "lines": []}
    numbers: dict[str, Any] = {"num_heads": 4, **SIZES[size]}
    print(
        f"\n{size} on {device}: tokens per second ({result['clock']} time), median of "
        f"{args.rounds}; {args.new_tokens} tokens after {args.prompt_tokens}"
    )
    heads = ("dtype", "rows", "MB", "GFLOP", "GB/s", "GFLOP/s", "bound", "by", "products")
    heads += ("generate", "of bound", "of prod.", "act", "of bound")
    print(" ".join(f"{head:>10}" for head in heads))
    for dtype in args.dtypes:
        model = random_causal_lm(max_positions=args.prompt_tokens + args.new_tokens + 1, **numbers)
        policy = CausalLMPolicy(model, device=args.device, dtype=dtype, value_head=False)
        for rows in args.rows:
            row = measure(policy, getattr(torch, dtype), rows, square, args)
            result["lines"].append(row)
            moved = (row["weight_bytes"] + row["cache_bytes"]) / 1e6
            cells = (f"{moved:,.1f}", f"{row['operations'] / 1e9:,.2f}", row["gb_per_s"])
            cells += (f"{row['gflop_per_s']:,.0f}", f"{row['bound']:,.0f}", row["bound_by"])
            cells += (f"{row['products']:,.0f}", f"{row['generate']:,.0f}")
            cells += (f"{row['generate_of_bound']:.1%}", f"{row['generate_of_products']:.1%}")
            cells += (f"{row['act']:,.0f}", f"{row['act_of_bound']:.1%}")
            print(" ".join(f"{cell:>10}" for cell in (dtype, rows, *cells)), flush=True)
        del policy, model
        gc.collect()
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
