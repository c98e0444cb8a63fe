"""Errors that are the user's to mend: reported in one line, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """What was asked for cannot be done, and the message says what can."""


@contextmanager
def reported() -> Iterator[None]:
    """Turn errors of building a task or a policy from the user's options into a `UsageError`."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, LookupError, RuntimeError) as error:
        raise UsageError(str(error) or type(error).__name__) from error
