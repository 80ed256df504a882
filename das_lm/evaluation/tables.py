"""Tables of text cells, for the console and for files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from rich.markup import escape
from rich.table import Table


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
        lines = [header, ["---"] * len(header), *rows]
        parts += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return parts
