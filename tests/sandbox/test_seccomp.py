"""The seccomp filter, run by an interpreter of its own: what it says of each call."""

from __future__ import annotations

import errno
import struct

import pytest

from textgym.sandbox.seccomp import AUDIT_ARCH, make_filter

ALLOW, KILL = "allow", "kill"
MACHINES = ("x86_64", "aarch64")
# Name, number on x86_64, number on aarch64.
NEEDED = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "getpid": (39, 172),
    "exit": (60, 93),
    "futex": (202, 98),
    "getdents64": (217, 61),
    "clock_gettime": (228, 113),
    "exit_group": (231, 94),
    "newfstatat": (262, 79),
    "pipe2": (293, 59),
    "getrandom": (318, 278),
    "rseq": (334, 293),
    "close_range": (436, 436),
}
REFUSED = {
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "ptrace": (101, 117),
    "process_vm_writev": (311, 271),
    "unlinkat": (263, 35),
    "mkdirat": (258, 34),
    "fchmodat": (268, 53),
    "utimensat": (280, 88),
    "renameat2": (316, 276),
    "truncate": (76, 45),
    "mount": (165, 40),
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "setrlimit": (160, 164),
    "timer_delete": (226, 111),
    "timer_settime": (223, 110),
    "prctl": (157, 167),
    "unshare": (272, 97),
    "setsid": (112, 157),
    "bpf": (321, 280),
    "keyctl": (250, 219),
}
UNKNOWN = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "open_tree": 428,
    "pidfd_open": 434,
    "clone3": 435,
    "openat2": 437,
    "landlock_create_ruleset": 444,
    "fchmodat2": 452,
    "of the year 2040": 900,
}


def verdict(machine, number, *arguments, arch=None):
    """Interpret the filter on `struct seccomp_data`."""
    padded = [a & (2**64 - 1) for a in arguments] + [0] * (6 - len(arguments))
    data = struct.pack("<iIQ6Q", number, AUDIT_ARCH[machine] if arch is None else arch, 0, *padded)
    program = make_filter(machine)
    steps = [struct.unpack_from("HBBI", program, at) for at in range(0, len(program), 8)]
    at = accumulator = 0
    while True:
        code, yes, no, operand = steps[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif code == 0x06:
            if operand == 0x7FFF0000:
                return ALLOW
            return KILL if operand == 0x80000000 else operand & 0xFFFF
        else:
            holds = {
                0x15: accumulator == operand,
                0x35: accumulator >= operand,
                0x45: accumulator & operand != 0,
            }[code]
            at += yes if holds else no


@pytest.mark.parametrize("machine", MACHINES)
class TestFilter:
    def test_what_python_needs_is_allowed(self, machine):
        for name, numbers in NEEDED.items():
            assert verdict(machine, numbers[MACHINES.index(machine)]) == ALLOW, name

    def test_what_it_does_not_is_refused(self, machine):
        for name, numbers in REFUSED.items():
            assert verdict(machine, numbers[MACHINES.index(machine)]) == errno.EPERM, name

    def test_what_is_young_is_unknown(self, machine):
        for name, number in UNKNOWN.items():
            assert verdict(machine, number) == errno.ENOSYS, name

    def test_other_architectures_kill(self, machine):
        assert verdict(machine, 0, arch=0x40000003) == KILL
        other = MACHINES[1 - MACHINES.index(machine)]
        assert verdict(machine, 0, arch=AUDIT_ARCH[other]) == KILL

    def test_threads_but_no_processes(self, machine):
        clone = 56 if machine == "x86_64" else 220
        assert verdict(machine, clone, 0x3D0F00) == ALLOW  # as pthread_create has it
        assert verdict(machine, clone, 17) == verdict(machine, clone, 0) == errno.EPERM
        assert verdict(machine, clone, 0x10000000 | 17) == errno.EPERM

    def test_reading_but_no_writing(self, machine):
        openat = 257 if machine == "x86_64" else 56
        read = 0o2000000  # O_CLOEXEC
        assert verdict(machine, openat, -100, 0, read) == ALLOW
        for flag in (0o1, 0o2, 0o3, 0o100, 0o1000, 0o20200000):
            assert verdict(machine, openat, -100, 0, read | flag) == errno.EPERM
        if machine == "x86_64":
            assert verdict(machine, 2, 0, read) == ALLOW
            assert verdict(machine, 2, 0, read | 0o1) == errno.EPERM

    def test_no_signals_by_descriptor(self, machine):
        fcntl, ioctl = (72, 16) if machine == "x86_64" else (25, 29)
        for command in (1, 2, 3, 4, 1030):  # F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
            assert verdict(machine, fcntl, 0, command) == ALLOW
        for command in (8, 10, 15):
            assert verdict(machine, fcntl, 0, command) == errno.EPERM
            assert verdict(machine, fcntl, 0, command | 1 << 32) == errno.EPERM
        assert verdict(machine, ioctl, 0, 0x5401) == ALLOW  # TCGETS: isatty
        assert verdict(machine, ioctl, 0, 0x5412) == errno.EPERM

    def test_limits_are_read_only(self, machine):
        prlimit = 302 if machine == "x86_64" else 261
        assert verdict(machine, prlimit, 0, 9, 0, 1 << 40) == ALLOW
        assert verdict(machine, prlimit, 0, 9, 1 << 40, 0) == errno.EPERM
        assert verdict(machine, prlimit, 0, 9, 0x1000, 0) == errno.EPERM


def test_x32_kills():
    assert verdict("x86_64", 0x40000000 | 39) == KILL


def test_an_unknown_machine():
    with pytest.raises(NotImplementedError, match="x86_64 and aarch64, not for riscv64"):
        make_filter("riscv64")
