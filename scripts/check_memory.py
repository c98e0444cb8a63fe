"""How well `textgym train --dry-run` predicts the memory that `textgym train` then needs.

`python scripts/check_memory.py` writes models of random weights and a table of prompts into a
temporary folder. For every configuration one process predicts and one trains, for a few updates;
what the second one used at most is compared with what the first one said: in all, and beyond what
a process needs without any model. On CUDA it is the device's memory that is compared. The last
line is JSON.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from machine import described, peak_mib

CHILD_THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
WORDS = 16  # of a prompt
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """One configuration."""

    name: str
    """What the table calls it."""
    agent: str = "grpo"
    """`--agent`."""
    vocab_size: int = 2048
    """V."""
    family: str = "llama"
    """`llama` or `gpt2`."""
    hidden: int = 256
    """Width."""
    layers: int = 6
    """Blocks."""
    heads: int = 4
    """Attention heads."""
    kv_heads: int | None = None
    """Key-value heads."""
    inner: int = 1024
    """Width of the MLP."""
    response: int = 64
    """Budget of a response."""
    options: tuple[str, ...] = ()
    """More options of `textgym train`."""


CASES = (
    Case("V=512", vocab_size=512),
    Case("V=2,048"),
    Case("V=8,192", vocab_size=8192),
    Case("V=32,000", vocab_size=32_000),
    Case("PPO", agent="ppo", options=("--minibatches", "2")),
    Case("PPO, V=32,000", agent="ppo", vocab_size=32_000, options=("--minibatches", "4")),
    Case("REINFORCE, KL", agent="reinforce", options=("--kl-coef", "0.05")),
    Case("entropy bonus", options=("--ent-coef", "0.01")),
    Case("microbatch 16", options=("--microbatch", "16")),
    Case("microbatch 4", options=("--microbatch", "4")),
    Case("GPT-2", family="gpt2"),
    Case("one key-value head", kv_heads=1),
    Case("wide and shallow", hidden=768, layers=2, heads=12, inner=3072),
    Case("narrow and deep", hidden=128, layers=12, inner=512),
    Case("long", hidden=128, layers=4, inner=512, response=240),
    Case("GPT-2, long", family="gpt2", hidden=128, layers=4, inner=512, response=240),
    Case("checkpointing", options=("--gradient-checkpointing",)),
    Case("bfloat16", options=("--compute-dtype", "bfloat16")),
    Case("LoRA", options=("--lora", "8")),
    Case("16 rows", options=("--num-envs", "16", "--path", "sequence")),
)


@dataclass(frozen=True)
class Args:
    """What is compared."""

    cases: tuple[str, ...] = ()
    """Names; default: all."""
    device: str = "cpu"
    """Where."""
    updates: int = 2
    """Updates of the training runs."""


def write_inputs(case: Case, folder: Path) -> None:
    """Write model, tokenizer and prompts."""
    import numpy as np
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    from textgym.policies import random_causal_lm

    words = [f"w{i}" for i in range(case.vocab_size)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    random_causal_lm(
        case.vocab_size,
        hidden_size=case.hidden,
        num_layers=case.layers,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        intermediate_size=case.inner,
        max_positions=512,
        family="gpt2" if case.family == "gpt2" else "llama",
    ).save_pretrained(folder / "model")
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    rng = np.random.default_rng(0)
    rows = ({"prompt": " ".join(rng.choice(words, WORDS))} for _ in range(512))
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def command(case: Case, folder: Path, args: Args) -> list[str]:
    """Options of `textgym train`."""
    tokens = args.updates * 64 * case.response
    return [
        *("--agent", case.agent, "--model", str(folder / "model"), "--device", args.device),
        *("--prompts", str(folder / "prompts.jsonl"), "--reward", "length", "--quiet"),
        *("--env-args", json.dumps({"stop": []}), "--max-new-tokens", str(case.response)),
        *("--total-tokens", str(tokens), "--report-prompts", "64", "--eval-every", "0"),
        *("--folder", str(folder / "run"), *case.options),
    ]


def child(kind: str, options: list[str]) -> None:
    """Predict, or train and tell the peak."""
    from contextlib import redirect_stdout

    if kind == "write":
        write_inputs(Case(**json.loads(options[0])), Path(options[1]))
        return
    if kind == "predict":
        from textgym.commands.dry_run import forecast
        from textgym.commands.options import parse

        agent = options[options.index("--agent") + 1]
        found = forecast(agent, *parse(agent, options))
        cpu = found.policy.device.type == "cpu"
        shown = {"peaks": found.peaks, "base": found.base if cpu else 0}
        print(json.dumps({**shown, "footprint": asdict(found.footprint)}))
        return
    from textgym.cli import main as textgym

    device = options[options.index("--device") + 1]
    with redirect_stdout(sys.stderr):
        status = textgym(["train", *options])
    if status:
        sys.exit(status)
    print(json.dumps({"peak": peak_mib(device) * MIB}))


def in_child(kind: str, options: list[str]) -> Any:
    """Do it in a process of its own, and read its last line."""
    done = subprocess.run(
        [sys.executable, __file__, "child", kind, *options],
        env={**os.environ, **CHILD_THREADS},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{kind} {options}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else None


def compare(case: Case, args: Args) -> dict[str, Any]:
    """One configuration."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_child("write", [json.dumps(asdict(case)), name])
        options = command(case, folder, args)
        predicted, measured = in_child("predict", options), in_child("train", options)
    base, total, peak = predicted["base"], max(predicted["peaks"].values()), measured["peak"]
    row = {
        "case": case.name,
        "base_mib": base / MIB,
        "tensors_mib": max(predicted["footprint"]["peaks"].values()) / MIB,
        "predicted_mib": total / MIB,
        "measured_mib": peak / MIB,
        "ratio": total / peak,
        "ratio_beyond_base": (total - base) / (peak - base),
    }
    numbers = "".join(f"{value:12.2f}" for value in list(row.values())[5:])
    sizes = "".join(f"{value:10.0f}" for value in list(row.values())[1:5])
    print(f"{case.name:24s}{sizes}{numbers}", flush=True)
    return row


def main(args: Args) -> None:
    """Compare, and print."""
    chosen = [case for case in CASES if not args.cases or case.name in args.cases]
    print(f"{'MiB':24s}      base   tensors predicted  measured       ratio  beyond base")
    rows = [compare(case, args) for case in chosen]
    worst = max((abs(row["ratio"] - 1.0) for row in rows), default=0.0)
    print(f"\nthe largest error is {worst:.0%} of what was measured\n")
    packages = ("torch", "transformers", "numpy")
    print(json.dumps({**described(packages), "libc": platform.libc_ver(), "rows": rows}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main(tyro.cli(Args, description=__doc__))
