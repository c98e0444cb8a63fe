"""Tokens per second of `collect` through `env.step` against `generate()` of transformers.

`python scripts/bench_rollout.py` lets one model of random weights write the same number of tokens
after the same prompts: by `model.generate`, by `collect` on its step path and on its sequence path,
in turns. `generate` is that of the model as transformers makes it; `same layers` is that of the
policy's own model, whose linear layers a CPU multiplies by oneDNN. It also steps the environment
alone. The clock is CPU time of one thread; on an accelerator it is wall time. The last line is
JSON.
"""

from __future__ import annotations

import copy
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

from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.rollout import collect
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

KINDS = ("generate", "same_layers", "step", "sequence", "environment")


@dataclass(frozen=True)
class Args:
    """What to measure."""

    vocab_sizes: tuple[int, ...] = (4096, 32_000)
    """Vocabulary sizes V."""
    num_envs: tuple[int, ...] = (16, 64)
    """Numbers of rows N."""
    prompt_tokens: int = 32
    """Length of every prompt."""
    new_tokens: int = 64
    """Length of every response; nothing else ends it."""
    rounds: int = 5
    """Measurements of each kind, taken in turns; tables show the median."""
    device: str = "auto"
    """Where the model runs."""


def make_policy(vocab_size: int, args: Args) -> tuple[CausalLMPolicy, Any]:
    """A Llama with grouped-query attention and tied embeddings, float32; and its plain twin."""
    model = random_causal_lm(
        vocab_size,
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=688,
        max_positions=args.prompt_tokens + args.new_tokens,
    )
    plain = copy.deepcopy(model)
    policy = CausalLMPolicy(model, device=args.device)
    return policy, plain.to(policy.device)


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

    def generate(model: Any) -> None:
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=args.new_tokens,
            pad_token_id=0,
            **sampled,
        )
        assert written.shape[1] == args.prompt_tokens + args.new_tokens

    def collected(path: Any) -> None:
        policy.invalidate_cache()  # as after an update: prompts are prefilled each time
        episodes = collect(policy, envs, number, prompt_rows=rows, path=path)
        assert len(episodes.logprob) == number * args.new_tokens

    def environment() -> None:
        envs.reset(options={"prompt_row": rows})
        for action in actions:
            envs.step(action)

    return {
        "generate": lambda: generate(plain),
        "same_layers": lambda: generate(policy.model),
        "step": lambda: collected("step"),
        "sequence": lambda: collected("sequence"),
        "environment": environment,
    }


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
    policy, plain = make_policy(vocab_size, args)
    kinds = runners(policy, plain, make_envs(vocab_size, num_envs, args), args)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(args.rounds + 1):
        for kind in KINDS:
            spent = seconds(kinds[kind], policy.device)
            if turn:  # the first one warms up
                times[kind].append(spent)
    tokens = num_envs * args.new_tokens
    middle = {kind: statistics.median(times[kind]) for kind in KINDS}
    row: dict[str, Any] = {"vocab_size": vocab_size, "num_envs": num_envs}
    row |= {kind: round(tokens / middle[kind]) for kind in KINDS}
    row["step_over_generate"] = round(middle["generate"] / middle["step"], 2)
    row["sequence_over_generate"] = round(middle["generate"] / middle["sequence"], 2)
    row["step_over_same_layers"] = round(middle["same_layers"] / middle["step"], 2)
    row["environment_share"] = round(middle["environment"] / middle["step"], 3)
    row["spread"] = {k: [round(tokens / max(t)), round(tokens / min(t))] for k, t in times.items()}
    return row


def main(args: Args) -> None:
    """Print the table and the JSON line."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "bench_rollout"}
    result |= described(("torch", "transformers", "gymnasium", "numpy"))
    for key in ("processor", "cores", "system", "python", "versions", "command", "commit"):
        print(f"{key:<10} {result[key]}")
    device = make_policy(8, args)[0].device
    result |= {
        "device": str(device),
        "clock": "cpu" if device.type == "cpu" else "wall",
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "rows": [],
    }
    print(f"\ntokens per second ({result['clock']} time), median of {args.rounds}")
    heads = ("V", "N", "generate", "same layers", "step path", "sequence")
    heads += ("step/gen", "step/same", "seq/gen", "env share")
    print(" ".join(f"{head:>11}" for head in heads))
    for vocab_size in args.vocab_sizes:
        for num_envs in args.num_envs:
            row = measure(vocab_size, num_envs, args)
            result["rows"].append(row)
            print(
                " ".join(f"{n:>11,}" for n in (vocab_size, num_envs, *(row[k] for k in KINDS[:4]))),
                f"{row['step_over_generate']:>10}x {row['step_over_same_layers']:>10}x"
                f" {row['sequence_over_generate']:>10}x {row['environment_share']:>11.1%}",
                flush=True,
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
