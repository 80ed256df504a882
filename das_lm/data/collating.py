"""Rows become batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from das_lm.data.masking import IGNORED
from das_lm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PaddingCollator:
    """
    Makes a batch: pads `input_ids` and `labels` to the longest row and adds the attention mask, all of shape
    [batch, tokens]; numbers become a vector of shape [batch].
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        padding = tokenizer.pad_token_id or 0  # nothing attends to it
        self.padding = {"input_ids": padding, "labels": IGNORED, "attention_mask": 0}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        rows = [{**row, "attention_mask": np.ones(len(row["input_ids"]), dtype=np.int64)} for row in rows]
        batch = {}
        for name in rows[0]:
            if name in self.padding:
                batch[name] = torch.full((len(rows), length), self.padding[name], dtype=torch.int64)
                for index, row in enumerate(rows):
                    batch[name][index, : len(row[name])] = torch.from_numpy(np.asarray(row[name]))
            else:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch


class OwnCollator:
    """
    A user's own collator of rows that are masked and labelled already.

    Args:
        collator: makes `input_ids`, `attention_mask` and `labels`, each [batch, tokens]; what else there is to know of
            the rows need not pass through it.
    """

    def __init__(self, collator: Callable[[list], Mapping[str, torch.Tensor]]):
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch. Raises `UserError` where the labels are no longer those of the rows: masked twice, or cut."""
        labels = np.concatenate([np.asarray(row["labels"]) for row in rows])
        others = {name: [row[name] for row in rows] for name in rows[0] if name not in ("input_ids", "labels")}
        batch = self.collator(list(rows))
        made = set(batch) if isinstance(batch, Mapping) else set()
        missing = [name for name in ("input_ids", "attention_mask", "labels") if name not in made]
        if missing:
            raise UserError(f"data_collator: makes no {', '.join(missing)}; return a mapping of these, [rows, tokens]")
        ours = torch.as_tensor(batch["labels"])
        if ours[ours != IGNORED].tolist() != labels[labels != IGNORED].tolist():
            raise UserError(
                "data_collator: the rows are masked and labelled already, and it made other labels of theirs; only "
                f"pad them, with {IGNORED}, or leave it out (mlm_probability is the share that is masked)"
            )
        return {**{name: torch.tensor(values) for name, values in others.items()}, **batch}


def collate(rows: Mapping[str, torch.Tensor] | Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Makes a batch of rows of tensors or numbers; what a data set's `__getitems__` made is a batch already."""
    if isinstance(rows, Mapping):
        return dict(rows)
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
