"""Whether a response is JSON, and fits a JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from textgym.rewards.base import Example
from textgym.rewards.verifiers.base import Ask, PooledVerifier, Verifier, check_length, need
from textgym.rewards.verifiers.json_text import LONGEST, read_json


class Json(Verifier):
    """1 if the response is one JSON value, alone or in one Markdown fence, else 0.

    **Refuses** what Python's parser lets pass: NaN, Infinity, numbers that overflow or have more
    than 400 digits, keys that come twice, nesting deeper than 64.

    **Range** 0 or 1. **Cost** linear in the text. **Statuses** of what could not be judged:
    `too long` (more than 100,000 characters).
    """

    judges_content = False

    def __init__(self) -> None:
        super().__init__("json", None)

    def verify(self, text: str, row: Mapping[str, Any]) -> float:
        """Parse the text."""
        check_length(text, LONGEST)
        try:
            read_json(text)
        except ValueError:
            return 0.0
        return 1.0

    def examples(self) -> tuple[Example, ...]:
        """Give JSON, JSON in a fence, and two that are none."""
        return (
            Example({}, '{"name": "Ada", "age": 36}', 1.0),
            Example({}, '```json\n["a", "b"]\n```', 1.0),
            Example({}, '{"age": NaN}', 0.0),
            Example({}, 'Here it is: {"age": 36}', 0.0),
        )


class JsonSchema(PooledVerifier):
    """1 if the response is JSON (as `Json` reads it) that fits a JSON Schema, else 0.

    The schema is checked in a worker pool: a `pattern` in it can take exponential time on a text
    that a model wrote. Its draft is that of its `$schema`, 2020-12 by default; nothing is fetched
    for a `$ref`; `format` is not asserted.

    **The column**, if one is named, holds the schema of its row: a mapping, or JSON of one.

    **Range** 0 or 1. **Cost** linear in the text, and in a worker what the schema costs: about 100
    microseconds; at most `cpu_seconds`. **Statuses** of what could not be judged: `too long` (over
    100,000 characters), `timeout`, `memory`, `recursion`, `crash`, `killed`, `overflow` (a
    number is too large for the schema's arithmetic).

    Args:
        schema: The schema; None to read it from the column.
        column: The column of schemas; `"schema"` if none is given.
        cpu_seconds: CPU time of one text.
        wall_seconds: Wall time of one text.
        memory_mb: Memory of a worker, in MiB.
        workers: How many processes.

    Raises:
        ImportError: If jsonschema is not installed.
        ValueError: If the schema is not a schema, or both `schema` and `column` are given.
    """

    setup = "textgym.rewards.verifiers.json_worker:judge"

    def __init__(
        self,
        schema: Mapping[str, Any] | bool | None = None,
        *,
        column: str | None = None,
        cpu_seconds: float = 0.5,
        wall_seconds: float = 20.0,
        memory_mb: int = 1024,
        workers: int = 1,
    ) -> None:
        need("jsonschema", "JsonSchema")
        if schema is not None and column is not None:
            raise ValueError(f"expected a schema or a column, got both; the column is {column!r}")
        super().__init__(
            "json_schema",
            None if schema is not None else column or "schema",
            cpu_seconds=cpu_seconds,
            wall_seconds=wall_seconds,
            memory_mb=memory_mb,
            workers=workers,
        )
        self._schema = None if schema is None else self._checked(schema)

    def ask(self, text: str, row: Mapping[str, Any]) -> float | Ask:
        """Parse here, where a text that is no JSON costs little; a worker does the rest."""
        check_length(text, LONGEST)
        schema = self._schema if self.column is None else self._written(row[self.column])
        try:
            read_json(text)
        except ValueError:
            return 0.0
        return Ask((schema, text))

    def examples(self) -> tuple[Example, ...]:
        """Give texts that fit and that do not; none for a schema of one's own."""
        if self.column is None:
            return ()
        row = {
            self.column: {
                "type": "object",
                "properties": {"age": {"type": "integer", "minimum": 0}},
                "required": ["age"],
            }
        }
        return (
            Example(row, '{"age": 36}', 1.0),
            Example(row, '{"age": -1}', 0.0),
            Example(row, "36 years", 0.0),
            Example({self.column: {"type": "array", "minItems": 2}}, "[1, 2]", 1.0),
        )

    def _checked(self, schema: Any) -> str:
        from jsonschema.exceptions import SchemaError

        from textgym.rewards.verifiers.json_worker import validator

        written = self._written(schema)
        try:
            validator(written)
        except SchemaError as error:
            raise ValueError(f"{schema!r:.200} is not a JSON Schema: {error.message}") from None
        return written

    def _written(self, schema: Any) -> str:
        """Give a schema as JSON.

        Raises:
            ValueError: If it is none.
        """
        try:
            value = json.loads(schema) if isinstance(schema, str) else schema
            if isinstance(value, Mapping | bool):
                return json.dumps(value if isinstance(value, bool) else dict(value), sort_keys=True)
        except (TypeError, ValueError):
            pass
        raise ValueError(f"reward {self.name!r} expected a JSON Schema, got {schema!r:.200}")
