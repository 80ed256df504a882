"""A bounded memory of earlier rows, each as likely to be kept as any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from das_lm.data.packing import longest_input
from das_lm.methods.base import Engine
from das_lm.randomness import addressed_seed

#: Rows that are drawn for at once.
AT_ONCE = 1 << 20


class Reservoir(Dataset):
    """
    A uniform sample of all rows that it was shown (Vitter, 1985, algorithm R), as a data set.

    Args:
        capacity: rows that are kept.
        seed: of the draws.
    """

    def __init__(self, capacity: int, seed: int):
        self.capacity, self.seed = capacity, seed
        self.rows: list[dict[str, torch.Tensor]] = []
        self.seen = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Show further rows: dictionaries of arrays or numbers."""
        for start in range(0, len(rows), AT_ONCE):  # of a stream there may be more than fit
            self._add(rows, range(start, min(start + AT_ONCE, len(rows))))

    def _add(self, rows: Sequence[dict[str, Any]], indices: range) -> None:
        draws = np.random.Generator(np.random.Philox(addressed_seed(self.seed, "reservoir", self.seen)))
        places = draws.integers(0, self.seen + 1 + np.arange(len(indices)))  # of the n-th row ever seen one in [0, n)
        for index, place in zip(indices, places.tolist(), strict=True):
            if len(self.rows) < self.capacity:
                self.rows.append(_copied(rows[index]))
            elif place < self.capacity:
                self.rows[place] = _copied(rows[index])
        self.seen += len(indices)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every column as one tensor of all values and the shapes of the rows' own."""
        state = {"memory.seen": torch.tensor(self.seen)}
        for name in self.rows[0] if self.rows else ():
            column = [row[name] for row in self.rows]
            state[f"memory.values.{name}"] = torch.cat([value.flatten() for value in column])
            state[f"memory.shapes.{name}"] = torch.tensor([list(value.shape) for value in column]).reshape(
                len(column), -1
            )
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor], trainer: Engine | None = None) -> None:
        """
        Take back what [`state_dict`] gave.

        Args:
            trainer: whose model is to read the rows.

        Raises:
            ValueError: they are no such rows; or another error, where the state is broken.
        """
        self.seen = int(state["memory.seen"])
        columns = {}
        for key, values in state.items():
            if key.startswith("memory.values."):
                name = key.removeprefix("memory.values.")
                shapes = [tuple(shape) for shape in state[f"memory.shapes.{name}"].long().tolist()]
                parts = values.cpu().split([int(np.prod(shape)) for shape in shapes])
                columns[name] = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        self.rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if not 0 < len(self) <= self.seen:
            raise ValueError(f"a memory of {len(self)} rows of {self.seen}")
        if trainer is not None and trainer.units is not None:
            check_tokens(self.rows, trainer)
        elif trainer is not None and trainer.train_dataset is not None:
            own = next(iter(trainer.train_dataset.domains.values()))[0]
            kinds = [{name: torch.as_tensor(value).ndim for name, value in row.items()} for row in (own, self.rows[0])]
            if kinds[0] != kinds[1]:
                raise ValueError(f"rows with {', '.join(columns)}, not as the domain's, with {', '.join(own)}")


def check_tokens(rows: Sequence[dict[str, torch.Tensor]], trainer: Engine) -> None:
    """Raises `ValueError` for a row that is no block of token ids, or too much for the model."""
    model = trainer.units.model
    check_blocks(rows, len(model.get_input_embeddings().weight), longest_input(model, trainer.processing_class))


def check_blocks(rows: Sequence[dict[str, torch.Tensor]], vocabulary: int, longest: float) -> None:
    """The same of a vocabulary and a longest input."""
    for row in rows:
        ids = row.get("input_ids")
        if row.keys() != {"input_ids"} or ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64):
            raise ValueError("rows that are no blocks of token ids")
        if not 0 < len(ids) <= longest or not 0 <= ids.min() <= ids.max() < vocabulary:
            raise ValueError(
                f"a block of {len(ids)} tokens with ids up to {ids.max() if len(ids) else None}; the model reads up "
                f"to {longest:,.0f} tokens of {vocabulary}"
            )


def _copied(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(value).clone() for name, value in row.items()}
