"""Handing items out to the workers of a pool, and taking in what they say: one call of `map`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from textgym.sandbox.frames import FrameError
from textgym.sandbox.workers import Worker, WorkerLost, wait_for

if TYPE_CHECKING:
    from textgym.sandbox.pool import WorkerPool

CHUNK = 8
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


class Run:
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
