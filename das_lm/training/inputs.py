"""The data that users hand to a trainer, in the forms that the Trainer and TRL take, as it works with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchStream

from das_lm.data.blocks import HeldOutWindows, TrainingBlocks, TrainingRows
from das_lm.data.chats import chat_of
from das_lm.data.collating import OwnCollator, PaddingCollator, collate
from das_lm.data.masking import labeling
from das_lm.data.packing import longest_input, nothing_in, pack, windows
from das_lm.data.readers import missing_column, text_of
from das_lm.data.streaming import DocumentStream, TrainingStream
from das_lm.errors import UserError, as_user_error
from das_lm.model.objective import ModuleLoss
from das_lm.training.config import ContinualConfig


def data_seed(args: ContinualConfig) -> int:
    """The seed of order and masks."""
    return args.seed if args.data_seed is None else args.data_seed


class Rows:
    """
    Data of a module that is no language model.

    Args:
        args: the arguments.
        domain: name of the domain that is learned.
        model: the module; rows that are tuples (a `TensorDataset`) go to the arguments of its forward in their order.
    """

    collator = staticmethod(collate)

    def __init__(self, args: ContinualConfig, domain: str, model: nn.Module):
        self.args, self.domain, self.model, self.seed = args, domain, model, data_seed(args)

    def training(self, data: Any, where: str = "train_dataset") -> TrainingRows | None:
        """What is trained on. Raises `UserError` for what a module cannot be trained on."""
        if data is None or isinstance(data, TrainingRows):
            return data
        return TrainingRows({self.domain: self.rows(_train_split(data, where), where)}, self.seed)

    def rows_to_train_on(self, domains: Mapping[str, Any]) -> TrainingRows:
        """Training rows of domains, whose rows are as they have to be."""
        return TrainingRows(domains, self.seed)

    def held_out(self, data: Any, where: str = "eval_dataset") -> Any:
        """What is measured: a data set, or a dictionary of them by domain."""
        return _by_domain(data, where, self.rows)

    def collating(self, own: Any) -> Callable[[list], dict[str, Any]]:
        """What makes batches: the user's own collator, if there is one. Raises `UserError` for what is none."""
        if own is not None and not callable(own):
            raise UserError(f"data_collator: {type(own).__name__} is none; give a function of a list of rows")
        return self.collator if own is None else own

    def again(self, data: TrainingRows | None) -> None:
        """The trainer begins anew with a fresh model, and with what a search has made of the arguments."""
        if data is not None:
            data.reset(data_seed(self.args))

    def rows(self, data: Any, where: str) -> Any:
        """A map-style data set of dictionaries."""
        _refuse_names(data, where)
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise UserError(f"{where}: {type(data).__name__} has no length; a module needs a map-style data set")
        if not len(data):
            return data
        row = data[0]
        arguments = list(inspect.signature(self.model.forward).parameters)
        model = type(self.model).__name__
        if isinstance(row, list | tuple):
            if len(row) > len(arguments):
                raise UserError(
                    f"{where}: rows hold {len(row)} columns without names, and {model}.forward takes "
                    f"{', '.join(arguments)}; make every row a dictionary"
                )
            return _NamedRows(data, arguments[: len(row)])
        taken = ModuleLoss(self.model).arguments
        if not isinstance(row, Mapping) or (taken is not None and not taken & row.keys()):
            has = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise UserError(
                f"{where}: rows hold {has}, and {model}.forward takes {', '.join(arguments)}; make every row a "
                "dictionary of these, or, for a language model and text, give its tokenizer as processing_class"
            )
        return data


class _NamedRows(TorchDataset):
    """Rows that are tuples, as dictionaries."""

    def __init__(self, rows: Any, names: Sequence[str]):
        self.rows, self.names = rows, names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(zip(self.names, self.rows[index], strict=True))


