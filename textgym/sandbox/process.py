"""The scorer's side of one zygote: starting it, asking it for a job, reading what may be forged."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from textgym.sandbox.frames import encode
from textgym.sandbox.outcome import (
    Job,
    Outcome,
    SandboxError,
    ZygoteDiedError,
    answers_in,
    status_of,
)

START_SECONDS = 60.0
# How long the zygote may take to start a job, and to end one that it was told to end.
GRACE_SECONDS = 10.0
MOST_OUTPUT = 1 << 20
# Only the files that the zygote imports are loaded, by way of packages without their `__init__`.
BOOT = """
import sys, types
for name, folder in zip(("textgym", "textgym.sandbox"), sys.argv[1:3]):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from textgym.sandbox.zygote import main
main(int(sys.argv[3]), int(sys.argv[4]))
"""
# Next to nothing of the scorer's environment; one malloc arena, because each takes address space.
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}
# Without it, a Python whose libraries lie elsewhere does not start.
INHERITED = ("LD_LIBRARY_PATH",)


class Zygote:
    """One zygote, started anew when it has died; used by one thread at a time.

    Raises:
        SandboxError: If it cannot be started.
    """

    def __init__(self) -> None:
        self.missing: tuple[str, ...] = ()
        self.starts = 0
        self._talk: _Talk | None = None
        self._start()

    def _start(self) -> None:
        self.starts += 1
        if sys.platform != "linux":
            raise SandboxError(
                f"the sandbox for model-written code needs Linux, not {sys.platform}"
            )
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here = Path(__file__).resolve().parent
        arguments = [str(here.parent), str(here), str(theirs.fileno()), str(os.getpid())]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-S", "-B", "-X", "utf8", "-c", BOOT, *arguments],
                env=ENVIRONMENT | {n: os.environ[n] for n in INHERITED if n in os.environ},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._end = weakref.finalize(self, _end, os.getpid(), self.process, self.control)
        ready = self._receive(time.monotonic() + START_SECONDS)
        if ready is None:
            self.process.kill()
            assert self.process.stderr is not None
            trouble = self.process.stderr.read().decode(errors="replace").strip()
            self.kill()
            raise SandboxError(f"the zygote of the sandbox did not start: {trouble[-2000:]}")

    def restart(self) -> None:
        """Kill what is left of it and start it anew."""
        self.kill()
        self._start()

    def kill(self) -> None:
        """End it, and with it whatever it runs."""
        self._end()

    def forget(self) -> None:
        """Let go of a zygote that belongs to the process of which this one is a fork."""
        self._end.detach()
        if self._talk is not None:
            self._talk.close_inbox()  # else the program would wait for the end of its stdin
        self.process.returncode = 0  # not ours to wait for
        self.control.close()
        if self.process.stderr is not None:
            self.process.stderr.close()

    def run(self, job: Job) -> Outcome:
        """Run a job.

        Raises:
            ZygoteDiedError: If the zygote is gone; whether the job did it is not known.
            SandboxError: If the job could not be started.
        """
        content = {"code": job.code, "entry_point": job.entry_point, "calls": job.calls}
        more = b"" if job.calls is not None else job.stdin.encode("utf-8", "surrogatepass")
        limits = {"cpu_seconds": job.cpu_seconds, "memory_mb": job.memory_mb}
        began = time.monotonic()
        end, data, stopped = self.ask(content, limits, more, job.wall_seconds)
        if data[:1] != b"+":
            why = data[1:].decode(errors="replace") or f"it ended as {end}"
            raise SandboxError(f"a job of the sandbox could not be started: {why}")
        status = stopped or status_of(end, job.cpu_seconds)
        answers = [] if job.calls is None else answers_in(data[1:], len(job.calls))
        if job.calls is not None and status == "ok" and len(answers) < len(job.calls):
            status = "crash"
        output = data[1:] if job.calls is None else b""
        took = time.monotonic() - began
        return Outcome(status, answers, output, end["cpu"], end["memory"], took)

    def ask(
        self, content: dict[str, Any], limits: dict[str, Any], more: bytes, wall_seconds: float
    ) -> tuple[dict[str, Any], bytes, str]:
        """Have a child forked, write it its job and read what it says until it has ended.

        Returns:
            How it ended, what it wrote, and why it was stopped (empty if it was not).

        Raises:
            ZygoteDiedError: If the zygote is gone, or does not end the job when told to.
        """
        if self.control.fileno() < 0:
            raise ZygoteDiedError("the zygote of the sandbox has ended")
        inbox, outbox = os.pipe(), os.pipe()
        talk = _Talk(self.control.fileno(), inbox[1], outbox[0], encode(content) + more)
        self._talk = talk
        try:
            request = json.dumps({**limits, "missing": self.missing}).encode()
            try:
                socket.send_fds(self.control, [request], [inbox[0], outbox[1]])
            except OSError as error:
                raise ZygoteDiedError(f"the zygote of the sandbox is gone: {error}") from None
            finally:
                os.close(inbox[0])
                os.close(outbox[1])
            stopped = talk.until(wall_seconds)
            if stopped:
                with contextlib.suppress(OSError):
                    self.control.send(b"kill")
            end = self._receive(time.monotonic() + GRACE_SECONDS)
            if end is None:
                raise ZygoteDiedError("the zygote of the sandbox died while it ran a job")
            return end, talk.rest(), stopped
        finally:
            self._talk = None
            talk.close_inbox()
            os.close(outbox[0])

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        """Wait for a packet; None if the zygote is gone or late."""
        poller = select.poll()
        poller.register(self.control, select.POLLIN)
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        try:
            data = self.control.recv(4096)
        except OSError:
            return None
        return dict(json.loads(data)) if data else None


class _Talk:
    """Writing to a child and reading from it at once, as far as it goes along."""

    def __init__(self, control: int, inbox: int, outbox: int, message: bytes) -> None:
        self.control, self.inbox, self.outbox = control, inbox, outbox
        self.message, self.data = memoryview(message), bytearray()
        os.set_blocking(inbox, False)
        os.set_blocking(outbox, False)
        self.poller = select.poll()
        self.poller.register(control, select.POLLIN)
        self.poller.register(inbox, select.POLLOUT)
        self.poller.register(outbox, select.POLLIN)

    def until(self, wall_seconds: float) -> str:
        """Go on until the zygote speaks, the job's time is over or too much was written.

        A job's time begins with its first byte, which is written before the program starts: where
        too little is left of a budget for a start, the program is to blame and not the sandbox.
        """
        deadline = time.monotonic() + max(wall_seconds, GRACE_SECONDS)
        started = False
        while (left := deadline - time.monotonic()) > 0:
            ready = dict(self.poller.poll(left * 1000))
            if self.inbox in ready:
                self._write()
            if self.outbox in ready and not self._read():
                self.poller.unregister(self.outbox)
            if len(self.data) > MOST_OUTPUT:
                return "output"
            if self.control in ready:
                return ""
            if self.data and not started:
                started, deadline = True, time.monotonic() + wall_seconds
        return "timeout"

    def rest(self) -> bytes:
        """Read what is left in the pipe, and give all."""
        while len(self.data) <= MOST_OUTPUT and self._read():
            pass
        return bytes(self.data)

    def close_inbox(self) -> None:
        """Close the end that writes, once."""
        if self.inbox >= 0:
            os.close(self.inbox)
            self.inbox = -1

    def _write(self) -> None:
        try:
            self.message = self.message[os.write(self.inbox, self.message[: 1 << 16]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.message = self.message[:0]
        if not self.message:
            self.poller.unregister(self.inbox)
            self.close_inbox()  # the end of its stdin

    def _read(self) -> bool:
        try:
            part = os.read(self.outbox, 1 << 16)
        except BlockingIOError:
            return False
        self.data += part
        return bool(part)


def _end(owner: int, process: subprocess.Popen[bytes], control: socket.socket) -> None:
    """Kill a zygote; nothing in a fork of the process that owns it."""
    if os.getpid() != owner:
        return
    # Others may have closed the descriptors; the process is to end all the same.
    with contextlib.suppress(OSError):
        control.close()
    # The guard and the server share a session; the server's end ends the job.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr is not None:
        with contextlib.suppress(OSError):
            process.stderr.close()
