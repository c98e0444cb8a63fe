"""The caller's end of one worker process; what is inside is `textgym.sandbox.worker`."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

from textgym.sandbox.frames import read_frame, write_frame

# The path comes first, so that this package and the function are found as in the caller.
START = (
    "import json, sys; config = json.loads(sys.argv[1]); sys.path[:] = config['path']; "
    "from textgym.sandbox.worker import main; main(config)"
)
# All that a worker gets of the caller's environment: what finds the interpreter and its libraries.
KEPT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "TMPDIR")
# One thread, because a process with threads cannot be forked safely, and no randomness.
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
LARGEST_ANSWER = 1 << 16
ANSWER_SECONDS = 10.0  # from the first byte of an answer, which is written at once, to its last


class WorkerLost(Exception):
    """The worker says that it cannot go on."""


class Worker:
    """A worker process and its pipes.

    Args:
        config: What `textgym.sandbox.worker.main` expects, but for `path` and `parent`.

    Attributes:
        deadline: The `time.monotonic()` at which it is overdue.
        has_read: Whether it has read the chunk that it was sent last.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        path = [entry or os.getcwd() for entry in sys.path]
        whole = {**config, "path": path, "parent": os.getpid()}
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        # -s and -P: only the caller's path. A session of its own: Ctrl-C in the terminal is for the
        # caller, and the worker can be killed with all that it started.
        self.setup = config["setup"]
        self.process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-c", START, json.dumps(whole)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            close_fds=True,
            start_new_session=True,
            env=ENVIRONMENT | environment,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.inbox, self.outbox = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.inbox, False)
        os.set_blocking(self.outbox, False)
        self.begun = False
        self.has_read = False
        self.deadline = 0.0

    def begin(self, deadline: float) -> None:
        """Wait until the worker is ready; at once, if it has been before.

        Raises:
            RuntimeError: If it cannot work; says why.
        """
        if self.begun:
            return
        try:
            said = read_frame(self.outbox, LARGEST_ANSWER, deadline)
            problem = None if said == "ready" else str(said[1])
        except TimeoutError:
            problem = "it takes too long to import"
        except (EOFError, OSError, ValueError) as error:
            problem = f"its process ended at once ({error})"
        if problem is not None:
            module = self.setup.partition(":")[0]
            raise RuntimeError(
                f"a worker for {self.setup!r} could not be started: {problem}\n"
                f"Expected `import {module}` to work in a new Python process with this process's "
                "import path and a bare environment."
            )
        self.begun = True

    def send(self, chunk: list[list[Any]], seconds: float) -> None:
        """Send a chunk of items.

        Raises:
            OSError: If the worker has gone.
            TimeoutError: If it does not read.
        """
        self.has_read = False
        self.deadline = time.monotonic() + seconds
        write_frame(self.inbox, chunk, self.deadline)

    def receive(self) -> Any:
        """Read one answer, whose first bytes are there.

        Raises:
            EOFError: If the worker has gone.
            WorkerLost: If it cannot go on; says why.
        """
        said = read_frame(self.outbox, LARGEST_ANSWER, time.monotonic() + ANSWER_SECONDS)
        if said in ("ready", "read"):
            return said
        if not (isinstance(said, list) and len(said) == 2 and isinstance(said[1], str)):
            raise WorkerLost(f"it said {said!r:.200}")
        if said[0] == "failed":
            raise WorkerLost(said[1])
        return said

    def end(self) -> None:
        """Kill the process, with all that it started, and close the pipes."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._close()

    def forget(self) -> None:
        """Close the pipes, in a process that is not the worker's parent."""
        self.process.returncode = 0  # it is not ours to wait for
        self._close()

    def _close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def wait_for(workers: list[Worker], deadline: float) -> list[Worker]:
    """Wait until some of the workers have said something, or have gone; none at the deadline.

    Args:
        workers: The workers.
        deadline: A `time.monotonic()`.
    """
    poller = select.poll()
    by_fd = {worker.outbox: worker for worker in workers}
    for fd in by_fd:
        poller.register(fd, select.POLLIN)
    left = max(0.0, deadline - time.monotonic()) * 1000.0
    return [by_fd[fd] for fd, _ in poller.poll(left)]
