"""Responses of unequal lengths: giving finished rows the next prompt, against waiting for the rest.

`python scripts/bench_ragged.py` collects the same episodes on the same rows in four ways, in turns:

- `waiting`: a batch decodes until its longest response has ended, as `generate` does.
- `compaction`: rows that have ended leave the batch; the next batch waits for its last row.
- `sequence`: `collect`'s sequence path. Rows that have ended are given the next prompts.
- `step`: the same on the step path.

Lengths are uniform over a range, and the draws are steered so that responses have just these; the
tokens between are drawn as ever. Rates count the tokens of responses, not those that a row decodes
after its end. Prompts are shared by groups of 8. The clock is CPU time of one thread; on an
accelerator it is wall time. The last line is JSON.
"""

from __future__ import annotations

import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch: one thread, so CPU time is comparable

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from machine import described
from torch import Tensor

from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.policies.results import Drawn
from textgym.rollout import collect
from textgym.sampling import Sampler
from textgym.streams import mix64
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

GROUP = 8
KINDS = ("waiting", "compaction", "sequence", "step")


@dataclass(frozen=True)
class Args:
    """What to measure."""

    ranges: tuple[tuple[int, int], ...] = ((64, 64), (32, 96), (1, 128))
    """Shortest and longest response."""
    episodes: int = 512
    """Responses, a multiple of rows."""
    num_envs: int = 64
    """Rows N, a multiple of 8."""
    vocab_size: int = 2048
    """Vocabulary size V."""
    prompt_tokens: int = 16
    """Length of every prompt."""
    rounds: int = 3
    """Measurements of each kind, taken in turns; tables show the median."""
    device: str = "auto"
    """Where the model runs."""


class SteeredPolicy(CausalLMPolicy):
    """Draws the stop id with certain keys, and with no others."""

    stop_id: int
    last: Tensor

    def _draw(
        self, hidden: Tensor, key: Tensor, mask: Tensor | None, sampler: Sampler | None = None
    ) -> Drawn:
        drawn = super()._draw(hidden, key, mask, sampler)
        action = torch.where(drawn.action == self.stop_id, 0, drawn.action)
        action = torch.where(torch.isin(key, self.last), self.stop_id, action)
        return Drawn(action, drawn.logprob, drawn.value)


