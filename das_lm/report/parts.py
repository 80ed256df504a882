"""What a page is made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from das_lm.report.drawing import Drawing
from das_lm.report.table import Rows


@dataclass
class Headline:
    """
    A large figure at the top.

    Args:
        label: its name.
        about: what it is taken of.
        value: the figure.
        beside: its interval, and further lines below it.
        mood: `"better"`, `"worse"` or `""`.
    """

    label: str
    about: str
    value: str
    beside: list[str] = field(default_factory=list)
    mood: str = ""


@dataclass
class Part:
    """
    A part of a page; what is empty is not shown.

    Args:
        title: its heading.
        words: paragraphs.
        findings: a list.
        tables: title -> rows.
        drawings: figures, each with its tables folded.
        folded: tables that open when they are asked for.
        text: as it was written, folded.
    """

    title: str
    words: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    tables: dict[str, Rows] = field(default_factory=dict)
    drawings: list[Drawing] = field(default_factory=list)
    folded: dict[str, Rows] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any((self.words, self.findings, self.tables, self.drawings, self.folded, self.text))


@dataclass
class Page:
    """
    A page.

    Args:
        lead: what was done.
        notes: what must not be overlooked.
        headlines: the large figures, and what is said below them.
        verdict: a sentence against plain training.
        parts: the rest.
    """

    lead: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    headlines: list[Headline] = field(default_factory=list)
    verdict: str = ""
    parts: list[Part] = field(default_factory=list)

    @property
    def drawings(self) -> list[Drawing]:
        """Of all parts."""
        return [drawing for part in self.parts for drawing in part.drawings]


def listing(names: Iterable[str]) -> str:
    """`a, b and c`."""
    *start, last = names
    return f"{', '.join(start)} and {last}" if start else last


def sentence(text: str) -> str:
    """A description as a sentence before others."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}. " if text else ""
