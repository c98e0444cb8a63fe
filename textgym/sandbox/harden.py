"""Giving up powers, layer by layer: what a process of the sandbox can no longer do.

Each function tries a layer and notes why it is not to be had; nothing here decides whether what is
left is enough (`textgym.sandbox.levels` does). A scored program starts with none of this to undo.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import struct
from collections.abc import Callable

from textgym.sandbox.landlock import restrict
from textgym.sandbox.seccomp import install
from textgym.sandbox.syscalls import syscall

NAMESPACES = {
    "user namespace": 0x10000000,
    "process namespace": 0x20000000,
    "network namespace": 0x40000000,
    "ipc namespace": 0x08000000,
}
NOBODY = 65534
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
PROCESS_CPU_CLOCK = 2
MEGABYTE = 1 << 20

Missing = dict[str, str]


def attempt(layer: str, action: Callable[[], object], missing: Missing) -> None:
    """Put a layer on, or note why not."""
    try:
        action()
    except (OSError, ValueError, NotImplementedError) as error:
        missing[layer] = str(error)


def leave_root(needed: str, missing: Missing) -> None:
    """Become nobody, where this is root and nobody may read the file `needed` (Python's own)."""
    if os.geteuid() != 0:
        return

    def leave() -> None:
        os.seteuid(NOBODY)
        readable = os.access(needed, os.R_OK, effective_ids=True)
        os.seteuid(0)
        if not readable:
            raise OSError(f"this is root, and Python ({needed}) is readable for root only")
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)

    attempt("unprivileged user", leave, missing)


def enter_namespaces(missing: Missing) -> None:
    """Leave the namespaces of the machine; what is forked afterwards is in new ones."""
    together = 0
    for flag in NAMESPACES.values():
        together |= flag
    try:
        syscall("unshare", together)
    except (OSError, NotImplementedError):
        for name, flag in NAMESPACES.items():
            attempt(name, lambda flag=flag: syscall("unshare", flag), missing)  # type: ignore[misc]


def die_with_parent(parent: int | None) -> None:
    """Be killed when the parent dies; exit if that is no longer process `parent`."""
    syscall("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def confine(
    *,
    cpu_seconds: float,
    memory_mb: int,
    rules: int | None,
    program: bytes | None,
    own_count: bool,
    missing: Missing,
) -> None:
    """Put the layers of a job on the calling process, which runs one thread; there is no way back.

    Args:
        cpu_seconds: CPU time after which the kernel kills the process.
        memory_mb: Address space, MiB, all that it has already included.
        rules: Landlock rules; None where the kernel has none.
        program: The seccomp filter; None where there is none for this kind of machine.
        own_count: The processes of its user are counted apart from those of others.
        missing: Where to note the layers that could not be put on.
    """
    attempt("resource limits", lambda: limit(cpu_seconds, memory_mb, own_count), missing)
    attempt("cpu timer", lambda: kill_after(cpu_seconds), missing)
    attempt("no capabilities", drop_capabilities, missing)
    attempt("no new privileges", lambda: syscall("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), missing)
    if rules is not None:
        attempt("landlock", lambda: restrict(rules), missing)
    if program is not None:
        attempt("seccomp", lambda: install(program), missing)


def limit(cpu_seconds: float, memory_mb: int, own_count: bool) -> None:
    """Set the resource limits, soft and hard alike."""
    memory = memory_mb * MEGABYTE
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: math.ceil(cpu_seconds) + 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_STACK: min(64 * MEGABYTE, memory),
    }
    if own_count:
        limits[resource.RLIMIT_NPROC] = 512
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def kill_after(cpu_seconds: float) -> None:
    """Have the kernel kill the process after that much CPU time, to a millisecond or so.

    A timer that sends SIGKILL can be neither ignored nor caught, as one of `setitimer` can, and
    RLIMIT_CPU counts in whole seconds.
    """
    event = struct.pack("Qii", 0, signal.SIGKILL, 0)
    timer = ctypes.create_string_buffer(4)
    syscall("timer_create", PROCESS_CPU_CLOCK, ctypes.create_string_buffer(event, 64), timer)
    (number,) = struct.unpack("i", timer.raw)
    seconds = max(1, int(cpu_seconds * 1e9))
    when = struct.pack("qqqq", 0, 0, *divmod(seconds, 10**9))
    syscall("timer_settime", number, 0, ctypes.create_string_buffer(when, 32), None)


def drop_capabilities() -> None:
    """Give up every capability, those of root and those inside a user namespace."""
    header = struct.pack("Ii", 0x20080522, 0)
    none = bytes(24)
    syscall("capset", ctypes.create_string_buffer(header, 8), ctypes.create_string_buffer(none, 24))
