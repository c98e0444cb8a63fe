"""How an async reward calls what answers it: in turns, with a time limit, retries and a breaker.

What a failure costs: an attempt that raises or is late is the service's fault, never the text's. It
is repeated after a pause that doubles from attempt to attempt. When nothing helps, the text is
unscored with the last error as its status, and `Reward.evaluate` asks once more, as it does for
every reward. A `TextFailure` is an answer: it is not repeated and trips no breaker.

After `break_after` failed attempts in a row the breaker opens: calls fail at once with
`CircuitOpenError` for `break_seconds`, so that a service that is down costs nothing but a status.
Then one call is let through as a probe; its success closes the breaker, its failure opens it again.
"""

from __future__ import annotations

import asyncio
import math
import os
from asyncio import sleep
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from textgym.rewards.errors import TextFailure
from textgym.streams import generator

# A service that asks for more patience than this is not believed.
LONGEST_PAUSE = 3600.0


class CircuitOpenError(RuntimeError):
    """The service failed so often that it is left alone for a while."""


@dataclass
class CallCounts:
    """What the calls of one service came to.

    Attributes:
        calls: Calls asked for, those that the breaker refused included.
        attempts: Requests that were made.
        retries: Attempts that repeated a failed one.
        failures: Calls that gave nothing in the end, refused ones included.
        refused: Calls that the breaker refused.
        seconds: Time spent in attempts, summed over them.
        slowest: The longest attempt, in seconds.
    """

    calls: int = 0
    attempts: int = 0
    retries: int = 0
    failures: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0

    @property
    def mean_seconds(self) -> float:
        """Mean time of an attempt in seconds; 0 before the first."""
        return self.seconds / self.attempts if self.attempts else 0.0


