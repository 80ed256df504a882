"""New words: those that a domain uses often, and the tokenizer cuts into pieces, become tokens of their own."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from rich.progress import track
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from das_lm.data.chats import in_words
from das_lm.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MIN_LETTERS = 4
WORD = r"\p{L}\p{M}\p{N}_"  # none of these follows the end of a word
BYTE_LEVEL, SENTENCEPIECE = "Ġ", "▁"  # what the space before a word becomes


def find_new_words(
    documents: Dataset, tokenizer: PreTrainedTokenizerFast, count: int, min_documents: int = 5
) -> list[str]:
    """
    The words that would save the most tokens, had they tokens of their own: frequency × (pieces − 1).

    A word is four letters or more, as the tokenizer's normalizer leaves them and as it splits text into words. Where
    tokens include the space before a word (all but WordPiece), only words after a space count.

    Args:
        documents: with the column `text`.
        count: how many words at most.
        min_documents: words found in fewer documents are left out.

    Returns:
        the words, the one that saves most first; of equals, in alphabetical order.

    Raises:
        UserError: `count` is below 1, or the tokenizer cannot be given new words (see [`add_words`]).
    """
    if count < 1:
        raise UserError(f"add_tokens: {count} is too few; give the number of words to add, 1 or more")
    words = _Words(tokenizer)
    frequency, spread = Counter(), Counter()
    hidden = not PartialState(cpu=not torch.cuda.is_available()).is_main_process
    texts = track(documents["text"], "Looking for new words", len(documents), transient=True, disable=hidden)
    for text in texts:
        tokens = Counter(words.chunks(in_words(text)))
        frequency.update(tokens)
        spread.update(tokens.keys())
    saved = {}
    for token, documents_with in spread.items():
        word = words.word(token)
        is_new = word is not None and words.core.token_to_id(token) is None
        if is_new and len(word) >= MIN_LETTERS and documents_with >= min_documents:
            saved[word] = frequency[token] * (len(words.pieces(token)) - 1)
    return sorted((word for word in saved if saved[word] > 0), key=lambda word: (-saved[word], word))[:count]


def add_words(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, words: Iterable[str]
) -> PreTrainedTokenizerFast:
    """
    Give words tokens of their own. Every other word is tokenized as before, and texts decode as before.

    A WordPiece tokenizer gets them as whole-word added tokens. With BPE, byte-level or with ▁ for spaces, added tokens
    would lose the space before them, and further merges would change the words that contain new ones. Its vocabulary
    grows instead, and what is an entry as a whole is no longer merged (`ignore_merges`, as in Llama 3); where ▁ does
    not separate words, a regular expression sets the new ones apart.

    The new rows of the embeddings, and of the output layer with its bias, are the means of the rows of their pieces;
    the old ones keep their values. Rows beyond the old vocabulary that the model has already are used first.

    Args:
        model: a language model, changed in place.
        tokenizer: a fast one; it is left alone.
        words: words of letters; those in the vocabulary already are passed over.

    Returns:
        the tokenizer with the words. It is saved and loaded as any other.

    Raises:
        UserError: something is no word to the tokenizer, or this kind of tokenizer cannot be given words.
    """
    known = _Words(tokenizer)
    vocabulary = known.core.get_vocab(with_added_tokens=True)
    tokens = [token for token in dict.fromkeys(map(known.token, words)) if token not in vocabulary]
    if not tokens:
        return tokenizer
    ids = {token: number for number, token in enumerate(tokens, max(vocabulary.values()) + 1)}
    if known.lead:
        larger = _with_entries(model, tokenizer, known, ids)
    else:
        larger = copy.deepcopy(tokenizer)
        larger.add_tokens([AddedToken(token, single_word=True, normalized=True) for token in tokens])
    if any(ids[token] not in larger(f". {known.word(token)}")["input_ids"] for token in tokens):
        raise UserError(
            f"add_tokens: transformers builds the tokenizer of a {model.config.model_type} model anew from its "
            "vocabulary, which would lose the new words; leave add_tokens out"
        )
    _grow(model, {ids[token]: known.pieces(token) for token in tokens})
    return larger


class _Words:
    """
    How a tokenizer sees words.

    Args:
        tokenizer: a fast one.

    Raises:
        UserError: it is none of WordPiece, byte-level BPE and BPE with ▁.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        if not tokenizer.is_fast:
            raise UserError("add_tokens: the tokenizer is no fast one, and only those can be given words")
        self.core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.lead = self._lead()
        if self.lead == SENTENCEPIECE:  # its chunks hold more than a word: punctuation, or the whole text
            _isolate(self.core, rf"{SENTENCEPIECE}\p{{L}}+(?![{WORD}])")

    def _lead(self) -> str:
        """What stands at the beginning of a token for the space before a word."""
        if isinstance(self.core.model, models.WordPiece):
            return ""
        if isinstance(self.core.model, models.BPE):
            seen = "".join(self.chunks("a a"))
            for lead in (BYTE_LEVEL, SENTENCEPIECE):
                if lead in seen:
                    return lead
        raise UserError(
            f"add_tokens: a tokenizer of the kind {type(self.core.model).__name__} cannot be given words without a "
            "change to how others are cut; WordPiece can, and BPE that is byte-level or has ▁ for spaces"
        )

    def chunks(self, text: str) -> list[str]:
        """The parts of a text that are cut into tokens each on its own."""
        if self.core.normalizer is not None:
            text = self.core.normalizer.normalize_str(text)
        if self.core.pre_tokenizer is None:
            return [text]
        return [chunk for chunk, _ in self.core.pre_tokenizer.pre_tokenize_str(text)]

    def pieces(self, token: str) -> list[int]:
        """The tokens of a chunk."""
        return [piece.id for piece in self.core.model.tokenize(token)]

    def text(self, token: str) -> str:
        """What an entry of the vocabulary stands for."""
        if self.lead == BYTE_LEVEL:
            return decoders.ByteLevel().decode([token])
        return token.replace(SENTENCEPIECE, " ") if self.lead else token

    def word(self, chunk: str) -> str | None:
        """The word that a chunk is, with the space before it where tokens include it; `None` if it is none."""
        text = self.text(chunk)
        word = text.removeprefix(" ")
        return word if word.isalpha() and (word != text) == bool(self.lead) else None

    def token(self, word: str) -> str:
        """What a word is in the vocabulary."""
        _, *chunks = self.chunks(f". {word}")
        if len(chunks) != 1 or self.word(chunks[0]) is None or not self.pieces(chunks[0]):
            raise UserError(f"add_tokens: '{word}' is not one word of letters to this tokenizer")
        return chunks[0]


