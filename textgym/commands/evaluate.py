"""`textgym eval`: score a model or a checkpoint, greedy and sampled, as a table and as JSON.

The folder of a run brings its task along: `textgym eval --model runs/<name>` scores its best
checkpoint on its own test prompts, against the model that it started from.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console

from textgym.commands.errors import reported
from textgym.commands.measure import Measured, ceiling, measure, sampler
from textgym.commands.models import load_policy
from textgym.commands.options import OPTIONS, value_of
from textgym.commands.report import (
    as_json,
    completions_json,
    counted,
    metrics_table,
    notes,
    print_completions,
    summary,
    write_json,
)
from textgym.commands.setup import Split, TaskArgs, TaskMaker, default_model

if TYPE_CHECKING:
    from textgym.policies import CausalLMPolicy


@dataclass(frozen=True)
class EvalArgs(TaskArgs):
    """Score a model or a checkpoint on prompts, greedy and sampled."""

    split: Split = "test"
    """Whose prompts."""
    count: int | None = None
    """Only the first so many prompts; default is all."""
    samples: int = 1
    """Responses to each prompt, when sampling."""
    temperature: float = 1.0
    """Of sampling."""
    top_k: int | None = None
    """Sample among the k most likely tokens."""
    top_p: float | None = None
    """Sample from the nucleus of this probability."""
    seed: int = 0
    """Seed of the draws."""
    reference: str | None = None
    """Model that KL and perplexity are under; default is the one that a run started from, else the
    model itself."""
    lowercase: bool = False
    """Whether corpus BLEU compares lower-cased."""
    num_envs: int = 64
    """Rows of the vector environment; changes speed, not results."""
    device: str = "auto"
    """Where the models live."""
    dtype: str | None = None
    """Of the weights; default is float32."""
    completions: int = 4
    """Prompts whose responses are printed."""
    output: Path | None = None
    """A JSON file for the table and every response."""


def run(arguments: Sequence[str]) -> int:
    """Score, print the table, and print its JSON as the last line."""
    args = tyro.cli(
        EvalArgs,
        args=arguments,
        default=_defaults(arguments),
        prog="textgym eval",
        description=__doc__,
    )
    console = Console(highlight=False)
    with reported():
        maker = TaskMaker(args)
        envs = maker.vector(args.split, args.num_envs)
        task = envs.task
        loading = {"device": args.device, "dtype": args.dtype, "temperature": args.temperature}
        policy = load_policy(maker.model, task, seed=args.seed, **loading)
        reference = policy.frozen_copy()
        if args.reference is not None:
            reference = load_policy(args.reference, task, seed=args.seed, **loading).frozen_copy()
        columns = measured_both(policy, reference, envs, args)
        top = ceiling(task, count=args.count, lowercase=args.lowercase)
    shown = {name: summary(measured) for name, measured in columns.items()}
    if top is not None:
        shown["ceiling"] = summary(top)
    number = len(columns["greedy"].prompts)
    print_completions(console, columns, args.completions)
    console.print()
    console.print(metrics_table(f"{maker.model}: {counted(number, f'{args.split} prompt')}", shown))
    console.print(f"[dim]{notes(shown, 'the reference model')}[/]")
    result = {
        "model": maker.model,
        "split": args.split,
        "prompts": number,
        "metrics": as_json(shown),
    }
    if args.output is not None:
        with reported():
            write_json(args.output, {**result, "completions": completions_json(columns, number)})
    print(json.dumps(result))
    return 0


def measured_both(
    policy: CausalLMPolicy, reference: CausalLMPolicy, envs: Any, args: EvalArgs
) -> dict[str, Measured]:
    """Measure the most likely responses and sampled ones."""
    common: dict[str, Any] = {"count": args.count, "seed": args.seed, "lowercase": args.lowercase}
    with sampler(policy, method="greedy", top_k=None, top_p=None):
        greedy = measure(policy, reference, envs, **common)
    with sampler(policy, method="inverse_cdf", top_k=args.top_k, top_p=args.top_p):
        sampled = measure(policy, reference, envs, samples=args.samples, **common)
    return {"greedy": greedy, "sampled": sampled}


def _defaults(arguments: Sequence[str]) -> EvalArgs:
    """Options of the run whose folder `--model` names, where it names one."""
    model = value_of("--model", arguments)
    path = Path(model or "") / OPTIONS
    if model is None or not path.is_file():
        return EvalArgs()
    options = json.loads(path.read_text(encoding="utf-8"))
    saved, seed = options["args"], options["config"]["seed"]
    names = {field.name for field in dataclasses.fields(TaskArgs)}
    given = {name: value for name, value in saved.items() if name in names}
    given["stop"] = tuple(given["stop"])
    started_from = saved["model"] or default_model(saved["env"])
    return EvalArgs(
        **{**given, "model": model},
        reference=started_from,
        seed=seed,
        temperature=saved["temperature"],
    )
