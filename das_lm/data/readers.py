"""Reads documents from files: text, JSON lines, CSV, Parquet. Each error names the file, the line and the column."""

from __future__ import annotations

import codecs
import csv
import functools
import glob
import gzip
import hashlib
import itertools
import json
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from das_lm.data.chats import chat_of
from das_lm.errors import UserError, as_user_error, did_you_mean
from das_lm.plain_words import describe_value

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset


def to_row(text: str | None) -> dict[str, Any]:
    """A document as a row: `id`, `text`, and `characters` without the white space around it (-1: there is no text).

    Halves of surrogate pairs, which JSON can spell and UTF-8 cannot, become question marks.
    """
    if text is None:
        return {"id": "", "text": "", "characters": -1}
    encoded = text.encode("utf-8", "replace")
    return {
        "id": hashlib.blake2b(encoded, digest_size=8).hexdigest(),
        "text": encoded.decode("utf-8"),
        "characters": len(text.strip()),
    }


def row_features() -> Features:
    """The columns of [`to_row`]."""
    from datasets import Features, Value

    return Features({"id": Value("string"), "text": Value("string"), "characters": Value("int64")})


def rows_of_column(batch: dict[str, list], column: str, where: str) -> dict[str, list]:
    """[`to_row`] for a batch of `datasets.map`."""
    rows = [to_row(text_of(cell, where, column)) for cell in batch[column]]
    return {key: [row[key] for row in rows] for key in ("id", "text", "characters")}


def text_of(value: Any, where: str, column: str, option: str = "column") -> str | None:
    """A cell as text or nothing; a conversation as in `chats`. Raises `UserError` for anything else."""
    if value is None or isinstance(value, str):
        return value
    if (chat := chat_of(value)) is not None:
        return chat
    raise UserError(not_text(where, column, describe_value(value), option))


def not_text(where: str, column: str, what: Any, option: str = "column") -> str:
    """The message for a column that holds something else; `option` is what names the column."""
    return f"{where}: column '{column}' holds {what}, not text; name another as `{option}`"


def missing_column(where: str, column: str, columns: list[str], option: str = "column") -> str:
    """The message for a column that is not there, with those that are."""
    near = did_you_mean(column, columns) if len(columns) > 1 else ""
    near = near if near.startswith(" Did") else ""
    there_are = ", ".join(map(str, columns))
    there_are = there_are if len(there_are) <= 1_000 else f"{there_are[:1_000]} …"
    return f"{where}: no column '{column}'; there is {there_are}.{near} Set `{option}`"


def _check_columns(where: str, column: str, columns: list[str]) -> None:
    if column not in columns:
        raise UserError(missing_column(where, column, columns))
    if columns.count(column) > 1:
        raise UserError(f"{where}: {columns.count(column)} columns are called '{column}'; rename all but one")


# Files


