"""Turns the fact tables of this folder into documents and cloze questions.

Every (fact, pattern) pair belongs to one split, chosen by a hash, so held-out text states facts that were seen in
training with sentences that were not. All choices come from SHA-256 and `random.Random(text).random()`, which give the
same values on every machine and Python version.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

FOLDER = Path(__file__).parent
SIZES = {"train": 4500, "held_out": 450}
CLOZE_SIZE = 240
CLOZE_PER_ANSWER = 3
CHOICES = 8
BLANK = "____"

TOPIC_OPENERS = (
    "Here are some notes on {topic}.",
    "This page is about {topic}.",
    "Many questions in a quiz concern {topic}.",
    "What follows is a short lesson on {topic}.",
    "Everyone can learn something about {topic}.",
    "Our subject today is {topic}.",
    "A list helps to remember {topic}.",
)
PROFILE_OPENERS = (
    "The keyword of this page is {e}.",
    "The next entry in the book reads: {e}.",
    "The subject of this note is {e}.",
    "A reader asked about {e}.",
    "Here is what the file says under {e}.",
    "Let us open the chapter with the title {e}.",
)
COMPARISON_OPENERS = (
    "Two entries from the chapter on {topic} are compared here: {e} and {f}.",
    "This note sets {e} beside {f}.",
    "How do {e} and {f} differ?",
    "A table on {topic} has one column for {e} and one for {f}.",
)
MIXED_OPENERS = (
    "Some notes from a notebook follow.",
    "Here are answers to questions of last week.",
    "These lines come from a page of mixed facts.",
    "A few things are good to know.",
    "The quiz of the day had several parts.",
)
CLOSERS = (
    "That is all for this page.",
    "More can be found in any good book on the subject.",
    "These facts are easy to check.",
    "Those who know this have learned the essentials.",
    "The next page continues the list.",
    "It pays to remember this.",
)
ADDITIONS = ("in addition, ", "moreover, ", "besides, ", "note that ", "as is well known, ", "it is also true that ")
RESTATEMENTS = ("in other words, ", "put differently, ", "that is to say, ", "to say it again, ")
CONTRASTS = ("by contrast, ", "on the other hand, ", "meanwhile, ", "in the other column, ")
AGREEMENTS = ("likewise, ", "in the same way, ", "similarly, ")
SERIES = ("next, ", "then again, ", "another line says that ", "further down, ", "after that, ")

_ARTICLE = re.compile(r"a\(n\) (?=(\S+))")
_VOWEL_SOUND = re.compile(r"[aeiouAEIOU]|X[A-Z]")
_YOU_SOUND = re.compile(r"(uni|use|ukr|ugan|urug|eu)", re.IGNORECASE)


@dataclass(frozen=True)
class Fact:
    """One cell of a table, with the sentence patterns of each split."""

    table: str
    entity: str
    relation: str
    value: str
    patterns: dict[str, tuple[str, ...]]  # "train" and "held_out", disjoint

    @property
    def key(self) -> tuple[str, str]:
        return self.relation, self.entity


@dataclass(frozen=True)
class Document:
    """A document as its sentences and the (relation, entity, pattern) triples they state."""

    sentences: tuple[str, ...]
    pairs: tuple[tuple[str, str, str], ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


class Draw:
    """Seeded choices that use nothing of `random` but `Random.random`, whose sequence is guaranteed."""

    def __init__(self, seed: str):
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def between(self, low: int, high: int) -> int:
        """An integer in low ... high, both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, items):
        return items[int(self._random() * len(items))]

    def shuffled(self, items) -> list:
        return [item for _, _, item in sorted((self._random(), i, item) for i, item in enumerate(items))]


class Deck:
    """Deals its cards in a random order and starts over when all are dealt, so that every card comes equally often."""

    def __init__(self, cards, draw: Draw):
        self._cards, self._draw, self._left = list(cards), draw, []

    def deal(self):
        if not self._left:
            self._left = self._draw.shuffled(self._cards)
        return self._left.pop()


def _digest(*parts: str) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _lines(block: str) -> list[str]:
    return [line.strip() for line in block.splitlines() if line.strip()]


@cache
def tables(domain: str) -> dict:
    """The parsed fact file of a domain: table name → topic, relations (topic, patterns) and rows."""
    return yaml.safe_load((FOLDER / f"{domain}.yaml").read_text(encoding="utf-8"))["tables"]


