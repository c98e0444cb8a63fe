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
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from textgym.sandbox.frames import FrameError, encode
from textgym.sandbox.workers import Worker, WorkerLost, wait_for

CHUNK = 8
START_SECONDS = 120.0
RETRIED = ("memory", "crash", "killed")


@dataclass(frozen=True)
class Verdict:
    """What a worker found of an item.

    Attributes:
        value: The number that the function gave; None if it gave none.
        status: `"ok"`; a status of the function's own; `"timeout"` (CPU or wall time), `"memory"`,
            `"recursion"`, `"crash"` (a signal such as SIGSEGV); `"killed"` (its worker was killed,
            and so was the fresh one that tried again); `"error: ..."` (the function raised).
    """

    value: float | None
    status: str

    @property
    def is_service_fault(self) -> bool:
        """Whether the code is at fault rather than the item.

        What kills two workers counts as the item's fault. Without a value it would be unscored, and
        what is unscored costs a policy nothing: it would drift to texts that kill.
        """
        return self.status.startswith("error: ")


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
                    _Run(self, todo, found).finish()
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


class _Run:
    """One call of `map`: chunks that wait, and workers at work on the others."""

    def __init__(
        self, pool: WorkerPool, todo: dict[bytes, Sequence[Any]], found: dict[bytes, Verdict]
    ) -> None:
        self.pool, self.items, self.found = pool, todo, found
        size = max(1, min(CHUNK, -(-len(todo) // pool.size)))
        keys = list(todo)
        self.waiting = deque(keys[i : i + size] for i in range(0, len(keys), size))
        self.tried: set[bytes] = set()
        self.lost = 0
        self.busy: dict[Worker, deque[bytes]] = {}

    def finish(self) -> None:
        """Score everything."""
        while self.waiting or self.busy:
            self._hand_out()
            if not self.busy:
                continue  # nobody could be given anything; that is counted, so it ends
            deadline = min(worker.deadline for worker in self.busy)
            for worker in wait_for(list(self.busy), deadline):
                self._listen(worker)
            now = time.monotonic()
            for worker in [w for w in self.busy if w.deadline <= now]:
                self._overdue(worker)

    def _hand_out(self) -> None:
        idle = [
            worker
            for worker in self.pool.hire(len(self.waiting) + len(self.busy))
            if worker not in self.busy
        ]
        for worker in idle:
            if not self.waiting:
                break
            keys = self.waiting.popleft()
            self.busy[worker] = deque(keys)
            try:
                worker.send([list(self.items[key]) for key in keys], self.pool.wall_seconds)
            except (OSError, TimeoutError):
                self._dismiss(worker, "it does not read")

    def _listen(self, worker: Worker) -> None:
        """Take what the worker says."""
        try:
            said = worker.receive()
        except (EOFError, OSError, FrameError, TimeoutError, WorkerLost) as error:
            self._dismiss(worker, str(error))
            return
        if said == "read":
            worker.has_read = True
        elif said != "ready":
            self._verdict(worker, said)
        worker.deadline = time.monotonic() + self.pool.wall_seconds

    def _verdict(self, worker: Worker, said: Any) -> None:
        keys = self.busy[worker]
        died = said[0] == "died"
        if died and not worker.has_read:
            self._dismiss(worker, f"it died ({said[1]}) before it had read its items")
            return
        self.lost = 0
        key = keys.popleft()
        value, status = (None, said[1]) if died else said
        if status in RETRIED and died and key not in self.tried:
            self.tried.add(key)
            self.waiting.append([key])
        else:
            self._settle(key, Verdict(value, status))
        if died or not keys:
            del self.busy[worker]
            if keys:  # neighbours of the one that killed
                self.waiting.appendleft(list(keys))

    def _overdue(self, worker: Worker) -> None:
        """Kill a worker whose item has used up its wall time."""
        keys = self.busy.pop(worker)
        self.pool.dismiss(worker)
        if worker.has_read:
            self.found[keys.popleft()] = Verdict(None, "timeout")
        else:
            self._count_loss("it took too long to read its items")
        if keys:
            self.waiting.appendleft(list(keys))

    def _settle(self, key: bytes, verdict: Verdict) -> None:
        self.found[key] = verdict
        if verdict.status != "killed" and not verdict.is_service_fault:
            self.pool.remember(key, verdict)

    def _dismiss(self, worker: Worker, reason: str) -> None:
        """End a worker that is no more of use; its items are no less deserving for it."""
        keys = self.busy.pop(worker)
        self.pool.dismiss(worker)
        if worker.has_read and keys[0] in self.tried:
            self.lost = 0
            self._settle(keys.popleft(), Verdict(None, "killed"))
        else:
            self._count_loss(reason)
            if worker.has_read:
                self.tried.add(keys[0])
        if keys:
            self.waiting.appendleft(list(keys))

    def _count_loss(self, reason: str) -> None:
        self.lost += 1
        if self.lost > 2 * self.pool.size + 1:
            raise RuntimeError(
                f"the workers of {self.pool.setup!r} do not last: {self.lost} were lost one after "
                f"the other without a verdict, the last because {reason}"
            )


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
