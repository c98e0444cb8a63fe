"""`textgym train` and `textgym sft`: train, and show what it changed on prompts never trained on.

The options of the task and of the run are `TrainArgs`, those of the algorithm are the fields of its
config, the same dataclass that Python users pass. A run's folder holds them (`run.json`), logs,
samples, TensorBoard events, checkpoints, the learning curve and the final table (`report.json`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.markup import escape

import textgym.agents
from textgym.commands.errors import UsageError, reported
from textgym.commands.listing import agent_modules
from textgym.commands.measure import Measured, ceiling, measure
from textgym.commands.models import load_policy
from textgym.commands.report import (
    as_json,
    completions_json,
    metrics_table,
    print_completions,
    summary,
    write_json,
)
from textgym.commands.setup import TaskArgs, TaskMaker
from textgym.logging import plot_learning_curve, read_metrics
from textgym.runs import Result, read_policy
from textgym.tokens import EMBEDDED

if TYPE_CHECKING:
    from textgym.policies import CausalLMPolicy

OPTIONS, REPORT = "run.json", "report.json"
REPORT_SEED = 0x7E57
PROBE_UPDATES = 8  # of SFT, to see how many tokens fit into the time that RL took
TOTAL_TOKENS = 200_000
FOR_EMBEDDED: dict[str, dict[str, Any]] = {
    "ppo": {"lr": 1e-3, "kl_coef": 0.01},
    "reinforce": {"lr": 1e-3, "kl_coef": 0.01},
    "sft": {"lr": 1e-3},
}
"""What differs from a config's defaults for the embedded model, which is tiny."""


@dataclass(frozen=True)
class TrainArgs(TaskArgs):
    """Train a language model, and compare it on held-out prompts before and after."""

    agent: str = "ppo"
    """Which algorithm; its own options follow from it."""
    total_tokens: int | None = None
    """Action tokens to train on; sft: None is its `epochs`."""
    folder: Path | None = None
    """Where everything goes; default is a new one under runs/."""
    resume: bool = False
    """Go on with the run in --folder, with its options."""
    num_envs: int = 64
    """Rows of the vector environment; changes speed, not results."""
    device: str = "auto"
    """Where the model lives: "auto" is CUDA if there is any, else the CPU."""
    dtype: str | None = None
    """Of the weights; default is float32."""
    lora: int | None = None
    """Train low-rank adapters of this rank instead of all weights."""
    temperature: float = 1.0
    """Divides the logits, in sampling and in learning alike."""
    report_prompts: int = 256
    """Test prompts of the table that is printed; fewer are sampled several times."""
    completions: int = 4
    """Prompts whose responses are printed side by side."""
    sft_baseline: bool | None = None
    """Whether to train SFT for the same time and compare; default is with the embedded model."""
    quiet: bool = False
    """No progress."""


def run(arguments: Sequence[str]) -> int:
    """Train by reinforcement learning."""
    name = value_of("--agent", arguments) or _saved(arguments).get("agent") or "ppo"
    names = [agent for agent in agent_modules() if agent != "sft"]
    if name not in names:
        hint = "; use `textgym sft`" if name == "sft" else ""
        raise UsageError(f"no agent {name!r}, there are {', '.join(names)}{hint}")
    return _run(name, arguments)


def run_sft(arguments: Sequence[str]) -> int:
    """Fine-tune on references."""
    return _run("sft", arguments)


def _run(agent: str, arguments: Sequence[str]) -> int:
    args, config = parse(agent, arguments)
    console = Console(highlight=False)
    with reported():
        training = Training(agent, args, config, console)
    return training.run()


