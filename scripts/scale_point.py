"""One point of `bench_scale.py`: a GRPO agent of one size, measured in a process of its own."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from machine import peak_mib

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
class Setting:
    """How a point is measured."""

    compute_dtype: str = "float32"
    """What forwards compute in; weights are float32."""
    forward_tokens: int = 16_384
    """Tokens in one forward of the update; more are several forwards."""
    rounds: int = 3
    """Iterations measured; tables show the median."""
    device: str = "cpu"
    """Where the model runs."""


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

    def __init__(self, point: Point, args: Setting) -> None:
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


def child(pipe: Any, point: Point, memory: int, args: Setting) -> None:
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


def measured(point: Point, args: Setting) -> dict[str, Any]:
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
