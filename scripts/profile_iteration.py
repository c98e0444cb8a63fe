"""Which operations one iteration spends its time on: PyTorch's profiler on one rollout and update.

`python scripts/profile_iteration.py --size 6.8M` lets GRPO train a Llama of random weights (64
responses of 64 tokens in groups of 8), profiles the rollout and the update of one iteration, and
prints the operations that cost most by themselves. With `--folder` it writes both traces, which
`chrome://tracing` and ui.perfetto.dev open. The last line is JSON.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the benchmarks run

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from against_trl.workload import SIZES
from machine import described
from torch.profiler import ProfilerActivity, profile

from textgym.agents import GRPO, GRPOConfig
from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.runs import Run
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

PROMPT, RESPONSE, EPISODES, GROUP = 16, 64, 64, 8


@dataclass(frozen=True)
class Args:
    """What to profile."""

    size: str = "6.8M"
    """0.16M, 6.8M, 14.5M or 0.5B parameters."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """What forwards compute in."""
    path: Literal["step", "sequence"] = "sequence"
    """How responses are sampled."""
    device: str = "auto"
    """Where the model runs."""
    warmup: int = 2
    """Iterations before."""
    top: int = 10
    """Operations printed."""
    folder: Path | None = None
    """Where the traces go."""


class Profiled:
    """Profiles the phases of one iteration, where a run says that they end."""

    def __init__(self, args: Args, device: torch.device) -> None:
        self.args, self.device = args, device
        self.updates = 0
        self.found: dict[str, profile] = {}
        self._running: profile | None = None
        rollout_done, finish_update = Run.rollout_done, Run.finish_update

        def sampled(run: Run) -> None:
            self._switch("update")
            rollout_done(run)

        def finished(run: Run, *given: Any, **named: Any) -> None:
            finish_update(run, *given, **named)
            self.updates += 1
            self._switch("rollout")

        Run.rollout_done, Run.finish_update = sampled, finished  # type: ignore[method-assign]

    def _switch(self, phase: str) -> None:
        if self._running is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self._running.stop()
            self._running = None
        if self.updates == self.args.warmup and phase not in self.found:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._running = self.found[phase] = profile(activities=activities)
            self._running.start()

    def table(self, phase: str) -> list[dict[str, Any]]:
        """Operations by their own time, milliseconds and share of the phase."""
        kind = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        events = self.found[phase].key_averages()
        whole = sum(getattr(event, kind) for event in events)
        events = sorted(events, key=lambda event: -getattr(event, kind))
        return [
            {
                "name": event.key,
                "calls": event.count,
                "ms": round(getattr(event, kind) / 1e3, 1),
                "share": round(getattr(event, kind) / whole, 3),
            }
            for event in events[: self.args.top]
        ]


def train(args: Args) -> Profiled:
    """Train for as many iterations as it takes."""
    size = SIZES[args.size]
    model = random_causal_lm(
        size["vocab_size"],
        hidden_size=size["hidden_size"],
        num_layers=size["layers"],
        num_heads=size["heads"],
        num_kv_heads=size.get("kv_heads"),
        intermediate_size=size["inner"],
    )
    policy = CausalLMPolicy(
        model, device=args.device, compute_dtype=args.compute_dtype, value_head=False
    )
    ids = np.random.default_rng(0).integers(size["vocab_size"], size=(256, PROMPT))
    symbols = [f"s{i}" for i in range(size["vocab_size"])]
    envs = TextGenVectorEnv(
        num_envs=EPISODES,
        autoreset_mode="Disabled",
        prompts=[{"prompt": row} for row in ids.tolist()],
        tokenizer=symbol_tokenizer(symbols, bos=None, eos=None),
        reward=lambda token_ids: sum(t < size["vocab_size"] // 2 for t in token_ids) / RESPONSE,
        max_new_tokens=RESPONSE,
        stop=(),
    )
    config = GRPOConfig(episodes=EPISODES, group_size=GROUP, path=args.path, eval_every=0)
    profiled = Profiled(args, policy.device)
    GRPO(policy, envs, config).learn(1 << 40, quiet=True, max_updates=args.warmup + 1)
    return profiled


def main(args: Args) -> None:
    """Print the tables and the JSON line."""
    if args.device != "cuda":
        torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "profile_iteration"}
    result |= described(("torch", "transformers", "numpy"))
    for key in ("processor", "cores", "system", "python", "versions", "command", "commit"):
        print(f"{key:<10} {result[key]}")
    profiled = train(args)
    if profiled.device.type == "cuda":
        result["device"] = torch.cuda.get_device_name(profiled.device)
    for phase in ("rollout", "update"):
        rows = result[phase] = profiled.table(phase)
        print(f"\n{phase:<52}{'calls':>8}{'ms':>10}{'share':>8}")
        for row in rows:
            print(f"{row['name'][:50]:<52}{row['calls']:>8}{row['ms']:>10}{row['share']:>8.1%}")
        if args.folder is not None:
            args.folder.mkdir(parents=True, exist_ok=True)
            trace = args.folder / f"{phase}.json.gz"
            profiled.found[phase].export_chrome_trace(str(trace))
            print(f"trace: {trace}")
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
