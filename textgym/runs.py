"""The bookkeeping of a training run: counters, held-out evaluation, checkpoints, resume, Ctrl-C.

No learning happens here, and nothing here calls an agent: an agent's `learn` opens a `Run`, loops
while `run.wants_more`, and hands each finished update to `run.finish_update`. With several
processes each has a `Run`; the leader's writes files, and all stop after the same update.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np

from textgym.checkpoint import (
    CheckpointError,
    OtherRunError,
    best_checkpoint,
    latest_checkpoint,
    load_state,
    prepare_folder,
    save_checkpoint,
)
from textgym.learning import check_scored
from textgym.logging import RunLogger
from textgym.malloc import keep_freed_memory
from textgym.metrics import rollout_metrics
from textgym.parallel import any_of, gather, of_leader, shared, world
from textgym.rollout import collect
from textgym.streams import mix64
from textgym.weights import fingerprint, read_policy, write_policy

if TYPE_CHECKING:
    from textgym.episodes import Episodes
    from textgym.policies import CausalLMPolicy
    from textgym.task import Task
    from textgym.vector import TextGenVectorEnv

_EVAL = 0x45564C  # key of the held-out draws


class Stateful(Protocol):
    """What a checkpoint keeps."""

    def state_dict(self) -> Any:
        """Everything that `load_state_dict` needs."""

    def load_state_dict(self, state: Any) -> Any:
        """Go on from `state`."""


@dataclass
class Counters:
    """How far a run is."""

    update: int = 0
    """Updates done."""
    tokens: int = 0
    """Action tokens sampled, unscored and discarded ones counted."""
    groups: int = 0
    """Groups of episodes started: the number of the next one's stream."""
    best: float = -math.inf
    """Best held-out result so far, larger is better."""
    since_best: int = 0
    """Held-out evaluations since the best one."""


@dataclass
class Result:
    """What `learn` returns."""

    updates: int
    """Updates done, those before a resume included."""
    total_tokens: int
    """Action tokens so far, those before a resume included."""
    history: list[dict[str, float]]
    """Metrics of every update of this call, as logged."""
    interrupted: bool
    """Whether Ctrl-C (or a polite kill) ended the run early."""
    checkpoint: Path | None
    """The newest checkpoint, where there is a folder."""
    best_checkpoint: Path | None = None
    """The best one by held-out evaluation, where there was any."""