@cache
def facts(domain: str) -> tuple[Fact, ...]:
    """All facts of a domain. A third of the patterns of each fact is held out, picked by hash."""
    found = []
    for name, table in tables(domain).items():
        patterns = {relation: _lines(entry["patterns"]) for relation, entry in table["relations"].items()}
        for row in _lines(table["rows"]):
            entity, *values = (cell.strip() for cell in row.split(" | "))
            for relation, value in zip(patterns, values, strict=True):
                if value == "-":
                    continue
                order = sorted(patterns[relation], key=lambda p, r=relation, e=entity: _digest(domain, r, e, p))
                cut = len(order) // 3
                split = {"held_out": tuple(order[:cut]), "train": tuple(order[cut:])}
                found.append(Fact(name, entity, relation, value, split))
    return tuple(found)


def clause(pattern: str, entity: str, value: str) -> str:
    """The pattern filled in, without capital and full stop."""

    def article(match: re.Match) -> str:
        word = match.group(1)
        return "an " if _VOWEL_SOUND.match(word) and not _YOU_SOUND.match(word) else "a "

    return _ARTICLE.sub(article, pattern.replace("{e}", entity).replace("{v}", value))


def sentence(text: str) -> str:
    """A clause with capital and full stop."""
    return text[0].upper() + text[1:] + "."


class Composer:
    """Writes the documents of one domain and split."""

    def __init__(self, domain: str, split: str):
        self.tables, self.split = tables(domain), split
        self.facts = facts(domain)
        self.draw = Draw(f"{domain} {split}")
        self.by_entity: dict[tuple[str, str], list[Fact]] = {}
        by_relation: dict[str, list[Fact]] = {}
        by_table: dict[str, dict[str, None]] = {}
        for fact in self.facts:
            self.by_entity.setdefault((fact.table, fact.entity), []).append(fact)
            by_relation.setdefault(fact.relation, []).append(fact)
            by_table.setdefault(fact.table, {})[fact.entity] = None
        self.leads = Deck(self.facts, self.draw)
        self.others = Deck(self.facts, self.draw)
        self.relation_decks = {name: Deck(group, self.draw) for name, group in by_relation.items()}
        self.entity_decks = {name: Deck(group, self.draw) for name, group in by_table.items()}
        self.uses: dict[tuple[str, str], int] = {}

    def write(self, count: int) -> list[Document]:
        """`count` documents; no document twice, and no sentence twice within one."""
        shapes = (self._profile, self._profile, self._comparison, self._list, self._mixture)
        found: dict[str, Document] = {}
        while len(found) < count:
            document = self.draw.pick(shapes)(self.leads.deal())
            if len(set(document.pairs)) == len(document.pairs):
                found.setdefault(document.text, document)
        return list(found.values())

    def _pattern(self, fact: Fact) -> str:
        """The patterns of a fact take turns."""
        turn = self.uses.get(fact.key, 0)
        self.uses[fact.key] = turn + 1
        patterns = fact.patterns[self.split]
        return patterns[turn % len(patterns)]

    def _document(self, opener: str | None, stated: list[tuple[str, Fact]]) -> Document:
        """Puts opener, clauses with their connectives, and now and then a closing sentence together."""
        sentences = [opener] if opener else []
        pairs = []
        for connective, fact in stated:
            pattern = self._pattern(fact)
            pairs.append((*fact.key, pattern))
            sentences.append(sentence(connective + clause(pattern, fact.entity, fact.value)))
        if self.draw.chance(0.2):
            sentences.append(self.draw.pick(CLOSERS))
        return Document(tuple(sentences), tuple(pairs))

    def _opener(self, openers: tuple[str, ...], **names: str) -> str | None:
        return self.draw.pick(openers).format(**names) if self.draw.chance(0.5) else None

    def _connective(self, connectives: tuple[str, ...], first: bool = False) -> str:
        return self.draw.pick(connectives) if not first and self.draw.chance(0.4) else ""

    def _profile(self, lead: Fact) -> Document:
        """What is known of one entity, each fact once or more; a short entry goes on with a second entity."""
        known = self.draw.shuffled(self.by_entity[lead.table, lead.entity])
        stated = []
        for fact in known:
            stated.append((self._connective(ADDITIONS, first=not stated), fact))
            if len(known) < 3 and len(fact.patterns[self.split]) > 1:
                stated.append((self.draw.pick(RESTATEMENTS), fact))
        while len(stated) < 3:
            stated.append((self._connective(SERIES), self.relation_decks[lead.relation].deal()))
        return self._document(self._opener(PROFILE_OPENERS, e=lead.entity), stated)

    def _comparison(self, lead: Fact) -> Document:
        """Two entities of a table, relation by relation."""
        other = self.entity_decks[lead.table].deal()
        while other == lead.entity:
            other = self.entity_decks[lead.table].deal()
        left = {fact.relation: fact for fact in self.by_entity[lead.table, lead.entity]}
        right = {fact.relation: fact for fact in self.by_entity[lead.table, other]}
        stated = []
        for relation in self.draw.shuffled(list(left | right))[:3]:
            if relation in left:
                stated.append((self._connective(ADDITIONS, first=not stated), left[relation]))
            if relation in right:
                both = relation in left
                agree = both and left[relation].value == right[relation].value
                words = (AGREEMENTS if agree else CONTRASTS) if both else ADDITIONS
                stated.append((self._connective(words, first=not stated), right[relation]))
        while len(stated) < 3:
            stated.append((self._connective(SERIES), self.relation_decks[lead.relation].deal()))
        topic = self.tables[lead.table]["topic"]
        return self._document(self._opener(COMPARISON_OPENERS, topic=topic, e=lead.entity, f=other), stated)

    def _list(self, lead: Fact) -> Document:
        """Several facts of one relation."""
        stated = [("", lead)]
        for _ in range(self.draw.between(2, 5)):
            stated.append((self._connective(SERIES), self.relation_decks[lead.relation].deal()))
        topic = self.tables[lead.table]["relations"][lead.relation]["topic"]
        return self._document(self._opener(TOPIC_OPENERS, topic=topic), stated)

    def _mixture(self, lead: Fact) -> Document:
        """Facts from anywhere in the domain."""
        stated = [("", lead)]
        for _ in range(self.draw.between(2, 5)):
            stated.append((self._connective(SERIES), self.others.deal()))
        return self._document(self._opener(MIXED_OPENERS), stated)


