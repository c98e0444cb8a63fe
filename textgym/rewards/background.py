"""One event loop in a thread of its own, on which async rewards run.

It works from any thread, also inside a running loop (a notebook), and after a fork.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from textgym.rewards.service import Service

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_pid = 0
_thread: threading.Thread | None = None


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Await `main()` on the loop of the rewards and give its result.

    Raises:
        RuntimeError: If called on that loop itself, which would wait for itself.
    """
    loop = _running_loop()
    if threading.current_thread() is _thread:
        raise RuntimeError("an async reward cannot score with another async reward: await it there")
    future = asyncio.run_coroutine_threadsafe(main(), loop)
    try:
        return future.result()
    except BaseException:
        # Ctrl-C while waiting: what still runs is cancelled, not left behind.
        future.cancel()
        raise


async def gather(calls: Sequence[Callable[[], Awaitable[Any]]], service: Service) -> list[Any]:
    """Make all calls concurrently, as the service allows.

    Args:
        calls: Functions of no argument that return an awaitable.
        service: Has the turns, the timeout, the retries and the breaker.

    Returns:
        For each call its result, or the exception that it came to: also one that is no `Exception`,
        for which see `raise_interrupts`.
    """
    return await asyncio.gather(*(service.call(call) for call in calls))


def raise_interrupts(results: list[Any]) -> list[Any]:
    """Raise the KeyboardInterrupt or SystemExit among the results; else give them back."""
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Exception):
            raise result
    return results


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
