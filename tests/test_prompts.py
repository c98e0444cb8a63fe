"""Prompt tables: where they come from, what is refused and how it is named, and splits."""

from __future__ import annotations

import copy
import csv
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textgym.prompts import Prompts, link, require_column

ROWS = [
    {"prompt": "a", "references": "one", "level": 1},
    {"prompt": "b", "references": "two", "level": 2},
    {"prompt": "a", "references": "three", "level": 1},
]
GROUPED = [
    {"prompt": "a", "references": ["one", "three"], "level": 1},
    {"prompt": "b", "references": ["two"], "level": 2},
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


def write_delimited(path: Path, rows: list[dict[str, Any]], delimiter: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_list(folder: Path, rows: list[dict[str, Any]]) -> Any:
    return rows


def as_jsonl(folder: Path, rows: list[dict[str, Any]]) -> Any:
    return write_jsonl(folder / "rows.jsonl", rows)


def as_json(folder: Path, rows: list[dict[str, Any]]) -> Any:
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")
    return str(folder / "rows.json")


def as_csv(folder: Path, rows: list[dict[str, Any]]) -> Any:
    return write_delimited(folder / "rows.csv", rows, ",")


def as_tsv(folder: Path, rows: list[dict[str, Any]]) -> Any:
    return write_delimited(folder / "rows.TSV", rows, "\t")


def as_parquet(folder: Path, rows: list[dict[str, Any]]) -> Any:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def as_dataset(folder: Path, rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(rows)


SOURCES = [as_list, as_jsonl, as_json, as_csv, as_tsv, as_parquet, as_dataset]


# --- sources


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_table(source: Callable[..., Any], tmp_path: Path) -> None:
    table = Prompts.load(source(tmp_path, ROWS))
    assert table.columns == ("prompt", "references", "level")
    text = source in (as_csv, as_tsv)  # delimited files hold text only
    assert list(table) == [{**r, "level": str(r["level"])} if text else r for r in ROWS]


@pytest.mark.parametrize("source", SOURCES)
def test_references_of_one_prompt_are_grouped(source: Callable[..., Any], tmp_path: Path) -> None:
    table = Prompts.load(source(tmp_path, ROWS), references="references", columns=[])
    assert list(table) == [{"prompt": r["prompt"], "references": r["references"]} for r in GROUPED]


@pytest.mark.parametrize("source", [as_list, as_jsonl, as_json, as_parquet, as_dataset])
def test_lists_of_references_ids_and_messages(source: Callable[..., Any], tmp_path: Path) -> None:
    references = [{"prompt": "a", "references": ["x", "y"]}, {"prompt": "b", "references": ["z"]}]
    assert list(Prompts.load(source(tmp_path, references), references="references")) == references
    ids = [{"prompt": [1, 2]}, {"prompt": [3]}]
    assert list(Prompts.load(source(tmp_path, ids))) == ids
    chat = [{"prompt": [{"role": "user", "content": "hi"}]}]
    assert list(Prompts.load(source(tmp_path, chat))) == chat


def test_columns_are_renamed_kept_and_put_into_templates() -> None:
    rows = [{"mr": "x", "ref": "y", "id": 7, "prompt": "not this"}]
    loaded = Prompts.load(rows, prompt="mr", references="ref")
    assert list(loaded) == [{"prompt": "x", "references": ["y"], "id": 7}]
    only = Prompts.load(rows, prompt="mr", columns=["ref"])
    assert list(only) == [{"prompt": "x", "ref": "y"}]
    made = Prompts.load(rows, template="{mr} -> {id:03d}\n", columns=["ref"])
    assert list(made) == [{"prompt": "x -> 007\n", "ref": "y"}]


def test_e2e_devset_groups_its_references(shared: Path) -> None:
    table = Prompts.load(shared / "data/e2e_nlg/devset.csv", prompt="mr", references="ref")
    assert len(table) == 547
    assert sum(len(row["references"]) for row in table) == 4672
    assert table.columns == ("prompt", "references")
    assert table[0]["prompt"] == "name[Alimentum], area[city centre], familyFriendly[no]"


def test_a_dataset_is_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    loaded = Prompts.load("someone/rows", split="test")
    assert (asked, loaded.name, list(loaded)) == ([("someone/rows", "test")], "someone/rows", ROWS)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = as_parquet(tmp_path, ROWS)
    for module in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'textgym\[data\]'"):
        Prompts.load(source)
    with pytest.raises(ImportError, match=r"needs datasets: pip install 'textgym\[data\]'"):
        Prompts.load("someone/rows")


def test_a_table_is_returned_as_it_is_unless_something_is_asked() -> None:
    table = Prompts(ROWS)
    assert Prompts.load(table) is table
    assert list(Prompts.load(table, references="references")) == GROUPED


def test_from_function_writes_row_after_row() -> None:
    def row(rng: np.random.Generator, digits: int = 1) -> dict[str, Any]:
        return {"prompt": str(rng.integers(10**digits))}

    table = Prompts.from_function(row, 20, seed=3, digits=6)
    assert (len(table), table.name) == (20, "row")
    assert len({r["prompt"] for r in table}) > 15
    # A row depends on (seed, index) only: a longer table begins with a shorter one.
    assert list(Prompts.from_function(row, 5, seed=3, digits=6)) == list(table)[:5]
    assert list(Prompts.from_function(row, 5, seed=4, digits=6)) != list(table)[:5]
    with pytest.raises(ValueError, match="size must be at least 1"):
        Prompts.from_function(row, 0)


@pytest.mark.parametrize("size", [1, 1000])
def test_sizes(size: int, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}"} for i in range(size)]
    assert list(Prompts.load(write_jsonl(tmp_path / "rows.jsonl", rows))) == rows


# --- text


HARD = 'é ☃ 𝄞 \u2028 \u2029 \x85 \x0b "quoted", comma\ttab'


@pytest.mark.parametrize("source", SOURCES)
def test_unicode_survives(source: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"prompt": HARD, "answer": HARD + "\nsecond line"}, {"prompt": "b", "answer": ""}]
    assert list(Prompts.load(source(tmp_path, rows))) == rows


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_any_text_survives_jsonl(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    rows = [{"prompt": text} for text in texts]
    path = tmp_path_factory.mktemp("jsonl") / "rows.jsonl"
    assert list(Prompts.load(write_jsonl(path, rows))) == rows


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(ending: str, tmp_path: Path) -> None:
    text = {".jsonl": '{"prompt": "a"}\n', ".json": '[{"prompt": "a"}]'}.get(ending, "prompt\na\n")
    path = tmp_path / f"rows{ending}"
    path.write_text(text, "utf-8-sig")
    assert list(Prompts.load(path)) == [{"prompt": "a"}]


def test_windows_line_ends_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')
    assert [row["prompt"] for row in Prompts.load(path)] == ["a", "b"]


def test_a_long_field_of_a_csv(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 200_000}]
    before = csv.field_size_limit()
    assert list(Prompts.load(as_csv(tmp_path, rows))) == rows
    assert csv.field_size_limit() == before


# --- what is refused, and how it is named


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", "", "no prompts"),
        ("rows.json", "[]", "no prompts"),
        ("rows.csv", "", "no prompts"),
        ("rows.csv", "prompt,answer\n", "no prompts"),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": \n', "rows.jsonl: line 2 is not JSON"),
        ("rows.json", "[{", "rows.json: not JSON"),
        ("rows.json", '{"prompt": "a"}', "expected a JSON list of objects, got dict"),
        ("rows.csv", "prompt,answer\na,b\nc,d,e\n", "line 3 has more fields than the header"),
        ("rows.csv", "prompt,answer\na,b\nc\n", "row 1, column 'answer' is empty"),
        ("rows.csv", "prompt,prompt\na,b\n", "names \\['prompt'\\] more than once"),
        ("rows.csv", 'prompt\n"a\nb\n', "the row that begins in line 2: unexp"),
        ("rows.parquet", "no parquet", "rows.parquet: not Parquet"),
        ("rows.txt", "a", "cannot read prompts from this; the endings are"),
        ("rows.jsonl", "[1]\n", "row 0 must be a mapping, got list"),
        ("rows.jsonl", '{"prompt": "a"}\n3\n', "row 1 must be a mapping, got int"),
        ("rows.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "row 1 has an extra column 'text'"),
        ("rows.jsonl", '{"prompt": "a", "b": 1}\n{"prompt": "b"}\n', "row 1 has no column 'b'"),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', "row 1, column 'prompt' is empty"),
        (
            "rows.jsonl",
            '{"prompt": "a"}\n{"prompt": 3}\n',
            "row 1, column 'prompt': expected a str",
        ),
        ("rows.jsonl", '{"promt": "a"}\n', "no column 'prompt'.*did you mean 'promt'"),
    ],
)
def test_broken_files(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text, "utf-8")
    with pytest.raises((ValueError, TypeError), match=message):
        Prompts.load(path)


def test_missing_files_wrong_encodings_and_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no prompts file"):
        Prompts.load(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="endings are"):
        Prompts.load(tmp_path / "absent.txt")
    (tmp_path / "latin.csv").write_bytes("prompt\nné\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.csv: not UTF-8"):
        Prompts.load(tmp_path / "latin.csv")
    with pytest.raises(TypeError, match="got int"):
        Prompts.load(3)
    with pytest.raises(TypeError, match=r"mapping with the keys \['train'\].*pass one"):
        Prompts.load({"train": ROWS})


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "no prompts"),
        ([{}], ValueError, "row 0 has no column 'prompt'"),
        ([{"promt": "a"}], ValueError, "rename 'promt', or pass prompt=<column>"),
        ([{"prompt": "a"}, {"prompt": "a", "x": 1}], ValueError, "row 1 has an extra column 'x'"),
        ([{"prompt": "a", "x": 1}, {"prompt": "a"}], ValueError, "row 1 has no column 'x'"),
        ([{"prompt": "a"}, "b"], TypeError, "row 1 must be a mapping, got str"),
        ([{"prompt": "a"}, {"prompt": 1.5}], TypeError, "row 1, column 'prompt'.*got 1.5"),
        ([{"prompt": [1, 2.5]}], TypeError, "row 0, column 'prompt'"),
        ([{"prompt": [True]}], TypeError, "row 0, column 'prompt'"),
        ([{"prompt": [{"role": "user"}]}], TypeError, "'role' and 'content'"),
        ("rows.jsonl", TypeError, "use Prompts.load"),
        ({"prompt": "a"}, TypeError, "got dict"),
    ],
)
def test_bad_rows(rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Prompts(rows)


def test_misspelt_columns_are_suggested() -> None:
    rows = [{"prompt": "a", "references": "b"}]
    message = (
        r"no column 'referense'; the columns are \['prompt', 'references'\]; did you mean 'refe"
    )
    with pytest.raises(ValueError, match=message):
        Prompts.load(rows, references="referense")
    with pytest.raises(ValueError, match="did you mean 'references'"):
        Prompts.load(rows, columns=["reference"])
    with pytest.raises(ValueError, match="did you mean 'prompt'"):
        Prompts.load(rows, template="{prompts}!")
    with pytest.raises(TypeError, match="list of names, got the string 'references'"):
        Prompts.load(rows, columns="references")
    with pytest.raises(ValueError, match=r"here: no column 'zzz'; the columns are \['a'\]$"):
        require_column("zzz", ["a"], where="here")


def test_bad_references() -> None:
    with pytest.raises(TypeError, match="row 1, references: expected a string or a list"):
        Prompts.load([{"prompt": "a", "r": "x"}, {"prompt": "b", "r": 5}], references="r")
    rows = [{"prompt": "a", "r": "x", "n": 1}, {"prompt": "a", "r": "y", "n": 2}]
    with pytest.raises(ValueError, match=r"row 1, column 'n' differs between rows of one prompt"):
        Prompts.load(rows, references="r")
    assert len(Prompts.load(rows, references="r", columns=[])) == 1


# --- splits


def table(size: int) -> Prompts:
    return Prompts([{"prompt": f"p{i % (size * 3 // 4)}", "i": i} for i in range(size)])


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 80), st.floats(0.2, 0.8), st.integers(0, 1000))
def test_splits_are_a_partition_that_shares_no_prompt(size: int, share: float, seed: int) -> None:
    whole = table(size)
    train, heldout = whole.split(share, seed=seed)
    assert sorted(r["i"] for part in (train, heldout) for r in part) == list(range(size))
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in heldout}
    distinct = size * 3 // 4
    assert len({r["prompt"] for r in heldout}) == round(share * distinct)
    again = whole.split(share, seed=seed)[1]
    assert [r["i"] for r in again] == [r["i"] for r in heldout]