def read_files(patterns: list[str], column: str, limit: int | None, name: str) -> Dataset:
    """Rows of all files, kept in the cache of `datasets` by all that they depend on."""
    import datasets

    files = tuple((path, _content_hash(path)) for path in _files(patterns, name))
    try:
        return datasets.Dataset.from_generator(
            _rows_of_files,
            features=row_features(),
            gen_kwargs={
                "files": files,
                "column": column,
                "limit": limit,
                "code": Path(__file__).read_bytes(),
            },
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _content_hash(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def stream_files(patterns: list[str], column: str, name: str) -> IterableDataset:
    """The documents of all files in their column, file after file, read when they are asked for."""
    import datasets

    # Each file of the list is a shard, which a resumed run begins with where it stopped in it.
    return datasets.IterableDataset.from_generator(
        _texts_of_files, gen_kwargs={"files": _files(patterns, name), "column": column}
    )


def _texts_of_files(files: list[str], column: str) -> Iterator[dict[str, Any]]:
    for path in files:
        for text in _documents(path, column):
            yield {column: text}


def _files(patterns: list[str], name: str) -> list[str]:
    """The files of all patterns, each once, by however many links it is reached."""
    files: dict[str, str] = {}
    for path in itertools.chain.from_iterable(_matches(pattern, name) for pattern in patterns):
        files.setdefault(os.path.realpath(path), path)
    return list(files.values())


def _matches(pattern: str, name: str) -> list[str]:
    """The files of a path or glob, sorted."""
    pattern = os.path.expanduser(pattern)
    paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        folder = Path(pattern).parent
        beside = [str(path) for path in folder.iterdir()] if folder.is_dir() else []
        near = did_you_mean(pattern, beside)
        raise UserError(
            f"domain '{name}': no file matches '{pattern}'.{near if near.startswith(' Did') else ''}"
            f" Paths are relative to {os.getcwd()}"
        )
    for path in paths:
        if os.path.isdir(path):
            raise UserError(
                f"domain '{name}': '{path}' is a directory; name its files, for example '{Path(path) / '*.txt'}'"
            )
        if not os.path.isfile(path):
            what = "a pipe or a device" if os.path.exists(path) else "a link that leads to no file"
            raise UserError(f"domain '{name}': '{path}' is {what}; give a file, or a pattern that leaves it out")
        if _suffix(path) not in READERS or path.endswith(".parquet.gz"):
            known = ", ".join(READERS)
            raise UserError(
                f"domain '{name}': '{path}': unsupported kind of file '{''.join(Path(path).suffixes[-2:])}'; write "
                f"{known}, or one of them except .parquet with .gz"
            )
    return paths


def _suffix(path: str) -> str:
    return Path(path.removesuffix(".gz")).suffix


def _rows_of_files(
    files: tuple[tuple[str, str], ...], column: str, limit: int | None, code: bytes
) -> Iterator[dict[str, Any]]:
    """All that the rows depend on are arguments, for they make the key of the cache: `code` is this module's."""

    texts = itertools.chain.from_iterable(_documents(path, column) for path, *_ in files)
    yield from map(to_row, itertools.islice(texts, limit))


def _documents(path: str, column: str) -> Iterator[str | None]:
    is_empty = True
    for text in READERS[_suffix(path)](path, column):
        is_empty = False
        yield text
    if is_empty:
        raise UserError(f"{path}: the file is empty; remove it from the list or fill it")


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """(Number, text) of each line of a UTF-8 file, gzip or not; line ends are kept, a byte order mark is not."""
    offset = 0
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and line.startswith(codecs.BOM_UTF8):
                    line = line.removeprefix(codecs.BOM_UTF8)
                    offset = len(codecs.BOM_UTF8)
                if b"\0" in line:
                    raise UserError(
                        f"{path}: a binary file, not text (NUL at byte {offset + line.index(0):,}); convert it to "
                        "UTF-8 text"
                    )
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}:{number}: not UTF-8 text (byte {offset + error.start:,} is "
                        f"0x{line[error.start]:02x}); convert the file to UTF-8, for example with iconv"
                    ) from None
                yield number, text
                offset += len(line)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _read_text(path: str, column: str) -> Iterator[str]:
    """Documents separated by blank lines; a file without a blank line between two others has one per line."""
    status = os.stat(path)
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    separated = _has_blank_lines(path, identity)
    document: list[str] = []
    for _, line in _lines(path):
        line = line.rstrip("\r\n")
        if line.strip():
            document.append(line)
        if document and (not separated or not line.strip()):
            yield "\n".join(document)
            document = []
    if document:
        yield "\n".join(document)


@functools.lru_cache
def _has_blank_lines(path: str, identity: tuple[int, ...]) -> bool:
    """Whether a blank line stands between two others; kept, for a stream opens its files again and again."""
    text = blank = False
    for _, line in _lines(path):
        if not line.strip():
            blank = text
        elif blank:
            return True
        else:
            text = True
    return False


def _read_json_lines(path: str, column: str) -> Iterator[str | None]:
    columns = None
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: broken JSON ({error}); write one complete object per line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: {describe_value(row)}; write one JSON object per line")
        if columns is None:
            columns = list(row)
            if column not in row:
                raise UserError(missing_column(where, column, columns))
        yield text_of(row.get(column), where, column)


def _read_csv(path: str, column: str) -> Iterator[str | None]:
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the 128 KiB that the module allows by default
    reader = csv.DictReader((line for _, line in _lines(path)), strict=True)
    try:
        if reader.fieldnames is not None:
            _check_columns(f"{path}:1", column, list(reader.fieldnames))
        for row in reader:
            yield row[column]
    except csv.Error as error:
        raise UserError(f"{path}:{reader.reader.line_num}: broken CSV ({error})") from None


def _read_parquet(path: str, column: str) -> Iterator[str | None]:
    from pyarrow import types
    from pyarrow.parquet import ParquetFile

    with as_user_error(f"{path}: not a readable Parquet file"), ParquetFile(path) as file:
        names, kinds = file.schema_arrow.names, file.schema_arrow.types
        _check_columns(path, column, names)
        kind = kinds[names.index(column)]
        is_coded = types.is_dictionary(kind)
        kind = kind.value_type if is_coded else kind
        is_list = types.is_list(kind) or types.is_large_list(kind)
        is_chat = is_list and types.is_struct(kind.value_type)
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or is_chat):
            raise UserError(not_text(path, column, kind))
        for batch in file.iter_batches(1_000, columns=[column]):  # "a.b" is also the b of every structure a
            cells = batch.column(batch.schema.names.index(column))
            try:
                for cell in (cells.dictionary_decode() if is_coded else cells).to_pylist():
                    yield text_of(cell, path, column)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: column '{column}' is not UTF-8 text ({error}); convert it") from None


READERS = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
