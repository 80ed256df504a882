"""Text for terminals, which obey control characters, and for files that must not hold any."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import rich.console
from rich.segment import Segment

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """Text with a `?` for every control character but line ends and tabs, and for every half of a surrogate pair."""
    return _CONTROL.sub("?", text)


def is_watched() -> bool:
    """Whether somebody looks at progress bars: in a notebook, or on a terminal (stderr, or `TTY_COMPATIBLE=1`)."""
    console = rich.console.Console(stderr=True)
    return console.is_terminal or console.is_jupyter


class Console(rich.console.Console):
    """A console to which no name from a file and no text of a user gives orders."""

    def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
        """See rich; the text of every segment is [`printable`]."""
        for segment in super().render(*args, **kwargs):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