def parse(agent: str, arguments: Sequence[str]) -> tuple[TrainArgs, Any]:
    """Read the options of the run, and of its agent into the agent's own config.

    Args:
        agent: Module of `textgym.agents`.
        arguments: The options. With `--resume`, those of the run in `--folder` are the defaults.
    """
    config_type = agent_class(agent, "Config")
    saved = _saved(arguments)
    args, config = TrainArgs(agent=agent), default_config(agent, arguments)
    if saved:
        given = {**saved["args"], "stop": tuple(saved["args"]["stop"])}
        args, config = TrainArgs(**given), config_type(**saved["config"])
    both = dataclasses.make_dataclass(
        "Options", [("run", TrainArgs), (agent, config_type)], frozen=True
    )
    parsed: Any = tyro.cli(
        both,
        args=arguments,
        default=both(args, config),
        prog="textgym sft" if agent == "sft" else "textgym train",
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return parsed.run, getattr(parsed, agent)


def agent_class(agent: str, suffix: str = "") -> Any:
    """Class or config of an agent, by the name of its module."""
    name = next(n for n, module in textgym.agents.WHERE.items() if module == agent)
    return getattr(textgym.agents, name.removesuffix("Config") + suffix)


def default_config(agent: str, arguments: Sequence[str]) -> Any:
    """Where the options start: the config's defaults, or what suits the embedded model."""
    model = value_of("--model", arguments) or EMBEDDED
    changed = FOR_EMBEDDED.get(agent, {}) if model == EMBEDDED else {}
    return agent_class(agent, "Config")(**changed)


class Training:
    """One run of the command.

    Args:
        agent: Module of `textgym.agents`.
        args: The run's options.
        config: The agent's.
        console: Where tables go.

    Raises:
        ValueError, OSError: Prompts, model and options do not fit or are not there.
    """

    def __init__(self, agent: str, args: TrainArgs, config: Any, console: Console) -> None:
        self.agent, self.args, self.config, self.console = agent, args, config, console
        self.maker = TaskMaker(args)
        self.folder = _folder(agent, args, self.maker.id)
        self.envs = self.maker.vector("train", args.num_envs)
        self.validation = self.maker.vector("validation", args.num_envs)
        self.test = self.maker.vector("test", args.num_envs)
        self.policy = self.start()
        self.reference = self.policy.frozen_copy()
        self.learner = self.make(agent, self.policy, config, self.folder)

    def start(self) -> CausalLMPolicy:
        """The policy before training."""
        args = self.args
        return load_policy(
            args.model,
            self.envs.task,
            seed=self.config.seed,
            device=args.device,
            dtype=args.dtype,
            lora=args.lora,
            temperature=args.temperature,
        )

    def make(self, agent: str, policy: CausalLMPolicy, config: Any, folder: Path) -> Any:
        """An agent on this task."""
        more = {} if agent == "sft" else {"reference": self.reference}
        return agent_class(agent)(
            policy, self.envs, config, eval_envs=self.validation, folder=folder, **more
        )

    def run(self) -> int:
        """Measure, train, measure again, and report; returns the exit status."""
        args, console = self.args, self.console
        self.introduce()
        before = self.measure(self.policy if not args.resume else self.start())
        self.folder.mkdir(parents=True, exist_ok=True)
        options = {"agent": self.agent, "args": _plain(args), "config": _plain(self.config)}
        write_json(self.folder / OPTIONS, options)
        result = self.learner.learn(self.total_tokens, resume=args.resume, quiet=args.quiet)
        if result.interrupted:
            command = "sft" if self.agent == "sft" else "train"
            console.print(f"go on with: textgym {command} --resume --folder {self.folder}")
            return 130
        seconds = trained_seconds(self.folder)
        best = result.best_checkpoint
        if best is not None:
            read_policy(self.policy, best)
        columns = {"before": before, self.agent: self.measure(self.policy)}
        top = ceiling(self.test.task, count=args.report_prompts)
        if self.wants_baseline:
            shown = {name: summary(measured) for name, measured in columns.items()}
            console.print(metrics_table("so far", shown))
            columns["sft"] = self.baseline(seconds)
        self.report(columns, top, result, seconds)
        return 0

    def introduce(self) -> None:
        """Say what is trained on what."""
        tables = [len(envs.task.prompts) for envs in (self.envs, self.validation, self.test)]
        parameters = sum(p.numel() for p in self.policy.model.parameters())
        rewards = " + ".join(self.envs.task.schedule.names)
        self.console.print(
            f"[bold]{self.agent}[/] on {self.maker.id}, reward {rewards}"
            f"\nmodel {escape(self.args.model)}: {parameters:,} parameters on {self.policy.device}"
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
        return self.args.model == EMBEDDED if asked is None else asked

    def measure(self, policy: CausalLMPolicy) -> Measured:
        """Sample responses to the test prompts; every policy gets the same draws.

        Where there are fewer prompts than asked for, each gets several responses.
        """
        count, prompts = self.args.report_prompts, len(self.test.task.prompts)
        samples = max(1, count // prompts)
        return measure(
            policy, self.reference, self.test, count=count, samples=samples, seed=REPORT_SEED
        )

    def baseline(self, seconds: float) -> Measured:
        """Train SFT from the same start for as long, its weights chosen on validation."""
        config = default_config("sft", ["--model", self.args.model])
        config = dataclasses.replace(config, seed=self.config.seed)
        folder = self.folder / "sft"
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory() as scratch:  # how fast it is, on weights thrown away
            probe = self.make("sft", self.start(), config, Path(scratch))
            done = probe.learn(1 << 40, quiet=True, max_updates=PROBE_UPDATES).history
        speed = done[-1]["time/tokens_per_s"]
        policy = self.start()
        learner = self.make("sft", policy, config, folder)
        learner.learn(max(1, round(speed * seconds)), quiet=self.args.quiet)
        return self.measure(policy)

    def report(
        self, columns: dict[str, Measured], top: Measured | None, result: Result, seconds: float
    ) -> None:
        """Print table and completions; write them and the learning curve."""
        console, folder = self.console, self.folder
        shown = {name: summary(measured) for name, measured in columns.items()}
        if top is not None:
            shown["ceiling"] = summary(top)
        number = len(columns["before"].prompts)
        print_completions(console, columns, self.args.completions)
        console.print()
        console.print(metrics_table(f"{number} test prompts, sampled", shown))
        if top is not None:
            console.print("[dim]ceiling: one reference scored against the others[/]")
        took = {self.agent: seconds}
        if "sft" in columns and self.agent != "sft":
            took["sft"] = trained_seconds(folder / "sft")
        console.print(
            "[dim]trained: " + ", ".join(f"{n} {s:.0f} s" for n, s in took.items()) + "[/]"
        )
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
        console.print(f"\nlearning curve {escape(str(curve))}\ncheckpoint     {escape(str(kept))}")
        console.print(f"score it with: textgym eval --model {escape(str(folder))}")


def trained_seconds(folder: Path) -> float:
    """Seconds that a run sampled and trained, without evaluations and checkpoints."""
    lines = read_metrics(folder)
    return sum((m.get("time/rollout_s") or 0.0) + (m.get("time/train_s") or 0.0) for m in lines)


def _folder(agent: str, args: TrainArgs, env_id: str) -> Path:
    if args.folder is not None:
        return args.folder
    if args.resume:
        raise UsageError("--resume needs --folder, the folder of the run to go on with")
    stem = f"{env_id.removeprefix('textgym/').lower()}-{agent}"
    return next(
        folder for k in itertools.count(1) if not (folder := Path("runs") / f"{stem}-{k}").exists()
    )


def _saved(arguments: Sequence[str]) -> dict[str, Any]:
    """Options of the run that is to be resumed; empty where none is."""
    folder = value_of("--folder", arguments)
    if folder is None or "--resume" not in arguments or "--help" in arguments:
        return {}
    path = Path(folder) / OPTIONS
    if not path.is_file():
        raise UsageError(f"--resume: {folder} holds no run ({OPTIONS} is missing)")
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return saved


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """Value of one option, read before the others are known."""
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


def _plain(options: Any) -> dict[str, Any]:
    """A dataclass as JSON values that do not depend on the working directory."""
    values = dataclasses.asdict(options)
    for name in ("prompts", "test_prompts", "model"):
        value = values.get(name)
        if isinstance(value, str) and Path(value).exists():
            values[name] = str(Path(value).resolve())
    for name, value in values.items():
        values[name] = str(value) if isinstance(value, Path) else value
    return {name: value for name, value in values.items() if name not in ("resume", "folder")}
