"""What runs in the child of a zygote: one program, whose every answer is its own claim.

Nothing here protects anything: the program shares the process and may change all of it. It can only
change what the scorer reads, and the scorer believes no more than it would of a return value.
"""

from __future__ import annotations

import os
import random
import sys
import types
from typing import Any, NoReturn

from textgym.sandbox.frames import write_frame
from textgym.sandbox.plain import NotPlainError, from_json, to_json

# How a job exits; anything else is a crash.
EXIT_STATUS = {
    0: "ok",
    81: "syntax",
    82: "memory",
    83: "recursion",
    84: "exception",
    85: "no entry point",
}
_CODE_OF = {status: code for code, status in EXIT_STATUS.items()}
FILE = "<answer>"


def run_job(job: dict[str, Any], result: int) -> NoReturn:
    """Run a job in this process and exit.

    Args:
        job: `code`; `calls`, lists of arguments as JSON, or None for a program that reads stdin and
            writes stdout; `entry_point`, the function to call.
        result: The file descriptor for a frame per call, `["ok", value]` or `[reason]`.
    """
    status = "exception"
    try:
        random.seed(0)
        if job["calls"] is None:
            status = _run_program(job["code"])
        else:
            status = _run_calls(job["code"], job["entry_point"], job["calls"], result)
    except BaseException as error:
        status = _reason(error)
    finally:
        os._exit(_CODE_OF.get(status, 84))


def _run_program(code: str) -> str:
    sys.argv = ["answer.py"]
    try:
        _execute(code, "__main__")
    except SystemExit as error:
        if error.code not in (None, 0):
            return "exception"
    finally:
        # As at the end of any program: threads end, exit handlers run, output is written.
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        import atexit

        atexit._run_exitfuncs()
        sys.stdout.flush()
    return "ok"


def _run_calls(code: str, entry_point: str | None, calls: list[Any], result: int) -> str:
    module = _execute(code, "answer")
    function = _find(module, entry_point)
    if function is None:
        return "no entry point"
    for arguments in calls:
        try:
            outcome = ["ok", to_json(function(*from_json(arguments)))]
        except NotPlainError:
            outcome = ["not plain"]
        except BaseException as error:
            outcome = [_reason(error)]
        write_frame(result, outcome)
    return "ok"


def _execute(code: str, name: str) -> types.ModuleType:
    try:
        compiled = compile(code, FILE, "exec")
    except (SyntaxError, ValueError):
        # ValueError: a NUL, or a lone surrogate.
        os._exit(_CODE_OF["syntax"])
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compiled, module.__dict__)
    return module


def _find(module: types.ModuleType, entry_point: str | None) -> Any:
    """Find `function`, or `Class.method` of a new instance; the last function if none is named."""
    if entry_point is None:
        functions = [
            value
            for value in list(module.__dict__.values())
            if isinstance(value, types.FunctionType) and value.__code__.co_filename == FILE
        ]
        return functions[-1] if functions else None
    found: Any = module
    for name in entry_point.split("."):
        found = getattr(found() if isinstance(found, type) else found, name, None)
    return found if callable(found) else None


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "memory"
    return "recursion" if isinstance(error, RecursionError) else "exception"