class Service:
    """Carries out the calls of one reward, or of several that share one service.

    Limits, breaker and counts hold for all of them together in one process. It is used on the event
    loop of `textgym.rewards.background`; reading `counts` is safe from anywhere.

    Args:
        timeout: Seconds that one attempt may take; None for no limit.
        max_concurrency: How many calls run at a time. A call keeps its turn while it pauses, so a
            service in trouble gets less to do.
        retries: How often a failed attempt is repeated.
        retry_on: The exceptions that are worth a repetition (a timeout is a `TimeoutError`).
        backoff: Seconds before the first repetition; they double from one to the next, and each is
            shortened at random by up to a half. An exception with a `retry_after` of its own is
            waited for at least as long.
        max_backoff: No pause is longer. If the service asks for more, the call fails, and with a
            breaker the service is left alone for as long as it asked (at most an hour).
        break_after: Failed attempts in a row that open the breaker; None for no breaker.
        break_seconds: How long it stays open.
        seed: Key of the pauses' random part, which differs from process to process: workers
            that failed together should not come back together.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        *,
        timeout: float | None = None,
        max_concurrency: int = 32,
        retries: int = 0,
        retry_on: tuple[type[Exception], ...] = (Exception,),
        backoff: float = 0.5,
        max_backoff: float = 30.0,
        break_after: int | None = None,
        break_seconds: float = 30.0,
        seed: int = 0,
    ) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be positive seconds, got {timeout}")
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency must be at least 1, got {max_concurrency}")
        if retries < 0:
            raise ValueError(f"retries must be 0 or more, got {retries}")
        for what, seconds in (
            ("backoff", backoff),
            ("max_backoff", max_backoff),
            ("break_seconds", break_seconds),
        ):
            if not 0 <= seconds < math.inf:
                raise ValueError(f"{what} must be finite seconds, 0 or more, got {seconds}")
        if break_after is not None and break_after < 1:
            raise ValueError(f"break_after must be at least 1, or None, got {break_after}")
        self.timeout, self.max_concurrency = timeout, max_concurrency
        self.retries, self.retry_on = retries, retry_on
        self.backoff, self.max_backoff = backoff, max_backoff
        self.break_after, self.break_seconds = break_after, break_seconds
        self.seed = seed
        self._begin()

    def _begin(self) -> None:
        self._counts = CallCounts()
        self._failed_in_a_row = 0
        self._open_until = -math.inf
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def counts(self) -> CallCounts:
        """A copy of the counts so far."""
        return replace(self._counts)

    async def call(self, function: Callable[[], Awaitable[Any]]) -> Any:
        """Call `function` and give its result, or the exception that it came to, as a value."""
        async with self._turn():
            self._counts.calls += 1
            outcome = await self._call(function)
            if isinstance(outcome, Exception) and not isinstance(outcome, TextFailure):
                self._counts.failures += 1
            return outcome

    async def _call(self, function: Callable[[], Awaitable[Any]]) -> Any:
        outcome: Any = None
        for attempt in range(self.retries + 1):
            refusal = self._refusal()
            if refusal is not None:
                if attempt:  # what went wrong says more than that nothing is tried now
                    return outcome
                self._counts.refused += 1
                return refusal
            self._counts.attempts += 1
            self._counts.retries += attempt > 0
            outcome = await self._attempt(function)
            if not isinstance(outcome, Exception) or isinstance(outcome, TextFailure):
                self._failed_in_a_row, self._open_until = 0, -math.inf
                return outcome
            asked = _seconds(getattr(outcome, "retry_after", None))
            self._note_failure(asked)
            if attempt == self.retries or not isinstance(outcome, self.retry_on):
                return outcome
            if asked > self.max_backoff:
                return outcome
            await sleep(max(asked, self._pause(attempt)))
        return outcome

    async def _attempt(self, function: Callable[[], Awaitable[Any]]) -> Any:
        start = monotonic()
        task = asyncio.ensure_future(_caught(function))
        try:
            # Unlike wait_for, this does not wait for a call that refuses to be cancelled.
            done, _ = await asyncio.wait([task], timeout=self.timeout)
        finally:
            task.cancel()
            took = monotonic() - start
            self._counts.seconds += took
            self._counts.slowest = max(self._counts.slowest, took)
        return task.result() if done else TimeoutError(f"no answer in {self.timeout:g} s")

    def _refusal(self) -> CircuitOpenError | None:
        """Say no while the breaker is open; the one who finds its time over becomes the probe."""
        if self._open_until == -math.inf:
            return None
        left = self._open_until - monotonic()
        if left > 0:
            return CircuitOpenError(
                f"the service failed {self._failed_in_a_row} times in a row; it is called again in "
                f"{left:.0f} s"
            )
        self._open_until = monotonic() + self.break_seconds
        return None

    def _note_failure(self, asked: float) -> None:
        self._failed_in_a_row += 1
        if self.break_after is None:
            return
        rest = asked if asked > self.max_backoff else 0.0
        if self._failed_in_a_row >= self.break_after:
            rest = max(rest, self.break_seconds)
        if rest:
            self._open_until = max(self._open_until, monotonic() + rest)

    def _pause(self, attempt: int) -> float:
        longest: float = min(self.max_backoff, self.backoff * 2.0 ** min(attempt, 60))
        return longest * (1.0 - 0.5 * float(self._random.random()))

    def _turn(self) -> asyncio.Semaphore:
        # A semaphore belongs to its loop, and a forked process has a loop of its own.
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            self._turns = asyncio.Semaphore(self.max_concurrency)
            self._random = generator(self.seed, os.getpid())
        return self._turns

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __deepcopy__(self, memo: dict[int, Any]) -> Service:
        return self


async def _caught(function: Callable[[], Awaitable[Any]]) -> Any:
    # A KeyboardInterrupt that left a task would end the loop: everything is handed back as a value.
    try:
        return await function()
    except asyncio.CancelledError:
        return RuntimeError("the call was cancelled")
    except BaseException as error:
        return error


def _seconds(value: Any) -> float:
    """Read a `retry_after`: seconds, 0 if it is none."""
    if not isinstance(value, int | float) or not value > 0:
        return 0.0
    return float(min(value, LONGEST_PAUSE))
