"""The scorer's side of the self-test: what can a program do in a zygote of this machine?"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

from textgym.sandbox.levels import BREACHES, EXIT_EXECUTED, Report
from textgym.sandbox.outcome import SandboxError, ZygoteDiedError
from textgym.sandbox.plain import parse_answer
from textgym.sandbox.process import Zygote

CPU_SECONDS, MEMORY_MB, WALL_SECONDS = 0.02, 256, 30.0


def self_test(zygote: Zygote) -> Report:
    """Have jobs of our own try what must not be possible; restarts a zygote that dies of it.

    Raises:
        SandboxError: If the probe itself fails.
    """
    missing, breaches = _try_everything(zygote)
    try:
        _probe(zygote, {"probe": "signal"}, cpu_seconds=5.0)
    except ZygoteDiedError:
        breaches.add("signals")
        zygote.restart()
    end, _ = _probe(zygote, {"probe": "spin"}, cpu_seconds=CPU_SECONDS)
    if end["exit"] >= 0 or end["cpu"] > 1.0:
        breaches.add("time")
    return Report(missing, frozenset(breaches))


def _try_everything(zygote: Zygote) -> tuple[dict[str, str], set[str]]:
    # The path of a socket has at most 107 bytes.
    near = tempfile.gettempdir() if len(os.fsencode(tempfile.gettempdir())) < 80 else "/var/tmp"
    folder = Path(tempfile.mkdtemp(prefix="textgym-", dir=near))
    try:
        (folder / "secret").write_text("secret")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "socket"))
            listener.listen()
            # Open to everybody: the test is of the sandbox, not of modes.
            for path in (folder, folder / "secret", folder / "socket"):
                path.chmod(0o777)
            attempts = {"folder": str(folder), "scorer": os.getpid(), "memory_mb": MEMORY_MB}
            end, data = _probe(zygote, {"probe": "attempts", **attempts}, cpu_seconds=10.0)
    finally:
        shutil.rmtree(folder)
    try:
        if data[:1] != b"+":
            raise ValueError(data[1:].decode(errors="replace"))
        missing, found = parse_answer(data[5:])
    except ValueError as error:
        raise SandboxError(f"the self-test of the sandbox ended as {end}: {error}") from None
    breaches = set(found) & set(BREACHES)
    if end["exit"] == EXIT_EXECUTED:
        breaches.add("programs")
    return missing, breaches


def _probe(
    zygote: Zygote, content: dict[str, Any], *, cpu_seconds: float
) -> tuple[dict[str, Any], bytes]:
    limits = {"cpu_seconds": cpu_seconds, "memory_mb": MEMORY_MB}
    end, data, stopped = zygote.ask(content, limits, b"", WALL_SECONDS)
    return {**end, "stopped": stopped}, data
