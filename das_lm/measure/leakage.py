"""
Leakage: measured text that was trained on, and training text that repeats itself.

Documents are compared by their n-grams: n words in a row, 13 as for GPT-3 (Brown et al., 2005.14165, appendix C). A
word is a run of letters and digits; case, punctuation and white space do not count.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from das_lm.data.chats import in_words
from das_lm.data.domains import Documents, Domain
from das_lm.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from das_lm.run.recipe import Recipe

#: Words of an n-gram.
N = 13
#: A document of fewer words than this is not judged: what it shares, it shares by chance (GPT-3's lower bound).
SHORTEST = 8
#: Share of a document's n-grams from which on it counts as trained on. A few may be a phrase that everybody writes.
MOST = 0.5
#: Passages that are kept of two texts that overlap.
EXAMPLES = 3

_WORD = re.compile(r"\w+")
_CHUNK = 1 << 22  # n-grams of training text that are hashed at once: 32 MB
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing modulo 2⁶⁴


@dataclass
class Found:
    """
    A document that shares n-grams with training text.

    Args:
        id: its id (see [`Documents`]).
        share: share of its n-grams.
        words: length of the longest passage that it shares with one training document, in words.
        source: id of that training document.
        passage: the passage as the document has it; of the longest [`EXAMPLES`] from different training documents.
    """

    id: str
    share: float
    words: int
    source: str
    passage: str | None = None


@dataclass
class Overlap:
    """
    What a text shares with training text.

    Args:
        trained: the domain that is trained on.
        measured: the domain or end-task whose text is looked for; `trained` itself where its training documents are
            looked for in those before them.
        documents: how many documents are looked for.
        too_short: how many of them are not judged, having fewer than [`SHORTEST`] words.
        found: those of which an n-gram was found, the longest passage first.
    """

    trained: str
    measured: str
    documents: int
    too_short: int
    found: list[Found] = field(default_factory=list)

    @property
    def examples(self) -> list[Found]:
        """Those whose passage is kept."""
        return [found for found in self.found if found.passage is not None]

    def at_least(self, share: float) -> int:
        """How many documents were found with that share of their n-grams or more."""
        return sum(found.share >= share for found in self.found)


@dataclass
class Leakage:
    """
    What [`check`] found.

    Args:
        n: words of an n-gram.
        repeated: per learned domain, its training documents of which an n-gram stands in an earlier one.
        leaked: per learned domain and measured text, the measured documents of which an n-gram stands in the domain's
            training text.
    """

    n: int
    repeated: list[Overlap]
    leaked: list[Overlap]

    def warnings(self) -> list[tuple[str, str]]:
        """(measured text, sentence) for every one of which documents were trained on, by [`MOST`] of their n-grams."""
        return [
            (
                one.measured,
                f"'{one.measured}': {count:,} of {one.documents:,} measured documents stand in training text: half or "
                f"more of their {self.n}-grams are in that of '{one.trained}'",
            )
            for one in self.leaked
            if (count := one.at_least(MOST))
        ]

    def to_json(self) -> dict[str, Any]:
        """All counts, documents and examples."""
        return asdict(self)

    def tables(self) -> list[Table]:
        """The counts and examples, for the console."""
        words = f"{self.n} words in a row"
        repeated = self._table(f"Training documents that share {words} with earlier ones", self.repeated, "itself")
        leaked = self._table(f"Measured documents that share {words} with training text", self.leaked)
        examples = Table("trained on", "compared", "words", "passage", title="Longest passages", title_justify="left")
        for overlap in (*self.repeated, *self.leaked):
            names = (overlap.trained, "itself" if overlap in self.repeated else overlap.measured)
            for found in overlap.examples:
                examples.add_row(*map(escape, names), str(found.words), escape(_shortened(found.passage)))
        return [repeated, leaked, *([examples] if examples.rows else [])]

    def _table(self, title: str, overlaps: list[Overlap], measured: str | None = None) -> Table:
        table = Table("trained on", "compared", title=title, title_justify="left")
        for header in ("documents", f"under {SHORTEST} words", "share any", "half or more", "all n-grams"):
            table.add_column(header, justify="right")
        for one in overlaps:
            counts = (one.documents, one.too_short, len(one.found), one.at_least(MOST), one.at_least(1))
            names = (one.trained, measured or one.measured)
            table.add_row(*map(escape, names), *(f"{count:,}" for count in counts))
        return table


def check(recipe: Recipe, n: int = N, end_tasks: Mapping[str, str] | None = None, progress: bool = True) -> Leakage:
    """
    Look for leakage and repetition in the text of a recipe: in the training text of every learned domain, for the
    held-out text of all domains, the measured text and the test text of end-tasks.

    Memory: about 160 bytes per word of what is looked for: of the measured texts and, of one domain at a time, of the
    training text.

    Args:
        recipe: what is learned and measured.
        n: words of an n-gram; a document that is shorter is looked for whole.
        end_tasks: name -> its test text: a file with a column `text`, of a kind that a domain's `data` may be, or a
            directory with `test.jsonl`.
        progress: show a progress bar.

    Raises:
        UserError: text that cannot be read, or an `n` below 2.
    """
    if n < 2:
        raise UserError(f"--n {n}: write the words of an n-gram, 2 or more; 13 is usual")
    text = recipe.load_text()
    for name, path in (end_tasks or {}).items():
        path = os.path.join(path, "test.jsonl") if os.path.isdir(path) else path
        text[f"{name} (end-task)"] = Domain(name, data=path, min_characters=1).load(measure_only=True)
    return find_leakage(text, n, repeated=True, progress=progress)


def find_leakage(text: Mapping[str, Documents], n: int = N, repeated: bool = False, progress: bool = False) -> Leakage:
    """
    Compare the training text of all domains that have one, and do not stream it, with the held-out text of all.

    Args:
        text: the text of all domains by name.
        n: words of an n-gram.
        repeated: compare the training text with itself, too.
        progress: show a progress bar.
    """
    vocabulary: dict[str, int] = defaultdict(lambda: len(vocabulary), {"": 0})
    learned = {name: documents.train for name, documents in text.items() if documents.has_length}
    texts = {name: documents.held_out for name, documents in text.items() if len(documents.held_out)}
    held_out = {name: _Words.of(documents, vocabulary, n) for name, documents in texts.items()}
    leakage = Leakage(n, [], [])
    for name in track(learned, "Comparing", transient=True, disable=not progress):
        train = _Words.of(learned[name], vocabulary, n)
        codes = np.random.default_rng(0).integers(2**64, size=len(vocabulary), dtype=np.uint64)
        if repeated:
            places = train.first_seen_in(train, codes)
            places[train.document_at(places) == train.ngrams.document] = -1  # not in an earlier document
            leakage.repeated.append(_overlap(name, name, train, train, places, learned[name], learned[name]))
        for measured, words in held_out.items():
            places = words.first_seen_in(train, codes)
            both = (text[measured].held_out, learned[name])
            leakage.leaked.append(_overlap(name, measured, words, train, places, *both))
    return leakage


class _Ngrams(NamedTuple):
    """Of every n-gram its document, where it begins, and its length; all of shape [n-grams]."""

    document: np.ndarray
    begin: np.ndarray
    length: np.ndarray


@dataclass
class _Words:
    """
    Documents as numbers of words.

    Args:
        ids: all documents in a row, a 0 after each, int32 [words + documents].
        lengths: words of every document, [documents].
        n: words of an n-gram.
    """

    ids: np.ndarray
    lengths: np.ndarray
    n: int

    @classmethod
    def of(cls, documents: Dataset, vocabulary: dict[str, int], n: int) -> _Words:
        """Number the words; new ones join the vocabulary, in which the empty word has the number 0."""
        ids, lengths = [], []
        for batch in documents.select_columns("text").iter(1000):
            words = []
            for text in batch["text"]:
                count = len(words)
                words += " ".join(_WORD.findall(in_words(text))).lower().split()
                lengths.append(len(words) - count)
                words.append("")
            ids.append(np.fromiter(map(vocabulary.__getitem__, words), np.int32, len(words)))
        return cls(np.concatenate(ids), np.array(lengths), n)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where every document begins, [documents]."""
        return np.cumsum(self.lengths + 1) - self.lengths - 1

    @cached_property
    def is_judged(self) -> np.ndarray:
        """Whether a document is long enough to be compared, [documents]."""
        return self.lengths >= min(SHORTEST, self.n)

    @cached_property
    def ngram_counts(self) -> np.ndarray:
        """N-grams of every document, [documents]."""
        return np.where(self.is_judged, np.maximum(self.lengths - self.n, 0) + 1, 0)

    @cached_property
    def ngrams(self) -> _Ngrams:
        """Of a document of n words or more every n in a row, of a shorter one all of its words, of one that is not
        judged none."""
        counts = self.ngram_counts
        document = np.repeat(np.arange(len(counts)), counts)
        begin = np.arange(counts.sum()) + np.repeat(self.starts - (np.cumsum(counts) - counts), counts)
        return _Ngrams(document, begin, np.minimum(self.lengths, self.n)[document])

    def document_at(self, places: np.ndarray) -> np.ndarray:
        """The document in which each place (position in `ids`) lies; −1 of a negative place."""
        return np.searchsorted(self.starts, places, side="right") - 1

    def first_seen_in(self, train: _Words, codes: np.ndarray) -> np.ndarray:
        """
        Where every n-gram first stands in training text.

        Args:
            train: the training text.
            codes: a random number for every word, uint64 [vocabulary].

        Returns:
            positions in `train.ids`, −1 where there is none; [n-grams].
        """
        places = np.full(len(self.ngrams.begin), -1)
        for length in np.unique(self.ngrams.length):
            if length > len(train.ids):
                break
            mine = np.flatnonzero(self.ngrams.length == length)
            begin = self.ngrams.begin[mine]
            wanted, which = np.unique(_hashes(codes[self.ids], length)[begin], return_inverse=True)
            first = np.full(len(wanted), -1)
            may_be = np.zeros(1 << 22, bool)  # by the first bits of a hash, which rule most of the training text out
            may_be[wanted >> np.uint64(42)] = True
            for start in range(0, len(train.ids) - length + 1, _CHUNK):
                hashes = _hashes(codes[train.ids[start : start + _CHUNK + length - 1]], length)
                hits = np.flatnonzero(may_be[hashes >> np.uint64(42)])
                slots = np.minimum(np.searchsorted(wanted, hashes[hits]), len(wanted) - 1)
                is_hit = wanted[slots] == hashes[hits]
                slots, earliest = np.unique(slots[is_hit], return_index=True)
                is_new = first[slots] < 0
                first[slots[is_new]] = start + hits[is_hit][earliest[is_new]]
            place = first[which]
            is_same = place >= 0
            for offset in range(length):  # the words themselves, for two n-grams may have one hash
                is_same &= self.ids[begin + offset] == train.ids[place + offset]
            places[mine] = np.where(is_same, place, -1)
        return places