@cache
def compose(domain: str, split: str) -> tuple[Document, ...]:
    """The documents of a domain and split, with the facts and patterns that they use."""
    return tuple(Composer(domain, split).write(SIZES[split]))


def _question(fact: Fact, pattern: str) -> str | None:
    """The sentence with the value blanked out, or None where the blank would not stand for the value alone."""
    if "a(n) {v}" in pattern or fact.value.lower() in fact.entity.lower():
        return None
    text = sentence(clause(pattern, fact.entity, BLANK))
    full = sentence(clause(pattern, fact.entity, fact.value))
    return text if text.replace(BLANK, fact.value) == full else None


@dataclass(frozen=True)
class Question:
    """A cloze question and the fact and pattern it was made of."""

    text: str
    fact: Fact
    pattern: str
    choices: tuple[str, ...]


@cache
def questions(domain: str) -> tuple[Question, ...]:
    """Cloze questions from held-out pairs, taken from the relations in turn so that no relation dominates."""
    draw = Draw(f"{domain} cloze")
    values: dict[str, list[str]] = {}
    candidates: dict[str, list[tuple[Fact, str, str]]] = {}
    for fact in facts(domain):
        known = values.setdefault(fact.relation, [])
        if fact.value not in known:
            known.append(fact.value)
        for pattern in fact.patterns["held_out"]:
            text = _question(fact, pattern)
            if text is not None:
                candidates.setdefault(fact.relation, []).append((fact, pattern, text))
    queues = {relation: draw.shuffled(group) for relation, group in candidates.items() if len(values[relation]) > 3}
    asked: dict[tuple[str, str], int] = {}
    found: list[Question] = []
    while len(found) < CLOZE_SIZE and any(queues.values()):
        for relation, queue in queues.items():
            while queue and asked.get((relation, queue[-1][0].value), 0) >= CLOZE_PER_ANSWER:
                queue.pop()
            if not queue or len(found) == CLOZE_SIZE:
                continue
            fact, pattern, text = queue.pop()
            asked[relation, fact.value] = asked.get((relation, fact.value), 0) + 1
            wrong = draw.shuffled([value for value in values[relation] if value != fact.value])[: CHOICES - 1]
            found.append(Question(text, fact, pattern, tuple(draw.shuffled([fact.value, *wrong]))))
    return tuple(found)
