"""From documents to what the model reads: packed blocks for training, windows of single documents for measuring."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from das_lm.data.chats import as_read, chat_opening
from das_lm.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerFast

#: The last, incomplete block is kept if it holds at least this many tokens of text, or is the only one.
MIN_TOKENS_OF_LAST_BLOCK = 8

BLOCKS_PER_CHUNK = 65_536


def pack(
    documents: Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int, num_proc: int | None = None
) -> Dataset:
    """Tokenize documents and cut them, joined by a separator token, into blocks without padding.

    A block is the tokenizer's leading special tokens, text, and its trailing special tokens. All are `max_length`
    tokens long except the last, which is dropped where it holds fewer than 8 tokens of text and is not the only one.
    The separator is the tokenizer's `sep_token`, else its `eos_token`, else nothing. All blocks are held in memory, at
    four bytes a token; a stream (see `streaming`) holds a few of them.

    Args:
        documents: With the column `text`. Where they are on disk, `datasets` caches their tokens.
        max_length: Tokens per block, special tokens included.
        num_proc: Processes that tokenize.

    Returns:
        A data set with the column `input_ids` (int32).

    Raises:
        UserError: There is no text, the tokenizer makes no token of it, or `max_length` leaves no room beside the
            special tokens.
    """
    import datasets

    prefix, suffix = special_tokens(tokenizer)
    room = text_room(max_length, prefix, suffix)
    separator = separator_of(tokenizer)
    tokens = documents.map(
        tokenize,
        batched=True,
        remove_columns=documents.column_names,
        features=_features("input_ids"),
        fn_kwargs={"tokenizer": tokenizer, "separator": separator},
        num_proc=num_proc,
        desc="Tokenizing",
    )
    batches = (
        batch["input_ids"].combine_chunks().flatten().to_numpy()
        for batch in tokens.with_format("arrow").iter(batch_size=1_000)
    )
    chunks = []
    for text in cut(batches, room, separator):
        for start in range(0, len(text), BLOCKS_PER_CHUNK):
            part = text[start : start + BLOCKS_PER_CHUNK]
            chunks.append(_data_set(with_special_tokens(part, prefix, suffix)))
    if not chunks:
        raise nothing_in(documents)
    return datasets.concatenate_datasets(chunks)


def cut(tokens: Iterable[np.ndarray], room: int, separator: int | None, began: bool = False) -> Iterator[np.ndarray]:
    """Cut the tokens of documents, which come piece by piece, into the text of blocks.

    Args:
        tokens: int32 [tokens]; a separator after each document, if there is one.
        room: Tokens of text per block.
        began: Blocks were cut before these tokens, so that a short last one is not the only one.

    Yields:
        Blocks as soon as they are full, [blocks, room]; at last, if it is kept, [1, rest].
    """
    held_back = 0 if separator is None else 1  # a separator joins documents: none follows the last
    left = np.empty(0, np.int32)
    for piece in tokens:
        left = np.concatenate([left, piece])
        full = max(0, len(left) - held_back) // room
        if full:
            began = True
            yield left[: full * room].reshape(full, room)
            left = left[full * room :]
    rest = max(0, len(left) - held_back)
    if rest >= MIN_TOKENS_OF_LAST_BLOCK or (rest and not began):
        yield left[None, :rest]


def windows(documents: Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int) -> Dataset:
    """Tokenize held-out documents, each on its own, long ones in consecutive windows without overlap.

    Args:
        documents: With the column `text`.
        max_length: Tokens per window, the tokenizer's leading and trailing special tokens included.

    Returns:
        A data set with the columns `input_ids` (int32), `document` (position in `documents`) and `bytes` (UTF-8 bytes
        of text from the end of the token before to the end of each token, 0 for special tokens; over the windows of a
        document they sum to the document's). A document of which the tokenizer makes no token has no window.

    Raises:
        UserError: There is no text, the tokenizer makes no token of it or knows no offsets, or `max_length` leaves no
            room beside the special tokens.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} cannot say which text a token covers; use a fast tokenizer")
    prefix, suffix = special_tokens(tokenizer)
    found = documents.map(
        _windows,
        batched=True,
        with_indices=True,
        remove_columns=documents.column_names,
        features=_features("input_ids", "document", "bytes"),
        fn_kwargs={
            "tokenizer": tokenizer,
            "prefix": prefix,
            "suffix": suffix,
            "room": text_room(max_length, prefix, suffix),
        },
        desc="Tokenizing held-out text",
    )
    if not len(found):
        raise nothing_in(documents)
    return found


