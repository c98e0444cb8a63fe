"""What every child of `bench_e2e.py` runs: one model, one table of prompts, one reward, one clock.

Nothing here needs textgym or TRL, so that the environments of both can import it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SIZES: dict[str, dict[str, int]] = {
    "0.16M": {"vocab_size": 512, "hidden_size": 64, "layers": 2, "heads": 4, "inner": 256},
    "6.8M": {"vocab_size": 2048, "hidden_size": 256, "layers": 6, "heads": 4, "inner": 1024},
    "14.5M": {"vocab_size": 32_000, "hidden_size": 256, "layers": 6, "heads": 4, "inner": 1024},
    "0.5B": {  # the numbers of Qwen2.5-0.5B
        "vocab_size": 151_936,
        "hidden_size": 896,
        "layers": 24,
        "heads": 14,
        "kv_heads": 2,
        "inner": 4864,
    },
}
"""Llamas with tied embeddings, by their number of parameters."""

PROMPTS = 4096


@dataclass(frozen=True)
class Workload:
    """What one child does."""

    algorithm: str
    """`grpo` or `ppo`."""
    size: str
    """A key of `SIZES`."""
    dtype: str
    """`float32`, or `bfloat16` to compute in; weights are float32 in both."""
    kl_coef: float
    """Price of KL to the first policy; 0: no reference."""
    warmup: int
    """Updates before the clock counts."""
    updates: int
    """Updates that are measured."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    prompt_tokens: int = 16
    """Length of every prompt."""
    response_tokens: int = 64
    """Length of every response; nothing ends it earlier."""
    episodes: int = 64
    """Responses of an update."""
    group_size: int = 8
    """Responses to one prompt, in GRPO."""
    epochs: int = 4
    """Passes over a batch, in PPO."""
    microbatch: int = 64
    """Responses in one forward of the update."""
    lr: float = 1e-3
    """Learning rate of Adam."""
    options: dict[str, Any] = field(default_factory=dict)
    """What is not the same in both: fields of our config."""

    @property
    def vocab_size(self) -> int:
        """Vocabulary size V."""
        return SIZES[self.size]["vocab_size"]

    def as_argument(self) -> str:
        """How a child is told."""
        return json.dumps(asdict(self))


def from_command_line(doc: str | None) -> Workload:
    """Read the workload that the parent asks for."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("workload", help="a Workload as JSON; bench_e2e.py gives it")
    return Workload(**json.loads(parser.parse_args().workload))


def save_model(work: Workload, folder: str) -> None:
    """Write a float32 model of random weights into a folder; the same one in every child."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SIZES[work.size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocab_size"],
        hidden_size=size["hidden_size"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size.get("kv_heads", size["heads"]),
        max_position_embeddings=max(512, work.prompt_tokens + work.response_tokens),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def prompts(work: Workload) -> list[list[int]]:
    """Random ids; the same ones in every child."""
    import numpy as np

    shape = (PROMPTS, work.prompt_tokens)
    return np.random.default_rng(0).integers(work.vocab_size, size=shape).tolist()


class Meter:
    """Reward and clock of a child: both report what they saw, whoever trains.

    On a CPU the clock is CPU time of the process, on CUDA it is wall time after synchronisation.
    """

    def __init__(self, work: Workload) -> None:
        """Start with nothing measured."""
        self.work = work
        self.ends: list[float] = []
        self.sampling: list[float] = []
        self.tokens: list[int] = []
        self.rewards: list[float] = []
        self.built_mib = 0.0
        self._sampling, self._tokens, self._sum, self._count = 0.0, 0, 0.0, 0

    def reward(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Share of ids in the lower half of the vocabulary, for each response."""
        half = self.work.vocab_size // 2
        scores = [sum(i < half for i in ids) / max(1, len(ids)) for ids in completion_ids]
        self._tokens += sum(len(ids) for ids in completion_ids)
        self._sum += sum(scores)
        self._count += len(scores)
        return scores

    def now(self) -> float:
        """Seconds of the clock."""
        if self.work.device == "cpu":
            return time.process_time()
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Count what is inside as sampling and scoring."""
        began = self.now()
        yield
        self._sampling += self.now() - began

    def rollout_done(self) -> None:
        """Count all since the last update as sampling and scoring."""
        self._sampling = self.now() - self.ends[-1] if self.ends else 0.0

    def update_done(self) -> None:
        """End an update."""
        self.ends.append(self.now())
        self.sampling.append(self._sampling)
        self.tokens.append(self._tokens)
        self.rewards.append(self._sum / max(1, self._count))
        self._sampling, self._tokens, self._sum, self._count = 0.0, 0, 0.0, 0

    def ready(self, model: torch.nn.Module) -> None:
        """Note what was there before the first update."""
        self.built_mib = self.peak_mib()
        self.parameters = sum(p.numel() for p in model.parameters())
        self.weights = sum(float(p.detach().double().abs().sum()) for p in model.parameters())

    def peak_mib(self) -> float:
        """Peak memory: of the process, or of the accelerator."""
        if self.work.device != "cpu":
            import torch

            return torch.cuda.max_memory_allocated() / 2**20
        try:  # ru_maxrss would begin with that of the process that started this one
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

    def report(self, *packages: str) -> None:
        """Print the JSON line.

        Raises:
            RuntimeError: If an update did not have its tokens.
        """
        work = self.work
        last = work.warmup + work.updates
        due = work.episodes * work.response_tokens
        if self.tokens[:last] != [due] * last:
            raise RuntimeError(f"expected {due} tokens in each of {last} updates: {self.tokens}")
        times = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        print(
            json.dumps(
                {
                    "seconds": times[work.warmup - 1 : last - 1],
                    "rollout_seconds": self.sampling[work.warmup : last],
                    "tokens": due,
                    "rewards": self.rewards[:last],
                    "peak_mib": self.peak_mib(),
                    "built_mib": self.built_mib,
                    "parameters": self.parameters,
                    "weights": self.weights,
                    "versions": {name: version(name) for name in packages},
                }
            )
        )


def one_thread(work: Workload) -> None:
    """Let torch compute in one thread on a CPU, as the parent's OMP_NUM_THREADS asks for too."""
    import torch

    if work.device == "cpu":
        torch.set_num_threads(1)
        assert os.environ.get("OMP_NUM_THREADS") == "1", "set OMP_NUM_THREADS=1"