class Text:
    """
    Text as a language model reads it: packed blocks to train on, windows of held-out documents to measure.

    Args:
        args: the arguments.
        domain: name of the domain that is learned.
        model: the language model.
        tokenizer: its tokenizer.
        column: the column that holds the text.

    Raises:
        UserError: the tokenizer is of another model, or blocks are longer than the model reads.
    """

    def __init__(self, args: ContinualConfig, domain: str, model: nn.Module, tokenizer: Any, column: str):
        known, limit = len(model.get_input_embeddings().weight), longest_input(model, tokenizer)
        if len(tokenizer) > known:
            raise UserError(
                f"processing_class: the tokenizer has {len(tokenizer)} tokens, the model {known}; give its own"
            )
        if args.max_length > limit:
            raise UserError(f"max_length: {args.max_length} is beyond what the model reads, {limit} tokens")
        self.args, self.domain, self.tokenizer, self.column = args, domain, tokenizer, column
        self.known, self.limit = known, limit
        self.seed, self.max_length, self.mlm_probability = data_seed(args), args.max_length, args.mlm_probability
        self.masking = labeling(tokenizer, model.can_generate(), args.mlm_probability)
        self.collator = PaddingCollator(tokenizer)

    def training(self, data: Any, where: str = "train_dataset") -> TrainingBlocks | None:
        """What is trained on. Raises `UserError` for what is no text."""
        data = _train_split(data, where)
        if isinstance(data, TorchStream) and not isinstance(data, datasets.IterableDataset):
            data = _as_stream(data, self.column)
        if isinstance(data, datasets.IterableDataset):
            data = DocumentStream(data, self.column, where=f"domain '{self.domain}'", option="text_column")
        if isinstance(data, DocumentStream):
            data = TrainingStream(data, self.tokenizer, self.max_length, self.masking, self.seed, self.domain)
        if isinstance(data, TrainingStream):
            self._take_from_stream(data)
        elif data is not None and not isinstance(data, TrainingBlocks):
            data = self._table(data, where)
            if "input_ids" not in data.column_names:
                data = pack(data, self.tokenizer, self.max_length)
            data = TrainingBlocks({self.domain: data}, self.masking, self.seed)
        return data

    def rows_to_train_on(self, domains: Mapping[str, Any]) -> TrainingBlocks:
        """See [`Rows.rows_to_train_on`]."""
        blocks = TrainingBlocks({}, self.masking, self.seed)
        blocks.domains = dict(domains)
        return blocks

    def held_out(self, data: Any, where: str = "eval_dataset") -> Any:
        """What is measured: [`HeldOutWindows`], or a dictionary of them by domain."""
        return _by_domain(data, where, self._windows)

    def again(self, data: TrainingBlocks | None) -> None:
        """See [`Rows.again`]. Raises `UserError` where a search has changed what the blocks were made with."""
        for name in ("max_length", "mlm_probability"):
            if getattr(self.args, name) != getattr(self, name):
                raise UserError(f"hyperparameter_search: {name} changes the text itself; make a trainer for each")
        Rows.again(self, data)
        if isinstance(data, TrainingStream):
            self._take_from_stream(data)

    def collating(self, own: Any) -> Callable[[list], dict[str, Any]]:
        """See [`Rows.collating`]. Raises `UserError` for a collator of transformers, too: the rows are masked, and
        their labels in place."""
        collator = Rows.collating(self, own)
        kinds = collator if inspect.isfunction(collator) else type(collator)
        if any(kind.__module__.startswith("transformers.") for kind in getattr(kinds, "__mro__", (kinds,))):
            name = getattr(kinds, "__name__", kinds)
            raise UserError(
                f"data_collator: {name} would mask or label rows again that are masked and labelled, or not pad their "
                "labels; leave it out (mlm_probability is the share that is masked)"
            )
        return collator if own is None else OwnCollator(own)

    def _windows(self, data: Any, where: str) -> HeldOutWindows:
        if isinstance(data, HeldOutWindows):
            return data
        if isinstance(data, TorchStream | DocumentStream):
            raise UserError(f"{where}: a stream has no end; give its first documents, as list(stream.take(1000))")
        data = self._table(data, where)
        if "input_ids" not in data.column_names:
            data = windows(data, self.tokenizer, self.max_length)
        elif "document" not in data.column_names:
            data = data.add_column("document", list(range(len(data))))
        return HeldOutWindows(data, self.masking, self.seed)

    def _table(self, data: Any, where: str) -> datasets.Dataset:
        """A data set with the column `input_ids`, or with a column `text` without rows that hold none."""
        if not isinstance(data, datasets.Dataset):
            data = _as_table(data, self.column, where)
        if "input_ids" in data.column_names:
            self._check_ids(data, where)
            return data
        if self.column not in data.column_names:
            raise UserError(missing_column(where, self.column, data.column_names, "text_column"))
        data = data.with_format(None).select_columns([self.column])
        if isinstance(data.features[self.column], datasets.List | list):
            cells = enumerate(data[self.column])
            texts = [text_of(cell, f"{where}, row {index}", self.column, "text_column") for index, cell in cells]
            data = datasets.Dataset.from_dict({self.column: texts})
        kept: list[int] = []
        for start in range(0, len(data), 1000):
            texts = data[start : start + 1000][self.column]
            kept.extend(
                index
                for index, text in enumerate(texts, start)
                if (text_of(text, f"{where}, row {index}", self.column, "text_column") or "").strip()
            )
        if not kept:
            raise nothing_in((), f"{where}: ")
        data = data if self.column == "text" else data.rename_column(self.column, "text")
        return data if len(kept) == len(data) else data.select(kept)

    def _check_ids(self, data: datasets.Dataset, where: str) -> None:
        """Raises `UserError` for rows that are no token ids, or none that the model can read."""
        rows = data.with_format("arrow")
        for start in range(0, len(rows), 1000):
            column = rows[start : start + 1000]["input_ids"]
            kind = getattr(column.type, "value_type", None)
            if column.null_count or kind is None or not pa.types.is_integer(kind):
                raise UserError(f"{where}: input_ids hold {column.type}, not token ids; give a list of ids a row")
            length, ids = pc.min_max(pc.list_value_length(column)).as_py(), pc.min_max(pc.list_flatten(column)).as_py()
            if not 0 < length["min"] <= length["max"] <= self.limit or not 0 <= ids["min"] <= ids["max"] < self.known:
                raise UserError(
                    f"{where}: input_ids have {length['min']} to {length['max']} tokens with ids from {ids['min']} to "
                    f"{ids['max']}; the model reads 1 to {self.limit:,.0f} tokens of {self.known:,}"
                )

    def _take_from_stream(self, stream: TrainingStream) -> None:
        """Make of a stream the rows that training takes, one after the other."""
        args = self.args
        if args.max_steps <= 0:
            where = stream.documents.where
            raise UserError(f"max_steps: how long {where} is, is not known; say how many steps to train")
        stream.length = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        # It is read where the checkpoints are written, which hold its place; tokenizers use threads of their own.
        args.dataloader_num_workers, args.dataloader_prefetch_factor = 0, None
        args.dataloader_persistent_workers, args.dataloader_multiprocessing_context = False, None


