"""`textgym train --dry-run`: what a run will need of memory, and whether this machine has it.

Task and agent are made as for training, but the weights of the policy take no memory (see
`textgym.memory`); nothing is sampled, trained or written.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from textgym.commands.errors import UsageError
from textgym.commands.measure import FORWARD
from textgym.commands.models import RANDOM
from textgym.commands.options import TrainArgs, agent_class, policy_settings
from textgym.commands.ram import MIB, available_memory, used_memory
from textgym.commands.setup import TaskMaker
from textgym.episodes import SequenceBatch
from textgym.learning import GuardedOptimizer
from textgym.memory import Footprint, Workload, episode_bytes, predict
from textgym.weightless import HOLES, fake_weights, without_storage

if TYPE_CHECKING:
    from textgym.policies import CausalLMPolicy
    from textgym.task import Task


@dataclass(frozen=True)
class Forecast:
    """What a run will need, bytes."""

    policy: CausalLMPolicy
    """With fake weights."""
    work: Workload
    """What is done with it."""
    footprint: Footprint
    """On the policy's device."""
    base: int
    """RAM of a process without the model: interpreter, libraries, tables of prompts."""
    episodes: int
    """RAM of what a rollout collects."""

    @property
    def peaks(self) -> dict[str, int]:
        """The most that each phase takes on the policy's device; on a CPU, of the whole process."""
        if self.policy.device.type != "cpu":
            return self.footprint.peaks
        process = self.base + self.episodes
        return {phase: process + size for phase, size in self.footprint.ram.items()}


def dry_run(agent: str, args: TrainArgs, config: Any, console: Console) -> int:
    """Print what a run will need; returns 0 where this machine has it, else 1."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "--dry-run looks at one process: start it without torchrun. Each process of a run "
            "needs what it says, but for activations, of which it has its share"
        )
    found = forecast(agent, args, config)
    console.print(table(agent, found))
    device = found.policy.device
    available, needed = available_memory(device), max(found.peaks.values())
    where = "RAM" if device.type == "cpu" else f"on {device}"
    if available is None:
        console.print(f"how much memory is left {where} cannot be told here")
        return 0
    fits = needed <= available
    verdict = "[green]fits[/]" if fits else "[red]does not fit[/]"
    console.print(f"{_mib(needed)} MiB of the {_mib(available)} MiB left {where}: it {verdict}")
    if not fits:
        for line in advice(found, args, available):
            console.print(f"  {escape(line)}", soft_wrap=True)
    return 0 if fits else 1


def forecast(agent: str, args: TrainArgs, config: Any) -> Forecast:
    """Predict what `train` would need with these options.

    Raises:
        UsageError: It cannot be told for this agent.
        ValueError, OSError: As in training.
    """
    if agent.startswith("sb3-"):
        raise UsageError(
            f"--dry-run knows what our own agents do, not what SB3 does in {agent}; ppo with as "
            "many episodes as SB3's rollout has, and as many minibatches, comes near it"
        )
    maker = TaskMaker(args)
    envs, validation, test = (
        maker.vector(split, args.num_envs) for split in ("train", "validation", "test")
    )
    warm_up()
    base = used_memory()
    with fake_weights():
        policy = weightless_policy(maker.model, envs.task, args, config.seed)
        more = {} if agent == "sft" else {"reference": policy.frozen_copy()}
        learner = agent_class(agent)(policy, envs, config, eval_envs=validation, **more)
        work = workload(learner, args, test)
        reference = more.get("reference") or policy.frozen_copy()
        footprint = predict(policy, reference, learner.optimizer, work)
    vocab_size = policy.vocab_size if work.masks else 0
    tokens = int((work.prompts + work.responses).sum()), int(work.responses.sum())
    episodes = episode_bytes(*tokens, len(envs.task.schedule.names), vocab_size)
    return Forecast(policy, work, footprint, base, episodes)


def warm_up() -> None:
    """Let libraries load what they load when they are first used, so that it is counted."""
    import matplotlib.figure  # noqa: F401
    import torch.utils.tensorboard

    from textgym.policies import CausalLMPolicy, random_causal_lm

    model = random_causal_lm(64, hidden_size=128, num_layers=1, intermediate_size=512)
    policy = CausalLMPolicy(model, device="cpu")
    optimizer = GuardedOptimizer(policy, lr=0.0, max_grad_norm=1.0)
    tokens, rows = torch.ones(16, 64, dtype=torch.int64), torch.arange(16)
    batch = SequenceBatch(tokens, torch.full((16,), 64), rows, torch.full((16,), 63))
    loss = policy.evaluate(batch).logprob.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step(loss)
    observation = {"input_ids": tokens.numpy(), "length": np.full(16, 63)}
    policy.act(observation, rows.numpy().astype(np.uint64))


def weightless_policy(name: str, task: Task, args: TrainArgs, seed: int) -> CausalLMPolicy:
    """The policy that `load_policy` makes, from the model's configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from textgym.policies import CausalLMPolicy, random_causal_lm
    from textgym.policies.loading import find_model, resolve_device, resolve_dtype
    from textgym.policies.saving import read_settings

    settings: dict[str, Any] = {"vocab_size": task.vocab_size, **policy_settings(args)}
    device, dtype = resolve_device(settings.pop("device")), resolve_dtype(settings.pop("dtype"))
    if name != RANDOM:
        name = find_model(name)
        settings = {**read_settings(name), **settings}

    def build() -> CausalLMPolicy:
        if name == RANDOM:
            model = random_causal_lm(task.vocab_size, max_positions=task.max_length, seed=seed)
        else:
            shape = AutoConfig.from_pretrained(name)
            auto: Any = AutoModelForCausalLM
            model = auto.from_config(shape, dtype=dtype or torch.float32)
        return CausalLMPolicy(model, device="meta", dtype=dtype, **settings)

    return without_storage(build, device)


