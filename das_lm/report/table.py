"""Tables of text cells, for the console and for files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from das_lm.terminal import printable

#: Characters that could be HTML, a link, a picture, code, or the end of a cell -> how they are shown in Markdown.
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {one: f"\\{one}" for one in "\\`[]|"})


def console_table(title: str, rows: Sequence[Sequence[str]], words: Collection[str] = ()) -> Table:
    """
    For the console.

    Args:
        title: above it.
        rows: the first is the header.
        words: headers of the columns that hold no numbers, besides the first.
    """
    table = Table(title=escape(title), title_justify="left")
    for number, name in enumerate(rows[0]):
        table.add_column(escape(name), justify="left" if number == 0 or name in words else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    return table


def markdown_tables(tables: Mapping[str, Sequence[Sequence[str]]]) -> list[str]:
    """Title -> rows, the first the header, as paragraphs of Markdown."""
    parts = []
    for title, (header, *rows) in tables.items():
        lines = [list(map(as_markdown, header)), ["---"] * len(header), *(map(as_markdown, row) for row in rows)]
        parts += [f"## {as_markdown(title)}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return parts


def as_markdown(text: str) -> str:
    """Text of one line in which no name is markup."""
    return printable(" ".join(text.split())).translate(_ESCAPES)
