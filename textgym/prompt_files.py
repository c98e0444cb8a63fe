"""Readers of prompt tables: files, Hugging Face datasets, and rows that are at hand.

A reader gives rows as they are in the source; `Prompts.load` shapes them. What is broken is named
by file and line.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def read_rows(source: Any, split: str) -> tuple[list[Any], str]:
    """Read the rows of a source, and what error messages call it.

    Args:
        source: A path with one of the endings of `ENDINGS`, the name of a Hugging Face dataset, a
            dataset object, or any iterable of rows.
        split: Split of a dataset that is loaded by name.

    Raises:
        FileNotFoundError: A path with a known ending does not exist.
        ValueError: The file is broken, or its ending is unknown.
        TypeError: The source is none of these.
        ImportError: Parquet or dataset support is not installed.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        reader = _READERS.get(path.suffix.lower())
        if reader is not None:
            return _read_file(path, reader), path.name
        if isinstance(source, Path) or path.is_file():
            raise ValueError(
                f"{path}: cannot read prompts from this; the endings are {list(ENDINGS)}"
            )
        return list(_datasets().load_dataset(source, split=split)), source
    if isinstance(source, Mapping):
        raise TypeError(
            f"prompts came as a mapping with the keys {list(source)}; expected a list of rows (of "
            "a dataset of several splits, pass one)"
        )
    if isinstance(source, Iterable):
        return list(source), str(getattr(source, "name", None) or "prompts")
    raise TypeError(
        "prompts must be a list of dicts, a path, a Hugging Face dataset or its name, got "
        f"{type(source).__name__}"
    )


def _read_file(path: Path, reader: Callable[[Path], list[Any]]) -> list[Any]:
    if not path.exists():
        raise FileNotFoundError(f"no prompts file {str(path)!r}")
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: not UTF-8 text ({error}); convert it to UTF-8") from None


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    # Not splitlines(): a JSON string may hold U+2028 and other line ends that are not "\n".
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.name}: line {number} is not JSON: {error}") from None
    return rows


def _read_json(path: Path) -> list[Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: not JSON: {error}") from None
    if not isinstance(value, list):
        raise ValueError(
            f"{path.name}: expected a JSON list of objects, got {type(value).__name__}"
        )
    return value


def _read_csv(path: Path, delimiter: str = ",") -> list[Any]:
    limit = csv.field_size_limit(sys.maxsize)  # a document may be longer than the 128 KiB default
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # strict: a quote that is never closed would otherwise swallow the rest of the file.
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            try:
                return _csv_rows(reader, path.name)
            except csv.Error as error:
                raise ValueError(
                    f"{path.name}: the row that begins in line {reader.line_num + 1}: {error}"
                ) from None
    finally:
        csv.field_size_limit(limit)


def _csv_rows(reader: csv.DictReader[str], name: str) -> list[Any]:
    header = list(reader.fieldnames or ())
    twice = {column for column in header if header.count(column) > 1}
    if twice:
        raise ValueError(f"{name}: the header names {sorted(twice)} more than once")
    rows: list[Any] = []
    for row in reader:
        if None in row:
            raise ValueError(f"{name}: line {reader.line_num} has more fields than the header")
        rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ImportError("reading Parquet needs pyarrow: pip install 'textgym[data]'") from None
    try:
        rows: list[Any] = parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(f"{path.name}: not Parquet: {error}") from None
    return rows


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            "loading a dataset by name needs datasets: pip install 'textgym[data]'"
        ) from None
    return datasets


_READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, "\t"),
    ".parquet": _read_parquet,
}
ENDINGS: tuple[str, ...] = tuple(_READERS)
