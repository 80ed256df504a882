"""Rows of small files, JSON lines or CSV, each with where it stands."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from das_lm.errors import UserError
from das_lm.plain_words import describe_value


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Read a `.csv` file with a header, or JSON lines (any other name): one object per line.

    Returns:
        of each row `FILE:LINE` and its cells.

    Raises:
        UserError: the file cannot be read, or a line is broken; with the line.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no file; write its content to one")
    read = _csv_rows if path.suffix == ".csv" else _json_rows
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from read(path, file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: broken JSON ({error}); write one complete object per line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: {describe_value(row)}; write one JSON object per line")
        yield f"{path}:{number}", row


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the 128 KiB that the module allows by default
    reader = csv.DictReader(lines, strict=True)
    try:
        for row in reader:
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.reader.line_num}: broken CSV ({error})") from None
