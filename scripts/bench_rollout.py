"""Tokens per second of `collect` through `env.step` against `generate()` of transformers.

`python scripts/bench_rollout.py` lets one model of random weights write the same number of tokens
after the same prompts: by `model.generate`, by `collect` on its step path and on its sequence path,
in turns. `generate` is that of the model as transformers makes it; `same layers` is that of the
policy's own model, whose linear layers a CPU multiplies by oneDNN. It also steps the environment
alone. The clock is CPU time of one thread; on an accelerator it is wall time. The last line is
JSON.

`--preset gpu` takes a model of 0.5 billion parameters in bfloat16 (random weights, the numbers of
Qwen2.5-0.5B) and longer responses. There `static` is `generate` with transformers' static cache,
which it compiles on CUDA; `eager` is the sequence path without CUDA graphs, `compiled` the same
with compiled ones. What the first use takes (captures, compilers) is stated beside the times.
"""

from __future__ import annotations

import copy
import gc
import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch: one thread, so CPU time is comparable

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import tyro
from machine import described

from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.policies.loading import resolve_device
from textgym.rollout import collect
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

Preset = Literal["cpu", "gpu"]
MODELS: dict[Preset, dict[str, int]] = {
    "cpu": {
        "hidden_size": 256,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 688,
    },
    "gpu": {  # the numbers of Qwen2.5-0.5B
        "hidden_size": 896,
        "num_layers": 24,
        "num_heads": 14,
        "num_kv_heads": 2,
        "intermediate_size": 4864,
    },
}
DTYPES: dict[Preset, str] = {"cpu": "float32", "gpu": "bfloat16"}
SIZES: dict[Preset, dict[str, Any]] = {
    "cpu": {
        "vocab_sizes": (4096, 32_000),
        "num_envs": (16, 64),
        "prompt_tokens": 32,
        "new_tokens": 64,
        "rounds": 5,
    },
    "gpu": {
        "vocab_sizes": (151_936,),
        "num_envs": (64, 256),
        "prompt_tokens": 32,
        "new_tokens": 512,
        "rounds": 3,
    },
}


@dataclass(frozen=True)
class Args:
    """What to measure. What is left empty or 0 is as the preset says."""

    preset: Preset = "cpu"
    """A small model in float32, or one of 0.5 billion parameters in bfloat16."""
    vocab_sizes: tuple[int, ...] = ()
    """Vocabulary sizes V."""
    num_envs: tuple[int, ...] = ()
    """Numbers of rows N."""
    prompt_tokens: int = 0
    """Length of every prompt."""
    new_tokens: int = 0
    """Length of every response; nothing else ends it."""
    rounds: int = 0
    """Measurements of each kind, taken in turns; tables show the median."""
    device: str = "auto"
    """Where the model runs."""

    def complete(self) -> Args:
        """Fill in the preset."""
        given = {name: value for name, value in asdict(self).items() if value}
        return Args(**{**SIZES[self.preset], **given})


def make_policy(vocab_size: int, args: Args) -> tuple[CausalLMPolicy, Any]:
    """A Llama with grouped-query attention and tied embeddings; and its plain twin."""
    model = random_causal_lm(
        vocab_size, max_positions=args.prompt_tokens + args.new_tokens, **MODELS[args.preset]
    )
    plain = copy.deepcopy(model)
    policy = CausalLMPolicy(model, device=args.device, dtype=DTYPES[args.preset])
    return policy, plain.to(device=policy.device, dtype=policy.model.dtype)


def make_envs(vocab_size: int, num_envs: int, args: Args) -> TextGenVectorEnv:
    """Prompts of random ids; the text is decoded and its reward is 1."""
    rng = np.random.default_rng(0)
    ids = rng.integers(vocab_size, size=(256, args.prompt_tokens))
    symbols = [f"s{i}" for i in range(vocab_size - 1)]  # and one more for the beginning
    return TextGenVectorEnv(
        num_envs=num_envs,
        autoreset_mode="Disabled",
        prompts=[{"prompt": row} for row in ids.tolist()],
        tokenizer=symbol_tokenizer(symbols, eos=None),
        reward=lambda text: 1.0,
        max_new_tokens=args.new_tokens,
        stop=(),
    )


