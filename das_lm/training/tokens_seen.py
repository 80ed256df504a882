"""How many tokens of each source a model was trained on: of the domain, and of what is remembered or replayed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

if TYPE_CHECKING:
    from das_lm.training.trainer import ContinualTrainer

#: The file of a checkpoint that says how it was learned, and the key in it.
STATE_NAME = "continual_state.json"
KEY = "tokens_seen"


class TokensSeen:
    """
    Counts the tokens of every batch, padding left out, by the source of its rows; on the device, where they are.

    Args:
        trainer: whose batches they are.
    """

    def __init__(self, trainer: ContinualTrainer):
        self.trainer = trainer
        self._numbers: dict[str, int] = {}
        self._counts = torch.zeros(0, dtype=torch.int64)

    def begin(self, checkpoint: str | None) -> None:
        """A run begins, or goes on from a checkpoint, with what that has counted."""
        self._numbers, self._counts = {}, self._counts[:0]
        if checkpoint is not None and (path := Path(checkpoint) / STATE_NAME).is_file():
            found = json.loads(path.read_text(encoding="utf-8")).get(KEY, {})
            self._register(list(found))
            if self.trainer.is_world_process_zero():
                for name, count in found.items():
                    self._counts[self._numbers[name]] = count

    def note(self, batch: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> None:
        """
        Count a batch of text; of other data nothing.

        Args:
            batch: with `attention_mask`, [rows, tokens].
            inputs: its first rows: the domain's, with `from_domain` where there are several, and `replayed_from`
                where a memory stands in for some. What methods append comes after, in the order of the methods;
                second views of rows come last.
        """
        if self.trainer.units is None:
            return
        own, rows = len(inputs["input_ids"]), self.trainer.train_dataset
        tokens = batch["attention_mask"].sum(1)
        domains = list(rows.domains) if "from_domain" in batch else [self.trainer.domain]
        names = [*domains, *map(_replayed, rows.memories)]
        source = batch["from_domain"][:own] if "from_domain" in batch else torch.zeros_like(tokens[:own])
        if "replayed_from" in batch:
            memory = batch["replayed_from"][:own]
            source = torch.where(memory > 0, memory + len(domains) - 1, source)
        self._add(names, source, tokens[:own])
        if appended := [f"{name}, remembered" for method in self.trainer.methods for name in method.appended]:
            self._add(appended, torch.arange(len(appended), device=tokens.device), tokens[own : own + len(appended)])

    def _add(self, names: list[str], source: torch.Tensor, tokens: torch.Tensor) -> None:
        """Of every row its source, an index into `names`, and its tokens, each [rows]."""
        self._register(names)
        number = torch.tensor([self._numbers[name] for name in names], device=tokens.device)
        self._counts.index_add_(0, number[source], tokens)

    def _register(self, names: list[str]) -> None:
        for name in names:
            self._numbers.setdefault(name, len(self._numbers))
        if new := len(self._numbers) - len(self._counts):
            counts = self._counts.to(self.trainer.args.device)
            self._counts = torch.cat([counts, counts.new_zeros(new)])

    def state(self) -> dict[str, dict[str, int]]:
        """Source -> tokens, over all processes, which all take part."""
        if self.trainer.units is None:
            return {}
        seen: dict[str, int] = {}
        for counts in gather_object([dict(zip(self._numbers, self._counts.tolist(), strict=True))]):
            for name, count in counts.items():  # processes may have drawn from other sources
                seen[name] = seen.get(name, 0) + count
        return {KEY: {name: count for name, count in seen.items() if count}}


def _replayed(memory: str) -> str:
    """What a memory is called: those of methods are known by a class, and perhaps what is remembered."""
    _, _, source = memory.partition(" ")
    return f"{source or 'earlier domains'}, replayed"
