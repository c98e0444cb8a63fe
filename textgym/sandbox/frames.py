"""Length-prefixed JSON between processes: four bytes of length, little endian, then UTF-8.

JSON and never pickle, because what a child sends is not trusted. Any string survives as it is, lone
surrogates and NULs too. Nothing but the standard library is imported, so that a fresh process can
speak at once.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from typing import Any

_LENGTH = struct.Struct("<I")
LARGEST = 2**32 - 1


class FrameError(ValueError):
    """What came is not a frame: too long, not UTF-8, not JSON."""


def read_exactly(fd: int, n: int, deadline: float | None = None) -> bytes:
    """Read exactly `n` bytes.

    Args:
        fd: A file descriptor, blocking or not.
        n: How many bytes.
        deadline: A `time.monotonic()` in seconds after which to give up; None waits for ever.

    Raises:
        EOFError: If the other end was closed before.
        TimeoutError: If the deadline has passed.
    """
    parts: list[bytes] = []
    missing = n
    while missing:
        if deadline is not None:
            _wait(fd, select.POLLIN, deadline)
        try:
            part = os.read(fd, min(missing, 1 << 20))
        except BlockingIOError:
            _wait(fd, select.POLLIN, deadline)
            continue
        if not part:
            raise EOFError(f"the other end was closed {missing} of {n} bytes too early")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def read_frame(fd: int, limit: int, deadline: float | None = None) -> Any:
    """Read one value. NaN and infinities are accepted as Python's json writes them.

    Args:
        fd: A file descriptor, blocking or not.
        limit: The most bytes that the frame may have, its length not counted.
        deadline: A `time.monotonic()` in seconds after which to give up; None waits for ever.

    Raises:
        EOFError: If the other end was closed.
        FrameError: If the frame is longer than `limit`, or is not JSON in UTF-8.
        TimeoutError: If the deadline has passed.
    """
    (size,) = _LENGTH.unpack(read_exactly(fd, _LENGTH.size, deadline))
    if size > limit:
        raise FrameError(f"expected a frame of at most {limit} bytes, one of {size} was announced")
    return decode(read_exactly(fd, size, deadline))


def write_frame(fd: int, value: Any, deadline: float | None = None) -> None:
    """Write one value.

    Args:
        fd: A file descriptor, blocking or not.
        value: What JSON can hold.
        deadline: A `time.monotonic()` in seconds after which to give up; it is kept only where `fd`
            does not block.

    Raises:
        BrokenPipeError: If the other end was closed.
        TimeoutError: If the deadline has passed; a part of the frame may have been written.
        TypeError: If JSON cannot hold the value.
        ValueError: If it holds itself, or the frame would be longer than 4 GiB.
    """
    write_exactly(fd, encode(value), deadline)


def encode(value: Any) -> bytes:
    """Give the bytes of a frame, its length included; raises as `write_frame`."""
    # Escapes would join two lone surrogates into one character; "surrogatepass" keeps them apart.
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    data = body.encode("utf-8", "surrogatepass")
    if len(data) > LARGEST:
        raise ValueError(f"a frame holds at most {LARGEST} bytes, got {len(data)}")
    return _LENGTH.pack(len(data)) + data


def decode(data: bytes) -> Any:
    """Read the value in the body of a frame.

    Raises:
        FrameError: If it is not JSON in UTF-8, is nested too deeply, or holds an integer too long.
    """
    try:
        return json.loads(data.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"expected JSON in UTF-8, got {data[:80]!r}: {error}") from None


def write_exactly(fd: int, data: bytes, deadline: float | None = None) -> None:
    """Write all of `data`; raises as `write_frame`."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest[: 1 << 20]) :]
        except BlockingIOError:
            _wait(fd, select.POLLOUT, deadline)


def _wait(fd: int, event: int, deadline: float | None) -> None:
    # poll, because select is limited to descriptors below 1024.
    poller = select.poll()
    poller.register(fd, event)
    left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000.0
    if not poller.poll(left):
        raise TimeoutError("the other end of the pipe has not answered in time")
