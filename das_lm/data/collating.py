"""Rows become batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from das_lm.data.masking import IGNORED

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


def collate(rows: Mapping[str, torch.Tensor] | Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Makes a batch of rows of tensors or numbers; what a data set's `__getitems__` made is a batch already."""
    if isinstance(rows, Mapping):
        return dict(rows)
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
