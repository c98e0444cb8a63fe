"""Show what the sandbox is worth on this machine: `python -m textgym.sandbox`."""

from __future__ import annotations

import sys

from textgym.sandbox.outcome import SandboxError
from textgym.sandbox.process import Zygote
from textgym.sandbox.selftest import self_test


def main() -> int:
    """Print the layers, the attempts and the level; 1 if there is no sandbox at all."""
    try:
        zygote = Zygote()
    except SandboxError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        print(self_test(zygote).table())
    finally:
        zygote.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
