"""What `JsonSchema` runs in the worker pool."""

from __future__ import annotations

import functools
import json
from typing import Any

import jsonschema
from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]

from textgym.rewards.verifiers.json_text import read_json


def judge(schema: str, text: str) -> float | str:
    """Tell whether a text is JSON that fits a schema; a status, if its numbers overflow on the way.

    Raises:
        jsonschema.SchemaError: If the schema is none.
        referencing.exceptions.Unresolvable: If it refers to what is not in it.
    """
    kept = validator(schema)
    try:
        return float(kept.is_valid(read_json(text)))
    except ArithmeticError:
        return "overflow"


@functools.lru_cache(1024)
def validator(schema: str) -> Any:
    """Make the validator of a schema, written as JSON.

    Raises:
        jsonschema.SchemaError: If it is no schema.
    """
    value = json.loads(schema)
    kind = jsonschema.validators.validator_for(value, default=jsonschema.Draft202012Validator)
    kind.check_schema(value)
    # The drafts' own schemas are known; nothing else is fetched.
    return kind(value, registry=REGISTRY)