class Run:
    """One call of `learn`, as a context manager."""

    def __init__(
        self,
        title: str,
        policy: CausalLMPolicy,
        config: Any,
        parts: Mapping[str, Stateful],
        *,
        folder: str | Path | None,
        total_tokens: int | None,
        resume: bool,
        quiet: bool,
        max_updates: int | None = None,
        evaluate: Callable[[], tuple[dict[str, float], float]] | None = None,
        reference: CausalLMPolicy | None = None,
        task: Task | None = None,
    ) -> None:
        """Prepare the folder and, when resuming, put everything back as it was.

        Args:
            title: Name of the agent.
            policy: What is trained; its weights are loaded in place when resuming.
            config: The agent's dataclass; reads `eval_every`, `checkpoint_every`, `keep`.
            parts: What a checkpoint keeps besides weights and counters, by name.
            folder: Where logs and checkpoints go; None for neither.
            total_tokens: Ends the run; None for no limit.
            resume: Go on from the newest checkpoint of `folder`, if there is one.
            quiet: No progress.
            max_updates: Ends this call (not the run) after so many updates.
            evaluate: Returns held-out metrics, and one number that is larger for a better policy.
            reference: Its weights are compared with those of the run that is resumed.
            task: Its tokenizer is written beside the weights, and under `rewards/` what its reward
                has frozen of the training split.

        Raises:
            CheckpointError: If the folder cannot be written, or holds a run and `resume` is False.
            ValueError: If the reference is not that of the run that is resumed, or processes start
                from different weights or settings.
        """
        self.leads = world().leads
        self.policy, self.config, self.parts = policy, config, dict(parts)
        policy.invalidate_cache()  # what it did before this run must not show in how it rounds
        if policy.device.type == "cpu":
            keep_freed_memory()
        self.tokenizer = None if task is None else task.tokenizer
        self.folder = None if folder is None else Path(folder).expanduser().absolute()
        shared(lambda: self._prepare(task))
        self.total_tokens, self.max_updates = total_tokens, max_updates
        self.counters = Counters()
        self.history: list[dict[str, float]] = []
        self.resumed = False
        self._evaluate = evaluate
        self._fingerprint = fingerprint(reference)
        self._saved: Path | None = None
        self._saved_update = -1
        self._done_here = 0
        self._rollout_s = 0.0
        self._interrupt = _Interrupt()
        newest = None if self.checkpoints is None else latest_checkpoint(self.checkpoints)
        # One look for all: the leader may write its first checkpoint before others have looked.
        newest = of_leader(newest)
        if newest is not None:
            if not resume:
                raise CheckpointError(
                    f"{self.folder} already holds a run ({newest.name}): resume it "
                    "(resume=True, --resume) or choose another folder"
                )
            self._load(newest)
        self._check_alike()
        self.log = RunLogger(
            self.folder if self.leads else None,
            title=title,
            total_tokens=total_tokens,
            quiet=quiet or not self.leads,
        )
        self.log.truncate_after(self.counters.update if self.resumed else -1)
        self._clock = time.perf_counter()
        if self.resumed:
            self.log.message(f"resumed after update {self.counters.update} from {self._saved}")

    @property
    def checkpoints(self) -> Path | None:
        """The folder of the checkpoints."""
        return None if self.folder is None else self.folder / "checkpoints"

    @property
    def progress(self) -> float:
        """Share of the run's tokens done; 0 where there is no limit."""
        return self.counters.tokens / self.total_tokens if self.total_tokens else 0.0

    @property
    def finished(self) -> bool:
        """Whether the run is over: its tokens are spent, or its patience is (also once resumed)."""
        spent = self.total_tokens is not None and self.counters.tokens >= self.total_tokens
        patience = getattr(self.config, "patience", 0)
        return spent or 0 < patience <= self.counters.since_best

    @property
    def wants_more(self) -> bool:
        """Whether to do another update. All processes must ask, and get the same answer."""
        here = self.max_updates is not None and self._done_here >= self.max_updates
        return not (self.finished or here or any_of(self._interrupt.requested))

    def __enter__(self) -> Self:
        self._interrupt.install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._interrupt.restore()
        if error is not None and self._saved is not None:
            self.log.message(f"stopped; resume from {self._saved} with resume=True (--resume)")
        self.log.close()

    def begin(self) -> None:
        """Evaluate and save before the first update; nothing when resumed."""
        if self.resumed:
            return
        metrics, improved = self._held_out()
        if metrics:
            metrics["time/total_tokens"] = self.counters.tokens
            self.log.log(0, metrics)
            self.history.append(metrics)
        self._save(best=improved)
        self._fresh_start()

    def rollout_done(self) -> None:
        """Note the time, and let go of the rollout's cache: the update needs the memory."""
        self._rollout_s = time.perf_counter() - self._clock
        self.policy.invalidate_cache()

    def finish_update(
        self,
        metrics: Mapping[str, float],
        tokens: int,
        samples: Callable[[], Iterable[Mapping[str, Any]]] = tuple,
    ) -> None:
        """Count, evaluate, log and save, in this order, so that a checkpoint has its log lines.

        Args:
            metrics: Of this update, by glossary name.
            tokens: Action tokens of this update.
            samples: Called where this update's samples are to be logged.
        """
        count, every = self.counters, self.config.eval_every
        count.update += 1
        count.tokens += tokens
        self._done_here += 1
        seconds = time.perf_counter() - self._clock
        line = dict(metrics)
        line["time/update"] = count.update
        line["time/total_tokens"] = count.tokens
        line["time/tokens_per_s"] = tokens / max(seconds, 1e-9)
        line["time/rollout_s"] = self._rollout_s
        line["time/train_s"] = seconds - self._rollout_s
        improved = False
        # A call that ends early evaluates nothing more, so that the resumed run is the same run.
        due = self.finished or (every > 0 and count.update % every == 0)
        if due:
            held_out, improved = self._held_out()
            line |= held_out
        self.log.log(count.update, line)
        self.history.append(line)
        if due or count.update == 1:
            self.log.log_samples(count.update, samples())
        if improved or not self.wants_more or count.update % self.config.checkpoint_every == 0:
            self._save(best=improved)
        self._fresh_start()

    def result(self) -> Result:
        """What was done."""
        interrupted = any_of(self._interrupt.requested)
        if interrupted:
            if self._saved_update != self.counters.update:  # it came when the update was done
                self._save(best=False)
            where = f"saved {self._saved}; resume with resume=True (--resume)"
            self.log.message(f"interrupted: {where if self._saved else 'nothing was saved'}")
        best = None if self.checkpoints is None else best_checkpoint(self.checkpoints)
        return Result(
            self.counters.update,
            self.counters.tokens,
            self.history,
            interrupted,
            self._saved,
            best,
        )

    def _fresh_start(self) -> None:
        """Begin an update with an empty cache, as a resumed run does, to round as it rounds."""
        self.policy.invalidate_cache()
        self._clock = time.perf_counter()

    def _held_out(self) -> tuple[dict[str, float], bool]:
        if self._evaluate is None:
            return {}, False
        metrics, score = self._evaluate()
        count = self.counters
        improved = score > count.best
        count.best = max(count.best, score)
        count.since_best = 0 if improved else count.since_best + 1
        return metrics | {"eval/best": count.best}, improved

    def _prepare(self, task: Task | None) -> None:
        """Make the folder, and keep in it what the reward has frozen."""
        if self.folder is None or not self.leads:
            return
        prepare_folder(self.folder)
        if task is not None:
            task.schedule.keep(self.folder / "rewards")

    def _check_alike(self) -> None:
        """Check that all processes are at the same place of the same run."""
        mine = (fingerprint(self.policy), self._fingerprint, self._settings, self.counters)
        if any(other != mine for other in gather(mine)):
            raise ValueError(
                "the processes start from different weights or settings: give each the same model, "
                "reference, config and seed"
            )

    @property
    def _settings(self) -> str:
        return json.dumps(dataclasses.asdict(self.config), default=str)

    def _save(self, best: bool) -> None:
        """Let the leader write a checkpoint, and wait for it: who reads it next finds it whole."""
        if self.checkpoints is not None:
            self._saved = shared(lambda: self._written(best) if self.leads else None)[0]
            self._saved_update = self.counters.update

    def _written(self, best: bool) -> Path:
        assert self.checkpoints is not None
        self.log.flush()
        state = {
            "counters": dataclasses.asdict(self.counters),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "config": self._settings,
            "reference": self._fingerprint,
        }
        return save_checkpoint(
            self.checkpoints,
            step=self.counters.update,
            write=lambda path: write_policy(self.policy, self.tokenizer, path),
            state=state,
            keep=self.config.keep,
            best=best,
        )

    def _load(self, checkpoint: Path) -> None:
        state = load_state(checkpoint)
        if state["reference"] != self._fingerprint:
            raise OtherRunError(
                f"the reference policy is not that of the run in {self.folder}: make the agent "
                "with the model that the run started from (its weights are loaded when resuming)"
            )
        if set(state["parts"]) != set(self.parts):
            raise OtherRunError(
                f"{checkpoint} was saved by another agent or configuration: it holds "
                f"{sorted(state['parts'])}, this one needs {sorted(self.parts)}"
            )
        read_policy(self.policy, checkpoint)
        self.counters = Counters(**state["counters"])
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self._saved, self.resumed = checkpoint, True
        self._saved_update = self.counters.update


