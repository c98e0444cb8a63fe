"""What a benchmark states beside its numbers: machine, versions, command and commit."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def described(packages: tuple[str, ...] = ("gymnasium", "numpy", "torch")) -> dict[str, Any]:
    """Describe where a benchmark runs.

    Args:
        packages: Distributions whose versions matter for it.

    Returns:
        JSON values: processor, cores, operating system, Python, versions, command, commit.
    """
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "commit": _commit(),
    }


def peak_mib(device: str = "cpu") -> float:
    """Peak memory of this process in MiB, or that of an accelerator's allocator."""
    if device != "cpu":
        import torch

        return torch.accelerator.max_memory_allocated() / 2**20
    try:  # ru_maxrss would begin with that of the process before it
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Short hash of the checkout, with `-dirty` where tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
