"""What a run writes down: metrics, TensorBoard events, samples, live progress and a learning curve.

    <folder>/metrics.jsonl         one JSON line an update; a number that is not finite is null
    <folder>/samples.jsonl         sample responses with the reward of each token
    <folder>/tensorboard/          the same metrics as events
    <folder>/learning_curve.png    drawn at the end

Every metric has one name and one line in `GLOSSARY`; a name that is not there is an error.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

METRICS, SAMPLES, EVENTS, CURVE = (
    "metrics.jsonl",
    "samples.jsonl",
    "tensorboard",
    "learning_curve.png",
)

GLOSSARY: dict[str, str] = {
    "rollout/reward_mean": "mean over scored episodes of the environment's reward per episode",
    "rollout/reward_std": "standard deviation of that sum over scored episodes",
    "rollout/response_length": "mean number of action tokens per scored episode",
    "rollout/stop_id": "share of scored episodes that ended on a stop id",
    "rollout/stop_string": "share of scored episodes that ended on a stop string",
    "rollout/length": "share of scored episodes cut by the token budget",
    "rollout/env": "share of scored episodes ended by the environment itself",
    "rollout/unscored": "share of episodes without a score; they have no weight anywhere",
    "kl/ref": "sampled KL to the reference (sum of k1), nats per response; drives the controller",
    "kl/ref_exact": "exact full-distribution KL to the reference, nats per response",
    "kl/beta": "price of one nat of KL, in units of reward",
    "loss/kl": "mean k3 to the reference, as the loss weighs tokens; its price is not in it",
    "loss/policy": "policy loss, mean over the update's steps",
    "loss/value": "value loss, mean over the update's steps",
    "loss/nll": "negative log-likelihood of the reference responses, nats per token (SFT)",
    "policy/entropy": "mean entropy of the sampling distribution per action token, nats",
    "policy/logprob": "mean log-probability of the sampled tokens, nats per token",
    "ppo/approx_kl": "k3 of KL(old || new), mean over the update's minibatches, nats per token",
    "grpo/flat_groups": "share of the batch's groups whose responses all earn the same, before KL",
    "grpo/resampled": "groups sampled in place of flat ones, as a share of the batch's groups",
    "expert/kept": "share of the responses sampled that are learned from",
    "expert/flat_groups": "share of groups whose responses all earn the same, before KL",
    "expert/reward_mean": "mean over the responses learned from of the environment's reward",
    "ppo/clip_fraction": "share of action tokens whose ratio lies outside the clip range",
    "ppo/first_ratio_error": "largest |ratio - 1| before the first step; 0: learner equals sampler",
    "ppo/epochs": "epochs begun before the target KL stopped the update",
    "trpo/kl": "mean KL(old || new) of the policy's step, nats per token",
    "trpo/line_search": "1 where the line search found a step that was taken, else 0",
    "value/explained_variance": "share of the returns' variance that the values explain; 1 is best",
    "baseline/value": "moving-average baseline that this batch was judged by",
    "optim/grad_norm": "global gradient norm before clipping, mean over the update's steps",
    "optim/lr": "learning rate of the update's last step",
    "sampler/gap": "mean |log pi of learner - log pi as sampled| per action token, nats",
    "sampler/max_ratio": "largest probability of a token by the learner over that when sampled",
    "optim/steps": "optimizer steps of this update",
    "optim/skipped": "optimizer steps skipped so far: a loss or gradient was not finite",
    "time/tokens_per_s": "action tokens sampled and trained on, per second of this update",
    "time/rollout_s": "seconds of this update spent sampling and scoring",
    "time/train_s": "seconds of this update spent training",
    "time/total_tokens": "action tokens so far, discarded ones counted (SFT: response tokens)",
    "time/update": "updates so far",
    "eval/reward_mean": "mean reward on held-out prompts",
    "eval/reward_std": "standard deviation of the reward over held-out episodes",
    "eval/response_length": "mean number of action tokens on held-out prompts",
    "eval/cut": "share of held-out responses cut by the token budget",
    "eval/unscored": "share of held-out episodes without a score",
    "eval/nll": "negative log-likelihood of held-out reference responses, nats per token",
    "eval/perplexity": "exp of eval/nll",
    "eval/best": "best held-out score so far: reward, or minus the nll (SFT)",
}
"""Meaning of every metric, by name."""

FAMILIES: dict[str, str] = {
    "reward/": "mean over the episodes it applies to of this unweighted reward component",
    "eval/reward/": "the same component on held-out prompts",
    "unscored/": "share of episodes without a score for this reason: an exception, nan, none, ...",
}
"""Meaning of the metrics whose names end in that of a reward component or a failure, by prefix."""


def describe(name: str) -> str:
    """Meaning of a metric.

    Raises:
        KeyError: If the glossary does not have it.
    """
    if name in GLOSSARY:
        return GLOSSARY[name]
    for prefix, meaning in FAMILIES.items():
        if name.startswith(prefix) and len(name) > len(prefix):
            return meaning
    raise KeyError(
        f"metric {name!r} is not in textgym.logging.GLOSSARY: add it there with one line of meaning"
    )


class RunLogger:
    """Writes one run's logs into a folder and shows its progress on standard error.

    Attributes:
        folder: Where the logs go, or None: then there is progress only.
        history: The metrics of every update logged by this object, in order.
    """

    def __init__(
        self,
        folder: str | Path | None,
        *,
        title: str = "train",
        total_tokens: int | None = None,
        quiet: bool = False,
        tensorboard: bool = True,
        plain_every: float = 5.0,
    ) -> None:
        """Open the logs; nothing is written before the first call.

        Args:
            folder: Made if it is not there. None writes no files.
            title: Stands before the progress.
            total_tokens: Of the whole run, for the bar and the time left.
            quiet: No progress.
            tensorboard: Whether to write events.
            plain_every: Seconds between lines of progress where there is no terminal.
        """
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.history: list[dict[str, float]] = []
        self._tensorboard = tensorboard and self.folder is not None
        self._writer: Any = None
        self._files: dict[str, Any] = {}
        self._progress = None if quiet else _Progress(title, total_tokens, plain_every)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line of metrics.

        Args:
            step: Updates done, this one included.
            metrics: Numbers by glossary name.

        Raises:
            KeyError: If a name is not in the glossary.
            OSError: If the line cannot be written.
        """
        for name in metrics:
            describe(name)
        numbers = {name: float(value) for name, value in metrics.items()}
        self._append(METRICS, {"step": step, **numbers})
        if self._tensorboard:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                # Events of a killed run's lost updates lie after this step: hide them.
                assert self.folder is not None
                self._writer = SummaryWriter(str(self.folder / EVENTS), purge_step=step)
            self._write_event(step, {n: v for n, v in numbers.items() if math.isfinite(v)})
        self.history.append(numbers)
        if self._progress is not None:
            self._progress.show(step, numbers)

    def _write_event(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write all numbers of an update as one event; one each takes 30 times as long."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._writer.file_writer.add_summary(Summary(value=values), step)

    def log_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Write sample responses, one line each, beside the step that they are from."""
        for sample in samples:
            self._append(SAMPLES, {"step": step, **sample})

    def truncate_after(self, step: int) -> None:
        """Drop every line of a later step, and the torn line that a killed process may leave."""
        self._close_files()
        if self.folder is not None:
            for name in (METRICS, SAMPLES):
                _truncate(self.folder / name, step)

    def flush(self) -> None:
        """Bring everything written so far to the disk; call it before a checkpoint is saved."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def message(self, text: str) -> None:
        """Show a line above the progress."""
        if self._progress is not None:
            self._progress.message(text)

    def close(self) -> None:
        """Write what is pending and end the progress. May be called twice."""
        self._close_files()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._progress is not None:
            self._progress.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        if name not in self._files:
            self._files[name] = (self.folder / name).open("a", encoding="utf-8")
        file = self._files[name]
        file.write(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The metrics of a run, one dict a line; null becomes None. A torn last line is left out."""
    return [record for _, record in _whole_lines(Path(folder) / METRICS)]


def plot_learning_curve(folder: str | Path) -> Path:
    """Draw a run's learning curve from its metrics.

    Returns:
        The PNG's path, `<folder>/learning_curve.png`.

    Raises:
        ValueError: If there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(folder)
    panels = [
        ("reward", ("rollout/reward_mean", "eval/reward_mean")),
        ("loss, nats per token", ("loss/nll", "eval/nll")),
        ("KL to the reference,\nnats per response", ("kl/ref_exact", "kl/ref")),
        ("entropy, nats per token", ("policy/entropy",)),
        ("response length, tokens", ("rollout/response_length",)),
    ]
    curves: list[tuple[str, list[tuple[str, list[float], list[float]]]]] = []
    for label, names in panels:
        lines = []
        for name in names:
            points = [
                (float(r.get("time/total_tokens") or r["step"]), float(r[name]))
                for r in records
                if r.get(name) is not None
            ]
            if points:
                lines.append((name, [x for x, _ in points], [y for _, y in points]))
        if lines:
            curves.append((label, lines))
    if not curves:
        raise ValueError(f"{Path(folder) / METRICS} holds no metric of the learning curve")

    figure = Figure(figsize=(8, 2.6 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, lines) in zip(axes, curves, strict=True):
        for name, x, y in lines:
            axis.plot(x, y, marker="o" if name.startswith("eval/") else None, ms=4, label=name)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(loc="best", fontsize="small")
    axes[-1].set_xlabel("action tokens")
    path = Path(folder) / CURVE
    figure.savefig(path, dpi=120)
    return path


class _Progress:
    """A live bar on a terminal, a plain line now and then elsewhere; both on standard error."""

    SHOWN = (
        ("reward", ("rollout/reward_mean",)),
        ("eval", ("eval/reward_mean",)),
        ("eval nll", ("eval/nll",)),
        ("nll", ("loss/nll",)),
        ("KL", ("kl/ref_exact", "kl/ref")),
        ("entropy", ("policy/entropy",)),
    )
    BAR = 12
    DROPPED = ("tokens", "entropy", "update", "speed", "KL")
    """What a narrow terminal goes without, in this order; the bar tells the share of tokens."""

    def __init__(self, title: str, total_tokens: int | None, plain_every: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.title, self.total, self.plain_every = title, total_tokens, plain_every
        self.console = Console(stderr=True)
        self.live: Any = None
        self.task: Any = None
        self.first: tuple[float, float] | None = None
        self.kept: dict[str, float] = {}
        self.last_line = -math.inf
        self.pending = ""
        if self.console.is_terminal:
            self.live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=self.BAR),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[facts]}", markup=False),
                console=self.console,
            )

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        now, tokens = time.monotonic(), numbers.get("time/total_tokens", math.nan)
        if self.first is None:
            # What was done before this call (by a resumed run, or during the first update) took
            # a time that is not known here.
            self.first = (now, tokens)
        parts = self.facts(step, numbers, now, tokens)
        facts = "  ".join(parts.values())
        if self.live is not None:
            room = self.console.width - len(self.title) - self.BAR - len("  100% ") - 1
            for name in self.DROPPED:
                if len(facts) > room:
                    parts.pop(name, None)
                    facts = "  ".join(parts.values())
            if self.task is None:
                self.live.start()
                self.task = self.live.add_task(self.title, total=self.total, facts=facts)
            self.live.update(self.task, completed=0 if math.isnan(tokens) else tokens, facts=facts)
        elif now - self.last_line >= self.plain_every:
            self.last_line, self.pending = now, ""
            self.line(facts)
        else:
            self.pending = facts

    def facts(
        self, step: int, numbers: Mapping[str, float], now: float, tokens: float
    ) -> dict[str, str]:
        """By name: update, tokens, speed, what is learned, time left."""
        parts = {"update": f"update {step}"}
        if not math.isnan(tokens):
            whole = f"/{self.total:,}" if self.total else ""
            parts["tokens"] = f"{tokens:,.0f}{whole} tokens"
        if math.isfinite(numbers.get("time/tokens_per_s", math.nan)):
            parts["speed"] = f"{numbers['time/tokens_per_s']:,.0f} tok/s"
        for label, names in self.SHOWN:
            for name in names:
                if math.isfinite(numbers.get(name, math.nan)):
                    self.kept[label] = numbers[name]  # evaluations come every few updates
                    break
            if label in self.kept:
                parts[label] = f"{label} {self.kept[label]:.3f}"
        assert self.first is not None
        since, before = self.first
        if self.total and tokens > before:
            left = max(0.0, (now - since) * (self.total - tokens) / (tokens - before))
            parts["left"] = f"ETA {int(left) // 60}:{int(left) % 60:02d}"
        return parts

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def line(self, facts: str) -> None:
        self.console.print(f"{self.title}  {facts}", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
        if self.pending:
            self.line(self.pending)
            self.pending = ""


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity; NumPy's and torch's scalars become Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, tensors
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _whole_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines before the first that is torn, each with what it says."""
    found: list[tuple[bytes, dict[str, Any]]] = []
    if path.is_file():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(record, dict):
                break
            found.append((line, record))
    return found


def _truncate(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = b"".join(line for line, record in _whole_lines(path) if record["step"] <= step)
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