class Bench:
    """One range of lengths."""

    def __init__(self, low: int, high: int, args: Args) -> None:
        self.args, self.longest = args, high
        model = random_causal_lm(
            args.vocab_size,
            hidden_size=256,
            num_layers=6,
            num_heads=4,
            intermediate_size=1024,
            max_positions=args.prompt_tokens + high,
        )
        self.policy = SteeredPolicy(  # a graph would keep the keys it was captured with
            model, device=args.device, value_head=False, cuda_graphs=False
        )
        rng = np.random.default_rng(0)
        ids = rng.integers(args.vocab_size - 2, size=(256, args.prompt_tokens))
        symbols = [f"s{i}" for i in range(args.vocab_size - 2)]  # and two more, one of them stops
        tokenizer = symbol_tokenizer(symbols)
        self.envs = TextGenVectorEnv(
            num_envs=args.num_envs,
            autoreset_mode="Disabled",
            prompts=[{"prompt": row} for row in ids.tolist()],
            tokenizer=tokenizer,
            reward=lambda text: 1.0,
            max_new_tokens=high,
        )
        groups = args.episodes // GROUP
        self.prompts = rng.integers(256, size=groups)
        self.lengths = rng.integers(low, high + 1, size=args.episodes)
        self.stream = np.repeat(mix64(0, np.arange(groups)), GROUP)
        self.sample = np.tile(np.arange(GROUP), groups)
        last = mix64(0, self.stream, self.sample, args.prompt_tokens + self.lengths - 1)
        (self.policy.stop_id,) = tokenizer.stop_ids
        self.last = torch.from_numpy(last.view(np.int64)).to(self.policy.device)

    def collected(self, path: Any, batch: int) -> None:
        """All episodes by `collect`, so many at a time."""
        self.policy.last = self.last
        for first in range(0, self.args.episodes // GROUP, batch // GROUP):
            rows = self.prompts[first : first + batch // GROUP]
            made = collect(
                self.policy,
                self.envs,
                batch,
                group_size=GROUP,
                first_episode=first,
                prompt_rows=rows,
                path=path,
            )
            assert (made.lengths == self.lengths[first * GROUP :][:batch]).all()

    def waiting(self) -> None:
        """Batches that decode until the longest response has ended; the rest is thrown away."""
        self.policy.last = self.last[:0]
        number = self.args.num_envs
        for first in range(0, self.args.episodes, number):
            part = slice(first, first + number)
            rows = np.repeat(self.prompts, GROUP)[part]
            obs, _ = self.envs.reset(options={"prompt_row": rows})
            self.policy.generate(
                obs,
                self.stream[part],
                self.sample[part],
                max_new_tokens=int(self.lengths[part].max()),
                stop_ids=(),
            )

    def kinds(self) -> dict[str, Callable[[], None]]:
        """One function a kind."""
        return {
            "waiting": self.waiting,
            "compaction": lambda: self.collected("sequence", self.args.num_envs),
            "sequence": lambda: self.collected("sequence", self.args.episodes),
            "step": lambda: self.collected("step", self.args.episodes),
        }

    def seconds(self, run: Callable[[], None]) -> float:
        """CPU seconds; wall seconds on an accelerator. The cache is empty, as after an update."""
        self.policy.invalidate_cache()
        clock = time.process_time
        if self.policy.device.type != "cpu":
            torch.accelerator.synchronize()
            clock = time.perf_counter
        start = clock()
        run()
        if self.policy.device.type != "cpu":
            torch.accelerator.synchronize()
        return clock() - start


def measure(low: int, high: int, args: Args) -> dict[str, Any]:
    """Tokens per second of every kind, and what refilling wins."""
    bench = Bench(low, high, args)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(args.rounds + 1):
        for kind, run in bench.kinds().items():
            spent = bench.seconds(run)
            if turn:  # the first one warms up
                times[kind].append(spent)
    tokens = int(bench.lengths.sum())
    middle = {kind: statistics.median(spent) for kind, spent in times.items()}
    row: dict[str, Any] = {"shortest": low, "longest": high}
    row |= {kind: round(tokens / middle[kind]) for kind in KINDS}
    row["sequence_over_waiting"] = round(middle["waiting"] / middle["sequence"], 2)
    row["sequence_over_compaction"] = round(middle["compaction"] / middle["sequence"], 2)
    row["step_over_waiting"] = round(middle["waiting"] / middle["step"], 2)
    row["spread"] = {k: [round(tokens / max(t)), round(tokens / min(t))] for k, t in times.items()}
    return row


def main(args: Args) -> None:
    """Print the table and the JSON line."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "bench_ragged"}
    result |= described(("torch", "transformers", "gymnasium", "numpy"))
    for key in ("processor", "cores", "system", "python", "versions", "command", "commit"):
        print(f"{key:<10} {result[key]}")
    print(f"\n{args.episodes} responses on {args.num_envs} rows, tokens of responses per second,")
    print(f"median of {args.rounds}")
    heads = ("lengths", *KINDS, "seq/waiting", "seq/compact", "step/waiting")
    print(" ".join(f"{head:>12}" for head in heads))
    result["rows"] = []
    for low, high in args.ranges:
        row = measure(low, high, args)
        result["rows"].append(row)
        cells = [f"{low} to {high}", *(f"{row[kind]:,}" for kind in KINDS)]
        names = ("sequence_over_waiting", "sequence_over_compaction", "step_over_waiting")
        cells += [f"{row[name]}x" for name in names]
        print(" ".join(f"{cell:>12}" for cell in cells), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