def runners(
    policy: CausalLMPolicy, plain: Any, envs: TextGenVectorEnv, args: Args
) -> dict[str, Callable[[], None]]:
    """One function a kind, each of which writes N x `new_tokens` tokens."""
    number = envs.num_envs
    rows = np.arange(number)
    obs, _ = envs.reset(options={"prompt_row": rows})
    prompt = torch.from_numpy(obs["input_ids"][:, : args.prompt_tokens]).to(policy.device)
    actions = np.random.default_rng(0).integers(policy.vocab_size, size=(args.new_tokens, number))
    sampled: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}

    def generate(model: Any, **settings: Any) -> None:
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=args.new_tokens,
            pad_token_id=0,
            **sampled,
            **settings,
        )
        assert written.shape[1] == args.prompt_tokens + args.new_tokens

    def collected(path: Any, policy: CausalLMPolicy = policy) -> None:
        policy.invalidate_cache()  # as after an update: prompts are prefilled each time
        episodes = collect(policy, envs, number, prompt_rows=rows, path=path)
        assert len(episodes.logprob) == number * args.new_tokens

    def environment() -> None:
        envs.reset(options={"prompt_row": rows})
        for action in actions:
            envs.step(action)

    kinds = {
        "generate": lambda: generate(plain),
        "same_layers": lambda: generate(policy.model),
        "step": lambda: collected("step"),
        "sequence": lambda: collected("sequence"),
        "environment": environment,
    }
    if args.preset == "gpu":
        del kinds["same_layers"]  # on a GPU they are the same
        kinds["static"] = lambda: generate(plain, cache_implementation="static")
        eager = CausalLMPolicy(policy.model, device=policy.device, cuda_graphs=False)
        kinds["eager"] = lambda: collected("sequence", eager)
        if policy.device.type == "cuda":
            fused = CausalLMPolicy(policy.model, device=policy.device, cuda_graphs="compile")
            kinds["compiled"] = lambda: collected("sequence", fused)
    return kinds


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """CPU seconds of a run; wall seconds on an accelerator."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.accelerator.synchronize()
    start = time.perf_counter()
    run()
    torch.accelerator.synchronize()
    return time.perf_counter() - start


def measure(vocab_size: int, num_envs: int, args: Args) -> dict[str, Any]:
    """Tokens per second of every kind, and what collect wins over generate."""
    gc.collect()  # models of the row before refer to themselves
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    policy, plain = make_policy(vocab_size, args)
    kinds = runners(policy, plain, make_envs(vocab_size, num_envs, args), args)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    first: dict[str, float] = {}
    for turn in range(args.rounds + 1):
        for kind in kinds:
            spent = seconds(kinds[kind], policy.device)
            if turn:  # the first one warms up
                times[kind].append(spent)
            else:
                first[kind] = spent
    tokens = num_envs * args.new_tokens
    middle = {kind: statistics.median(times[kind]) for kind in kinds}
    row: dict[str, Any] = {"vocab_size": vocab_size, "num_envs": num_envs}
    row |= {kind: round(tokens / middle[kind]) for kind in kinds}
    row["step_over_generate"] = round(middle["generate"] / middle["step"], 2)
    row["sequence_over_generate"] = round(middle["generate"] / middle["sequence"], 2)
    if "same_layers" in kinds:
        row["step_over_same_layers"] = round(middle["same_layers"] / middle["step"], 2)
    if "static" in kinds:
        row["sequence_over_static"] = round(middle["static"] / middle["sequence"], 2)
    if "compiled" in kinds:
        row["compiled_over_static"] = round(middle["static"] / middle["compiled"], 2)
    row["environment_share"] = round(middle["environment"] / middle["step"], 3)
    row["environment_share_of_sequence"] = round(middle["environment"] / middle["sequence"], 3)
    row["spread"] = {k: [round(tokens / max(t)), round(tokens / min(t))] for k, t in times.items()}
    row["first_seconds"] = {kind: round(spent, 2) for kind, spent in first.items()}
    if policy.device.type == "cuda":
        row["memory"] = gpu_memory(policy)
    return row


def gpu_memory(policy: CausalLMPolicy) -> dict[str, int]:
    """MiB on the device: most that was allocated, of all kinds, and of the graphs of one policy."""
    decoder = policy._decoder
    graphs = None if decoder is None else decoder.graphs
    found = {"peak": torch.cuda.max_memory_allocated() >> 20}
    if graphs is not None:
        found |= {"graphs": graphs.steps.graph_bytes >> 20, "captures": graphs.steps.captures}
    return found


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    cells = []
    for name, value in row.items():
        if isinstance(value, dict):
            continue
        if "_over_" in name:
            cells.append(f"{value}x")
        else:
            cells.append(f"{value:.1%}" if "share" in name else f"{value:,}")
    return " ".join(f"{cell:>11}" for cell in cells)


HEADS = {
    "vocab_size": "V",
    "num_envs": "N",
    "same_layers": "same layers",
    "step": "step path",
    "environment": "env alone",
    "step_over_generate": "step/gen",
    "step_over_same_layers": "step/same",
    "sequence_over_generate": "seq/gen",
    "sequence_over_static": "seq/static",
    "compiled_over_static": "comp/static",
    "environment_share": "env/step",
    "environment_share_of_sequence": "env/seq",
}


def main(args: Args) -> None:
    """Print the table and the JSON line."""
    torch.set_num_threads(1)
    args = args.complete()
    result: dict[str, Any] = {"benchmark": "bench_rollout"}
    result |= described(("torch", "transformers", "gymnasium", "numpy"))
    for key in ("processor", "cores", "system", "python", "versions", "command", "commit"):
        print(f"{key:<10} {result[key]}")
    device = resolve_device(args.device)
    result |= {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "clock": "cpu" if device.type == "cpu" else "wall",
        "dtype": DTYPES[args.preset],
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "rows": [],
    }
    print(f"{'device':<10} {result['device']}, {result['dtype']}")
    print(f"\ntokens per second ({result['clock']} time), median of {args.rounds}")
    for vocab_size in args.vocab_sizes:
        for num_envs in args.num_envs:
            row = measure(vocab_size, num_envs, args)
            if not result["rows"]:
                names = [name for name, value in row.items() if not isinstance(value, dict)]
                print(" ".join(f"{HEADS.get(name, name):>11}" for name in names))
            result["rows"].append(row)
            print(line(row), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
