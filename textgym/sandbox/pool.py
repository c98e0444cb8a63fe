"""A pool of worker processes: trusted code over strings that are not trusted.

A library that reads model text (computer algebra, JSON Schema) can be made to hang, to fill the
memory or to crash. Here it does so in a process of its own:

- the CPU time of each item is counted by the kernel in the worker, whose default action ends it, so
  that loops in C die too, and a busy machine makes no difference;
- the wall time is watched by the caller, who kills;
- memory is limited, no file can be written and no core dumped;
- the item that killed a worker gets a status, its neighbours are scored by the next worker;
- what comes back is JSON, never a pickle; the worker has no part of the caller's environment, no
  file descriptor but its pipes, and ends with the caller, however the caller ends;
- the caller sets no signal handler, and may be any thread.

The code that runs is the caller's own. What a *model* wrote runs in `textgym.sandbox.runner`.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from textgym.sandbox.dispatch import Run, Verdict
from textgym.sandbox.frames import encode
from textgym.sandbox.workers import Worker

__all__ = ["Verdict", "WorkerPool", "shared_pool"]

START_SECONDS = 120.0


class WorkerPool:
    """Calls a function in worker processes, over many items at a time.

    The workers are started when the first items come. Verdicts are remembered, those of items that
    used up their CPU time too: CPU time does not depend on how busy the machine is, and a policy
    that has collapsed writes the same hostile text again and again. What may be otherwise the next
    time is not remembered: the wall time running out, `"killed"` and `"error: ..."`.

    An item whose worker ran out of memory, crashed or was killed is tried once more, in a fresh
    process, because the cause may be what came before it.

    Args:
        setup: `"package.module:function"`. The function is imported in the worker and called with
            an item's arguments; it returns a finite number, or a string, the status of an item that
            has no value. Import what it needs at the top of its module: that is done once, and not
            on the time of an item.
        workers: How many processes.
        cpu_seconds: CPU time of one item.
        wall_seconds: Wall time of one item. The worker is then started anew, which takes as long
            as its imports; leave it well above `cpu_seconds`.
        memory_mb: Address space of a worker, in MiB.
        cache: How many verdicts are remembered.

    Raises:
        RuntimeError: Where the system is not Linux.
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        setup: str,
        *,
        workers: int = 2,
        cpu_seconds: float = 1.0,
        wall_seconds: float = 20.0,
        memory_mb: int = 2048,
        cache: int = 65_536,
    ) -> None:
        if sys.platform != "linux":
            raise RuntimeError(
                f"the worker pool needs Linux, this is {sys.platform}: other systems do not end a "
                "process with its parent, nor limit its memory. Run in a container or under WSL; "
                "verifiers that need no pool (numeric, multiple_choice, ...) work everywhere."
            )
        if not all(part for part in setup.partition(":")):
            raise ValueError(f"setup must be 'package.module:function', got {setup!r}")
        if workers < 1 or memory_mb < 64 or cache < 0:
            raise ValueError(
                "expected workers >= 1, memory_mb >= 64 and cache >= 0, "
                f"got workers={workers}, memory_mb={memory_mb}, cache={cache}"
            )
        if not 0 < cpu_seconds < wall_seconds < float("inf"):
            raise ValueError(
                "expected 0 < cpu_seconds < wall_seconds, both finite, "
                f"got cpu_seconds={cpu_seconds}, wall_seconds={wall_seconds}"
            )
        self.setup, self.wall_seconds, self.size = setup, wall_seconds, workers
        self._config = {"setup": setup, "cpu_seconds": cpu_seconds, "memory_mb": memory_mb}
        self._cache: OrderedDict[bytes, Verdict] = OrderedDict()
        self._cache_size = cache
        self._lock = threading.Lock()
        self._workers: list[Worker] = []
        self._closed = False
        # At the end of the process too; it holds the list and not the pool.
        self._finalizer = weakref.finalize(self, _end_all, self._workers)
        _POOLS.add(self)

    def map(self, items: Sequence[Sequence[Any]]) -> list[Verdict]:
        """Give the verdict of each item, in order; equal items are scored once.

        Args:
            items: The arguments of each call: what JSON can hold.

        Raises:
            RuntimeError: If the pool is closed, or the workers cannot be started or do not last.
            TypeError: If an argument is not JSON.
        """
        keys = [hashlib.blake2b(encode(list(item)), digest_size=16).digest() for item in items]
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the worker pool of {self.setup!r} is closed")
            found: dict[bytes, Verdict] = {}
            todo: dict[bytes, Sequence[Any]] = {}
            for key, item in zip(keys, items, strict=True):
                known = self._cache.get(key)
                if known is None:
                    todo[key] = item
                else:
                    self._cache.move_to_end(key)
                    found[key] = known
            if todo:
                try:
                    Run(self, todo, found).finish()
                except BaseException:
                    _end_all(self._workers)  # what they still have to say belongs to no one
                    raise
            return [found[key] for key in keys]

    def close(self) -> None:
        """End the workers. The pool cannot be used any more."""
        with self._lock:
            self._closed = True
            _end_all(self._workers)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def remember(self, key: bytes, verdict: Verdict) -> None:
        """Keep a verdict, and forget the one that was not asked for the longest."""
        self._cache[key] = verdict
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)

    def hire(self, most: int) -> list[Worker]:
        """Start workers until there are `most`, no more than the pool's size; give them all.

        Raises:
            RuntimeError: If they cannot be started; says why.
        """
        while len(self._workers) < min(most, self.size):
            self._workers.append(Worker(self._config))
        deadline = time.monotonic() + START_SECONDS
        for worker in self._workers:
            worker.begin(deadline)
        return list(self._workers)

    def dismiss(self, worker: Worker) -> None:
        """End one worker."""
        worker.end()
        self._workers.remove(worker)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _after_fork(self) -> None:
        """Leave the workers, in the child of a fork, to the parent."""
        self._lock = threading.Lock()
        for worker in self._workers:
            worker.forget()
        self._workers.clear()


_POOLS: weakref.WeakSet[WorkerPool] = weakref.WeakSet()
_SHARED: dict[tuple[Any, ...], WorkerPool] = {}
_SHARED_LOCK = threading.Lock()


def shared_pool(setup: str, **limits: Any) -> WorkerPool:
    """Give the pool of this function and these limits that the whole process shares.

    Args:
        setup: As in `WorkerPool`.
        limits: The keyword arguments of `WorkerPool`.
    """
    key = (setup, *sorted(limits.items()))
    with _SHARED_LOCK:
        if key not in _SHARED or _SHARED[key].closed:
            _SHARED[key] = WorkerPool(setup, **limits)
        return _SHARED[key]


def _end_all(workers: list[Worker]) -> None:
    for worker in workers:
        worker.end()
    workers.clear()


def _after_fork_in_child() -> None:
    global _SHARED_LOCK
    _SHARED_LOCK = threading.Lock()
    for pool in list(_POOLS):
        pool._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