def _isolate(core: Tokenizer, pattern: str) -> None:
    """Let what matches a pattern be cut into tokens on its own."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([core.pre_tokenizer, split]) if core.pre_tokenizer else split


def _apart(words: Iterable[str], vocabulary: Iterable[str]) -> str:
    """A pattern for words with the ▁ before them, except where some token could reach beyond their ends."""
    followers = defaultdict(set)  # of a character in some token
    for token in vocabulary:
        for first, second in pairwise(token):
            followers[first].add(second)
    before = "".join(re.escape(first) for first in sorted(followers) if SENTENCEPIECE in followers[first])
    groups = defaultdict(list)  # by their last letter
    for word in words:
        groups[word[-1]].append(word)
    ends = []
    for last, group in groups.items():
        after = "".join(re.escape(second) for second in sorted(followers[last]))
        ends.append(f"(?:{'|'.join(group)})(?![{WORD}{after}])")
    return f"(?<![{SENTENCEPIECE}{before}]){SENTENCEPIECE}(?:{'|'.join(ends)})"


def _with_entries(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, known: _Words, ids: Mapping[str, int]
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with more entries in its vocabulary, that takes an entry as a whole.

    Transformers builds the tokenizers of most models from vocabulary and merges, and drops the rest; of the general
    class it reads the file.
    """
    from transformers import AutoTokenizer

    backend = tokenizer.backend_tokenizer
    if not backend.model.ignore_merges:
        _check_merges(backend, known)
    content = json.loads(backend.to_str())
    content["model"]["vocab"] = backend.get_vocab(with_added_tokens=True) | ids  # its ids may have no gap
    content["model"]["ignore_merges"] = True
    core = Tokenizer.from_str(json.dumps(content))
    if known.lead == SENTENCEPIECE:
        _isolate(core, _apart(map(known.word, ids), backend.get_vocab(with_added_tokens=False)))
        _isolate(core, r"(?<=\A<)0x[0-9A-F]{2}>\z")  # the name of a byte's token is no token of the text
    with TemporaryDirectory() as directory:
        model.config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        core.save(str(Path(directory, "tokenizer.json")))
        config = Path(directory, "tokenizer_config.json")
        settings = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps(settings | {"tokenizer_class": "TokenizersBackend"}), encoding="utf-8")
        larger = AutoTokenizer.from_pretrained(directory)
    larger.name_or_path = tokenizer.name_or_path
    return larger


def _check_merges(backend: Tokenizer, known: _Words) -> None:
    """
    Raises:
        UserError: the tokenizer has an entry that its merges do not lead to, and that a text could consist of.
    """
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in backend.get_vocab(with_added_tokens=False):
        is_byte = backend.model.byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", token)  # stands for no such text
        if token in added or is_byte or [piece.value for piece in backend.model.tokenize(token)] == [token]:
            continue
        if token in known.chunks(known.text(token)):
            raise UserError(
                f"add_tokens: the merges of the tokenizer do not lead to its token '{token}', so that it cannot be "
                "given words without a change to how that text is cut; leave add_tokens out"
            )


def _grow(model: PreTrainedModel, pieces: Mapping[int, Sequence[int]]) -> None:
    """Give rows to new tokens: the means of those of their pieces."""
    rows = max(pieces) + 1
    if rows > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, head.weight, head.bias):
            if weight is not None:
                means = [weight[list(of_one)].double().mean(dim=0) for of_one in pieces.values()]
                weight[list(pieces)] = torch.stack(means).to(weight.dtype)
