"""Rows of files, and what their columns hold."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from ..policies.files import check_no_pointer
from ..utils import read_text


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """
    Rows of a `.csv`, `.jsonl` or `.json` file. As Excel writes them in many countries, the columns of a `.csv` file may be
    separated by semicolons or tabs, and a byte order mark may come first.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it has another ending, a line that cannot be read, a row that is no object, a
            column name twice, or no rows.
    """
    path = Path(path)
    if path.is_file() and path.suffix not in (".csv", ".json", ".jsonl"):
        hint = " `--dataset_name` reads it, where there is this option." if path.suffix == ".parquet" else ""
        raise ValueError(f"{path}: a file of rows must end in .csv, .jsonl or .json.{hint}")
    text = read_text(path)
    check_no_pointer(path)
    try:
        rows = _parse_rows(path, text)
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV ({error}).") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must hold a list of rows, got {type(rows).__name__}.")
    if not rows:
        raise ValueError(f"{path} has no rows.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: must be an object with a value for each column, got {row!r:.80}.")
        if None in row:
            raise ValueError(f"{path}, row {number}: has more values than the file has columns.")
    return rows


def _parse_rows(path: Path, text: str) -> Any:
    if path.suffix == ".csv":
        header = text.partition("\n")[0]
        separator = max(",;\t", key=header.count)  # the comma, if there is none
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
        names = list(reader.fieldnames or ())
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{path}: the columns {repeated} are there more than once.")
        return list(reader)
    if path.suffix == ".json":
        return _parse_json(text, str(path))
    lines = text.removesuffix("\n").split("\n") if text else []
    return [_parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}).") from error


class NoColumn(ValueError):
    """A row has no value in any of the columns that a task reads."""


def column(row: dict[str, Any], names: tuple[str, ...], path: str, number: int) -> Any:
    """The first of some columns that has a value in a row."""
    for name in names:
        if row.get(name) not in (None, ""):
            return row[name]
    raise NoColumn(f"{path}, row {number}: none of the columns {list(names)} is there; it has {sorted(row)}.")


def whole(value: Any, where: str) -> int:
    """A whole number, which files also hold as text."""
    try:
        number = int(value)
        is_whole = not isinstance(value, bool) and (isinstance(value, str) or number == value)
    except (OverflowError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{where} must be a whole number, got {value!r}.")
    return number


def text_of(row: dict[str, Any], name: str, path: str, number: int) -> str:
    """What a column holds, which must be text."""
    value = column(row, (name,), path, number)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{path}, row {number}: the {name} must be text, got {value!r}.")
    return value
