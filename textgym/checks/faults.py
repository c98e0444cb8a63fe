"""Fault injection: a reward that fails at random, to see that training bears it.

The faults are those of a service, not of the text: each costs the text its value, is tried again,
and if the second try fails too the episode is unscored (`textgym.rewards.scores`).

What hangs, and what kills its process, does so in a worker of `textgym.sandbox.pool`, which is
killed and replaced. Nothing can stop a plain function that hangs in the trainer's own process
(Python threads cannot be ended): a scorer that may hang belongs in a worker, or is `async` with a
timeout.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from textgym.rewards.base import Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.functions import as_reward
from textgym.rewards.scores import as_items
from textgym.sandbox.pool import WorkerPool, shared_pool

_IN_WORKER = ("hang", "spin", "kill")


class InjectedFault(RuntimeError):
    """A fault that was asked for."""


class FaultyReward(Reward):
    """A reward that fails at random; its range, columns and good values are those of the other.

    Args:
        reward: What scores where nothing fails; anything that `as_reward` takes.
        seed: Key of the faults, which depend on how many texts were scored before.
        hang: Chance, for each text, that its worker sleeps for ever, until it is killed.
        spin: Chance that its worker computes for ever, until the kernel ends it.
        kill: Chance that its worker kills itself.
        raise_: Chance that it raises.
        nan: Chance that it gives NaN.
        wrong_type: Chance that it gives a string.
        wrong_length: Chance, for each call, that it gives one value too few.
        timeout: Seconds until a worker that hangs is killed; of CPU time a quarter of it.

    Attributes:
        met: How many faults of each kind have been injected, those of second tries included.

    Raises:
        ValueError: If the chances are negative or add up to more than 1.
    """

    def __init__(
        self,
        reward: Any,
        seed: int = 0,
        *,
        hang: float = 0.0,
        spin: float = 0.0,
        kill: float = 0.0,
        raise_: float = 0.0,
        nan: float = 0.0,
        wrong_type: float = 0.0,
        wrong_length: float = 0.0,
        timeout: float = 1.0,
    ) -> None:
        self.reward = as_reward(reward)
        self.name, self.low, self.high = self.reward.name, self.reward.low, self.reward.high
        self.reads_tokens = self.reward.reads_tokens
        self.chances = {
            "hang": hang,
            "spin": spin,
            "kill": kill,
            "raise": raise_,
            "nan": nan,
            "wrong type": wrong_type,
        }
        self.wrong_length, self.timeout = wrong_length, timeout
        self.good = round(1.0 - sum(self.chances.values()), 12)
        if min(*self.chances.values(), wrong_length, self.good) < 0 or wrong_length > 1:
            raise ValueError(
                f"expected chances of at least 0 and at most 1 in all, got {self.chances} and "
                f"wrong_length={wrong_length}"
            )
        self.generator = np.random.default_rng(seed)
        self.met: Counter[str] = Counter()

    def check(self, columns: Collection[str]) -> None:
        """Check the columns of the reward that is wrapped."""
        self.reward.check(columns)

    def fitted(self, rows: Sequence[Mapping[str, Any]]) -> FaultyReward:
        """Give the same around the fitted reward; generator and counts are shared."""
        reward = self.reward.fitted(rows)
        if reward is self.reward:
            return self
        twin = self.named(self.name)
        twin.reward = reward
        return twin

    def keep(self, folder: Path) -> None:
        """Write what the reward that is wrapped froze."""
        self.reward.keep(folder)

    def score(self, batch: TextBatch) -> Sequence[Any]:
        """Score, and put faults in the place of some values."""
        items = as_items(self.reward.score(batch), len(batch))
        kinds = [*self.chances, ""]
        chances = [*self.chances.values(), self.good]
        drawn = [kinds[k] for k in self.generator.choice(len(kinds), len(batch), p=chances)]
        self.met.update(kind for kind in drawn if kind)
        for i, kind in enumerate(drawn):
            if kind == "nan":
                items[i] = float("nan")
            elif kind == "wrong type":
                items[i] = "1.0"
            elif kind == "raise":
                items[i] = InjectedFault("raised")
        suffering = [i for i, kind in enumerate(drawn) if kind in _IN_WORKER]
        if suffering:
            said = self.pool.map([(drawn[i], self.generator.random()) for i in suffering])
            for i, verdict in zip(suffering, said, strict=True):
                items[i] = InjectedFault(f"the worker's verdict is {verdict.status!r}")
        if self.generator.random() < self.wrong_length:
            self.met["wrong length"] += 1
            items.pop()
        return items

    @property
    def pool(self) -> WorkerPool:
        """The workers that suffer."""
        return shared_pool(
            f"{__name__}:suffer",
            workers=1,
            cpu_seconds=self.timeout / 4,
            wall_seconds=self.timeout,
        )


def suffer(kind: str, number: float) -> float:
    """Hang, spin or die, in a worker.

    Args:
        kind: Which of them.
        number: Makes the item unlike all others, so that no verdict is remembered.
    """
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while kind == "spin":
        pass
    time.sleep(1e6)
    return number