def evaluate_policy(
    policy: CausalLMPolicy,
    envs: TextGenVectorEnv,
    episodes: int,
    *,
    seed: int,
    path: Literal["step", "sequence"] = "step",
) -> tuple[dict[str, float], Episodes]:
    """Sample a response to each of the first `episodes` held-out prompts (cycling through fewer).

    The streams are the same at every call, so that two evaluations differ by the policy only.

    Returns:
        Metrics by glossary name, and the episodes.

    Raises:
        UnscoredError: If more than 20 % of the episodes have no score: the mean of the others says
            little, and a checkpoint must not be called the best for it.
    """
    prompts = len(envs.unwrapped.task.prompts)
    rows = np.arange(episodes, dtype=np.int64) % prompts
    key = int(mix64(seed, _EVAL))
    found = collect(policy, envs, episodes, seed=key, prompt_rows=rows, path=path)
    check_scored(found)
    rollout = rollout_metrics(found)
    metrics = {
        "eval/reward_mean": rollout["rollout/reward_mean"],
        "eval/reward_std": rollout["rollout/reward_std"],
        "eval/response_length": rollout["rollout/response_length"],
        "eval/cut": rollout["rollout/length"],
        "eval/unscored": rollout["rollout/unscored"],
    }
    metrics |= {f"eval/{n}": v for n, v in rollout.items() if n.startswith("reward/")}
    return metrics, found


@dataclass
class _Interrupt:
    """Turns the first Ctrl-C (or SIGTERM) into a request, so that no update is left half done."""

    requested: bool = False
    previous: dict[int, Any] = field(default_factory=dict)

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
