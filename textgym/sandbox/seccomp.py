"""A seccomp filter: the kernel refuses the system calls that a scored program has no use for.

It denies by list, because what the standard library calls differs from one libc to the next; but of
the calls younger than Linux 5.1 only those listed are allowed, so that what a kernel learns later
is denied. Refused are: starting processes, signals, other processes' memory, sockets, every change
to files (opening for writing too), mounts, memory that RLIMIT_AS does not see, raising limits,
and the corners of the kernel where most of its faults have been.

See https://docs.kernel.org/userspace-api/seccomp_filter.html.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from textgym.sandbox.syscalls import ARCHITECTURES, MACHINE, syscall

# What is denied with EPERM: name, number on x86_64, number on aarch64 (- where it is not there).
DENIED = """
fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, setsid 112 157, setpgid 109 154,
kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272,
perf_event_open 298 241, bpf 321 280, userfaultfd 323 282, setns 308 268, unshare 272 97,
move_pages 279 239, migrate_pages 256 238,
socket 41 198, socketpair 53 199, connect 42 203, accept 43 202, accept4 288 242, bind 49 200,
listen 50 201, sendto 44 206, sendmsg 46 211, sendmmsg 307 269, recvfrom 45 207, recvmsg 47 212,
recvmmsg 299 243,
creat 85 -, mkdir 83 -, mkdirat 258 34, mknod 133 -, mknodat 259 33, rmdir 84 -, unlink 87 -,
unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37,
symlink 88 -, symlinkat 266 36, truncate 76 45, ftruncate 77 46, fallocate 285 47, chmod 90 -,
fchmod 91 52, fchmodat 268 53, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54, utime 132 -,
utimes 235 -, futimesat 261 -, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7,
removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, flock 73 32,
name_to_handle_at 303 264, open_by_handle_at 304 265, fanotify_init 300 262, fanotify_mark 301 263,
inotify_add_watch 254 27,
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, swapon 167 224, swapoff 168 225,
quotactl 179 60, acct 163 89,
memfd_create 319 279, shmget 29 194, shmat 30 196, shmctl 31 195, shmdt 67 197, semget 64 190,
semop 65 193, semctl 66 191, semtimedop 220 192, msgget 68 186, msgsnd 69 189, msgrcv 70 188,
msgctl 71 187, mq_open 240 180, mq_unlink 241 181, mq_timedsend 242 182, mq_timedreceive 243 183,
mq_notify 244 184, remap_file_pages 216 234, vmsplice 278 75, mbind 237 235, set_mempolicy 238 237,
setrlimit 160 164, timer_create 222 107, timer_settime 223 110, timer_delete 226 111,
prctl 157 167, seccomp 317 277, capset 126 91, personality 135 92, setuid 105 146, setgid 106 144,
setreuid 113 145, setregid 114 143, setresuid 117 147, setresgid 119 149, setfsuid 122 151,
setfsgid 123 152, setgroups 116 159, setpriority 141 140, ioprio_set 251 30,
sched_setscheduler 144 119, sched_setparam 142 118, sched_setattr 314 274,
sched_setaffinity 203 122,
add_key 248 217, request_key 249 218, keyctl 250 219, init_module 175 105, finit_module 313 273,
delete_module 176 106, kexec_load 246 104, kexec_file_load 320 294, reboot 169 142, syslog 103 116,
iopl 172 -, ioperm 173 -, modify_ldt 154 -, settimeofday 164 170, clock_settime 227 112,
adjtimex 159 171, clock_adjtime 305 266, sethostname 170 161, setdomainname 171 162, vhangup 153 58,
lookup_dcookie 212 18, uselib 134 -, ustat 136 -, sysfs 139 -, _sysctl 156 -, nfsservctl 180 42,
io_setup 206 0, io_destroy 207 1, io_submit 209 2, io_cancel 210 3, io_getevents 208 4
"""
# From this number on, which both architectures share, only these are allowed: close_range,
# faccessat2, epoll_pwait2, futex_waitv, map_shadow_stack, futex_wake, futex_wait, futex_requeue,
# mseal. The others do not exist for the program (ENOSYS): libc then takes the older call.
YOUNG = 424
YOUNG_ALLOWED = (436, 439, 441, 449, 453, 454, 455, 456, 462)

CLONE_THREAD = 0x10000
# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, __O_TMPFILE.
OPEN_TO_WRITE = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000
# Signals sent by a file descriptor: F_SETOWN, F_SETSIG, F_SETOWN_EX; and F_SETLEASE, F_NOTIFY.
FCNTL_DENIED = (8, 10, 15, 1024, 1026)
# Typing into a terminal: TIOCSTI, TIOCLINUX; signals again: FIOSETOWN, SIOCSPGRP.
IOCTL_DENIED = (0x5412, 0x541C, 0x8901, 0x8902)

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_REFUSE, _UNKNOWN = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS


def make_filter(machine: str = MACHINE) -> bytes:
    """Assemble the filter as instructions of classic BPF.

    Raises:
        NotImplementedError: If the machine is of an unknown kind.
    """
    if machine not in ARCHITECTURES:
        raise NotImplementedError(
            f"the filter is written for {' and '.join(ARCHITECTURES)}, not for {machine}"
        )
    column = ARCHITECTURES.index(machine)
    x86 = machine == "x86_64"
    program = [
        _step(_LOAD, 4),
        _step(_EQUAL, AUDIT_ARCH[machine], yes=1),
        _step(_RETURN, _KILL),
        _step(_LOAD, 0),
    ]
    if x86:
        program += [_step(_AT_LEAST, X32, no=1), _step(_RETURN, _KILL)]
    for entry in DENIED.replace("\n", " ").split(","):
        known = entry.split()[1:][column]
        if known != "-":
            program += [_step(_EQUAL, int(known), no=1), _step(_RETURN, _REFUSE)]
    program += _when(56 if x86 else 220, 0, [_step(_ANY_BIT, CLONE_THREAD, yes=1)])
    if x86:
        program += _when(2, 1, [_step(_ANY_BIT, OPEN_TO_WRITE, no=1)])
    program += _when(257 if x86 else 56, 2, [_step(_ANY_BIT, OPEN_TO_WRITE, no=1)])
    program += _when(72 if x86 else 25, 1, _one_of(FCNTL_DENIED))
    program += _when(16 if x86 else 29, 1, _one_of(IOCTL_DENIED))
    # prlimit64 may read limits: the pointer to new ones, both of its halves, must be null.
    null = [_step(_EQUAL, 0, no=2), _step(_LOAD, 16 + 8 * 2 + 4), _step(_EQUAL, 0, yes=1)]
    program += _when(302 if x86 else 261, 2, null)
    for number in YOUNG_ALLOWED:
        program += [_step(_EQUAL, number, no=1), _step(_RETURN, _ALLOW)]
    program += [_step(_AT_LEAST, YOUNG, no=1), _step(_RETURN, _UNKNOWN), _step(_RETURN, _ALLOW)]
    return b"".join(program)


def install(program: bytes) -> None:
    """Put the calling thread, and what it starts, under the filter; needs no_new_privs.

    Raises:
        NotImplementedError: If the machine is of an unknown kind.
        OSError: If the kernel refuses.
    """
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(instructions))
    syscall("seccomp", 1, 0, ctypes.create_string_buffer(header, len(header)))


def _step(code: int, operand: int, *, yes: int = 0, no: int = 0) -> bytes:
    """Give one instruction; a test skips `yes` or `no` instructions."""
    return struct.pack("HBBI", code, yes, no, operand)


def _when(number: int, argument: int, tests: list[bytes]) -> list[bytes]:
    """For one call, load an argument's low half; the tests fall through to a refusal or skip it."""
    load = _step(_LOAD, 16 + 8 * argument)
    body = [load, *tests, _step(_RETURN, _REFUSE), _step(_RETURN, _ALLOW)]
    return [_step(_EQUAL, number, no=len(body)), *body]


def _one_of(values: tuple[int, ...]) -> list[bytes]:
    """Fall through if the loaded word is one of `values`, else skip one instruction."""
    n = len(values)
    steps = [_step(_EQUAL, value, yes=n - 1 - i) for i, value in enumerate(values[:-1])]
    return [*steps, _step(_EQUAL, values[-1], no=1)]