def nothing_in(documents: Iterable[Mapping[str, Any]], where: str = "") -> UserError:
    """What to say of documents that give no token."""
    if any((document["text"] or "").strip() for document in documents):
        return UserError(f"{where}the tokenizer makes no token of the text; is it the tokenizer of this model?")
    return UserError(f"{where}the text is empty: no document holds more than white space")


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text, such as ``([cls], [sep])`` or ``([], [])``."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start], whole[start + len(text) :]
    raise UserError("the tokenizer changes a text when it adds special tokens, so that they cannot be told apart")


def separator_of(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token between the documents of a block: `sep_token`, else `eos_token`, else none."""
    return tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id


def ends_documents(tokenizer: PreTrainedTokenizerFast) -> bool:
    """
    Whether a separator in a block is the end of a document. It is not where a chat ends every turn with it, as the
    chat templates of instruct models do whose `eos_token` is `<|im_end|>`.
    """
    separator = separator_of(tokenizer)
    try:
        return separator is not None and separator not in chat_opening(tokenizer)[1]
    except UserError:  # told where chats are read or written
        return True


def highest_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The highest id that a text can get."""
    return max([*tokenizer.get_vocab().values(), *tokenizer("a")["input_ids"]])


def start_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """What stands before the first token of a text for a causal model: `bos_token`, or `eos_token` without one.

    Raises:
        UserError: the tokenizer has neither.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise UserError("the tokenizer has neither a bos_token nor an eos_token, from which a causal model can start")
    return start


def longest_input(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> float:
    """Tokens that a model reads at most; infinity if there is no limit."""
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    for name, module in model.base_model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from padding_idx + 1.
            positions = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return min(positions, tokenizer.model_max_length)


def text_room(max_length: int, prefix: list[int], suffix: list[int]) -> int:
    """Tokens of text per block or window."""
    room = max_length - len(prefix) - len(suffix)
    if room < 1:
        raise UserError(f"max_length {max_length} leaves no room for text beside the tokenizer's special tokens")
    return room


def _features(*columns: str) -> Features:
    from datasets import Features, Sequence, Value

    return Features(
        {column: Value("int64") if column == "document" else Sequence(Value("int32")) for column in columns}
    )


def tokenize(batch: dict[str, list], tokenizer: PreTrainedTokenizerFast, separator: int | None) -> dict[str, list]:
    """Token ids of each document, a separator after each that has any."""
    ids = tokenizer(
        as_read(batch["text"], tokenizer),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning that a document is longer than the model's maximum
    )["input_ids"]
    end = [] if separator is None else [separator]
    return {"input_ids": [document + end if document else document for document in ids]}


def with_special_tokens(text: np.ndarray, prefix: list[int], suffix: list[int]) -> np.ndarray:
    """Blocks from their text: int32 [blocks, tokens]."""
    head = np.broadcast_to(np.array(prefix, np.int32), (len(text), len(prefix)))
    tail = np.broadcast_to(np.array(suffix, np.int32), (len(text), len(suffix)))
    return np.concatenate([head, text, tail], axis=1)


def _data_set(blocks: np.ndarray) -> Dataset:
    """Blocks, int32 [blocks, tokens], as a data set."""
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable

    offsets = np.arange(len(blocks) + 1, dtype=np.int32) * blocks.shape[1]
    column = pyarrow.ListArray.from_arrays(offsets, blocks.ravel())
    return Dataset(InMemoryTable(pyarrow.table({"input_ids": column})))


def _windows(
    batch: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerFast,
    prefix: list[int],
    suffix: list[int],
    room: int,
) -> dict[str, list[Any]]:
    texts = as_read(batch["text"], tokenizer)
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    rows: dict[str, list[Any]] = {"input_ids": [], "document": [], "bytes": []}
    for index, text, ids, offsets in zip(indices, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        sizes = _token_bytes(text, [end for _, end in offsets])
        for start in range(0, len(ids), room):
            rows["input_ids"].append(prefix + ids[start : start + room] + suffix)
            rows["document"].append(index)
            rows["bytes"].append([0] * len(prefix) + sizes[start : start + room] + [0] * len(suffix))
    return rows


def _token_bytes(text: str, ends: list[int]) -> list[int]:
    """UTF-8 bytes up to the end of each token, in characters, from where the one before ended; the last takes the
    rest. Of the tokens of one character, the first has its bytes."""
    sizes, begin = [], 0
    for end in [*ends[:-1], len(text)]:
        sizes.append(len(text[begin:end].encode()))
        begin = max(begin, end)
    return sizes
