"""The zygote: a clean process that forks a child for each job, and knows nothing of any job.

It is two processes. The *guard* is started by the scorer's process and enters new namespaces; it
waits, and ends everything when the scorer's process is gone (it looks twice a second, because the
kernel's PDEATHSIG follows the thread that started a process, and threads end). The *server*, its
child, is the first process of the process namespace: when it dies, the kernel kills all the others.
It is asked for children over a socket, one at a time, and hands each the two pipes that came with
the request: what a job is and what it answers never pass through the server, so that no job can
find another in the memory that it inherits.

Requests and replies are one packet of JSON each; an empty packet is the end. `b"kill"` ends the
running job. The first byte of what a child writes is `+` or `-`, written before the program starts:
`-` and a reason where a layer that the scorer counts on could not be put on.

Linux only. It is started as `python -s -P -S -B -c "..."` with an environment of its own, which is
as isolated as `-I` but lets the hash seed be fixed; of this package only the files that it imports
are loaded.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from textgym.sandbox.frames import read_frame
from textgym.sandbox.harden import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    Missing,
    confine,
    die_with_parent,
    enter_namespaces,
    leave_root,
)
from textgym.sandbox.job import run_job
from textgym.sandbox.landlock import make_ruleset
from textgym.sandbox.probe import run_probe
from textgym.sandbox.seccomp import make_filter
from textgym.sandbox.syscalls import syscall

LARGEST_JOB = 1 << 30
LOOK_SECONDS = 0.5
MOST_FILES = 1024
# What programs import most; a child then finds it loaded.
PRELOADED = (
    "ast bisect collections contextlib copy dataclasses datetime decimal enum fractions functools "
    "heapq io itertools math operator queue random re statistics string textwrap threading typing"
).split()
READABLE = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


def main(control: int, scorer: int) -> NoReturn:
    """Be the guard; fork the server.

    Args:
        control: The file descriptor of the socket.
        scorer: The process that asks.
    """
    missing: Missing = {}
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, this goes before anything of the user
    leave_root(os.__file__, missing)
    enter_namespaces(missing)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    guard = os.getpid()
    server = os.fork()
    if server == 0:
        with contextlib.suppress(KeyboardInterrupt):
            # In a process namespace of its own, it sees no parent.
            _serve(control, None if "process namespace" not in missing else guard, missing)
        os._exit(1)
    os.close(control)
    while True:
        signal.sigtimedwait([signal.SIGCHLD], LOOK_SECONDS)
        if os.waitpid(server, os.WNOHANG)[0]:
            os._exit(0)
        if os.getppid() != scorer:
            os.kill(server, signal.SIGKILL)
            os._exit(0)


def _serve(control: int, guard: int | None, missing: Missing) -> NoReturn:
    die_with_parent(guard)
    server = _Server(socket.socket(fileno=control), first=guard is None, missing=missing)
    server.serve()


class _Server:
    """Forks children on request, one at a time.

    Args:
        control: The socket to the scorer.
        first: This is the first process of its process namespace.
        missing: The layers that could not be put on so far, with the reasons.
    """

    def __init__(self, control: socket.socket, *, first: bool, missing: Missing) -> None:
        self.control, self.first, self.missing = control, first, missing
        self.pid = os.getpid()
        self.nothing = os.open(os.devnull, os.O_RDWR)
        for name in PRELOADED:
            importlib.import_module(name)
        self.rules: int | None = None
        self.program: bytes | None = None
        folders = [p for p in sys.path if os.path.isdir(p)]
        libraries = os.path.join(sys.base_prefix, "lib")
        try:
            self.rules = make_ruleset([*folders, libraries, *READABLE, *DEVICES])
        except (OSError, NotImplementedError) as error:
            missing["landlock"] = str(error)
        try:
            self.program = make_filter()
        except NotImplementedError as error:
            missing["seccomp"] = str(error)
        with contextlib.suppress(OSError, NotImplementedError):
            syscall("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            # Nobody without privileges reads the memory of what is not dumpable.
            syscall("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
        self.wakeup, wake = os.pipe()
        for end in (self.wakeup, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        gc.collect()
        gc.freeze()

    def serve(self) -> NoReturn:
        """Answer requests until the scorer closes the socket."""
        os.dup2(self.nothing, 2)  # the pipe there is for what goes wrong until now
        self._reply({"ready": os.getpid()})
        while True:
            try:
                data, pipes, _, _ = socket.recv_fds(self.control, 4096, 2)
            except ConnectionError:
                os._exit(0)
            if not data:
                os._exit(0)
            if data == b"kill":
                continue  # it crossed the reply of a job that had ended
            request = json.loads(data)
            child = os.fork()
            if child == 0:
                self._child(request, *pipes)
            for end in pipes:
                os.close(end)
            self._wait(child)
            self._reply(self._end(child))

    def _reply(self, value: dict[str, Any]) -> None:
        try:
            self.control.send(json.dumps(value).encode())
        except OSError:
            os._exit(0)

    def _wait(self, child: int) -> None:
        """Return when the child has ended or is to be killed."""
        poller = select.poll()
        poller.register(self.wakeup, select.POLLIN)
        poller.register(self.control, select.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self.control.fileno() in ready:
                if not self.control.recv(16):
                    # The scorer is gone. The end of this process ends the child too.
                    os.kill(child, signal.SIGKILL)
                    os._exit(0)
                return
            os.read(self.wakeup, 4096)
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
                return

    def _end(self, child: int) -> dict[str, Any]:
        """Kill the child and all that it left, and tell how it ended."""
        if self.first and self.pid == 1:
            # To everything in this namespace, and nothing outside.
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        # The child is not reaped yet, so that its number is still its own.
        for kill in (os.kill, os.killpg):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, 0 if self.first else os.WNOHANG)[0]:
                pass
        return {
            "exit": os.waitstatus_to_exitcode(status),
            "cpu": usage.ru_utime + usage.ru_stime,
            "memory": usage.ru_maxrss / 1024,
        }

    def _child(self, request: dict[str, Any], inbox: int, result: int) -> NoReturn:
        """Become the job: nothing but two pipes is left of what was open."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            die_with_parent(self.pid)
            job = read_frame(inbox, LARGEST_JOB)
            if job.get("calls", ()) is None:
                # A program: what follows the job in its pipe is its stdin.
                os.dup2(inbox, 0)
                os.dup2(result, 1)
                result = 1
            rules = self.rules
            _close_all_but(fd for fd in (result, rules) if fd is not None)
            missing = dict(self.missing)
            confine(
                cpu_seconds=request["cpu_seconds"],
                memory_mb=request["memory_mb"],
                rules=rules,
                program=self.program,
                own_count="user namespace" not in missing,
                missing=missing,
            )
            if rules is not None:
                os.close(rules)
            unexpected = sorted(set(missing) - set(request["missing"]))
            if unexpected and "code" in job:
                os.write(result, b"-" + json.dumps({k: missing[k] for k in unexpected}).encode())
                os._exit(0)
            os.write(result, b"+")
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.write(result, b"-" + f"{type(error).__name__}: {error}".encode())
            os._exit(0)
        if "code" in job:
            run_job(job, result)
        run_probe(job, result, missing)


def _close_all_but(kept: Iterable[int]) -> None:
    low = 3
    for fd in [*sorted(fd for fd in kept if fd >= low), MOST_FILES]:
        os.closerange(low, fd)
        low = fd + 1
