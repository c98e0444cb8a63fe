"""What verifiers share: one judgement a text, and what a worker pool says of a text."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from typing import Any

from textgym.rewards.base import Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.errors import TextFailure, check_column
from textgym.sandbox.pool import Verdict, WorkerPool, shared_pool


class Verifier(Reward):
    """Says of each text by itself whether it is right: 1 if it is, 0 if it is not.

    A text without an answer, or with an answer that cannot be read, is wrong and no failure. The
    statuses that a verifier lists are those of texts that *could not be judged*, which get `low`.

    Subclasses implement `verify`, or `score`.

    Args:
        name: The name of the component.
        column: The column that the verifier reads; None if it reads none.
    """

    reads_only = True
    cheap = True

    def __init__(self, name: str, column: str | None) -> None:
        self.name, self.column = name, column

    def check(self, columns: Collection[str]) -> None:
        """Check that the column is there."""
        if self.column is not None:
            check_column(f"reward {self.name!r}", self.column, columns)

    def score(self, batch: TextBatch) -> list[Any]:
        """Judge each text; what goes wrong with one is its item."""
        if self.column is not None:
            batch.column(self.column)  # a column that is missing is everybody's failure
        return batch.each(self.verify)

    def verify(self, text: str, row: Mapping[str, Any]) -> float:
        """Judge one text.

        Raises:
            TextFailure: If the text cannot be judged.
            ValueError: If the row cannot be used.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement verify(text, row)")


class Ask(tuple[Any, ...]):
    """A question to the pool: the arguments of the function in the worker."""

    __slots__ = ()


class PooledVerifier(Verifier):
    """A verifier that leaves what is dangerous to a worker pool, which the process shares.

    Subclasses implement `ask`, and give their function as `setup`.

    Args:
        name: The name of the component.
        column: The column that the verifier reads; None if it reads none.
        cpu_seconds: CPU time of one text.
        wall_seconds: Wall time of one text.
        memory_mb: Memory of a worker, in MiB.
        workers: How many processes.
    """

    cheap = False
    setup: str

    def __init__(
        self,
        name: str,
        column: str | None,
        *,
        cpu_seconds: float,
        wall_seconds: float,
        memory_mb: int,
        workers: int,
    ) -> None:
        super().__init__(name, column)
        self.limits: dict[str, Any] = {
            "cpu_seconds": cpu_seconds,
            "wall_seconds": wall_seconds,
            "memory_mb": memory_mb,
            "workers": workers,
        }
        self.pool()  # wrong limits, and a system without pools, are known at once

    def pool(self) -> WorkerPool:
        """Give the pool; nothing is started before it has something to do."""
        return shared_pool(self.setup, **self.limits)

    def ask(self, text: str, row: Mapping[str, Any]) -> float | Ask:
        """Give the value of a text, or what to ask the pool about it; raises as `verify`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement ask(text, row)")

    def score(self, batch: TextBatch) -> list[Any]:
        """Judge what can be judged here, and ask the pool about the rest, all at once."""
        if self.column is not None:
            batch.column(self.column)
        items = batch.each(self.ask)
        asked = [i for i, item in enumerate(items) if isinstance(item, Ask)]
        if asked:
            verdicts = self.pool().map([items[i] for i in asked])
            for i, verdict in zip(asked, verdicts, strict=True):
                items[i] = as_item(verdict)
        return items


def as_item(verdict: Verdict) -> Any:
    """Give what `score` returns for a verdict: a value, or whose fault it is that there is none."""
    if verdict.value is not None:
        return verdict.value
    if verdict.is_service_fault:
        return RuntimeError(verdict.status.removeprefix("error: "))
    return TextFailure(verdict.status)


def check_length(text: str, longest: int) -> None:
    """Refuse a text that is longer than `longest` characters.

    Raises:
        TextFailure: With the status `too long`.
    """
    if len(text) > longest:
        raise TextFailure("too long")


def need(module: str, asker: str) -> None:
    """Check that an optional package is there, without importing it.

    Raises:
        ImportError: If it is not; says how to install it.
    """
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise ImportError(
            f"{asker} needs the package of {module!r}, which is not installed; "
            'install it with `pip install "textgym[verify]"`'
        )