def test_splits_differ_by_seed_and_take_a_number() -> None:
    whole = table(40)
    assert len({r["prompt"] for r in whole.split(7)[1]}) == 7
    assert {r["i"] for r in whole.split(7, seed=0)[1]} != {
        r["i"] for r in whole.split(7, seed=1)[1]
    }


@pytest.mark.parametrize("holdout", [0, 0.0, 1.0, 30, -1, 0.001])
def test_a_split_with_an_empty_side_is_an_error(holdout: float) -> None:
    with pytest.raises(ValueError, match="leaves one side empty"):
        table(40).split(holdout)


def test_a_split_of_a_split_stays_in_one_family() -> None:
    rest, test = table(40).split(0.25)
    train, validation = rest.split(0.25)
    assert train.family == validation.family == (train, validation, test)
    assert train[:3].family == train.family
    seen = [{r["i"] for r in part} for part in train.family]
    assert sum(map(len, seen)) == 40 == len(set.union(*seen))


def test_linked_tables_share_no_prompt() -> None:
    a, b = Prompts([{"prompt": "x"}], name="left"), Prompts([{"prompt": "x"}], name="right")
    with pytest.raises(ValueError, match="splits 'left' and 'right' share the prompt \"x\""):
        link(a, b)
    c = Prompts([{"prompt": "y"}])
    link(a, c)
    assert a.family == c.family == (a, c)
    # Ids and the text that looks like them are different prompts.
    link(Prompts([{"prompt": [1, 2]}]), Prompts([{"prompt": "[1, 2]"}]))


# --- tables as arguments of a spec


def test_indexing() -> None:
    whole = Prompts(ROWS)
    assert whole[1] == ROWS[1] == whole[-2]
    assert [r["level"] for r in whole[::-1]] == [1, 2, 1]
    assert list(whole.take([2, 0])) == [ROWS[2], ROWS[0]]
    with pytest.raises(IndexError):
        whole[3]
    assert repr(whole) == "Prompts('prompts', 3 rows, columns=['prompt', 'references', 'level'])"


def test_a_table_does_not_change_with_the_rows_it_was_made_from() -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a"}]
    made = Prompts(rows)
    rows[0]["prompt"] = "b"
    rows.append({"prompt": "c"})
    assert list(made) == [{"prompt": "a"}]


def test_deep_copy_is_identity_and_pickling_keeps_the_family() -> None:
    train, heldout = Prompts(ROWS).split(1)
    train.encoded["tokenizer"] = [[1]]
    assert copy.deepcopy({"prompts": train})["prompts"] is train
    other = pickle.loads(pickle.dumps(train))
    assert list(other) == list(train)
    assert other.family[0] is other
    assert list(other.family[1]) == list(heldout)
    assert other.encoded == {}, "ids are encoded anew in another process"
