"""Prompt tables: rows with a prompt and named columns that rewards read.

A table is made from a list of dicts, a JSONL, CSV or Parquet file, a Hugging Face dataset, or a
function that writes row after row from a generator of its own. Splits of one table know each other,
so that every environment over them has one observation space, and never share a prompt.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from string import Formatter
from typing import Any, overload

import numpy as np

from textgym.prompt_files import read_rows
from textgym.streams import generator, mix64

Row = Mapping[str, Any]


class Prompts(Sequence[Row]):
    """An indexable table of rows `{"prompt": str | list[int] | chat messages, ...columns}`.

    Args:
        rows: The rows; all have the same columns.
        name: What error messages call the table.

    Attributes:
        columns: Names of the columns, `"prompt"` among them.
        family: The splits that the table is one of, itself included; the training split first.
        encoded: Ids of the prompts by tokenizer, filled by `textgym.task`; not pickled.

    Raises:
        ValueError: There is no row, or a row has no prompt or other columns than the first.
        TypeError: A row is not a mapping, or its prompt is of no known kind.
    """

    def __init__(self, rows: Iterable[Row], *, name: str = "prompts") -> None:
        if isinstance(rows, str | Mapping):
            raise TypeError(
                f"rows must be a sequence of mappings, got {type(rows).__name__}; use "
                "Prompts.load(path) to read a file"
            )
        self.name = name
        self._rows: Sequence[Row] = [dict(_checked(row, i, name)) for i, row in enumerate(rows)]
        if not self._rows:
            raise ValueError(f"{name}: no prompts; a table needs at least one row with a 'prompt'")
        self.columns: tuple[str, ...] = tuple(self._rows[0])
        for i, row in enumerate(self._rows):
            if set(row) != set(self.columns):
                odd = sorted(map(str, set(row) ^ set(self.columns)))[0]
                has = "has no" if odd in self.columns else "has an extra"
                raise ValueError(
                    f"{name}: row {i} {has} column {odd!r}; expected {list(self.columns)}"
                )
        self.family: tuple[Prompts, ...] = (self,)
        self.encoded: dict[Any, list[list[int]]] = {}

    @classmethod
    def load(
        cls,
        source: Any,
        *,
        prompt: str = "prompt",
        references: str | None = None,
        columns: Collection[str] | None = None,
        template: str | None = None,
        split: str = "train",
    ) -> Prompts:
        r"""Read a table from wherever it is.

        Args:
            source: A `Prompts`, a list of dicts, the path of a `.jsonl`, `.json`, `.csv`, `.tsv` or
                `.parquet` file, a Hugging Face dataset object, or the name of one.
            prompt: Column that holds the prompt.
            references: Column that holds references. Rows with one prompt become one row, whose
                `references` is the list of theirs in the order of the file.
            columns: Other columns to keep (default: all).
            template: How a prompt is written from the columns, for example `"{mr}\n"`; default is
                the prompt column.
            split: Split of a Hugging Face dataset that is loaded by name.

        Raises:
            FileNotFoundError: A path with a known ending does not exist.
            ValueError: The file is empty or broken, or a column is not there.
            TypeError: A row is not a mapping, or a column's value has a type that it may not have.
            ImportError: Parquet or dataset support is not installed.
        """
        as_it_is = (prompt, references, columns, template) == ("prompt", None, None, None)
        if isinstance(source, Prompts) and as_it_is:
            return source
        rows, name = read_rows(source, split)
        if not rows:
            raise ValueError(f"{name}: no prompts; the source has no rows")
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise TypeError(f"{name}: row {i} must be a mapping, got {type(row).__name__}")
        if isinstance(columns, str):
            raise TypeError(f"columns must be a list of names, got the string {columns!r}")
        wanted = [prompt] if template is None else _fields(template)
        for column in (*wanted, references, *(columns or ())):
            if column is not None:
                require_column(column, rows[0], where=name)
        shape = _Shape(name, tuple(rows[0]), prompt, references, columns, template)
        made = [shape(row, i) for i, row in enumerate(rows)]
        return cls(made if references is None else _grouped(made, name), name=name)

    @classmethod
    def from_function(
        cls,
        function: Callable[..., Row],
        size: int,
        *,
        seed: int = 0,
        name: str | None = None,
        **knobs: Any,
    ) -> Prompts:
        """Fill a table with `function(rng, **knobs)`; each row has a generator of its own.

        Row `i` depends on (seed, i) alone.

        Raises:
            ValueError: `size` is not positive, or a row is bad.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        rows = (function(generator(seed, i), **knobs) for i in range(size))
        return cls(rows, name=name or str(getattr(function, "__name__", "function")))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Prompts: ...
    def __getitem__(self, index: int | slice) -> Row | Prompts:
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __repr__(self) -> str:
        return f"Prompts({self.name!r}, {len(self)} rows, columns={list(self.columns)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Prompts:
        """Return itself: tables are shared, and Gymnasium deep-copies a spec's arguments."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "encoded": {}}

    def take(self, indices: Iterable[int]) -> Prompts:
        """Table of some rows, in the order of `indices`, of the same family of splits."""
        part = Prompts([self._rows[i] for i in indices], name=self.name)
        part.family = self.family
        return part

    def split(self, holdout: float | int, *, seed: int = 0) -> tuple[Prompts, Prompts]:
        """Split into training and held-out rows; rows with one prompt stay together.

        A part may be split again: all parts then stay one family.

        Args:
            holdout: Held-out share of the distinct prompts (below 1) or their number.
            seed: Key of the shuffle.

        Returns:
            `(train, heldout)`, which share their `family`.

        Raises:
            ValueError: One side would be empty.
        """
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(self._rows):
            groups.setdefault(_key(row["prompt"]), []).append(i)
        share = isinstance(holdout, float | np.floating)
        count = round(holdout * len(groups)) if share else int(holdout)
        if not 0 < count < len(groups):
            raise ValueError(
                f"{self.name}: holding out {holdout} of {len(groups)} distinct prompts leaves one "
                "side empty; more prompts or another share would not"
            )
        order = np.argsort(mix64(seed, np.arange(len(groups))), kind="stable")
        chosen = [list(groups.values())[g] for g in order]
        heldout = self.take(sorted(itertools.chain(*chosen[:count])))
        train = self.take(sorted(itertools.chain(*chosen[count:])))
        # In the order of the splits, training first; a table that is a part of one comes before.
        at = next((i for i, table in enumerate(self.family) if table is self), 0)
        siblings = [table for table in self.family if table is not self]
        family = (*siblings[:at], train, heldout, *siblings[at:])
        train.family = heldout.family = family
        return train, heldout


def link(*splits: Prompts) -> tuple[Prompts, ...]:
    """Make tables one family of splits: their environments get one observation space.

    Raises:
        ValueError: Two of them share a prompt.
    """
    seen: dict[str, Prompts] = {}
    for table in splits:
        keys = {_key(row["prompt"]) for row in table}
        for key in keys & seen.keys():
            raise ValueError(
                f"splits {seen[key].name!r} and {table.name!r} share the prompt {key[:80]}"
            )
        seen.update(dict.fromkeys(keys, table))
    for table in splits:
        table.family = tuple(splits)
    return tuple(splits)


def require_column(column: str, columns: Iterable[str], *, where: str) -> None:
    """Raise a ValueError that lists the columns and the nearest, unless `column` is one of them."""
    names = [str(c) for c in columns]
    if column not in names:
        near = difflib.get_close_matches(column, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}: no column {column!r}; the columns are {names}{hint}")


def _checked(row: Any, index: int, name: str) -> Row:
    if not isinstance(row, Mapping):
        raise TypeError(
            f"{name}: row {index} must be a mapping, got {type(row).__name__}; write "
            '{"prompt": ...}'
        )
    if "prompt" not in row:
        near = difflib.get_close_matches("prompt", [str(c) for c in row], n=1)
        hint = f"; rename {near[0]!r}, or pass" if near else "; pass"
        raise ValueError(
            f"{name}: row {index} has no column 'prompt', only {list(row)}{hint} prompt=<column> "
            "to Prompts.load"
        )
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return row
    if isinstance(prompt, Sequence) and all(_is_message(m) for m in prompt) and len(prompt):
        return row
    if isinstance(prompt, Sequence | np.ndarray) and all(_is_id(i) for i in prompt):
        return {**row, "prompt": [int(i) for i in prompt]}
    raise TypeError(
        f"{name}: row {index}, column 'prompt': expected a string, token ids or chat messages with "
        f"'role' and 'content', got {prompt!r:.80}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _is_id(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True, default=str, ensure_ascii=False)


def _fields(template: str) -> list[str]:
    """Columns that a template names."""
    names = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    return [re.split(r"[.\[]", name)[0] for name in names]


class _Shape:
    """Makes a row of a table from a row of a source."""

    def __init__(
        self,
        name: str,
        known: tuple[str, ...],
        prompt: str,
        references: str | None,
        columns: Collection[str] | None,
        template: str | None,
    ) -> None:
        self.name = name
        self.known = set(known)
        self.prompt = prompt
        self.references = references
        self.template = template
        self.strict = columns is None  # with columns=[...], what else a row holds does not matter
        self.fields = [prompt] if template is None else _fields(template)
        taken = {prompt, references, "prompt", None if references is None else "references"}
        self.keep = [c for c in known if c not in taken and (columns is None or c in columns)]

    def __call__(self, row: Row, index: int) -> dict[str, Any]:
        where = f"{self.name}: row {index}"
        extra = [c for c in row if c not in self.known]
        if extra and self.strict:
            raise ValueError(
                f"{where} has an extra column {extra[0]!r}; row 0 has {sorted(self.known)}; name "
                "those to keep with columns=[...]"
            )
        for column in (*self.fields, *self.keep, self.references):
            if column is not None and column not in row:
                raise ValueError(f"{where} has no column {column!r}; it has {list(row)}")
            if column is not None and row[column] is None:
                raise ValueError(
                    f"{where}, column {column!r} is empty; fill it, or name the columns to keep "
                    "with columns=[...]"
                )
        text = row[self.prompt] if self.template is None else self.template.format_map(row)
        made = {"prompt": text, **{c: row[c] for c in self.keep}}
        if self.references is not None:
            made["references"] = row[self.references]
        return made


def _grouped(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for i, row in enumerate(rows):
        value = row["references"]
        if not isinstance(value, str | list | tuple | np.ndarray):
            raise TypeError(
                f"{name}: row {i}, references: expected a string or a list of strings, got "
                f"{type(value).__name__}"
            )
        several = [value] if isinstance(value, str) else list(value)
        group = groups.setdefault(_key(row["prompt"]), {**row, "references": []})
        group["references"] += several
        for column in row:
            if column not in ("prompt", "references") and row[column] != group[column]:
                raise ValueError(
                    f"{name}: row {i}, column {column!r} differs between rows of one prompt "
                    f"({row[column]!r:.40} and {group[column]!r:.40}); leave it out with "
                    "columns=[...]"
                )
    return list(groups.values())
