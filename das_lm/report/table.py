"""A table of text cells, as it is drawn on the console, in Markdown and in HTML."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import rich.table
from markupsafe import Markup
from markupsafe import escape as as_html
from rich.markup import escape

from das_lm.report.terms import defined
from das_lm.terminal import printable

#: Rows of cells, the first the header.
Rows = list[list[str]]
#: Characters that could be HTML, a link, a picture, code, or the end of a cell -> how they are shown in Markdown.
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {one: f"\\{one}" for one in "\\`[]|"})


class Strong(str):
    """A cell that stands out."""


class Links(str):
    """A cell of links to other files of the report: text -> its path from the page."""

    targets: dict[str, str]

    @classmethod
    def to(cls, targets: Mapping[str, str]) -> Links:
        cell = cls(", ".join(targets))
        cell.targets = dict(targets)
        return cell


@dataclass
class Table:
    """
    A table.

    Args:
        title: above it; `""` for none.
        rows: the first is the header.
        words: headers of the columns that hold no numbers, besides the first.
    """

    title: str
    rows: Sequence[Sequence[str]]
    words: Collection[str] = ()

    def console(self) -> rich.table.Table:
        """For the console."""
        table = rich.table.Table(title=escape(self.title), title_justify="left")
        for number, name in enumerate(self.rows[0]):
            is_words = number == 0 or name in self.words
            table.add_column(escape(name), justify="left" if is_words else "right", overflow="fold")
        for row in self.rows[1:]:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        """As a paragraph of Markdown, without its title."""
        header, *rows = ([as_markdown(cell) for cell in row] for row in self.rows)
        return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])

    def html(self) -> Markup:
        """As it stands in a page, without its title; it scrolls in a box of its own."""
        header, *rows = self.rows
        kinds = [' class="text"' if number and _is_text(rows, number) else "" for number in range(len(header))]
        head = "".join(f'<th scope="col"{kind}>{defined(cell)}</th>' for kind, cell in zip(kinds, header, strict=True))
        body = "\n".join(f"<tr>{''.join(map(_cell, range(len(row)), row, kinds))}</tr>" for row in rows)
        return Markup(
            f'<div class="scroll" tabindex="0"><table>\n{f"<thead><tr>{head}</tr></thead>" if any(header) else ""}\n'
            f"<tbody>\n{body}\n</tbody></table></div>"
        )


def _is_text(rows: Sequence[Sequence[str]], column: int) -> bool:
    """Whether a column holds words, no numbers."""
    return not any(re.match(r"[+−-]?\d|–|about ", row[column]) for row in rows)


def _cell(column: int, cell: str, kind: str) -> str:
    if column == 0:
        return f'<th scope="row">{defined(cell)}</th>'
    if isinstance(cell, Links):
        links = (f'<a href="{as_html(quote(path))}">{as_html(text)}</a>' for text, path in cell.targets.items())
        return f'<td class="links">{", ".join(links)}</td>'
    if not kind and len(cell) > 60:
        kind = ' class="words"'
    if isinstance(cell, Strong):
        kind = ' class="strong text"' if kind else ' class="strong"'
    cell = re.sub(r"(?<![\w.-])-(?=\d)", "−", cell)
    unbroken = cell.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    return f"<td{kind}>{as_html(unbroken)}</td>"


def markdown_tables(tables: Mapping[str, Sequence[Sequence[str]]]) -> list[str]:
    """Title -> rows, the first the header, as paragraphs of Markdown."""
    return [
        part for title, rows in tables.items() for part in (f"## {as_markdown(title)}", Table("", rows).markdown())
    ]


def as_markdown(text: str) -> str:
    """Text of one line in which no name is markup."""
    return printable(" ".join(text.split())).translate(_ESCAPES)
