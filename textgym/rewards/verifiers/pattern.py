"""Whether a response matches a regular expression, in linear time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from textgym.rewards.verifiers.base import Verifier, check_length, need

LONGEST = 1_000_000


class Pattern(Verifier):
    """1 if a regular expression matches the response, else 0.

    The engine is RE2 (google-re2), which takes time linear in the text whatever the expression; so
    it has no lookahead, no lookbehind, no backreferences, no possessive or atomic groups. Write
    what must *not* match as a second `Pattern`, subtracted or as a gate.

    **The column**, if one is named, holds the expression of its row.

    **Range** 0 or 1. **Cost** linear in the text. **Statuses** of what could not be judged:
    `too long` (more than 1,000,000 characters). Lone surrogates are read as `?`.

    Args:
        pattern: The expression; None to read it from the column.
        column: The column of expressions; None if `pattern` is given.
        whole: The expression must match the whole response, space around it not counted; else any
            part of it.

    Raises:
        ImportError: If google-re2 is not installed.
        ValueError: If the expression is not RE2's, or not exactly one of `pattern` and `column` is
            given.
    """

    def __init__(
        self, pattern: str | None = None, *, column: str | None = None, whole: bool = False
    ) -> None:
        need("re2", "Pattern")
        super().__init__("pattern", column)
        if (pattern is None) == (column is None):
            raise ValueError(
                f"expected a pattern or a column of patterns, got pattern={pattern!r} and "
                f"column={column!r}"
            )
        self.pattern, self.whole = pattern, whole
        if pattern is not None:
            compile_re2(pattern)

    def verify(self, text: str, row: Mapping[str, Any]) -> float:
        """Match the text."""
        check_length(text, LONGEST)
        pattern = self.pattern if self.column is None else row[self.column]
        if not isinstance(pattern, str):
            raise ValueError(
                f"reward {self.name!r} expected a string in the column {self.column!r}, "
                f"got {pattern!r:.200}"
            )
        compiled, text = compile_re2(pattern), encodable(text)
        found = compiled.fullmatch(text.strip()) if self.whole else compiled.search(text)
        return float(found is not None)


def encodable(text: str) -> str:
    """Give a text that RE2 can read, of the same length: `?` stands for lone surrogates."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


@functools.lru_cache(1024)
def compile_re2(pattern: str) -> Any:
    """Compile an expression that is matched in linear time.

    Raises:
        ImportError: If google-re2 is not installed.
        ValueError: If it is not one that RE2 knows.
    """
    need("re2", "a pattern that is matched in linear time")
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except (re2.error, UnicodeError) as error:
        reason = error.args[0] if error.args else error
        if isinstance(reason, bytes):
            reason = reason.decode("utf-8", "replace")
        raise ValueError(
            f"RE2 cannot compile the pattern {pattern!r:.200}: {reason}. It matches in linear time "
            "and so has no lookahead, lookbehind or backreferences; say what must not match with a "
            "second Pattern."
        ) from None
