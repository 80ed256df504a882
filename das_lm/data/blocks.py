"""Training blocks and held-out windows. Randomness is addressed, not streamed: order and masks are pure functions."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import Dataset

from das_lm.data.masking import IGNORED, MLMMasking, NextTokens
from das_lm.errors import UserError, did_you_mean
from das_lm.randomness import addressed_seed, permutation

SCHEDULES = ("sequential", "alternating", "interleaved")


class TrainingRows(Dataset):
    """
    The rows of one or several domains in an order that depends on (seed, domain, epoch) alone: a resumed run sees what
    an uninterrupted one does, on any number of processes.

    Args:
        domains: domain -> map-style data set, whose rows are dictionaries.
        seed: of the order.
        schedule: how several domains share an epoch: `"alternating"`, one after the other, each shuffled (so that
            their epochs take turns), or `"interleaved"`, every batch mixes. With one domain both are a plain shuffle.

    Raises:
        UserError: an unknown schedule.
    """

    def __init__(self, domains: Mapping[str, Any], seed: int, schedule: str = "sequential"):
        if schedule not in SCHEDULES:
            raise UserError(f"schedule: there is no '{schedule}'.{did_you_mean(schedule, SCHEDULES)}")
        self.domains = dict(domains)
        self.seed = seed
        self.schedule = schedule
        self.memories: dict[str, tuple[Any, float]] = {}  # name -> rows, and their share; in the order of the names
        # In shared memory, so that data-loader workers that live for several epochs see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._known: dict[str, tuple[Any, Any]] = {}  # of the newest epoch: order, and what is replayed

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; the Trainer calls it."""
        self._epoch.fill_(epoch)

    def reset(self, seed: int) -> None:
        """Begin anew, with another seed: nothing is replayed."""
        self.seed, self.memories, self._known = seed, {}, {}

    def at(self, epoch: int) -> Self:
        """The same rows in the order of another epoch; negative ones are never trained on, and replay nothing."""
        other = copy.copy(self)
        other._epoch, other._known = torch.tensor(epoch), {}
        return other

    def replay(self, name: str, memory: Any, share: float) -> None:
        """
        Put rows of a memory in the place of a share of the rows. Every row then has a number, `replayed_from`: 0 for
        the domains' own, n for the n-th of the memories in the order of their names. Where a row of a memory stands
        and which one it is depends on (seed, domains, epoch, position); its masks are of this draw alone.

        Args:
            name: of the memory.
            memory: map-style data set of rows as the domains have them.
            share: in [0, 1]; that of all memories too.
        """
        self.memories = dict(sorted({**self.memories, name: (memory, share)}.items()))
        self._known = {}

    def number_of(self, name: str) -> int:
        """`replayed_from` of the rows of a memory."""
        return 1 + list(self.memories).index(name)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.domains.values())

    def available(self, count: int) -> int:
        """How many of the first `count` rows of an epoch there are."""
        return min(count, len(self))

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch = self._epoch.item()
        replayed = self._replayed(len(self), epoch)
        if replayed is not None and replayed[0][position]:
            return self._recalled(int(replayed[0][position]), int(replayed[1][position]), epoch, position)
        domain, index = self._located(int(self._ordered(epoch)[position]))
        row = self.row(self.domains[domain], domain, index, epoch)
        return row if replayed is None else {**row, "replayed_from": 0}

    def row(self, rows: Any, domain: Any, index: int, epoch: int) -> dict[str, Any]:
        """One row of a data set, with an `example_id` that fits int64; `domain`, whatever the data set is known by,
        is part of its address."""
        return {**rows[index], "example_id": addressed_seed(domain, index) >> 1}

    def _located(self, index: int) -> tuple[str, int]:
        """A row counted through all domains -> its domain, and its index there."""
        for domain, rows in self.domains.items():
            if index < len(rows):
                return domain, index
            index -= len(rows)
        raise IndexError(index)

    def _ordered(self, epoch: int) -> np.ndarray:
        """Position in the epoch -> row, counted through all domains."""
        if self._known.get("order", (None,))[0] != epoch:
            parts, start = [], 0
            for domain, rows in self.domains.items():
                parts.append(start + permutation(len(rows), self.seed, domain, epoch))
                start += len(rows)
            order = np.concatenate(parts)
            if self.schedule == "interleaved":
                order = order[permutation(start, self.seed, "interleaved", epoch)]
            self._known["order"] = (epoch, order)
        return self._known["order"][1]

    def _replayed(self, size: int, epoch: int, *window: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Position in the epoch, or in a window of it, -> number of the memory that stands there, and its row, each
        [size]; `None` where nothing is replayed."""
        if not self.memories or epoch < 0:
            return None
        address = (epoch, *window)
        if self._known.get("replayed", (None,))[0] != address:
            draws = np.random.Generator(np.random.Philox(addressed_seed(self.seed, "replay", *self.domains, *address)))
            memories, shares = zip(*self.memories.values(), strict=True)
            place = np.searchsorted(np.cumsum(shares), draws.random(size), side="right")  # the last: of no memory
            rows = np.stack([draws.integers(len(memory), size=size) for memory in memories])
            numbers = np.where(place < len(memories), place + 1, 0)
            self._known["replayed"] = (address, (numbers, rows[numbers - 1, np.arange(size)]))
        return self._known["replayed"][1]

    def _recalled(self, number: int, index: int, epoch: int, position: int) -> dict[str, Any]:
        """A row of a memory, in a place that is its address beside (epoch, index)."""
        name = list(self.memories)[number - 1]
        row = self.row(self.memories[name][0], (name, *self.domains, position), index, epoch)
        return {**row, "replayed_from": number}


class TrainingBlocks(TrainingRows):
    """
    The packed blocks of one or several domains: [`TrainingRows`] with masks that depend on (seed, domain, epoch,
    block) alone.

    Args:
        domains: domain -> data set with a column `input_ids`.
        masking: what makes inputs and labels of a block.
        seed: of the order and the masks.
        schedule: see [`TrainingRows`].
    """

    def __init__(
        self, domains: Mapping[str, Any], masking: MLMMasking | NextTokens, seed: int, schedule: str = "sequential"
    ):
        super().__init__({name: blocks.with_format("numpy") for name, blocks in domains.items()}, seed, schedule)
        self.masking = masking

    def row(self, rows: Any, domain: Any, index: int, epoch: int) -> dict[str, Any]:
        """A block with its masks and their labels, each [tokens]; of several domains with `from_domain`, which of them
        it is of (0 for a memory's, too)."""
        input_ids = np.asarray(rows[index]["input_ids"], dtype=np.int64)
        masked, labels = self.masking(input_ids, addressed_seed(self.seed, domain, epoch, index))
        row = {"input_ids": masked, "labels": labels, "example_id": addressed_seed(domain, index) >> 1}
        if len(self.domains) > 1:
            row["from_domain"] = list(self.domains).index(domain) if domain in self.domains else 0
        return row


class HeldOutWindows(Dataset):
    """
    Held-out text, window by window, the longest first, with masks that depend on (seed, text of the window) alone: two
    checkpoints of one model see the same masks.

    Args:
        windows: data set with columns `input_ids`, `document` (the index of the document) and, for what is measured
            per byte, `bytes` (of text, per token), as `packing.windows` makes them.
        masking: what makes inputs and labels of a window.
        seed: of the masks.
    """

    def __init__(self, windows: Any, masking: MLMMasking | NextTokens, seed: int):
        self.windows = windows.with_format("numpy")
        self.masking = masking
        self.seed = seed
        lengths = np.array([len(ids) for ids in windows["input_ids"]])
        self._order = np.argsort(-lengths, kind="stable").tolist()

    def half(self, which: int) -> HeldOutWindows:
        """Every second document: 0, what something is chosen by; 1, what is then reported.

        Raises:
            UserError: there is one document.
        """
        documents = np.asarray(self.windows["document"])
        if documents.max() == 0:
            raise UserError("a single held-out document cannot be halved, to choose by one half: give two or more")
        chosen = self.windows.with_format(None).select(np.flatnonzero(documents % 2 == which))
        renumbered = chosen.remove_columns("document").add_column(
            "document", (np.asarray(chosen["document"]) // 2).tolist()
        )
        return HeldOutWindows(renumbered, self.masking, self.seed)

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same windows, bytes of text and masks."""
        columns = [
            self.windows.with_format(None)[name] for name in ("input_ids", "bytes") if name in self.windows.features
        ]
        rows = [np.asarray(row, dtype=np.int64).tobytes() for column in columns for row in column]
        content = hashlib.blake2b(b"|".join(rows), digest_size=16).hexdigest()
        about = (*self.masking.address, self.seed)
        return f"{addressed_seed(content, list(self.windows['document']), *about):016x}"

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = self.windows[self._order[position]]
        input_ids = np.asarray(row["input_ids"], dtype=np.int64)
        masked, labels = self.masking(input_ids, addressed_seed(self.seed, "held out", input_ids.tolist()))
        size = {"bytes": int(row["bytes"][self.masking.predicted(labels)].sum())} if "bytes" in row else {}
        return {"input_ids": masked, "labels": labels, "document": int(row["document"]), **size}


class SingleMasks(Dataset):
    """
    Held-out windows with one token masked at a time, every one in its turn, for the pseudo-perplexity (Salazar et al.,
    arXiv 1910.14659): a row per token.

    Args:
        held_out: the windows.
        documents: how many documents, drawn by (seed, their number).
    """

    def __init__(self, held_out: HeldOutWindows, documents: int):
        self.held_out = held_out
        number = np.asarray(held_out.windows["document"])
        total = int(number.max()) + 1
        drawn = permutation(total, held_out.seed, "pseudo-perplexity")[:documents]
        self._place = {int(document): place for place, document in enumerate(sorted(drawn))}
        special = held_out.masking.special_ids
        self._rows = [
            (int(window), int(position))
            for window in np.flatnonzero(np.isin(number, drawn))
            for position in np.flatnonzero(~np.isin(held_out.windows[int(window)]["input_ids"], special))
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        window, position = self._rows[index]
        row = self.held_out.windows[window]
        input_ids = np.array(row["input_ids"], dtype=np.int64)
        labels = np.full_like(input_ids, IGNORED)
        labels[position] = input_ids[position]
        input_ids[position] = self.held_out.masking.mask_token_id
        size = {"bytes": int(row["bytes"][position])} if "bytes" in row else {}
        return {"input_ids": input_ids, "labels": labels, "document": self._place[int(row["document"])], **size}
