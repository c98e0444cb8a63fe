"""`textgym train` and `textgym sft`: train, and show what it changed on prompts never trained on.

The options of the task and of the run are `TrainArgs`, those of the algorithm are the fields of its
config, the same dataclass that Python users pass. A run's folder holds them (`run.json`), logs,
samples, TensorBoard events, checkpoints, the learning curve and the final table (`report.json`).
Under `torchrun` the processes share the work (see `textgym.parallel`), and the first of them writes
and prints.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from textgym.checkpoint import CheckpointError, prepare_folder
from textgym.commands.dry_run import dry_run
from textgym.commands.errors import UsageError, reported
from textgym.commands.listing import agent_names
from textgym.commands.measure import Measured, ceiling, measure
from textgym.commands.models import load_policy
from textgym.commands.options import (
    OPTIONS,
    TrainArgs,
    agent_class,
    config_for,
    parse,
    plain,
    policy_settings,
    saved_options,
    value_of,
)
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
from textgym.commands.setup import TaskMaker
from textgym.learning import NonFiniteError, UnscoredError
from textgym.logging import plot_learning_curve, read_metrics
from textgym.parallel import ProcessError, of_leader, start, stop, world
from textgym.runs import Result
from textgym.tokens import EMBEDDED
from textgym.weights import read_policy

if TYPE_CHECKING:
    from textgym.policies import CausalLMPolicy

REPORT = "report.json"
REPORT_SEED = 0x7E57
PROBE_UPDATES = 16  # of SFT, to see how many tokens fit into the time that RL took
TOTAL_TOKENS = 100_000


def run(arguments: Sequence[str]) -> int:
    """Train by reinforcement learning."""
    name = value_of("--agent", arguments) or saved_options(arguments).get("agent") or "ppo"
    names = [agent for agent in agent_names() if agent != "sft"]
    if name not in names:
        hint = "; use `textgym sft`" if name == "sft" else ""
        raise UsageError(f"no agent {name!r}, there are {', '.join(names)}{hint}")
    return _run(name, arguments)


def run_sft(arguments: Sequence[str]) -> int:
    """Fine-tune on references."""
    return _run("sft", arguments)


def _run(agent: str, arguments: Sequence[str]) -> int:
    with reported():
        args, config = parse(agent, arguments)
        if args.dry_run:
            return dry_run(agent, args, config, Console(highlight=False))
        console = Console(highlight=False, quiet=not start(args.device).leads)
        training = Training(agent, args, config, console)
    status = training.run()
    if status != 1:  # a process that failed leaves without waiting for the others
        stop()
    return status


class Training:
    """One run of the command.

    Args:
        agent: Its name on the command line.
        args: The run's options.
        config: The agent's.
        console: Where tables go.

    Raises:
        ValueError, OSError: Prompts, model and options do not fit or are not there.
    """

    def __init__(self, agent: str, args: TrainArgs, config: Any, console: Console) -> None:
        self.agent, self.args, self.config, self.console = agent, args, config, console
        self.leads = world().leads
        self.maker = TaskMaker(args)
        self.folder = of_leader(_folder(agent, args, self.maker.id))
        if not args.resume and (self.folder / OPTIONS).exists():
            raise UsageError(
                f"{self.folder} already holds a run: go on with --resume, or choose another folder"
            )
        self.envs = self.training_envs(agent)
        self.validation = self.maker.vector("validation", args.num_envs)
        self.test = self.maker.vector("test", args.num_envs)
        self.policy = self.start()
        self.reference = self.policy.frozen_copy()
        self.learner = self.make(agent, self.policy, config, self.folder)
        if self.leads:
            prepare_folder(self.folder)

    def training_envs(self, agent: str) -> Any:
        """What an agent learns in, which resets as the agent wants it."""
        mode = getattr(agent_class(agent), "autoreset_mode", "Disabled")
        return self.maker.vector("train", self.args.num_envs, mode)

    def start(self) -> CausalLMPolicy:
        """The policy before training."""
        settings = policy_settings(self.args)
        return load_policy(self.maker.model, self.envs.task, seed=self.config.seed, **settings)

    def make(self, agent: str, policy: CausalLMPolicy, config: Any, folder: Path) -> Any:
        """An agent on this task."""
        more = {} if agent == "sft" else {"reference": self.reference}
        envs = self.envs if agent == self.agent else self.training_envs(agent)
        return agent_class(agent)(
            policy, envs, config, eval_envs=self.validation, folder=folder, **more
        )

    def run(self) -> int:
        """Measure, train, measure again, and report; returns the exit status."""
        args, console = self.args, self.console
        self.introduce()
        before = self.measure(self.policy if not args.resume else self.start())
        options = {"agent": self.agent, "args": plain(args), "config": plain(self.config)}
        if self.leads:
            write_json(self.folder / OPTIONS, options)
        command = "sft" if self.agent == "sft" else "train"
        again = f"textgym {command} --resume --folder {self.folder}"
        try:
            result, seconds = self.timed(
                self.learner, self.total_tokens, resume=args.resume, quiet=args.quiet
            )
        except (CheckpointError, NonFiniteError, UnscoredError, ProcessError, OSError) as error:
            if not self.leads and isinstance(error, OSError):  # all meet the others alike
                print(f"process {world().rank}: {error}", file=sys.stderr)
            console.print(f"[red]{escape(str(error))}[/]\nwhen that is mended: {escape(again)}")
            return 1
        if result.interrupted:
            console.print(f"go on with: {escape(again)}", soft_wrap=True)
            return 130
        best = result.best_checkpoint
        if best is not None:
            read_policy(self.policy, best)
        columns = {"before": before, self.agent: self.measure(self.policy)}
        took = {self.agent: seconds}
        if self.wants_baseline:
            if self.leads:
                shown = {name: summary(measured) for name, measured in columns.items()}
                console.print(metrics_table("so far", shown))
            console.print(
                "\nnow sft from the same start for the same time, to compare "
                "(--sft-baseline False leaves it out)",
                soft_wrap=True,
            )
            columns["sft"], took["sft"] = self.baseline(seconds)
        if self.leads:
            top = ceiling(self.test.task, count=args.report_prompts)
            self.report(columns, top, result, took)
        return 0

    def introduce(self) -> None:
        """Say what is trained on what."""
        tables = [len(envs.task.prompts) for envs in (self.envs, self.validation, self.test)]
        parameters = sum(p.numel() for p in self.policy.model.parameters())
        rewards = " + ".join(self.envs.task.schedule.names)
        device = str(self.policy.device)
        if world().size > 1:
            device = f"{self.policy.device.type}, {world().size} processes"
        self.console.print(
            f"[bold]{self.agent}[/] on {self.maker.id}, reward {rewards}"
            f"\nmodel {escape(self.maker.model)}: {parameters:,} parameters on {device}"
            f"\nprompts: {tables[0]} training, {tables[1]} validation, {tables[2]} test"
            f"\nfolder {escape(str(self.folder))}"
        )

    @property
    def total_tokens(self) -> int | None:
        """Tokens of the run."""
        if self.args.total_tokens is None and self.agent != "sft":
            return TOTAL_TOKENS
        return self.args.total_tokens

    @property
    def wants_baseline(self) -> bool:
        """Whether to train SFT beside."""
        asked = self.args.sft_baseline
        if self.agent == "sft" or "references" not in self.envs.task.prompts.columns:
            return False
        return self.maker.model == EMBEDDED if asked is None else asked

    def measure(self, policy: CausalLMPolicy) -> Measured:
        """Sample responses to the test prompts; every policy gets the same draws.

        Where there are fewer prompts than asked for, each gets several responses.
        """
        count, prompts = self.args.report_prompts, len(self.test.task.prompts)
        samples = max(1, count // prompts)
        return measure(
            policy, self.reference, self.test, count=count, samples=samples, seed=REPORT_SEED
        )

    def timed(self, learner: Any, tokens: int | None, **options: Any) -> tuple[Result, float]:
        """Let an agent learn; gives also how many seconds it took, those before a resume included.

        On the CPU they are CPU seconds, so that a busy machine cheats nobody; of several processes
        the leader's count.
        """
        clock = time.process_time if self.policy.device.type == "cpu" else time.perf_counter
        start = clock()
        result: Result = learner.learn(tokens, **options)
        seconds = clock() - start
        if self.leads and options.get("resume") and (here := _update_seconds(result.history)):
            seconds *= _update_seconds(read_metrics(learner.folder)) / here
        return result, of_leader(seconds)

    def baseline(self, seconds: float) -> tuple[Measured, float]:
        """Train SFT from the same start for as long, its weights chosen on validation."""
        config = dataclasses.replace(config_for("sft", self.maker.model), seed=self.config.seed)
        folder = self.folder / "sft"
        if self.leads:
            shutil.rmtree(folder, ignore_errors=True)
        # How fast it is, on weights that are thrown away.
        probe = agent_class("sft")(self.start(), self.training_envs("sft"), config)
        done, spent = self.timed(probe, 1 << 40, quiet=True, max_updates=PROBE_UPDATES)
        policy = self.start()
        learner = self.make("sft", policy, config, folder)
        tokens = max(1, round(done.total_tokens / spent * seconds))
        _, took = self.timed(learner, tokens, quiet=self.args.quiet)
        return self.measure(policy), took

    def report(
        self,
        columns: dict[str, Measured],
        top: Measured | None,
        result: Result,
        took: dict[str, float],
    ) -> None:
        """Print table and completions; write them and the learning curve."""
        console, folder = self.console, self.folder
        shown = {name: summary(measured) for name, measured in columns.items()}
        if top is not None:
            shown["ceiling"] = summary(top)
        number = len(columns["before"].prompts)
        print_completions(console, columns, self.args.completions)
        console.print()
        console.print(metrics_table(f"{counted(number, 'test prompt')}, sampled", shown))
        console.print(f"[dim]{notes(shown, 'the model before training')}[/]")
        kind = "CPU seconds" if self.policy.device.type == "cpu" else "seconds"
        times = ", ".join(f"{name} {seconds:.0f}" for name, seconds in took.items())
        console.print(f"[dim]{kind} of training, evaluations included: {times}[/]")
        written = {
            "env": self.maker.id,
            "agent": self.agent,
            "prompts": number,
            "updates": result.updates,
            "total_tokens": result.total_tokens,
            "train_seconds": took,
            "metrics": as_json(shown),
            "completions": completions_json(columns, self.args.completions),
        }
        write_json(folder / REPORT, written)
        curve = plot_learning_curve(folder)
        kept = result.best_checkpoint or result.checkpoint
        console.print(
            f"\nlearning curve {escape(str(curve))}\ncheckpoint     {escape(str(kept))}",
            soft_wrap=True,
        )
        console.print(f"score it with: textgym eval --model {escape(str(folder))}")


def _update_seconds(history: list[dict[str, Any]]) -> float:
    """Seconds that updates took, as they were logged."""
    return sum((m.get("time/rollout_s") or 0.0) + (m.get("time/train_s") or 0.0) for m in history)


def _folder(agent: str, args: TrainArgs, env_id: str) -> Path:
    if args.folder is not None:
        return args.folder
    if args.resume:
        raise UsageError("--resume needs --folder, the folder of the run to go on with")
    stem = f"{env_id.removeprefix('textgym/').lower()}-{agent}"
    return next(
        folder for k in itertools.count(1) if not (folder := Path("runs") / f"{stem}-{k}").exists()
    )
