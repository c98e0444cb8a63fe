"""System calls that Python's standard library does not offer, by number.

The numbers are those of `asm/unistd_64.h` (x86_64) and `asm-generic/unistd.h` (aarch64).
"""

from __future__ import annotations

import ctypes
import os
import platform

ARCHITECTURES = ("x86_64", "aarch64")
MACHINE = platform.machine()

_LIBC = ctypes.CDLL(None, use_errno=True)
# name: (x86_64, aarch64)
_NUMBERS = {
    "capset": (126, 91),
    "prctl": (157, 167),
    "timer_create": (222, 107),
    "timer_settime": (223, 110),
    "unshare": (272, 97),
    "seccomp": (317, 277),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}


def syscall(name: str, *arguments: int | ctypes.Array[ctypes.c_char] | None) -> int:
    """Make a system call.

    Args:
        name: The call.
        arguments: Integers, and buffers that the kernel reads or writes.

    Returns:
        What the kernel returned, at least 0.

    Raises:
        NotImplementedError: If its number on this kind of machine is not known here.
        OSError: If the kernel refused.
    """
    if MACHINE not in ARCHITECTURES:
        raise NotImplementedError(
            f"system calls are known here for {' and '.join(ARCHITECTURES)}, not for {MACHINE}"
        )
    number = _NUMBERS[name][ARCHITECTURES.index(MACHINE)]
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = int(_LIBC.syscall(ctypes.c_long(number), *values))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result