def _refuse_names(data: Any, where: str) -> None:
    if isinstance(data, str | Path):
        raise UserError(
            f"{where}: '{data}' is a name; give documents: those of files are Domain('name', data='{data}').load()"
        )
    if isinstance(data, Mapping):
        key = next(iter(data), "domain")
        raise UserError(f"{where}: a dictionary; one domain is learned at a time: give one of them, such as [{key!r}]")


def _train_split(data: Any, where: str) -> Any:
    """Of a `DatasetDict` its split `train`."""
    if not isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        return data
    if "train" not in data:
        raise UserError(f"{where}: has no split 'train'; give one of its splits, {', '.join(data)}")
    return data["train"]


def _by_domain(data: Any, where: str, one: Callable[[Any, str], Any]) -> Any:
    """Held-out data, or a flat dictionary of it; of a `DatasetDict` all splits but `train`, or `train` where there is
    no other."""
    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        data = {name: split for name, split in data.items() if name != "train" or len(data) == 1}
        if len(data) == 1:
            (data,) = data.values()
    if data is None or not isinstance(data, Mapping):
        return None if data is None else one(data, where)
    flat = {}
    for name, part in data.items():
        part = _by_domain(part, f"{where}['{name}']", one)
        flat |= {f"{name}_{inner}": each for inner, each in part.items()} if isinstance(part, dict) else {name: part}
    return flat


def _as_table(data: Any, column: str, where: str) -> datasets.Dataset:
    """A list, or a map-style data set, of texts or of dictionaries."""
    _refuse_names(data, where)
    if not isinstance(data, Sequence | TorchDataset | np.ndarray) or not hasattr(data, "__len__"):
        raise UserError(
            f"{where}: {type(data).__name__} holds no documents; give a data set with a column '{column}', or a list "
            "of texts"
        )
    rows = [data[index] for index in range(len(data))]
    if rows and isinstance(rows[0], Mapping):
        wanted = "input_ids" if "input_ids" in rows[0] else column
        if wanted not in rows[0]:
            raise UserError(missing_column(where, column, list(rows[0]), "text_column"))
        rows = [row.get(wanted) if isinstance(row, Mapping) else row for row in rows]
        if wanted == "input_ids":
            with as_user_error(f"{where}: input_ids are not lists of token ids"):
                return datasets.Dataset.from_dict({"input_ids": rows})
    rows = [chat_of(row) or row for row in rows]
    for index, row in enumerate(rows):
        if row is not None and not isinstance(row, str):
            raise UserError(f"{where}: row {index} is {type(row).__name__}, not text; give a list of texts")
    return datasets.Dataset.from_dict({column: rows})


def _as_stream(rows: TorchStream, column: str) -> datasets.IterableDataset:
    """Texts or dictionaries that are read again, from the beginning, whenever they are needed."""
    return datasets.IterableDataset.from_generator(
        lambda: (row if isinstance(row, Mapping) else {column: row} for row in rows)
    )
