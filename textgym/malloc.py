"""glibc's malloc, told to keep what an update frees, since the next one allocates it again.

By default glibc returns freed memory at the top of its heap to the system at once, and each page of
it costs a fault when it comes back: up to a quarter of the time of a small model's update.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping

LARGE = 1 << 25
"""Bytes from which each block is mapped for itself and given back at once; the most that glibc
would come to by itself."""
KEPT = 1 << 28
"""Freed bytes that stay at the top of the heap."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let this process keep up to `KEPT` freed bytes; training on a CPU asks for it.

    Returns:
        Whether it was done: not with another C library than glibc, nor where the environment
        already tunes malloc (`MALLOC_...`, `GLIBC_TUNABLES`).
    """
    tuned = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in environment)
    if tuned or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # Setting one of them ends glibc's own tuning of both.
    done = [libc.mallopt(_MMAP_THRESHOLD, LARGE), libc.mallopt(_TRIM_THRESHOLD, KEPT)]
    return all(done)
