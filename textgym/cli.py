"""The `textgym` command: `textgym list | play | sft | train | eval | check`.

Each command is a module of `textgym.commands`, imported when it is called, so that `textgym list`
does not wait for torch. `textgym <command> --help` lists its options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "list": ("listing", "environments, rewards and agents"),
    "play": ("play", "write a response yourself and see the reward"),
    "sft": ("sft", "fine-tune on reference responses"),
    "train": ("train", "train by reinforcement learning; without options, a small example"),
    "eval": ("evaluate", "score a model or checkpoint on prompts"),
    "check": ("check", "check that a reward keeps its word, also when texts are hostile"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command and its options; default are those of the process.

    Returns:
        Exit status: 0, 1 after a failure that was reported, 2 for wrong arguments, 130 for Ctrl-C.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        from textgym.version import __version__

        print(f"textgym {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"textgym: unknown command {name!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    from textgym.commands.errors import UsageError

    if name != "list" and sys.stderr.isatty():
        print(f"textgym {name}: loading", file=sys.stderr)  # of torch, some seconds
    module = import_module(f"textgym.commands.{COMMANDS[name][0]}")
    try:
        status: int = module.run(rest)
    except UsageError as error:
        print(f"textgym {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ntextgym {name}: interrupted", file=sys.stderr)
        return 130
    return status


def _usage() -> str:
    lines = [f"  {name:<6} {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: textgym <command> [options]",
            "",
            *lines,
            "",
            "textgym <command> --help says more.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
