"""Landlock: a process gives up the file system, but for reading below a few paths.

See https://docs.kernel.org/userspace-api/landlock.html. The kernel's version of it ("ABI") decides
what more is given up: renaming across folders (2), truncation (3), TCP (4), device ioctls (5),
abstract sockets and signals to processes outside (6).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence

from textgym.sandbox.syscalls import syscall

READ_FILE, READ_DIR = 1 << 2, 1 << 3
TCP_BIND_AND_CONNECT = 0b11
ABSTRACT_SOCKETS_AND_SIGNALS = 0b11


def landlock_version() -> int:
    """Give the version of the kernel's Landlock.

    Raises:
        NotImplementedError: If the machine is of an unknown kind.
        OSError: If the kernel has none (ENOSYS), or it is not enabled (EOPNOTSUPP).
    """
    return syscall("landlock_create_ruleset", None, 0, 1)


def make_ruleset(readable: Sequence[str]) -> int:
    """Make a set of rules that forbids everything but reading below `readable`.

    Args:
        readable: Files and folders; those that do not exist are passed over.

    Returns:
        A file descriptor for `restrict`.

    Raises:
        NotImplementedError: If the machine is of an unknown kind.
        OSError: If the kernel has no Landlock.
    """
    version = landlock_version()
    rights = 13 + min(version - 1, 2) + (version >= 5)
    attributes = struct.pack(
        "QQQ", (1 << rights) - 1, TCP_BIND_AND_CONNECT, ABSTRACT_SOCKETS_AND_SIGNALS
    )
    # An older kernel accepts a shorter structure only.
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = syscall("landlock_create_ruleset", _buffer(attributes[:size]), size, 0)
    for path in readable:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        access = READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE
        try:
            syscall("landlock_add_rule", rules, 1, _buffer(struct.pack("=Qi", access, fd)), 0)
        finally:
            os.close(fd)
    return rules


def restrict(rules: int) -> None:
    """Put the calling thread under a set of rules, for good; needs no_new_privs.

    Raises:
        OSError: If the kernel refuses.
    """
    syscall("landlock_restrict_self", rules, 0)


def _buffer(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data, len(data))