def _hashes(codes: np.ndarray, length: int) -> np.ndarray:
    """Hash of every `length` words in a row: a polynomial in their codes modulo 2⁶⁴. uint64 [words − length + 1]."""
    count = len(codes) - length + 1
    hashes = codes[:count].copy()
    for offset in range(1, length):
        hashes *= _MULTIPLIER
        hashes += codes[offset : offset + count]
    return hashes


def _overlap(
    trained: str,
    measured: str,
    words: _Words,
    train: _Words,
    places: np.ndarray,
    documents: Dataset,
    train_documents: Dataset,
) -> Overlap:
    """The documents of which an n-gram has a place in the training text."""
    overlap = Overlap(trained, measured, len(documents), int((~words.is_judged).sum()))
    hits = np.flatnonzero(places >= 0)
    if not len(hits):
        return overlap
    document = words.ngrams.document
    shares = np.bincount(document[hits], minlength=len(documents)) / np.maximum(words.ngram_counts, 1)
    # A passage: n-grams that follow one another, and whose first places in the training text do, too.
    follows = (np.diff(hits) == 1) & (np.diff(places[hits]) == 1) & (np.diff(document[hits]) == 0)
    begins = np.flatnonzero(np.append(True, ~follows))
    first, counts = hits[begins], np.diff(np.append(begins, len(hits)))
    order = np.lexsort((-counts, document[first]))
    best = order[np.unique(document[first[order]], return_index=True)[1]]  # of every document its longest passage
    passages = []
    for ngram, count in zip(first[best], counts[best], strict=True):
        start, place = int(words.ngrams.begin[ngram]), int(places[ngram])
        before, length = _agreement(words.ids, train.ids, start, place, int(count + words.ngrams.length[ngram] - 1))
        passages.append((before + length, int(document[ngram]), start - before, place))
    ids, train_ids, shown = list(documents["id"]), list(train_documents["id"]), set()
    for length, number, start, place in sorted(passages, key=lambda passage: (-passage[0], passage[1])):
        source = train_ids[train.document_at(place)]
        found = Found(ids[number], float(shares[number]), length, source)
        if len(shown) < EXAMPLES and source not in shown:
            shown.add(source)
            found.passage = _passage(in_words(documents[number]["text"]), start - int(words.starts[number]), length)
        overlap.found.append(found)
    return overlap


def _agreement(ids: np.ndarray, train: np.ndarray, start: int, place: int, length: int) -> tuple[int, int]:
    """How far two texts agree before `start` and `place`, and from there on, where they do for `length` words. A 0
    stands before and after every document."""
    before = 0
    while ids[start - before - 1] == train[place - before - 1] != 0:
        before += 1
    while ids[start + length] == train[place + length] != 0:
        length += 1
    return before, length


def _passage(text: str, start: int, count: int) -> str:
    """`count` words of a text from word `start` on, with what stands between them."""
    spans = [match.span() for match in _WORD.finditer(text)][start : start + count]
    return " ".join(text[spans[0][0] : spans[-1][1]].split())


def _shortened(passage: str, limit: int = 240) -> str:
    """For a terminal, which would obey control characters."""
    passage = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", passage)
    return passage if len(passage) <= limit else f"{passage[:limit]} …"
