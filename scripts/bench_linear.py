"""Linear layers by oneDNN against PyTorch's own: what `textgym.policies.cpu_linear` wins.

`python scripts/bench_linear.py` times forward and backward of the layers of a small language model
in float32, on one thread, in turns. The last line is JSON.
"""

from __future__ import annotations

import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch: one thread, so CPU time is comparable

import copy
import statistics
import time
from typing import Any

import torch
from machine import described
from torch import nn

from textgym.policies.cpu_linear import use_onednn

SHAPES = (
    (16, 256, 32_000),
    (64, 256, 32_000),
    (560, 288, 32_000),
    (1280, 288, 768),
    (16, 256, 688),
)
ROUNDS = 7


def milliseconds(layer: nn.Linear, x: torch.Tensor, *, backward: bool) -> float:
    """CPU time of one call."""
    start = time.process_time()
    if backward:
        layer(x).sum().backward()
    else:
        with torch.inference_mode():
            layer(x)
    return 1e3 * (time.process_time() - start)


def measure(rows: int, fan_in: int, fan_out: int, *, backward: bool) -> dict[str, Any]:
    """Median of both, in turns."""
    plain = nn.Linear(fan_in, fan_out, bias=False)
    holder = nn.Sequential(copy.deepcopy(plain))
    use_onednn(holder)
    x = torch.randn(rows, fan_in).requires_grad_(backward)
    times: list[list[float]] = [[], []]
    for turn in range(ROUNDS + 1):
        for spent, layer in zip(times, (plain, holder[0]), strict=True):
            found = milliseconds(layer, x, backward=backward)
            if turn:  # the first one warms up
                spent.append(found)
    pytorch, onednn = (statistics.median(spent) for spent in times)
    return {
        "rows": rows,
        "in": fan_in,
        "out": fan_out,
        "pass": "forward and backward" if backward else "forward",
        "pytorch_ms": round(pytorch, 2),
        "onednn_ms": round(onednn, 2),
        "ratio": round(pytorch / onednn, 2),
    }


def main() -> None:
    """Print the table and the JSON line."""
    torch.set_num_threads(1)
    found = [measure(*shape, backward=backward) for backward in (False, True) for shape in SHAPES]
    for row in found:
        print(" ".join(f"{name}={value}" for name, value in row.items()))
    print(json.dumps({"benchmark": "bench_linear", **described(("torch",)), "rows": found}))


if __name__ == "__main__":
    main()
