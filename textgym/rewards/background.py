"""One event loop in a thread of its own, on which async rewards run.

It works from any thread, also inside a running loop (a notebook), and after a fork.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_pid = 0
_thread: threading.Thread | None = None


def gather(
    calls: Sequence[Callable[[], Awaitable[Any]]], *, timeout: float | None, max_concurrency: int
) -> list[Any]:
    """Await all calls concurrently.

    Args:
        calls: Functions of no argument that return an awaitable.
        timeout: Seconds that each may take; None for no limit. Waiting for its turn is not counted.
        max_concurrency: How many run at a time.

    Returns:
        For each call its result, or the exception that it raised.

    Raises:
        BaseException: Those that are no `Exception` (KeyboardInterrupt, SystemExit), raised here.
    """
    loop = _running_loop()
    if threading.current_thread() is _thread:
        raise RuntimeError("an async reward cannot score with another async reward: await it there")
    future = asyncio.run_coroutine_threadsafe(_gather(calls, timeout, max_concurrency), loop)
    try:
        results = future.result()
    except BaseException:
        # Ctrl-C while waiting: what still runs is cancelled, not left behind.
        future.cancel()
        raise
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Exception):
            raise result
    return results


async def _gather(
    calls: Sequence[Callable[[], Awaitable[Any]]], timeout: float | None, max_concurrency: int
) -> list[Any]:
    turns = asyncio.Semaphore(max_concurrency)

    async def one(call: Callable[[], Awaitable[Any]]) -> Any:
        async with turns:
            task = asyncio.ensure_future(_caught(call))
            try:
                # Unlike wait_for, this does not wait for a call that refuses to be cancelled.
                done, _ = await asyncio.wait([task], timeout=timeout)
            finally:
                task.cancel()
            return task.result() if done else TimeoutError(f"no answer in {timeout:g} s")

    return await asyncio.gather(*(one(call) for call in calls))


async def _caught(call: Callable[[], Awaitable[Any]]) -> Any:
    # A KeyboardInterrupt that left a task would end the loop: everything is handed back as a value.
    try:
        return await call()
    except asyncio.CancelledError:
        return RuntimeError("the call was cancelled")
    except BaseException as error:
        return error


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop, _pid, _thread
    with _lock:
        if _loop is None or _pid != os.getpid():
            _loop, _pid = asyncio.new_event_loop(), os.getpid()
            _thread = threading.Thread(
                target=_loop.run_forever, name="textgym-rewards", daemon=True
            )
            _thread.start()
        return _loop
