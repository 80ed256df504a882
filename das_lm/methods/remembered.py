"""Text that stands for what the model knew before the first domain, whose own data is gone (arXiv 2605.26097)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

from das_lm.methods.base import Method
from das_lm.methods.memory import check_tokens
from das_lm.methods.writing import Writer, WritingArguments
from das_lm.randomness import addressed_seed, permutation

#: One row in so many is kept apart: it is never trained on, and measured in the end.
APART = 8


@dataclass
class Source:
    """
    Text that stands for the past.

    Args:
        rows: a map-style data set of rows as those that are trained on; `None` until the model has written them.
        weight: how often it is drawn, beside the others.
        write: how many rows the model writes; 0 for text that was given.
        budget: how far the model may drift from what the base model says of it, nats per predicted token, in place of
            `drift_budget`.
        is_written: whether a model wrote it, now or to a file.
    """

    rows: Any
    weight: float = 1.0
    write: int = 0
    budget: float | None = None
    is_written: bool = False

    @property
    def rows_to_train_on(self) -> Any:
        """All rows but those that are kept apart."""
        return Subset(self.rows, range(len(self.rows) - len(apart(len(self.rows)))))

    @property
    def rows_apart(self) -> Any:
        """Rows that nothing is trained on; none of fewer than [`APART`] rows."""
        return Subset(self.rows, apart(len(self.rows)))


class Remembered(Method):
    """
    What stands for the model's past: text that was given, text that the model writes itself before the first domain,
    or both. It trains nothing by itself. Methods take from it what they need: [`Anchor`] and [`Replay`] its rows;
    those that consolidate a domain when it ends consolidate the base model on it, as on a domain before the first.

    Of a state only what the model wrote is kept: given text is given again.

    Args:
        sources: by name.
        for_all: whether it serves all methods, or, since nobody asked for it, only those that cannot do without.
    """

    #: Before all methods, which find it in place.
    order = -10
    name = "remember"
    arguments = WritingArguments

    def __init__(self, sources: Mapping[str, Source], for_all: bool = True):
        self.sources, self.for_all = dict(sources), for_all
        self._has_begun = False

    @property
    def file_name(self) -> str:
        return "remembered.safetensors"

    def begin_domain(self) -> None:
        """Before the first domain, write what is to be written, and let methods consolidate the base model; unless no
        method has a use for it."""
        uses = any(one.consolidates_base or one.draws_remembered for one in self.trainer.methods)
        if self._has_begun or not (uses or self.args.importance == "remembered"):
            return
        for name, source in self.sources.items():
            if source.rows is None:
                source.rows = Writer(self.trainer).rows(source.write, name)
        fresh = [one for one in self.trainer.methods if one.consolidates_base and not one.state_dict()]
        if fresh and self.for_all:
            with self.trainer.reading({"remembered": self.as_domain()}):
                for one in fresh:
                    one.begin_domain()
                    one.end_domain()
        self._has_begun = True

    def as_domain(self) -> ConcatDataset:
        """`memory_size` rows, of every source as many as its weight asks for."""
        total, parts = sum(one.weight for one in self.sources.values()), []
        for source in self.sources.values():
            numbers = permutation(len(source.rows), self.args.seed, "remembered")
            count = round(self.args.memory_size * source.weight / total)
            parts.append(Subset(source.rows, np.resize(numbers, count).tolist()))
        return ConcatDataset(parts)

    def rows_apart(self) -> dict[str, Any]:
        """Of every source that serves all methods, the rows that nothing is trained on, if there are any."""
        sources = self.sources if self.for_all else {}
        used = {name: one for name, one in sources.items() if one.weight and one.rows is not None}
        return {name: one.rows_apart for name, one in used.items() if len(one.rows_apart)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the model wrote, and that all this has happened."""
        if not self._has_begun:
            return {}
        written = {
            f"written.{name}": torch.stack([row["input_ids"] for row in source.rows])
            for name, source in self.sources.items()
            if source.write
        }
        return {"begun": torch.ones(1), **written}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Raises `ValueError` for what is no text of the model."""
        self._has_begun = True
        for name, source in self.sources.items():
            blocks = state.get(f"written.{name}")
            if source.write and blocks is None:
                self._has_begun = False  # asked for only now: it is written now, by the model as it is
            elif source.write:
                source.rows = [{"input_ids": block} for block in blocks.cpu()]
                check_tokens(source.rows, self.trainer)

    def state(self) -> dict[str, Any]:
        return {"remembered": {name: len(one.rows) for name, one in self.sources.items() if one.rows is not None}}


class Drawing:
    """
    Draws rows of several sources, each as often as its weight says. A draw depends on its address alone.

    Args:
        sources: name -> rows and weight.
        seed: of the draws.
    """

    def __init__(self, sources: Mapping[str, tuple[Any, float]], seed: int):
        self.names, self.seed = list(sources), seed
        self.counts = [len(rows) for rows, _ in sources.values()]
        weights = np.array([weight for _, weight in sources.values()], dtype=np.float64)
        self._until = np.cumsum(weights / weights.sum())

    def __call__(self, chance: float, *address: Any) -> tuple[str, int, int] | None:
        """With a chance, a source, a row of it that is trained on, and a number for what else is drawn."""
        draws = np.random.Generator(np.random.Philox(addressed_seed(self.seed, *address)))
        happens, place = draws.random(2)
        if happens >= chance:
            return None
        which = min(int(np.searchsorted(self._until, place, side="right")), len(self.names) - 1)
        row, other = draws.integers(2**62, size=2).tolist()
        return self.names[which], _trained(row, self.counts[which]), other


def apart(count: int) -> range:
    """Of `count` rows the numbers of those that are kept apart: none where there are fewer than [`APART`]."""
    return range(count - count // APART, count)


def _trained(draw: int, count: int) -> int:
    return draw % (count - count // APART)