def workload(learner: Any, args: TrainArgs, test: Any) -> Workload:
    """What an agent does at most: prompts of all lengths that there are, responses of the budget.

    An agent that samples nothing learns from examples of all lengths.
    """
    config, task = learner.config, learner.task
    samples = hasattr(config, "episodes")
    group = config.group_size if samples else 1
    if samples:
        lengths = _spread(np.sort(task.prompt_length), config.episodes // group)
        prompts = np.repeat(lengths, group)
        responses = np.full(len(prompts), task.max_new_tokens)
    else:
        pairs = sorted(((len(e.prompt), len(e.response)) for e in learner.examples), key=sum)
        prompts, responses = _spread(np.array(pairs, np.int64), config.batch_size).T
    best = getattr(config, "best", None)
    reported = len(test.task.prompts)
    reported = min(args.report_prompts, reported) * max(1, args.report_prompts // reported)
    at_once = max(reported, config.eval_episodes, len(prompts) if samples else 0)
    return Workload(
        prompts=prompts,
        responses=responses,
        budget=task.max_new_tokens,
        columns=task.max_length,
        rows=min(args.num_envs, at_once),
        group_size=group,
        learned=None if best is None else min(len(prompts), len(prompts) // group * best),
        minibatches=getattr(config, "minibatches", 1),
        microbatch=config.microbatch,
        entropy_gradient=getattr(config, "ent_coef", 0.0) != 0.0,
        scored=samples,
        exact_kl=getattr(config, "exact_kl_episodes", 0),
        measured=min(FORWARD, reported),
        masks=bool(test.masks_actions),
    )


def _spread(sorted_values: Any, count: int) -> Any:
    """So many of them, from the first to the last."""
    return sorted_values[np.linspace(0, len(sorted_values) - 1, count).round().astype(np.int64)]


def table(agent: str, found: Forecast) -> Table:
    """What takes how much."""
    size, policy, work = found.footprint, found.policy, found.work
    weights = list(policy.parameters())
    trained = sum(p.numel() for p in weights if p.requires_grad)
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in weights}))
    layers, _, rows, heads, columns, head = size.cache_shape or (0,) * 6
    sequences, length = size.forward
    number = sum(p.numel() for p in weights)
    shown = [
        ("parameters", size.parameters, f"{number:,} of {dtypes}, {trained:,} trained"),
        ("gradients", size.gradients, "while it learns"),
        ("optimizer", size.optimizer, "Adam's moments"),
        ("reference", size.reference, "frozen copy of the weights"),
        ("acting copy", size.acting, f"of the weights, in {policy.compute_dtype}"),
        (
            "cache",
            size.cache,
            f"{rows} rows x {layers} layers x 2 x {heads} heads x {columns} columns x {head}",
        ),
        ("prefill", size.prefill, f"prompts of {work.rows} rows"),
        ("decoding step", size.decode, f"logits [{work.rows}, {policy.vocab_size}], sampler"),
        ("scoring", size.scoring, "by the reference, and the exact KL"),
        ("activations", size.activations, f"kept of {sequences} sequences of {length} tokens"),
        (
            "probabilities",
            size.probabilities,
            f"kept of their action tokens, V={policy.vocab_size}",
        ),
        ("passing", size.passing, "on top of both, in forward or backward"),
        ("episodes", found.episodes, f"{len(work.prompts)} of them, in RAM"),
        ("process", found.base, "interpreter, libraries, prompts, in RAM"),
    ]
    made = Table(title=f"memory of {agent}", title_justify="left", box=None, pad_edge=False)
    for name, justify in (("", "left"), ("MiB", "right"), ("", "left")):
        made.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, value, note in shown:
        if value:
            made.add_row(name, _mib(value), f"[dim]{escape(note)}[/]")
    made.add_section()
    for name, value in found.peaks.items():
        made.add_row(f"peak while {name}", f"[bold]{_mib(value)}[/]", "")
    return made


