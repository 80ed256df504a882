"""Domains larger than memory: documents are read, tokenized and cut into blocks while a model trains on them."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from das_lm.data.blocks import TrainingBlocks
from das_lm.data.masking import MLMMasking, NextTokens
from das_lm.data.packing import cut, nothing_in, separator_of, special_tokens, text_room, tokenize, with_special_tokens
from das_lm.data.readers import missing_column, text_of, to_row
from das_lm.errors import UserError
from das_lm.randomness import permutation

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerFast

#: Blocks that are shuffled among one another, unless a recipe says otherwise.
SHUFFLE_BUFFER = 10_000
#: Characters that are tokenized at once, and rows that are read at once. The memory that they take does not depend on
#: how long documents are, as long as a few of them fit.
CHARACTERS_AT_ONCE = 1_000_000
ROWS_AT_ONCE = 16
#: Places that are remembered, each the beginning of a window; resuming needs one of the newest.
PLACES = 1000


class DocumentStream:
    """
    Documents that are read one after the other, and never held all at once.

    Args:
        source: rows with a column of text. It is read in its order, and must have the same one whenever it is read
            (not a shuffle buffer of its own).
        column: the column that holds the text.
        where: names the source in messages.
        min_characters: shorter documents are left out.
        held_out: ids (see `readers.to_row`) of documents that are left out wherever they stand.
        is_remote: reading what was read before, to see that it is the same, would load it again; it is not done.
        option: names the column, in messages.
    """

    def __init__(
        self,
        source: IterableDataset,
        column: str = "text",
        where: str = "the stream",
        min_characters: int = 1,
        held_out: Collection[str] = (),
        is_remote: bool = False,
        option: str = "column",
    ):
        self.source, self.column, self.where, self.is_remote = source, column, where, is_remote
        self.min_characters, self.held_out, self.option = min_characters, frozenset(held_out), option

    def batches(self, state: Any = None) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        """
        The documents (`id`, `text`, `characters`), about a million characters at a time.

        Args:
            state: of the source, to begin there; `None` for its beginning.

        Yields:
            the state of the source before these documents, and the documents.

        Raises:
            UserError: the column is missing or holds no text, or reading breaks off.
        """
        source = copy.deepcopy(self.source)  # it remembers how far it was read
        if state is not None:
            source.load_state_dict(state)
        rows, characters = [], 0
        try:
            for batch in source.iter(ROWS_AT_ONCE):
                if self.column not in batch:
                    raise UserError(missing_column(self.where, self.column, list(batch), self.option))
                for value in batch[self.column]:
                    row = to_row(text_of(value, self.where, self.column, self.option))
                    if row["characters"] >= self.min_characters and row["id"] not in self.held_out:
                        rows.append(row)
                        characters += len(row["text"])
                if characters >= CHARACTERS_AT_ONCE:
                    yield state, rows
                    state, rows, characters = source.state_dict(), [], 0
        except UserError:
            raise
        except Exception as error:  # whatever the library and the network raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.where}: reading broke off: {reason}; go on with --resume") from error
        if rows:
            yield state, rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _, rows in self.batches():
            yield from rows

    def check(self, read: tuple[int, str]) -> None:
        """
        Read what was read before, and no more.

        Args:
            read: number and running hash of the documents.

        Raises:
            UserError: it has changed.
        """
        now = (0, "")
        if not self.is_remote:
            for row in itertools.islice(self, read[0]):
                now = _and(now, [row])
            if now != read:
                raise self.changed(f"the first {read[0]:,} documents are not those that the run has read")

    def changed(self, what: str) -> UserError:
        """The error for other text."""
        return UserError(
            f"{self.where}: {what}: the text or its order has changed. Give the text that the run began with, or "
            "start a new run"
        )


def _and(read: tuple[int, str], rows: list[dict[str, Any]]) -> tuple[int, str]:
    """Number and running hash of documents, with further ones."""
    digest = read[1]
    for row in rows:
        digest = hashlib.blake2b(f"{digest}{row['id']}".encode(), digest_size=8).hexdigest()
    return read[0] + len(rows), digest


@dataclass
class Place:
    """
    Where a window of blocks begins in a stream, so that it can be read from there.

    Args:
        epoch: how often the stream was read to its end before.
        block: blocks before the window in this epoch.
        length: blocks of an epoch; known once it was read to its end.
        source: state of the source of documents, some time before.
        skip: tokens from there that belong to earlier blocks.
        document: id of the first document from there.
        read: number and running hash of the documents before it in this epoch.
        whole: number and running hash of the documents of an epoch, where one was read to its end.
    """

    epoch: int = 0
    block: int = 0
    length: int | None = None
    source: Any = None
    skip: int = 0
    document: str | None = None
    read: tuple[int, str] = (0, "")
    whole: tuple[int, str] | None = None

    @property
    def row(self) -> int:
        """Rows before the window."""
        return self.epoch * (self.length or 0) + self.block


class TrainingStream(TrainingBlocks):
    """
    The blocks of a stream of documents as [`TrainingBlocks`]: the same blocks with the same masks, shuffled window by
    window. A window is `shuffle_buffer` blocks in a row (the last of an epoch may have fewer), in an order that is a
    function of (seed, domain, epoch, window) alone. It and the documents of one read are all that is in memory. When
    the stream ends, it begins anew.

    Positions are to be asked for in ascending order; others begin to read again from a place before. Every process
    reads the whole stream and takes its rows of each batch.

    Args:
        documents: what is read.
        tokenizer: makes tokens of it.
        max_length: tokens of a block.
        masking: what makes inputs and labels of a block.
        seed: of the order and the masks.
        domain: name of the domain.
        shuffle_buffer: blocks of a window.
    """

    def __init__(
        self,
        documents: DocumentStream,
        tokenizer: PreTrainedTokenizerFast,
        max_length: int,
        masking: MLMMasking | NextTokens,
        seed: int,
        domain: str,
        shuffle_buffer: int = SHUFFLE_BUFFER,
    ):
        super().__init__({}, masking, seed)
        self.documents, self.tokenizer, self.domain, self.shuffle_buffer = documents, tokenizer, domain, shuffle_buffer
        self.prefix, self.suffix = special_tokens(tokenizer)
        self.room = text_room(max_length, self.prefix, self.suffix)
        self.length = 0  # rows that training takes; the trainer knows
        self.domains = {domain: TrainedBlocks(self)}
        self._open()

    def _open(self, *places: Place) -> None:
        self._places = deque(places, maxlen=PLACES)
        self._windows: Iterator[tuple[Place, list[np.ndarray]]] | None = None
        self._known = {}

    # ---- rows ------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, Any]:
        place, blocks = self._window_of(position)
        local = position - place.row
        epoch, window = self._epoch.item() + place.epoch, place.block // self.shuffle_buffer
        index = self._shuffled(epoch, window, len(blocks))[local]
        row = self.row({place.block + index: {"input_ids": blocks[index]}}, self.domain, place.block + index, epoch)
        replayed = self._replayed(len(blocks), epoch, window)
        if replayed is None:
            return row
        number, index = (int(part[local]) for part in replayed)
        return self._recalled(number, index, epoch, position) if number else {**row, "replayed_from": 0}

    def available(self, count: int) -> int:
        """How many of the first `count` rows there are before the stream begins anew."""
        if self._windows is None:
            self._window_of(0)
        while True:
            place, blocks = self._window
            if place.length is not None:
                return min(count, place.length)
            if place.block + len(blocks) >= count:
                return count
            self._advance()

    def at(self, epoch: int) -> Self:
        """The same blocks in the order and with the masks of another epoch, read anew."""
        other = super().at(epoch)
        other._open()
        return other

    def block(self, position: int) -> np.ndarray:
        """Token ids of the block at a position, [tokens]; no masks, and nothing replayed."""
        place, blocks = self._window_of(position)
        epoch, window = self._epoch.item() + place.epoch, place.block // self.shuffle_buffer
        return blocks[self._shuffled(epoch, window, len(blocks))[position - place.row]]

    def _shuffled(self, *window: int) -> list[int]:
        """Position in a window (its epoch, number and size) -> block of the window."""
        if self._known.get("order", (None,))[0] != window:
            *address, size = window
            self._known["order"] = (window, permutation(size, self.seed, self.domain, *address).tolist())
        return self._known["order"][1]

    # ---- resuming --------------------------------------------------------------------------------------------------

    def state_dict(self, position: int) -> dict[str, Any]:
        """What [`load_state_dict`] needs to read from a position on; JSON."""
        seen = (0, "") if self._windows is None else self._window[0].whole or self._read_so_far
        return {**asdict(self._place_before(position)), "seen": seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Make tokens from the place that [`state_dict`] named on. What was read before is read again, to compare it.

        Raises:
            UserError: it has changed.
        """
        pairs = {name: tuple(state[name]) for name in ("read", "whole", "seen") if state.get(name)}
        self.documents.check(pairs.pop("seen", (0, "")))
        self._open(Place(**{name: value for name, value in {**state, **pairs}.items() if name != "seen"}))

    def _place_before(self, position: int) -> Place:
        return max((place for place in self._places if place.row <= position), key=lambda p: p.row, default=Place())

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _window_of(self, position: int) -> tuple[Place, list[np.ndarray]]:
        """The window in which a position lies."""
        if self._windows is None or position < self._window[0].row:
            self._windows = self._read(self._place_before(position))
            self._advance()
        while position >= self._window[0].row + len(self._window[1]):
            self._advance()
        return self._window

    def _advance(self) -> None:
        self._window = None  # two of them are not held
        self._window = next(self._windows)
        self._places.append(self._window[0])

    def _read(self, place: Place) -> Iterator[tuple[Place, list[np.ndarray]]]:
        """Window after window from a place on, epoch after epoch."""
        while True:
            blocks, count = self._blocks(place), place.block
            while window := list(itertools.islice(blocks, self.shuffle_buffer)):
                begin = replace(place, block=count, **window[0][1])
                yield begin, [ids for ids, _ in window]
                count += len(window)
                del window
            if not count:
                raise nothing_in(self.documents, f"{self.documents.where}: ")
            if place.whole not in (None, self._read_so_far):
                raise self.documents.changed("it was read to its end again, and differs from the first time")
            place = Place(place.epoch + 1, length=count, whole=self._read_so_far)

    def _blocks(self, place: Place) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Block after block from a place on to the end of the epoch, with what is its own of a place."""
        reads: deque[tuple[int, dict[str, Any]]] = deque()  # tokens before each, and what is its own of a place
        self._read_so_far = place.read
        separator = separator_of(self.tokenizer)

        def tokens() -> Iterator[np.ndarray]:
            """Of document after document, from `place` on."""
            before = -place.skip
            for state, rows in self.documents.batches(place.source):
                document = rows[0]["id"]
                if not reads and place.document not in (None, document):
                    raise self.documents.changed("where the checkpoint was written, another document stands now")
                reads.append((before, {"source": state, "document": document, "read": self._read_so_far}))
                self._read_so_far = _and(self._read_so_far, rows)
                ids = tokenize({"text": [row["text"] for row in rows]}, self.tokenizer, separator)["input_ids"]
                piece = np.fromiter(itertools.chain.from_iterable(ids), np.int32)
                yield piece[max(0, -before) :]
                before += len(piece)

        done = 0
        for text in cut(tokens(), self.room, separator, began=place.block > 0):
            for ids in with_special_tokens(text, self.prefix, self.suffix):
                while len(reads) > 1 and reads[1][0] <= done:
                    reads.popleft()
                before, own = reads[0]
                yield ids, {**own, "skip": done - before}
                done += self.room


class TrainedBlocks:
    """
    The blocks of a stream that training takes, once each and without masks, for memories: a sequence of rows, which is
    read again to give them.

    Args:
        stream: the stream.
    """

    def __init__(self, stream: TrainingStream):
        self.stream = stream
        self._again: TrainingStream | None = None

    def __len__(self) -> int:
        return self.stream.available(len(self.stream))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if self._again is None or index == 0:
            self._again = self.stream.at(0)
        return {"input_ids": self._again.block(index)}
