"""Prompt tables: rows with a prompt and named columns that rewards read.

A table is made from a list of dicts, a JSONL, CSV or Parquet file, a Hugging Face dataset, or a function that writes row
after row from a generator of its own. Splits of one table know each other, so that every environment over them has one
observation space, and never share a prompt.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from textgym.streams import generator, mix64

Row = Mapping[str, Any]


class Prompts(Sequence[Row]):
    """An indexable table of rows `{"prompt": str | list[int] | chat messages, ...columns}`.

    Args:
        rows: The rows; all have the same columns.
        name: What error messages call the table.

    Raises:
        ValueError: There is no row, or a row has no prompt, an empty column name or other columns than the first.
        TypeError: A row is not a mapping, or its prompt is of no known kind.
    """

    def __init__(self, rows: Iterable[Row], *, name: str = "prompts") -> None:
        self.name = name
        self._rows: Sequence[Row] = [dict(_checked(row, i, name)) for i, row in _numbered(rows)]
        if not self._rows:
            raise ValueError(f"{name}: no prompts; a table needs at least one row with a 'prompt'")
        self.columns = tuple(self._rows[0])
        for i, row in enumerate(self._rows):
            if set(row) != set(self.columns):
                odd = sorted(set(row) ^ set(self.columns))[0]
                has = "has no" if odd in self.columns else "has an extra"
                raise ValueError(f"{name}: row {i} {has} column {odd!r}; expected {self.columns}")
        self.family: tuple[Prompts, ...] = (self,)

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
        """Read a table from wherever it is.

        Args:
            source: A `Prompts`, a list of dicts, the path of a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, a
                Hugging Face dataset object, or the name of one.
            prompt: Column that holds the prompt.
            references: Column that holds references. Rows with one prompt become one row, whose `references` is the
                list of theirs in the order of the file.
            columns: Other columns to keep (default: all).
            template: How a prompt is written from the columns, for example `"{mr}\\n"`; default is the prompt column.
            split: Split of a Hugging Face dataset that is loaded by name.

        Raises:
            FileNotFoundError: A path with a known ending does not exist.
            ValueError: The file is empty or broken, or a column is not there.
            ImportError: Parquet or dataset support is not installed.
        """
        if isinstance(source, Prompts):
            return source
        rows, name = _read(source, split)
        rows = list(rows)
        if not rows:
            raise ValueError(f"{name}: no prompts; the source has no rows")
        if not isinstance(rows[0], Mapping):
            raise TypeError(f"{name}: row 0 must be a mapping, got {type(rows[0]).__name__}")
        for column in (prompt, references, *(columns or ())):
            if column is not None:
                require_column(column, rows[0], where=name)
        keep = [c for c in rows[0] if c not in (prompt, references)]
        keep = [c for c in keep if columns is None or c in columns]
        made = [_shape(row, i, name, prompt, references, keep, template) for i, row in enumerate(rows)]
        return cls(made if references is None else _grouped(made, name), name=name)

    @classmethod
    def from_function(
        cls, function: Callable[..., Row], size: int, *, seed: int = 0, name: str | None = None, **knobs: Any
    ) -> Prompts:
        """Fill a table from `function(rng, **knobs) -> row`, each row from a generator keyed by (seed, index).

        Raises:
            ValueError: `size` is not positive, or a row is bad.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        rows = (function(generator(seed, i), **knobs) for i in range(size))
        return cls(rows, name=name or getattr(function, "__name__", "function"))

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
        """Return itself: tables are read-only and shared (Gymnasium deep-copies the arguments of a spec)."""
        return self

    def take(self, indices: Iterable[int]) -> Prompts:
        """Table of some rows, in the order of `indices`, of the same family of splits."""
        part = Prompts([self._rows[i] for i in indices], name=self.name)
        part.family = self.family
        return part

    def split(self, holdout: float | int, *, seed: int = 0) -> tuple[Prompts, Prompts]:
        """Split into training and held-out rows; rows with one prompt stay together.

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
        count = round(holdout * len(groups)) if isinstance(holdout, float) else int(holdout)
        if not 0 < count < len(groups):
            raise ValueError(
                f"{self.name}: holding out {holdout} of {len(groups)} distinct prompts leaves one side empty"
            )
        order = np.argsort(mix64(seed, np.arange(len(groups))), kind="stable")
        chosen = [list(groups.values())[g] for g in order]
        heldout = sorted(itertools.chain(*chosen[:count]))
        train = sorted(itertools.chain(*chosen[count:]))
        return link(self.take(train), self.take(heldout))  # type: ignore[return-value]


def link(*splits: Prompts) -> tuple[Prompts, ...]:
    """Make tables one family of splits: their environments get one observation space.

    Raises:
        ValueError: Two of them share a prompt.
    """
    seen: dict[str, Prompts] = {}
    for table in splits:
        for key in {_key(row["prompt"]) for row in table}:
            if key in seen:
                raise ValueError(f"splits {seen[key].name!r} and {table.name!r} share the prompt {key[:80]!r}")
        seen.update({_key(row["prompt"]): table for row in table})
    for table in splits:
        table.family = tuple(splits)
    return tuple(splits)


def require_column(column: str, columns: Iterable[str], *, where: str) -> None:
    """Raise a ValueError that names the columns that exist and the nearest one, unless `column` is among them."""
    names = [str(c) for c in columns]
    if column not in names:
        near = difflib.get_close_matches(column, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}: no column {column!r}; the columns are {names}{hint}")


def _numbered(rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
    if isinstance(rows, str | Mapping):
        raise TypeError("rows must be a sequence of mappings; use Prompts.load(path) to read a file")
    return enumerate(rows)


def _checked(row: Any, index: int, name: str) -> Row:
    if not isinstance(row, Mapping):
        raise TypeError(f"{name}: row {index} must be a mapping, got {type(row).__name__}")
    if "prompt" not in row:
        near = difflib.get_close_matches("prompt", [str(c) for c in row], n=1)
        hint = f"; rename {near[0]!r}, or pass" if near else "; pass"
        raise ValueError(
            f"{name}: row {index} has no column 'prompt', only {list(row)}{hint} prompt=<column> to Prompts.load"
        )
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return row
    if isinstance(prompt, Sequence) and all(_is_message(m) for m in prompt) and len(prompt):
        return row
    if isinstance(prompt, Sequence | np.ndarray) and all(hasattr(i, "__index__") for i in prompt):
        return {**row, "prompt": [int(i) for i in prompt]}
    raise TypeError(
        f"{name}: row {index}, column 'prompt': expected a string, token ids or chat messages with 'role' and "
        f"'content', got {prompt!r:.80}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _key(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


def _shape(
    row: Row, index: int, name: str, prompt: str, references: str | None, keep: list[str], template: str | None
) -> dict[str, Any]:
    try:
        made = {"prompt": row[prompt] if template is None else template.format_map(row)}
        made |= {c: row[c] for c in keep if c != "prompt"}
        if references is not None:
            made["references"] = row[references]
    except KeyError as error:
        raise ValueError(f"{name}: row {index} has no column {error}; it has {list(row)}") from None
    for column, value in made.items():
        if value is None:
            raise ValueError(f"{name}: row {index}, column {column!r} is empty")
    return made


def _grouped(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for i, row in enumerate(rows):
        value = row["references"]
        several = [value] if isinstance(value, str) else list(value)
        group = groups.setdefault(_key(row["prompt"]), {**row, "references": []})
        group["references"] += several
        for column in row:
            if column not in ("prompt", "references") and row[column] != group[column]:
                raise ValueError(
                    f"{name}: row {i}, column {column!r} differs between rows of one prompt ({row[column]!r:.40} and "
                    f"{group[column]!r:.40}); leave it out with columns=[...]"
                )
    return list(groups.values())


def _read(source: Any, split: str) -> tuple[Iterable[Any], str]:
    if isinstance(source, str | Path):
        path = Path(source)
        reader = _READERS.get(path.suffix.lower())
        if reader is not None:
            if not path.exists():
                raise FileNotFoundError(f"no prompts file {str(path)!r}")
            return reader(path), path.name
        return _datasets().load_dataset(str(source), split=split), str(source)
    if hasattr(source, "column_names") or isinstance(source, Iterable):
        return source, "prompts"
    raise TypeError(
        "prompts must be a list of dicts, a path, a Hugging Face dataset or its name, got "
        f"{type(source).__name__}"
    )


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.name}: line {number} is not JSON: {error}") from None
    return rows


def _read_json(path: Path) -> list[Any]:
    value = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(value, list):
        raise ValueError(f"{path.name}: expected a JSON list of objects, got {type(value).__name__}")
    return value


def _read_csv(path: Path, delimiter: str = ",") -> list[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        rows: list[Any] = []
        for row in reader:
            if None in row:
                raise ValueError(f"{path.name}: line {reader.line_num} has more fields than the header")
            rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Any]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ImportError("reading Parquet needs pyarrow: pip install 'textgym[data]'") from None
    rows: list[Any] = parquet.read_table(path).to_pylist()
    return rows


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError("loading a dataset by name needs datasets: pip install 'textgym[data]'") from None
    return datasets


_READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, "\t"),
    ".parquet": _read_parquet,
}