def advice(found: Forecast, args: TrainArgs, available: int) -> list[str]:
    """Settings to lower, those that cost nothing but time first."""
    size, peaks = found.footprint, found.peaks
    too_much = [name for name, peak in peaks.items() if peak > available]
    lines = []

    def share(phase: str, moving: int) -> float:
        """How much of what moves there is room for, where the rest stays."""
        taken = moving * (1.0 + HOLES if found.policy.device.type == "cpu" else 1.0)
        return 1.0 - (peaks[phase] - available) / max(1.0, taken)

    if "learning" in too_much:
        sequences = size.forward[0]
        room = share("learning", size.activations + size.probabilities + size.passing)
        if (fewer := int(0.9 * sequences * room)) >= 1:  # not all of it is in proportion
            lines.append(f"--microbatch {fewer}: a forward holds {sequences} sequences now")
        if not args.gradient_checkpointing:
            lines.append("--gradient-checkpointing: activations are computed again")
        if size.probabilities > size.activations // 4:
            lines.append("--logit-chunk 1: probabilities are computed again")
    if "sampling" in too_much:
        room = share("sampling", size.cache + max(size.prefill, size.decode))
        if (fewer := int(found.work.rows * room)) >= 1:
            lines.append(f"--num-envs {fewer}: {found.work.rows} rows decode at once now")
    if "measuring" in too_much:
        lines.append("--report-prompts 8: up to 64 sequences are compared at once")
    if args.compute_dtype is None:
        lines.append("--compute-dtype bfloat16: half of the activations and of the cache")
    if args.lora is None:
        lines.append("--lora 8: no gradients, moments and reference for all weights")
    return [*lines, "--max-new-tokens, --model: shorter responses, a smaller model"]


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f}" if size < 10 * MIB else f"{size / MIB:,.0f}"
