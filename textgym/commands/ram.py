"""How much memory a process uses, and how much a machine has left."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

MIB = 1 << 20
_GROUPS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def used_memory() -> int:
    """Bytes of RAM that this process uses now; the most so far where that cannot be told."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return pages * resource.getpagesize()


def available_memory(device: torch.device) -> int | None:
    """Bytes that a new process could take on a device, this one being gone; None: unknown.

    RAM is what the kernel says is available, or what is left of a container's limit; where there is
    no Linux, all that is installed.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    return min([free, *_left_in_groups()]) + used_memory()


def _left_in_groups(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that control groups leave to this process."""
    left = []
    for folder in (root, root / "memory"):
        for limit, used in _GROUPS:
            try:
                left.append(int((folder / limit).read_text()) - int((folder / used).read_text()))
            except (OSError, ValueError):  # no such group, or no limit ("max")
                continue
    return left
