"""Domains: where their text comes from, and which documents are held out."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from das_lm.data.mixtures import PART, Part, characters_of, interleaved, parts_of, weights_of
from das_lm.data.readers import (
    missing_column,
    not_text,
    read_files,
    row_features,
    rows_of_column,
    stream_files,
    text_of,
    to_row,
)
from das_lm.errors import UserError, did_you_mean
from das_lm.plain_words import in_plain_words

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from das_lm.data.streaming import DocumentStream

#: A share that is split off, and a split of a hub data set, give at most this many held-out documents.
MAX_HELD_OUT = 1000

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclasses.dataclass(frozen=True)
class Documents:
    """The text of one domain.

    Both data sets have the columns `id` (16 hexadecimal digits, the hash of the text: one document has one id on every
    machine) and `text`.

    Attributes:
        train: What is trained on; `None` for a domain that is only measured; of a domain that is streamed, what reads
            it.
        held_out: What the domain is measured on; no document of it stands in `train`, and none stands in it twice.
        warnings: What was left out or looks odd, with counts; one sentence each.
        parts: Of a mixture, part -> its share of the text of `train`, in characters; of a stream, in documents.
    """

    train: Dataset | DocumentStream | None
    held_out: Dataset
    warnings: list[str]
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def has_length(self) -> bool:
        """Whether there is training text that was read, rather than none or a stream."""
        from datasets import Dataset

        return isinstance(self.train, Dataset)

    @property
    def fingerprints(self) -> dict[str, str]:
        """`training` (of a stream, see [`TrainingStream`]) and `held-out` -> [`text_fingerprint`]."""
        held_out = self.held_out if len(self.held_out) else None
        parts = {"training": self.train if self.has_length else None, "held-out": held_out}
        return {name: text_fingerprint(part) for name, part in parts.items() if part is not None}


@in_plain_words
@dataclass(config=ConfigDict(extra="forbid"))
class Domain:
    """
    A domain to learn, or to measure only. An entry of `domains` and of `measure` in a recipe has the same keys.

    Args:
        name: Up to 64 letters, digits, `_`, `.` and `-`; it names a folder of the output directory.
        data: `"built-in"` (the text of this name that comes with the package) or `"built-in:NAME"`; a path or glob, or
            a list of them: `.txt` (documents separated by blank lines, or one per line where there are none),
            `.jsonl`/`.json` (one object per line), `.csv` (with a header), each also as `.gz`, and `.parquet`; or
            `"hub:ORGANISATION/NAME"`, a data set of the Hugging Face hub. Or a mixture: a list of [`Part`], such as
            `[{path: a.txt, weight: 0.7}, {path: b.txt, weight: 0.3}]`, whose documents are interleaved at random.
        stopping_strategy: A mixture ends when the first of its parts does, `"first_exhausted"`, or when each has been
            read at least once, `"all_exhausted"`, others then several times.
        config: Configuration of the hub data set.
        split: Split of the hub data set.
        revision: Commit, tag or branch of the hub data set.
        streaming: Read files or the hub data set while training on it: nothing is read before, or kept on disk or in
            memory, but the documents that are split off and `shuffle_buffer` blocks. See `data/streaming.py`.
        shuffle_buffer: Blocks of a stream that are shuffled among one another.
        column: Column (of a JSON line: key) that holds the text, or messages (`[{role: …, content: …}, …]`), of which
            the chat template of the tokenizer makes text.
        held_out: The share of the documents that is split off and never trained on (at most 1,000 documents, chosen
            by the hash of their text: the same on every machine and for every order of the files); or paths as in
            `data`; or `"split:NAME"` of the hub data set (its first 1,000 documents). Built-in data has its own
            held-out text, and a share means that. Of a stream, the share is split off from as many documents at its
            beginning as it takes to find 1,000.
        min_characters: Shorter documents are left out.
        max_documents: Read this many documents of `data` at most.
        add_tokens: Before the domain is learned, so many of its words that the tokenizer cuts into pieces become
            tokens (see `new_words`): those that save the most.
        training: Training arguments that differ while this domain is learned.

    Raises:
        UserError: A wrong key, type or combination.
    """

    name: str
    data: str | list[str] | list[Part] = Field(default="built-in", validate_default=True)
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    shuffle_buffer: int = 10_000
    column: str = "text"
    held_out: float | str | list[str] = 0.1
    min_characters: int = 20
    max_documents: int | None = None
    add_tokens: int = Field(default=0, ge=0)
    training: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError(
                f"'{name}' names a folder: write up to 64 letters, digits, '_', '.', '-', the first a letter or digit"
            )
        return name

    @field_validator("data", mode="before")
    @classmethod
    def _take_parts(cls, data: Any) -> Any:
        return parts_of(data)

    @field_validator("data")
    @classmethod
    def _check_data(cls, data: Any, info: ValidationInfo) -> Any:
        if _is_empty(data):
            raise ValueError("is empty; write 'built-in', a path, a list of paths, or 'hub:organisation/name'")
        if data_kind(data) == "mixture":
            for index, part in enumerate(data):
                if data_kind(part.path) == "built-in":
                    cls._check_data(part.path if ":" in part.path else "built-in:", info)
                elif _is_empty(part.path) or part.path == "hub:":
                    raise ValueError(f"[{index}]: names no data; write a path, or 'hub:organisation/name'")
        elif isinstance(data, list):
            for entry in data:
                if data_kind(entry) != "files":
                    raise ValueError(f"'{entry}' cannot stand in a list; a list holds paths only")
        elif data_kind(data) == "built-in":
            from das_lm.data.built_in import DOMAINS

            name = data.partition(":")[2] or info.data.get("name", DOMAINS[0])
            if name not in DOMAINS:
                raise ValueError(
                    f"there is no built-in text named '{name}'.{did_you_mean(name, DOMAINS)} For other text give "
                    f"`data`: a path, or 'hub:organisation/name'"
                )
        elif data == "hub:":
            raise ValueError("names no data set; write 'hub:organisation/name'")
        return data

    @field_validator("streaming")
    @classmethod
    def _check_streaming(cls, streaming: bool, info: ValidationInfo) -> bool:
        if streaming and data_kind(info.data.get("data", "hub:")) == "built-in":
            raise ValueError("is for files and hub data sets; the built-in text is small, leave it out")
        return streaming

    @field_validator("config", "split", "revision")
    @classmethod
    def _check_hub_only(cls, value: Any, info: ValidationInfo) -> Any:
        if value and value != "train" and data_kind(info.data.get("data", "hub:")) != "hub":
            raise ValueError("is for hub data sets only; leave it out or write data: 'hub:organisation/name'")
        return value

    @field_validator("held_out")
    @classmethod
    def _check_held_out(cls, held_out: float | str | list[str], info: ValidationInfo) -> float | str | list[str]:
        if isinstance(held_out, float):
            if not 0 < held_out < 1:
                raise ValueError(
                    f"{held_out:g} must lie between 0 and 1: a domain is measured on text that it was not trained on"
                )
        elif _is_empty(held_out):
            raise ValueError("is empty; write a share such as 0.1, a path, a list of paths, or 'split:validation'")
        elif isinstance(held_out, str) and held_out.startswith("split:"):
            if held_out == "split:":
                raise ValueError("names no split; write for example 'split:validation'")
            if data_kind(info.data.get("data", "hub:")) != "hub":
                raise ValueError(f"'{held_out}' is for hub data sets only; write a share such as 0.1, or a path")
        elif any(data_kind(entry) != "files" for entry in ([held_out] if isinstance(held_out, str) else held_out)):
            raise ValueError(
                "holds more than paths; write a share such as 0.1, a path, a list of paths, or 'split:NAME'"
            )
        return held_out

    @field_validator("min_characters", "max_documents", "shuffle_buffer")
    @classmethod
    def _check_count(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"{value} must be at least 1")
        if value is not None and value > sys.maxsize:
            raise ValueError(f"{value:.0e} is more than can be counted; leave it out, or write less")
        return value

    @field_validator("add_tokens")
    @classmethod
    def _check_add_tokens(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("streaming"):
            raise ValueError("takes words of the whole text, which a stream does not read before; leave streaming out")
        return value

    def load(self, measure_only: bool = False) -> Documents:
        """Read the text and split off, or read, the held-out documents.

        Args:
            measure_only: The domain is never trained on. Its held-out text is then what `held_out` names (or that of
                the built-in domain), or else every document of `data`.

        Raises:
            UserError: No such file, an unreadable one, or no text left; with the file, line and column where it fits.
        """
        warnings: list[str] = []
        held_out = None
        if isinstance(self.held_out, float):
            if data_kind(self.data) == "built-in":
                held_out = self._read(self.data, "held_out", None)
        elif isinstance(self.held_out, str) and self.held_out.startswith("split:"):
            held_out = self._read(self.data, self.held_out.removeprefix("split:"), MAX_HELD_OUT)
        else:
            held_out = self._read(self.held_out, self.split, None)
        if held_out is not None:
            held_out = self._usable(held_out, "held-out ", warnings)
            held_out = held_out.select(np.sort(_first_of_each(held_out["id"])))
            if measure_only:
                return Documents(None, held_out, warnings)

        if self.streaming:
            return self._load_stream(held_out, measure_only, warnings)
        documents = self._documents(warnings)
        ids = np.array(documents["id"])
        first = _first_of_each(ids)
        if measure_only:
            return Documents(None, documents.select(np.sort(first)).select_columns(["id", "text"]), warnings)

        expected = 0
        if held_out is None:
            if len(first) == 1:
                raise UserError(
                    f"domain '{self.name}': there is a single document, so none can be split off; give held_out a path"
                )
            expected = min(max(1, round(self.held_out * len(first))), MAX_HELD_OUT, len(first) - 1)
            # `first` is in the order of the hashes.
            held_out = documents.select(np.sort(first[:expected])).select_columns(["id", "text"])
        in_held_out = np.isin(ids, np.array(held_out["id"]))
        kept = np.flatnonzero(~in_held_out)
        if not len(kept):
            raise UserError(
                f"domain '{self.name}': nothing is left to train on, since every document is also held out; give "
                "held_out other documents, or a share such as 0.1"
            )
        overlapping = int(in_held_out.sum()) - expected
        repeated = len(kept) - len(np.unique(ids[kept]))
        if overlapping:
            warnings.append(self._count(overlapping, "left out of the training text, being held out as well"))
        if repeated:
            warnings.append(self._count(repeated, "of the training text repeated word for word; kept"))
        documents = documents.select(kept)
        return Documents(documents, held_out, warnings, self._shares(documents))

    def load_whole(self) -> Documents:
        """Read all of it, and hold out nothing; of a stream `max_documents`.

        Raises:
            UserError: As [`load`].
        """
        warnings: list[str] = []
        documents = self._documents(warnings)
        return Documents(
            documents, documents.select([]).select_columns(["id", "text"]), warnings, self._shares(documents)
        )

    def _documents(self, warnings: list[str]) -> Dataset:
        """All usable documents; those of a mixture in one order."""
        if not self._is_mixture:
            return self._usable(self._read(self.data, self.split, self.max_documents), "", warnings)
        parts = [self._usable(one._read(one.data, one.split, None), "", warnings) for one in self._parts()]
        parts = [one.add_column(PART, [number] * len(one)) for number, one in enumerate(parts)]
        documents = interleaved(parts, self.data, self.stopping_strategy)
        return documents.select(range(min(self.max_documents or len(documents), len(documents))))

    @property
    def _is_mixture(self) -> bool:
        return data_kind(self.data) == "mixture"

    def _shares(self, documents: Dataset) -> dict[str, float]:
        return characters_of(documents, self.data) if self._is_mixture else {}

    def _parts(self) -> list[Domain]:
        """The parts of a mixture, as domains of their own."""
        return [
            dataclasses.replace(self, data=part.path, column=part.column or self.column, held_out=0.1)
            for part in self.data
        ]

    def _load_stream(self, held_out: Dataset | None, measure_only: bool, warnings: list[str]) -> Documents:
        """The documents as a stream. What is held out is read from its beginning: the first `MAX_HELD_OUT` whose hash
        falls below the share, or, to measure only, any."""
        from datasets import Dataset

        from das_lm.data.streaming import DocumentStream

        where = f"domain '{self.name}'"
        if data_kind(self.data) == "hub":
            where = f"{where}: hub data set '{self.data.removeprefix('hub:')}'"
        source = self._stream()
        if self.max_documents:
            source = source.take(self.max_documents)
        documents = DocumentStream(source, self.column, where, self.min_characters)
        if next(iter(documents), None) is None:
            raise UserError(
                f"{where}: there is no document of min_characters ({self.min_characters}) or more. Is "
                f"'{self.column}' the column that holds the text?"
            )
        if held_out is None:
            limit = self.max_documents if measure_only and self.max_documents else MAX_HELD_OUT
            found: dict[str, dict[str, Any]] = {}
            for row in documents:
                if measure_only or int(row["id"], 16) < self.held_out * 2**64:
                    found[row["id"]] = row
                if len(found) == limit:
                    break
            if not found:  # in a stream of a few documents
                row = min(documents, key=lambda row: row["id"])
                found[row["id"]] = row
            held_out = Dataset.from_list(list(found.values())).select_columns(["id", "text"])
        if measure_only:
            return Documents(None, held_out, warnings)
        paths = [part.path for part in self.data] if self._is_mixture else [self.data]
        is_remote = any(data_kind(path) == "hub" for path in paths)
        documents = DocumentStream(source, self.column, where, self.min_characters, held_out["id"], is_remote)
        if next(iter(documents), None) is None:
            raise UserError(
                f"{where}: nothing is left to train on, since every document is also held out; give held_out other "
                "documents, or a smaller share"
            )
        warnings.append(
            f"domain '{self.name}' is streamed: held-out documents are left out of its training text, but what "
            "else is left out or repeated is not counted, and no passage of it is compared with measured text"
        )
        return Documents(documents, held_out, warnings, weights_of(self.data) if self._is_mixture else {})

    def _stream(self) -> IterableDataset:
        """All rows, read when they are asked for."""
        if self._is_mixture:
            parts = [(one._stream().select_columns(one.column), one.column) for one in self._parts()]
            renamed = [
                one if column == self.column else one.rename_column(column, self.column) for one, column in parts
            ]
            return interleaved(renamed, self.data, self.stopping_strategy)
        if data_kind(self.data) == "hub":
            return self._open_hub(self.data.removeprefix("hub:"), self.split)
        return stream_files([self.data] if isinstance(self.data, str) else self.data, self.column, self.name)

    def _read(self, data: str | list[str], split: str, limit: int | None) -> Dataset:
        """All rows of a source, with the columns of [`to_row`]."""
        kind = data_kind(data)
        if kind == "files":
            return read_files([data] if isinstance(data, str) else data, self.column, limit, self.name)
        if kind == "hub":
            return self._read_hub(data.removeprefix("hub:"), split, limit)

        from datasets import Dataset

        from das_lm.data import built_in

        documents = built_in.documents(data.partition(":")[2] or self.name, split)
        return Dataset.from_list([to_row(document["text"]) for document in documents[:limit]])

    def _open_hub(self, source: str, split: str) -> Dataset | IterableDataset:
        import datasets

        try:
            return datasets.load_dataset(
                source, self.config, split=split, revision=self.revision, streaming=self.streaming
            )
        except Exception as error:  # whatever the library and the network raise
            raise self._not_loaded(source, split, error) from error

    def _not_loaded(self, source: str, split: str, error: Exception) -> UserError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return UserError(
            f"domain '{self.name}': hub data set '{source}', split '{split}', could not be loaded: {reason}. Check "
            "its name, config, split and revision and the network; it must hold plain data (Parquet, JSON, CSV, "
            "text), no loading script"
        )

    def _read_hub(self, source: str, split: str, limit: int | None) -> Dataset:
        import datasets

        where = f"domain '{self.name}': hub data set '{source}'"
        rows = self._open_hub(source, split)
        if self.streaming:
            try:
                rows = list(itertools.islice(rows, limit))
            except Exception as error:
                raise self._not_loaded(source, split, error) from error
        if not len(rows):
            raise UserError(f"{where}, split '{split}', is empty")
        columns = list(rows[0])
        if self.column not in columns:
            raise UserError(missing_column(where, self.column, columns))
        if self.streaming:
            return datasets.Dataset.from_list([to_row(text_of(row[self.column], where, self.column)) for row in rows])
        kind = rows.features[self.column]
        if not isinstance(kind, datasets.List | list) and kind.dtype not in ("string", "large_string", "string_view"):
            raise UserError(not_text(where, self.column, kind.dtype))
        rows = rows.select(range(min(limit or len(rows), len(rows))))
        return rows.map(
            rows_of_column,
            batched=True,
            remove_columns=columns,
            features=row_features(),
            fn_kwargs={"column": self.column, "where": where},
            desc=f"Reading {self.name}",
        )

    def _usable(self, rows: Dataset, what: str, warnings: list[str]) -> Dataset:
        """Leave out rows without text and documents that are too short, and count them."""
        characters = np.array(rows["characters"])
        usable = np.flatnonzero(characters >= self.min_characters)
        without = int((characters < 0).sum())
        short = len(characters) - len(usable) - without
        if not len(usable):
            raise UserError(
                f"domain '{self.name}': no {what}text is left: {without:,} rows without text, {short:,} documents "
                f"shorter than min_characters ({self.min_characters}). Is '{self.column}' the column that holds the "
                "text?"
            )
        if without:
            warnings.append(f"domain '{self.name}': {without:,} {what}row{'s' * (without != 1)} without text left out")
        if short:
            outcome = f"shorter than min_characters ({self.min_characters}) left out"
            warnings.append(self._count(short, outcome, what))
        return rows.select(usable).select_columns(["id", "text"])

    def _count(self, number: int, outcome: str, what: str = "") -> str:
        return f"domain '{self.name}': {number:,} {what}document{'s' * (number != 1)} {outcome}"


def text_fingerprint(documents: Dataset) -> str:
    """A hash of all documents in their order."""
    ids = documents.select_columns("id")[:]["id"]
    return hashlib.blake2b("".join(ids).encode(), digest_size=8).hexdigest()


def data_kind(data: str | list[str] | list[Part]) -> str:
    """Where a domain's `data` leads: `"built-in"`, `"hub"`, `"files"` or `"mixture"`."""
    if isinstance(data, list) and data and isinstance(data[0], Part):
        return "mixture"
    if isinstance(data, str):
        if data == "built-in" or data.startswith("built-in:"):
            return "built-in"
        if data.startswith("hub:"):
            return "hub"
    return "files"


def _is_empty(paths: str | list[str]) -> bool:
    return not paths or isinstance(paths, list) and "" in paths


def _first_of_each(ids: Iterable[str]) -> np.ndarray:
    """Position of the first document of each id, in the order of the ids (which are hashes)."""
    return np.unique(np.array(ids), return_index=True)[1]
